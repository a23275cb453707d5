"""Reads pickles that hold plain data, without running any code they name.

Published data sets come as pickles, and `pickle.load` calls whatever a file asks for. Here an own
small interpreter knows the opcodes that build numbers, strings, lists, tuples and dicts, and numpy
arrays of bytes (pickle protocols 0 to 4); anything else is a ValueError.
"""

import pickletools
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

# The callables that numpy's own pickles name. They are never imported or called from the file.
_RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_NDARRAY = "numpy ndarray"
_DTYPE = "numpy dtype"
_ENCODE = "_codecs encode"
_KNOWN_NAMES = frozenset({*_RECONSTRUCT, _NDARRAY, _DTYPE, _ENCODE})

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
_INTEGERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4")
_FLOATS = ("FLOAT", "BINFLOAT")
_STRINGS = (
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
)
_SCALARS = frozenset({*_INTEGERS, *_FLOATS, *_STRINGS})
_MARK = object()


class _Name(str):
    """A callable's name, which no string of the file can be taken for."""


class _Dtype(str):
    """The name of an array's element type."""


class _Array:
    """An array before its content is known; the memo may refer to it already."""

    def __init__(self) -> None:
        self.value: np.ndarray[Any, np.dtype[np.uint8]] | None = None

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or dtype not in ("u1", "|u1") or fortran:
            raise ValueError(f"expected an array of uint8 in C order, got {dtype!r}")
        content = data.encode("latin-1") if isinstance(data, str) else bytes(data)
        if any(not isinstance(side, int) or side < 0 for side in shape):
            raise ValueError(f"expected the shape of an array, got {shape!r}")
        self.value = np.frombuffer(content, np.uint8).reshape(shape)


class _Reader:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def read(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            self._step(opcode.name, argument)
        if len(self.stack) != 1:
            raise ValueError(f"expected one object, got {len(self.stack)}")
        return _finished(self.stack[0], {})

    def _step(self, name: str, argument: Any) -> None:
        if name in _SCALARS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(_known(argument))
        elif name not in ("PROTO", "FRAME", "STOP"):
            self._combine(name)

    def _combine(self, name: str) -> None:
        """The opcodes that take from the stack."""
        stack = self.stack
        match name:
            case "MARK":
                stack.append(_MARK)
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = self._since_mark()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                items = self._since_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "LIST":
                stack.append(self._since_mark())
            case "DICT":
                items = self._since_mark()
                stack.append(dict(zip(items[::2], items[1::2], strict=True)))
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_known(f"{module} {attribute}"))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_reduced(function, arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _Array):
                    stack[-1].build(state)
                elif not isinstance(stack[-1], _Dtype):
                    raise ValueError("expected plain data, got an object with a state")
            case _:
                raise ValueError(f"expected plain data, got the opcode {name}")

    def _since_mark(self) -> list[Any]:
        position = len(self.stack) - 1
        while self.stack[position] is not _MARK:
            position -= 1
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items


def _known(name: str) -> _Name:
    if name not in _KNOWN_NAMES:
        raise ValueError(f"expected plain data, got a call of '{name.replace(' ', '.')}'")
    return _Name(name)


def _reduced(function: Any, arguments: Any) -> Any:
    """What the known callables would give."""
    if isinstance(function, _Name) and function in _RECONSTRUCT and arguments[0] == _NDARRAY:
        return _Array()
    if isinstance(function, _Name) and function == _DTYPE:
        return _Dtype(arguments[0])
    if isinstance(function, _Name) and function == _ENCODE and arguments[1] == "latin1":
        return arguments[0].encode("latin-1")
    raise ValueError("expected plain data, got a call")


def _finished(value: Any, done: dict[int, Any]) -> Any:
    """The value with its arrays in place; what is shared stays shared (`done` goes by identity)."""
    if id(value) in done:
        return done[id(value)]
    result = value
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("expected an array with content, got none")
        result = value.value
    elif isinstance(value, dict):
        result = {_finished(key, done): _finished(item, done) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        result = type(value)(_finished(item, done) for item in value)
    elif isinstance(value, _Name | _Dtype):
        raise ValueError(f"expected plain data, got '{value}'")
    done[id(value)] = result
    return result


def loads(data: bytes) -> Any:
    """The object that a pickle of plain data holds.

    Numbers, strings, bytes, None, lists, tuples, dicts and uint8 arrays. Strings of Python 2 come
    as str (Latin-1). ValueError for everything else, and for what is no pickle; nothing that the
    file names is imported or called.
    """
    try:
        return _Reader().read(data)
    except ValueError as error:
        raise ValueError(f"[plain_pickle] {error!s:.200}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, struct.error) as error:
        raise ValueError(
            f"[plain_pickle] expected a pickle, got something else: {error!s:.200}"
        ) from None
    except RecursionError:
        raise ValueError("[plain_pickle] expected plain data, got a deep nesting") from None
