"""The folder of a run: what was asked for, what happened, what came out.

    config.toml           the resolved configuration
    environment.json      versions, processor, hashes of weights and data
    events.jsonl          one line per step, epoch, stage, evaluation and task
    accuracy_matrix.csv   T columns, one row per finished task; empty above the diagonal
    result.json           all metrics; null where undefined
    predictions.safetensors, state.safetensors, accuracy.png

Every file but the event log is written whole or not at all. A run that fails keeps its events and
the accuracy matrix of the finished tasks.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import safetensors.torch
import torch

from ntkcl.config import Config, to_toml
from ntkcl.result import Result

_OF_A_RUN = ("config.toml", "events.jsonl", "result.json")


class RunFolder:
    """Where one run writes. `reserve` first; nothing is written before `begin`."""

    def __init__(self, path: Path, created: Sequence[Path]) -> None:
        self.path = path
        self._created = created  # folders that were made for this run, the outermost first
        self._log: IO[str] | None = None
        self._rows: list[list[float]] = []
        self._tasks = 0

    @classmethod
    def reserve(cls, config: Config) -> RunFolder:
        """Makes the folder, or raises before any work: ValueError where it holds a run, OSError
        where it cannot be written to."""
        path = Path(config.output).expanduser() if config.output else _default_path(config)
        holds = [name for name in _OF_A_RUN if (path / name).exists()]
        if holds:
            raise ValueError(
                f"[output] '{path}' holds a run ({holds[0]}): give another output, or remove it"
            )
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OSError(f"[output] cannot write to '{path}': {error.strerror}") from None
        return cls(path, missing[::-1])

    def discard(self) -> None:
        """Removes the folders that were made for a run that did not begin."""
        for folder in reversed(self._created):
            try:
                folder.rmdir()
            except OSError:  # somebody else has put something there
                return

    def begin(self, config: Config, environment: Mapping[str, Any]) -> None:
        """Writes what is known beforehand and opens the event log."""
        self._log = (self.path / "events.jsonl").open("x", encoding="utf-8")
        write_atomically(self.path / "config.toml", to_toml(config).encode())
        write_atomically(self.path / "environment.json", _json(environment))

    def record(self, event: Mapping[str, Any]) -> None:
        """Adds an event to the log; after an evaluation also a row to the accuracy matrix."""
        assert self._log is not None
        self._log.write(json.dumps(_without_nan(event)) + "\n")
        self._log.flush()
        if event["event"] == "run_begin":
            self._tasks = event["tasks"]
        elif event["event"] == "evaluation":
            self._rows.append(list(event["per_task"]))
            self._write_matrix(self._rows, self._tasks)

    def finish(self, result: Result, raw: Mapping[str, Any]) -> None:
        """Writes the result, the trained state, the predictions and the plot."""
        write_atomically(self.path / "result.json", _json(result.to_dict()))
        self._write_matrix(result.accuracy_matrix.tolist(), len(result.evaluations))
        predictions = {
            f"task_{task}.{name}": tensor
            for task, pair in enumerate(raw["predictions"])
            for name, tensor in zip(("labels", "predictions"), pair, strict=True)
        }
        about = {"format": "pt", "ntkcl.method": result.config.method}
        write_atomically(self.path / "state.safetensors", _safetensors(raw["state"], about))
        write_atomically(self.path / "predictions.safetensors", _safetensors(predictions, about))
        from ntkcl.report import png

        write_atomically(self.path / "accuracy.png", png(result))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._log is not None:
            self._log.close()

    def _write_matrix(self, rows: Iterable[Sequence[float]], tasks: int) -> None:
        lines = [
            ",".join("" if math.isnan(v) else repr(v) for v in _padded(row, tasks)) for row in rows
        ]
        write_atomically(self.path / "accuracy_matrix.csv", ("\n".join(lines) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, also when the power goes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _default_path(config: Config) -> Path:
    """runs/<method>-<dataset>-<time>, counted on where two runs begin in one second."""
    dataset = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(config.dataset).stem) or "data"
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    base = Path("runs") / f"{config.method}-{dataset}-{time}"
    path, count = base, 1
    while path.exists():
        count += 1
        path = base.with_name(f"{base.name}-{count}")
    return path


def _padded(row: Sequence[float], length: int) -> list[float]:
    return [*row, *[math.nan] * (length - len(row))]


def _safetensors(tensors: Mapping[str, torch.Tensor], about: dict[str, str]) -> bytes:
    whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    return safetensors.torch.save(whole, metadata=about)


def _json(value: Any) -> bytes:
    return (json.dumps(_without_nan(value), indent=2) + "\n").encode()


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return value
