"""Own methods: a class with a few hooks, over the C++ loop, its data and its PEFT modules."""

from __future__ import annotations

import copy
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ntkcl import _C
from ntkcl.names import did_you_mean, shown


@dataclass(frozen=True)
class Task:
    """The task that is learned. Its classes are numbered n_old .. n_old + n_new - 1."""

    index: int  # from 0
    count: int  # tasks in all
    n_old: int  # classes of earlier tasks
    n_new: int
    seed: int  # of the run and this task

    @property
    def n_seen(self) -> int:
        return self.n_old + self.n_new

    def generator(self) -> torch.Generator:
        """For random draws: the same whenever the task is begun."""
        return torch.Generator().manual_seed(self.seed)


class Method:
    """A method over the features of the backbone, with modules that the core trains.

    Autograd goes through `loss` into the modules. Tensors that are attributes of the object are
    its state, which checkpoints and models hold: make all of them in `__init__`, of any size.

    Attributes:
      peft: what is trained in each block: "adapter", one beside the MLP (Chen et al., AdaptFormer,
        2022); "lora", one for every matrix (Hu et al., LoRA, 2022); "prompts", mixed from the
        tokens, behind gates (NTK-CL); "none".
      rank: bottleneck of the adapters or rank of the LoRAs; number of a block's prompts.
      scale: of the adapters' residual, or of the prompts that a block hands on.
      width: of the features; set before the first hook is called.
    """

    peft = "adapter"
    rank = 64
    scale = 0.1
    width: int

    def trains(self, task: Task) -> bool:
        """Whether this task has training steps."""
        return True

    def before_task(self, task: Task) -> None:
        """New heads and the like."""

    def parameters(self) -> Iterable[torch.Tensor]:
        """What is trained beside the modules."""
        return []

    def loss(self, features: torch.Tensor, labels: torch.Tensor, task: Task) -> torch.Tensor:
        """The loss of a batch: one number. features (B, D), labels (B) class numbers."""
        raise NotImplementedError(f"[method] '{type(self).__name__}' trains but has no loss")

    def after_task(self, features: torch.Tensor, labels: torch.Tensor, task: Task) -> None:
        """Statistics: features (n, D) and labels (n) of the task's images, after training."""

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Scores (B, n_seen) of features (B, D); the largest is the prediction."""
        raise NotImplementedError(f"[method] '{type(self).__name__}' has no scores")


_registered: dict[str, Callable[[], Method]] = {}
_imported: list[str] = []  # modules that were asked for


def register(name: str, make: Callable[[], Method]) -> None:
    """Makes a method known by name, for `train(method=name)`, `resume` and `load`.

    Args:
      name: not that of a method there is.
      make: the class, or a function that makes a new object.

    Raises:
      ValueError: the name is that of a built-in method, or has other characters than letters,
        digits, - and _.
      TypeError: `make` is an object, or a class of another kind.
    """
    if not re.fullmatch(r"\w[\w-]*", name):
        raise ValueError(f"[register] expected a name of letters, digits, - and _, got '{name}'")
    makes = issubclass(make, Method) if isinstance(make, type) else callable(make)
    if not makes:
        raise TypeError(
            "[register] expected a class derived from ntkcl.Method, or a function that makes an "
            f"object of one, got {shown(make)}"
        )
    if name in _C.describe_options()["methods"]:
        raise ValueError(f"[register] expected a new name, got the built-in '{name}'")
    _registered[name] = make


def register_own(method: Method | type[Method]) -> str:
    """Makes a class, or an object's copies, known; the name is that of the class, but where a class
    is registered already."""
    if isinstance(method, Method):
        name = type(method).__name__
        register(name, lambda: copy.deepcopy(method))
        return name
    for name, make in _registered.items():
        if make is method:
            return name
    register(method.__name__, method)
    return method.__name__


def list_methods() -> list[str]:
    """Names of the methods, own ones last."""
    return [*_C.describe_options()["methods"], *_registered]


def check_method(name: str) -> None:
    """ValueError where a method is neither built in nor registered."""
    known = list_methods()
    if name not in known:
        raise ValueError(
            f"[config] 'method': expected one of: {', '.join(known)}, got '{name}' (register an "
            f"own one first: `ntkcl.register('{name}', <class>)`, for a command in a module that "
            f"it names: `--import MODULE`){did_you_mean(name, known)}"
        )


def import_modules(names: Sequence[str]) -> None:
    """Imports modules that register methods, from the current folder as well, and remembers them
    for the commands that go on."""
    if names and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # `python -m ntkcl` has it there already
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                error.add_note(f"in the module '{name}'")
                raise
            raise ValueError(
                f"[import] expected a module here or installed, got '{name}': {error}"
            ) from None
    _imported.extend(name for name in names if name not in _imported)


def import_words() -> list[str]:
    """The options by which another process imports the same modules."""
    return [word for name in _imported for word in ("--import", name)]


def way_on(run: object, method: str) -> str:
    """What goes on with a run of a method that is known here."""
    if method not in _registered:
        return f"`ntkcl resume {run}`"
    if _imported:
        return f"`ntkcl resume {run} {' '.join(import_words())}`"
    return f"`ntkcl.resume('{run}')` where '{method}' is registered"


def core_method(name: str) -> str | Method:
    """What the core takes for a method: a name that it knows, or a new object."""
    check_method(name)
    make = _registered.get(name)
    if make is None:
        return name
    method = make()
    if not isinstance(method, Method):
        raise TypeError(f"[register] expected '{name}' to make an ntkcl.Method, got {method!r}")
    return method
