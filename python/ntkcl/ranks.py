"""Processes that train one run together, as `torchrun` starts them.

Rank 0 leads: its configuration counts, it alone writes the run folder, shows progress and calls
callbacks. The others follow: for each run that it begins they are told what to train and train it
with it. What they need goes over the process group, so the run folder may be where only rank 0
sees it; images and weights must be there for all.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
import torch.distributed as c10d

from ntkcl.config import Config, resolve, to_toml
from ntkcl.files import safetensors_bytes


@dataclass(frozen=True)
class Order:
    """A run that rank 0 begins or goes on with."""

    config: Config
    must_match: Mapping[str, Any]  # what of the environment must be the same on every rank
    checkpoint: dict[str, Any] | None = None  # "progress" and "tensors"


@dataclass
class Ranks:
    """This process among those that train together; alone by default."""

    rank: int = 0
    size: int = 1
    group: str | None = None  # torch.distributed's name of them all
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _training: bool = False

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @contextmanager
    def training(self, order: Order) -> Iterator[None]:
        """Has the others train the same while it is open. What ends it ends them as well."""
        self._send(
            {
                "config": to_toml(order.config),
                "must_match": dict(order.must_match),
                "progress": order.checkpoint["progress"] if order.checkpoint else None,
            },
            order.checkpoint["tensors"] if order.checkpoint else {},
        )
        self._training = True
        yield
        self._training = False

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Lets the others go with an error that would not end them as well."""
        try:
            yield
        except BaseException as error:
            if not self._training:
                with contextlib.suppress(ConnectionError):
                    self._send({"error": f"{type(error).__name__}: {error}"})
            raise

    def dismiss(self, outcome: Mapping[str, Any]) -> None:
        """Lets the others go with the outcome."""
        self._send({"outcome": outcome})

    def follow(self, train: Callable[[Order], object]) -> Any:
        """Trains what rank 0 begins, until it is done; its outcome.

        Raises:
          ConnectionError: rank 0 has failed.
        """
        while True:
            message, tensors = self._receive()
            if "error" in message:
                raise ConnectionError(f"[ranks] rank 0 has ended: {message['error']}")
            if "outcome" in message:
                return message["outcome"]
            checkpoint = None
            if message["progress"] is not None:
                checkpoint = {"progress": message["progress"], "tensors": tensors}
            config = resolve(tomllib.loads(message["config"]))
            train(Order(config, message["must_match"], checkpoint))

    def _send(
        self, message: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        if self.size > 1:
            self._broadcast(json.dumps(message).encode())
            self._broadcast(safetensors_bytes(tensors, {}) if tensors else b"")

    def _receive(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        message = json.loads(self._broadcast())
        tensors = self._broadcast()
        return message, safetensors.torch.load(tensors) if tensors else {}

    def _broadcast(self, content: bytes = b"") -> bytes:
        """What rank 0 gives."""
        try:
            length = torch.tensor([len(content)], device=self.device)
            c10d.broadcast(length, 0)
            data = torch.empty(int(length), dtype=torch.uint8, device=self.device)
            if not len(data):
                return b""
            if self.leads:
                data.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            c10d.broadcast(data, 0)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ConnectionError(
                f"[ranks] rank {self.rank} of {self.size} has lost the others: {reason}"
            ) from None
        return data.cpu().numpy().tobytes()


def join(device: str) -> Ranks:
    """The ranks of this process: those of torch.distributed's default group, which is made where
    `torchrun` has started the process.

    Args:
      device: as configured. On GPUs each rank takes the one of its local number.
    """
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if not c10d.is_available() or not (c10d.is_initialized() or started_by_torchrun()):
        return Ranks()
    if on_gpu and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not c10d.is_initialized():
        c10d.init_process_group("nccl" if on_gpu else "gloo")
        atexit.register(_leave)
    world = c10d.group.WORLD
    if world is None or world.size() == 1:
        return Ranks()
    return Ranks(
        world.rank(),
        world.size(),
        world.group_name,
        torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"),
    )


def leads() -> bool:
    """Whether this process is rank 0, or alone."""
    return not (c10d.is_available() and c10d.is_initialized()) or c10d.get_rank() == 0


def started_by_torchrun() -> bool:
    """Whether this process is one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _leave() -> None:
    if c10d.is_initialized():
        c10d.destroy_process_group()
