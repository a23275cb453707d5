"""Hostile changes of files: of any bytes, and of formats whose checksums and lengths have to be
right again before a reader looks at the rest. Every change is drawn from the `Random` given."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import safetensors.torch
import torch

Mutate = Callable[[Random, Sequence[bytes]], bytes]

_INTEGERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 1 << 20, (1 << 31) - 1, 1 << 31]
_INTEGERS += [(1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
NAMES = ["", ".", "..", "../../up", "/absolute", "a/../../up", "\0", "nul\0byte", "x" * 300]
NAMES += ["x/" * 2000, "C:\\drive", "..\\up", "\\\\host\\share", "line\nbreak", "\ud800", "é", "~"]
_DEEP = 100_000  # levels
_DEEP_MARK, _TWICE_MARK = "mark of a deep value", "mark of a key that stands twice"


# ---- any bytes -----------------------------------------------------------------------------------


def of_bytes(draws: Random, seeds: Sequence[bytes]) -> bytes:
    """A few changes of one of the seeds."""
    data = bytearray(draws.choice(seeds))
    for _ in range(1 + int(draws.expovariate(0.7))):
        draws.choice(_CHANGES)(draws, data, seeds)
    return bytes(data)


def _truncate(draws: Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[draws.randrange(len(data) + 1) :]


def _flip(draws: Random, data: bytearray, _: Sequence[bytes]) -> None:
    for _i in range(draws.randint(1, 8)):
        if data:
            data[_place(draws, data)] ^= 1 << draws.randrange(8)


def _integer(draws: Random, data: bytearray, _: Sequence[bytes]) -> None:
    width, order = draws.choice((1, 2, 4, 8)), draws.choice(("little", "big"))
    value = draws.choice(_INTEGERS) % (1 << 8 * width)
    at = _place(draws, data)
    data[at : at + width] = value.to_bytes(width, order)


def _noise(draws: Random, data: bytearray, _: Sequence[bytes]) -> None:
    first, last = _range(draws, data, 64)
    data[first:last] = draws.randbytes(last - first)


def _run(draws: Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = _place(draws, data)
    data[at:at] = bytes([draws.choice((0, 0x20, 0x41, 0xFF))]) * draws.choice((1, 16, 300, 70_000))


def _remove(draws: Random, data: bytearray, _: Sequence[bytes]) -> None:
    first, last = _range(draws, data, 256)
    del data[first:last]


def _repeat(draws: Random, data: bytearray, _: Sequence[bytes]) -> None:
    first, last = _range(draws, data, 1024)
    at = _place(draws, data)
    data[at:at] = data[first:last] * draws.choice((1, 2, 20))


def _splice(draws: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    other = draws.choice(seeds)
    first, last = _range(draws, other, 4096)
    at = _place(draws, data)
    data[at : at + draws.choice((0, last - first))] = other[first:last]


_CHANGES = (_truncate, _flip, _integer, _noise, _run, _remove, _repeat, _splice)


def _place(draws: Random, data: bytes | bytearray) -> int:
    """Half of them near the beginning or the end, where headers and directories stand."""
    near = min(len(data), 64)
    kind = draws.randrange(4)
    if kind == 0:
        return draws.randrange(near + 1) if near < len(data) else draws.randrange(max(near, 1))
    if kind == 1:
        return max(len(data) - 1 - draws.randrange(2 * near + 1), 0)
    return draws.randrange(max(len(data), 1))


def _range(draws: Random, data: bytes | bytearray, most: int) -> tuple[int, int]:
    first = _place(draws, data)
    return first, min(first + draws.randint(1, most), len(data))


# ---- JSON ----------------------------------------------------------------------------------------


def of_json(draws: Random, seeds: Sequence[bytes]) -> bytes:
    """Some values, keys or lengths of a JSON document changed; now and then its text as well."""
    text = json_text(draws, json.loads(draws.choice(seeds)))
    return of_bytes(draws, [text]) if draws.random() < 0.1 else text


def json_text(draws: Random, value: Any) -> bytes:
    """The document after some changes. Keys that stand twice and deep nestings are put into the
    text, as Python's values cannot or should not hold them."""
    for _ in range(1 + int(draws.expovariate(1))):
        value = _changed(draws, value)
    text = json.dumps(value)
    text = text.replace(f'"{_DEEP_MARK}"', "[" * _DEEP + "]" * draws.choice((0, _DEEP)))
    return text.replace(_TWICE_MARK, "format").encode("utf-8", "surrogatepass")


