"""Losses, speed and accuracies of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def summary_writer() -> Any:
    """The class that writes; ImportError says what to install."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "[tensorboard] expected the package tensorboard: pip install ntkcl[tensorboard]"
        ) from None
    return SummaryWriter


class TensorBoardLog:
    """A callback that writes scalars: losses and the learning rate by training step, speed by
    epoch, accuracies by task. Of a resumed run, what will happen again is hidden."""

    def __init__(self, folder: Path) -> None:
        self._make = summary_writer()
        self._folder = str(folder)
        self._writer: Any = None
        self._steps = 0

    def __call__(self, event: Mapping[str, Any]) -> None:
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def _on_run_begin(self, _: Mapping[str, Any]) -> None:
        self._writer = self._make(self._folder)

    def _on_resume(self, event: Mapping[str, Any]) -> None:
        self._steps = event["steps_done"]
        self._writer = self._make(self._folder, purge_step=self._steps)

    def _on_step(self, event: Mapping[str, Any]) -> None:
        for name, value in event["losses"].items():
            self._writer.add_scalar(f"loss/{name}", value, self._steps)
        self._writer.add_scalar("learning_rate", event["learning_rate"], self._steps)
        self._steps += 1

    def _on_epoch(self, event: Mapping[str, Any]) -> None:
        self._writer.add_scalar("images_per_second", event["images_per_second"], self._steps)

    def _on_evaluation(self, event: Mapping[str, Any]) -> None:
        for name in ("top1", "old_classes", "new_classes", "task_id", "within_task"):
            self._writer.add_scalar(f"accuracy/{name}", event[name], self._steps)
        self._writer.flush()

    def _on_task_end(self, _: Mapping[str, Any]) -> None:
        self._writer.flush()
