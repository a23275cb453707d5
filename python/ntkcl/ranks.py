"""Processes that train one run together, as `torchrun` starts them.

Rank 0 leads: its configuration counts, it alone writes the run folder, shows progress and calls
callbacks. The others follow: for each run that it begins they are told what to train and train it
with it. What they need goes over the process group, so the run folder may be where only rank 0
sees it; images and weights must be there for all.

Note: what is said and not computed goes over a group of its own on the CPU (gloo). It blocks, so it
notices when a rank is gone, and it may wait long, as for the reading of images.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import re
import signal
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
import torch.distributed as c10d

from ntkcl.config import Config, resolve, to_toml
from ntkcl.files import safetensors_bytes

_PATIENCE = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Order:
    """A run that rank 0 begins or goes on with."""

    config: Config
    must_match: Mapping[str, Any]  # what of the environment must be the same on every rank
    checkpoint: dict[str, Any] | None = None  # "progress" and "tensors"


class Ranks:
    """This process among those that train together; alone by default."""

    def __init__(self, control: c10d.ProcessGroup | None = None) -> None:
        self.rank = control.rank() if control else 0
        self.size = control.size() if control else 1
        self._control = control
        self._on_gpu: c10d.ProcessGroup | None = None
        self._training = False

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def groups(self, device: str) -> tuple[str, str] | None:
        """Names of the groups for tensors on this device and for the CPU's; none: alone."""
        if self._control is None:
            return None
        if device == "cpu" or not torch.cuda.is_available():
            return (self._control.group_name, self._control.group_name)
        if self._on_gpu is None:
            self._on_gpu = _new_group("nccl")
        return (self._on_gpu.group_name, self._control.group_name)

    def begin(self, device: str) -> None:
        """Makes the groups for this device, with the others."""
        self._send({"device": device})
        self.groups(device)

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

    def order(self, order: Order) -> None:
        """Has the others prepare the same run."""
        if self.size == 1:
            return
        self._send(
            {
                "config": to_toml(order.config),
                "must_match": dict(order.must_match),
                "progress": order.checkpoint["progress"] if order.checkpoint else None,
            },
            order.checkpoint["tensors"] if order.checkpoint else {},
        )

    @contextmanager
    def training(self) -> Iterator[None]:
        """Trains with the others. An error of this rank alone ends them, too."""
        self._training = True
        try:
            yield
        except BaseException as error:
            if not _ends_all(error):
                self._leave()
            if isinstance(error, ConnectionError):
                error.args = (_cause(error),)
            raise
        self._training = False

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
            if "device" in message:
                self.groups(message["device"])
                continue
            checkpoint = None
            if message["progress"] is not None:
                checkpoint = {"progress": message["progress"], "tensors": tensors}
            with self.training():
                config = resolve(tomllib.loads(message["config"]))
                train(Order(config, message["must_match"], checkpoint))

    def _leave(self) -> None:
        """Closes the connections, so that nobody waits for this rank; it cannot come back."""
        for group in (self._on_gpu, self._control):
            if group is not None:
                c10d.destroy_process_group(group)
        self._on_gpu = self._control = None
        global _lost
        _lost = self.size > 1

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
            length = torch.tensor([len(content)])
            c10d.broadcast(length, group=self._control, group_src=0)
            data = torch.empty(int(length), dtype=torch.uint8)
            if not len(data):
                return b""
            if self.leads:
                data.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            c10d.broadcast(data, group=self._control, group_src=0)
        except RuntimeError as error:
            raise ConnectionError(
                f"[ranks] rank {self.rank} of {self.size} has lost the others: expected each to "
                f"go on, got '{_cause(error)}'"
            ) from None
        return data.numpy().tobytes()


def _ends_all(error: BaseException) -> bool:
    """Whether every rank ends with it: a loss that is not finite, a stop that all agreed on."""
    agreed = isinstance(error, KeyboardInterrupt) and str(error).startswith("[train] stopped")
    return agreed or isinstance(error, FloatingPointError)


def _cause(error: Exception) -> str:
    """The first sentence of gloo's message, without the place in its sources."""
    line = str(error).partition("\n")[0]
    return re.sub(r"\[\S+:\d+\] |\. .*?(?='?$)", "", line)


_joined: Ranks | None = None
_lost = False


def join() -> Ranks:
    """The ranks of this process: those of torch.distributed's default group, which is made where
    `torchrun` has started the process.

    Raises:
      ConnectionError: this process has lost the others before.
    """
    global _joined
    if _lost:
        raise ConnectionError("[ranks] expected the others, which are gone: start all ranks again")
    if not are_several():
        return Ranks()
    if _joined is None:
        if not c10d.is_initialized():
            if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
                # A process that sees one GPU alone has that one.
                count = torch.cuda.device_count()
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % count)
            _meet()
            atexit.register(_end)
        _joined = Ranks(_new_group("gloo", _PATIENCE))
    _joined._training = False
    return _joined


def _meet() -> None:
    # A wait for ranks that never come asks no handler of Python's: the system's ends it.
    listens = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL) if listens else None
    try:
        c10d.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except RuntimeError as error:
        raise ConnectionError(
            f"[ranks] expected {os.environ['WORLD_SIZE']} ranks to meet, got '{_cause(error)}'"
        ) from None
    finally:
        if listens:
            signal.signal(signal.SIGTERM, handler)


def _new_group(backend: str, timeout: datetime.timedelta | None = None) -> c10d.ProcessGroup:
    group = c10d.new_group(backend=backend, timeout=timeout)
    assert isinstance(group, c10d.ProcessGroup)  # every rank is in it
    return group


def are_several() -> bool:
    """Whether this process is one of several ranks."""
    if not c10d.is_available():
        return False
    if c10d.is_initialized():
        return c10d.get_world_size() > 1
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _end() -> None:
    if c10d.is_initialized():
        c10d.destroy_process_group()
