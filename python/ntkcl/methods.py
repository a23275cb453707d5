"""Own methods: a class with a few hooks, over the C++ loop, its data and its PEFT modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ntkcl import _C


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


def register(name: str, make: Callable[[], Method]) -> None:
    """Makes a method known by name, for `train(method=name)`, `resume` and `load`.

    Args:
      name: not that of a method there is.
      make: the class, or a function that makes a new object.

    Raises:
      ValueError: the name is that of a built-in method.
    """
    if name in _C.describe_options()["methods"]:
        raise ValueError(f"[register] expected a new name, got the built-in '{name}'")
    _registered[name] = make


def register_object(method: Method) -> str:
    """Makes an object's copies known under the name of its class."""
    name = type(method).__name__
    register(name, lambda: copy.deepcopy(method))
    return name


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
