"""Own methods: a class with a few hooks, over the C++ loop, its data and its adapters."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ntkcl import _C
from ntkcl.names import shown


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
    """A method over the features of the backbone, with adapters that the core trains.

    Autograd goes through `loss` into the adapters. Tensors that are attributes of the object are
    its state, which checkpoints and models hold: make all of them in `__init__`, of any size.

    Attributes:
      peft: "adapter": one beside each MLP is trained (Chen et al., AdaptFormer, 2022); "none".
      rank, scale: of the adapters.
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
        """What is trained beside the adapters."""
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


def registered() -> list[str]:
    """Names of own methods."""
    return list(_registered)


def core_method(name: str) -> str | Method:
    """What the core takes for a method: a name that it knows, or a new object."""
    make = _registered.get(name)
    if make is None:
        return name
    method = make()
    if not isinstance(method, Method):
        raise TypeError(f"[register] expected '{name}' to make an ntkcl.Method, got {method!r}")
    return method