def _changed(draws: Random, value: Any) -> Any:
    inner = isinstance(value, dict | list) and value and draws.random() < 0.85
    if not inner:
        return _hostile(draws, value)
    if isinstance(value, list):
        at = draws.randrange(len(value))
        kind = draws.randrange(6)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return value + value[at:] * draws.choice((1, 2, 500))
        return [*value[:at], _changed(draws, value[at]), *value[at + 1 :]]
    key = draws.choice(list(value))
    kind = draws.randrange(8)
    rest = {name: item for name, item in value.items() if name != key}
    if kind == 0:
        return rest
    if kind == 1:
        return rest | {draws.choice([*NAMES, *value, _TWICE_MARK]): value[key]}
    if kind == 2:
        return value | {draws.choice(NAMES): draws.choice(list(value.values()))}
    return value | {key: _changed(draws, value[key])}


def _hostile(draws: Random, value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and draws.random() < 0.3:
        return value + draws.choice((-1, 1, 1 << 31, -(1 << 63)))
    numbers = [0, -1, 1, 0.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf")]
    numbers += [draws.choice(_INTEGERS), -draws.choice(_INTEGERS), 10**400]
    others = [None, True, False, [], {}, [[]], {"a": {}}, [value], {"value": value}, str(value)]
    huge = ["x" * 100_000, _DEEP_MARK, [0] * 5000]
    return draws.choice(draws.choice((numbers, others, NAMES, huge)))


# ---- TOML ----------------------------------------------------------------------------------------


def of_toml(draws: Random, seeds: Sequence[bytes]) -> bytes:
    """Lines with other values, missing, twice or in another order; now and then other bytes."""
    lines = draws.choice(seeds).decode().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    for _ in range(1 + int(draws.expovariate(1))):
        at = draws.randrange(len(lines))
        kind = draws.randrange(8)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(draws.randrange(len(lines)), lines[at])
        else:
            lines[at] = f"{lines[at].partition('=')[0]}= {_toml_value(draws)}"
        lines = lines or [""]
    text = "\n".join(lines).encode("utf-8", "surrogatepass")
    return of_bytes(draws, [text]) if draws.random() < 0.1 else text


def _toml_value(draws: Random) -> str:
    words = ["nan", "inf", "-inf", "true", "''", "[]", "{}", "[[1]]", "{a = 1}", "1e999", "0.5"]
    words += ["1979-05-27", "-1", "0", "9" * 5000, str(1 << 63), str(1 << 64), "0x7fffffffffffffff"]
    words += ["[" * 5000 + "]" * 5000, "[nan, 1]", "['a', 1]", "[" + "0," * 5000 + "]"]
    names = [json.dumps(name) for name in NAMES]
    return draws.choice(draws.choice((words, names)))


# ---- safetensors ---------------------------------------------------------------------------------


def of_safetensors(draws: Random, seeds: Sequence[bytes]) -> bytes:
    """Tensors of other values, shapes or types, missing or unknown ones; or another header; or
    other bytes."""
    data = draws.choice(seeds)
    kind = draws.randrange(10)
    if kind == 0:
        return of_bytes(draws, seeds)
    if kind == 1:
        length = int.from_bytes(data[:8], "little")
        header = json_text(draws, json.loads(data[8 : 8 + length]))
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    tensors = dict(sorted(safetensors.torch.load(data).items()))  # which come in any order
    for _ in range(1 + int(draws.expovariate(1))):
        _change_tensors(draws, tensors)
    return safetensors.torch.save(tensors)


def _change_tensors(draws: Random, tensors: dict[str, torch.Tensor]) -> None:
    if not tensors:
        return
    name = draws.choice(list(tensors))
    kind = draws.randrange(12)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        unknown = [*NAMES[8:9], "x", f"{name}.x", *tensors]
        tensors[draws.choice(unknown)] = tensors[name].clone()
    elif kind in (2, 3):
        tensors[name] = _other_shape(draws, tensors[name])
    elif kind == 4:
        types = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
        types += (torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
        tensors[name] = tensors[name].to(draws.choice(types))
    else:
        tensors[name] = _other_values(draws, tensors[name])


def _other_shape(draws: Random, tensor: torch.Tensor) -> torch.Tensor:
    sizes = list(tensor.shape)
    kind = draws.randrange(5)
    if kind == 0:
        return tensor.flatten().clone()
    if kind == 1:
        return tensor.new_zeros(())
    if kind == 2 or not sizes:
        return tensor.unsqueeze(0).clone()
    if kind == 3:
        return tensor.transpose(0, -1).contiguous()
    at = draws.randrange(len(sizes))
    sizes[at] = draws.choice((0, 1, sizes[at] + 1, max(sizes[at] - 1, 0), 2 * sizes[at]))
    return tensor.new_ones(sizes)


def _other_values(draws: Random, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() == 0 or tensor.is_complex():
        return tensor
    flat = tensor.flatten().clone()
    if tensor.is_floating_point():
        values = [float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e30, -1e30, 1e-40]
    elif tensor.dtype == torch.bool:
        values = [0, 1]
    else:
        largest = torch.iinfo(tensor.dtype).max
        values = [0, 1, -1, 2, 100, 1 << 20, largest, -largest - 1]
        values = [value for value in values if value >= torch.iinfo(tensor.dtype).min]
        values = [value for value in values if value <= largest]
    whole = draws.random() < 0.3
    flat[slice(None) if whole else draws.randrange(len(flat))] = draws.choice(values)
    return flat.reshape(tensor.shape)


# ---- zip -----------------------------------------------------------------------------------------


def of_zip(draws: Random, seeds: Sequence[bytes]) -> bytes:
    """Entries with other names, sizes, methods and contents, written anew; or other bytes."""
    data = draws.choice(seeds)
    if draws.random() < 0.4:
        return of_bytes(draws, seeds)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [_Entry(info.filename, archive.read(info)) for info in archive.infolist()]
    for _ in range(1 + int(draws.expovariate(1))):
        if entries:
            _change_entry(draws, entries)
    return _zip_bytes(draws, entries)


class _Entry:
    """What an archive says of a file, true or not."""

    def __init__(self, name: str, content: bytes, ratio: int = 0) -> None:
        self.name, self.packed = name, zlib.compress(content, wbits=-15)
        self.method, self.flags, self.extra, self.offset = 8, 0, b"", None
        self.size, self.packed_size, self.crc = len(content), len(self.packed), zlib.crc32(content)


def _change_entry(draws: Random, entries: list[_Entry]) -> None:
    entry = draws.choice(entries)
    integer = draws.choice(_INTEGERS) % (1 << 32)
    kind = draws.randrange(12)
    if kind == 0:
        prefix = draws.choice(("", "train/", "train/ant/"))
        entry.name = prefix + draws.choice(NAMES)
    elif kind == 1:
        entries.append(_Entry(draws.choice(entries).name, b"again"))
    elif kind == 2:
        entries.remove(entry)
    elif kind == 3:
        entry.size = integer
    elif kind == 4:
        entry.packed_size = integer
    elif kind == 5:
        entry.offset = integer
    elif kind == 6:
        entry.method = draws.choice((0, 1, 8, 9, 12, 14, 95, 99, 0xFFFF))
    elif kind == 7:
        entry.flags = draws.choice((1, 8, 0x20, 0x800, 0xFFFF))
    elif kind == 8:  # zip64 sizes
        entry.extra = struct.pack("<HHQQ", 1, 16, *draws.choices(_INTEGERS, k=2))
        entry.size = entry.packed_size = 0xFFFFFFFF
    elif kind == 9:  # a bomb, of true size or not
        bomb = _Entry(entry.name, bytes(draws.choice((1 << 16, 1 << 22))))
        bomb.size = draws.choice((bomb.size, 100, 1 << 31))
        entries[entries.index(entry)] = bomb
    elif kind == 10:
        entry.extra = draws.randbytes(draws.choice((1, 4, 40)))
    else:
        entry.packed = of_bytes(draws, [entry.packed])


def _zip_bytes(draws: Random, entries: Sequence[_Entry]) -> bytes:
    body, directory = bytearray(), bytearray()
    for e in entries:
        name = e.name.encode("utf-8", "surrogatepass")[:65535]
        shared = struct.pack(
            "<HHHHHIII", 20, e.flags & 0xFFFF, e.method, 0, 0, e.crc, e.packed_size, e.size
        )
        sizes = struct.pack("<HH", len(name), len(e.extra))
        offset = len(body) if e.offset is None else e.offset
        directory += b"PK\1\2" + struct.pack("<H", 20) + shared + sizes
        directory += struct.pack("<HHHII", 0, 0, 0, 0, offset) + name + e.extra
        body += b"PK\3\4" + shared + sizes + name + e.extra + e.packed
    count = draws.choice((len(entries), len(entries), len(entries), 0, 0xFFFF))
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), len(body), 0)
    return bytes(body + directory) + b"PK\5\6" + end


# ---- PNG -----------------------------------------------------------------------------------------


def of_png(draws: Random, seeds: Sequence[bytes]) -> bytes:
    """Chunks changed, repeated, moved or left out, with true lengths and checksums."""
    data, chunks, at = draws.choice(seeds), [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(1 + int(draws.expovariate(1))):
        place = draws.randrange(len(chunks))
        name, content = chunks[place]
        kind = draws.randrange(6)
        if kind == 0 and len(chunks) > 1:
            del chunks[place]
        elif kind == 1:
            chunks.insert(draws.randrange(len(chunks) + 1), (name, content))
        elif kind == 2 and name == b"IDAT":
            with contextlib.suppress(zlib.error):  # changed before
                pixels = zlib.decompressobj().decompress(content, 1 << 20)
                chunks[place] = (name, zlib.compress(of_bytes(draws, [pixels])))
        else:
            chunks[place] = (name, of_bytes(draws, [content]))
    return data[:8] + b"".join(
        struct.pack(">I", len(content)) + name + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )  # fmt: skip
