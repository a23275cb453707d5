"""The folder of a run: what was asked for, what happened, what came out.

    config.toml           the resolved configuration
    environment.json      versions, processor, hashes of weights and data
    events.jsonl          one line per step, epoch, stage, evaluation and task
    accuracy_matrix.csv   T columns, one row per finished task; empty above the diagonal
    result.json           all metrics; null where undefined
    predictions.safetensors   task_<t>.{labels, predictions, within_task, ranks,
                          inferred_tasks, confidences}: of each test image after task t
    state.safetensors, model.json   the trained model, see model.py
    accuracy.png
    checkpoint/           where an unfinished run goes on, see checkpoints.py

Every file but the event log is written whole or not at all. A run that fails keeps its events, the
accuracy matrix of the finished tasks and its checkpoints.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch

from ntkcl.checkpoints import Checkpoints
from ntkcl.config import PLACE_KEYS, SEEDS_FILE, Config, resolve, to_toml
from ntkcl.files import (
    read_object,
    remove_temporaries,
    safetensors_bytes,
    sync_folder,
    write_atomically,
)
from ntkcl.model import write_model
from ntkcl.names import shown
from ntkcl.result import Result, read_result

logger = logging.getLogger("ntkcl")

_OF_A_RUN = ("config.toml", "events.jsonl", "result.json", SEEDS_FILE)

# That the images and weights are the same is seen by their hashes.
_MAY_CHANGE = PLACE_KEYS | {"dataset", "weights", "seeds"}


class RunFolder:
    """Where one run writes. `reserve` first; nothing is written before `begin`."""

    def __init__(self, path: Path, created: Sequence[Path]) -> None:
        self.path = path
        self._created = created  # folders that were made for this run, the outermost first
        self._log: BinaryIO | None = None
        self._lock_file: int | None = None
        self._rows: list[list[float]] = []
        self._tasks = 0
        self.checkpoints = Checkpoints(path / "checkpoint")

    @classmethod
    def reserve(cls, config: Config) -> RunFolder:
        """Makes the folder, or raises before any work: ValueError where it holds a run, OSError
        where it cannot be written to."""
        path = Path(config.output).expanduser() if config.output else _default_path(config)
        check_free(path)
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
        self._close()
        for folder in reversed(self._created):
            try:
                folder.rmdir()
            except OSError:  # somebody else has put something there
                return

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """The folder of a run that was begun. ValueError where a process is writing to it."""
        folder = cls(path, [])
        folder._lock()
        try:
            folder._log = (path / "events.jsonl").open("a+b")
            remove_temporaries(path)
            folder.checkpoints.tidy()
        except BaseException:
            folder._close()
            raise
        return folder

    @staticmethod
    def is_run(path: Path) -> bool:
        """Whether a run was begun there. An exported model has a configuration alone."""
        beside = ("environment.json", "result.json")
        return (path / "config.toml").is_file() and any((path / n).is_file() for n in beside)

    @staticmethod
    def check_run(path: Path) -> None:
        """ValueError where a model alone is, without the run that made it."""
        has = {
            name for name in ("model", "environment", "result") if (path / f"{name}.json").is_file()
        }
        if has == {"model"}:
            raise ValueError(
                f"[resume] expected a run, got a model in '{path}'; ntkcl.load reads it"
            )

    @property
    def finished(self) -> bool:
        """result.json is written last."""
        return (self.path / "result.json").is_file()

    def environment(self) -> dict[str, Any]:
        """What `begin` was given."""
        file = self.path / "environment.json"
        try:
            found = read_object(file)
        except ValueError as damage:
            raise ValueError(f"[resume] {damage}") from None
        # The finished run writes these into its model.
        classes, weights = found.get("classes"), found.get("weights_sha256")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError(f"[resume] '{file}': expected names of classes, got {shown(classes)}")
        if not isinstance(weights, str):
            raise ValueError(f"[resume] '{file}': expected a checksum, got {shown(weights)}")
        return found

    def begin(self, config: Config, environment: Mapping[str, Any]) -> None:
        """Writes what is known beforehand and opens the event log. The configuration makes the
        folder a run's: it comes after what a resumed run wants to find beside it."""
        self._lock()
        check_free(self.path)  # nobody has begun a run since
        write_atomically(self.path / "environment.json", _json(environment))
        write_atomically(self.path / "config.toml", to_toml(config).encode())
        sync_folder(self.path.parent)
        self._log = (self.path / "events.jsonl").open("a+b")

    def go_back(self, log_bytes: int) -> None:
        """Forgets the events after a checkpoint: they will happen again."""
        assert self._log is not None
        if self._log.seek(0, os.SEEK_END) < log_bytes:
            logger.warning("[resume] '%s' is shorter than it was: events are lost", self._log.name)
        else:
            self._log.truncate(log_bytes)
        self._log.seek(0)
        content = self._log.read()
        self._log.truncate(content.rfind(b"\n") + 1)  # not in the midst of a line
        self._rows, self._tasks = [], 0
        for line in content[: content.rfind(b"\n") + 1].splitlines():
            try:
                self._note(json.loads(line))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                logger.warning("[resume] '%s': a line is damaged: %.80s", self._log.name, line)
        self._tasks = 0  # the trainer tells it again
        self._log.seek(0, os.SEEK_END)

    def record(self, event: Mapping[str, Any]) -> None:
        """Adds an event to the log; after an evaluation also a row to the accuracy matrix."""
        assert self._log is not None
        self._log.write((json.dumps(_without_nan(event)) + "\n").encode())
        self._log.flush()
        if self._note(event):
            self._write_matrix(self._rows, self._tasks)

    def save(self, checkpoint: Mapping[str, Any]) -> None:
        """Writes a checkpoint, after the events that led to it."""
        assert self._log is not None
        os.fsync(self._log.fileno())
        self.checkpoints.save(checkpoint, self._log.tell())

    def finish(self, result: Result, raw: Mapping[str, Any]) -> None:
        """Writes the trained state, the predictions, the plot and at last the result; the
        checkpoints have done their work."""
        self._write_matrix(result.accuracy_matrix.tolist(), len(result.evaluations))
        predictions = {
            f"task_{task}.{name}": tensor
            for task, of_images in enumerate(raw["predictions"])
            for name, tensor in _columns(of_images).items()
        }
        # One key of metadata: the order of several would change from run to run.
        about = {"ntkcl.method": result.config.method}
        content = safetensors_bytes(predictions, about)
        write_atomically(self.path / "predictions.safetensors", content)
        environment = self.environment()
        write_model(
            self.path,
            safetensors_bytes(raw["state"], about),
            environment["classes"],
            raw["task_sizes"],
            environment["weights_sha256"],
        )
        from ntkcl.figures import png

        write_atomically(self.path / "accuracy.png", png(result))
        write_atomically(self.path / "result.json", _json(result.to_dict()))
        self.checkpoints.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        try:
            if self._log is not None:
                self._log.close()  # writes what a full disk has refused, again
        finally:
            if self._lock_file is not None:
                os.close(self._lock_file)
                self._lock_file = None

    def _lock(self) -> None:
        """One process at a time writes here. The lock goes with the process, however it ends."""
        self._lock_file = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise ValueError(
                f"[output] '{self.path}' is in use: another process runs there"
            ) from None
        except OSError as error:
            logger.warning("[output] '%s' cannot be locked: %s", self.path, error.strerror)

    def _note(self, event: Mapping[str, Any]) -> bool:
        """Whether the event adds a row to the accuracy matrix."""
        if event["event"] in ("run_begin", "resume"):
            self._tasks = event["tasks"]
        elif event["event"] == "evaluation":
            self._rows.append([math.nan if v is None else float(v) for v in event["per_task"]])
        return bool(event["event"] == "evaluation")

    def _write_matrix(self, rows: Iterable[Sequence[float]], tasks: int) -> None:
        lines = [
            ",".join("" if math.isnan(v) else repr(v) for v in _padded(row, tasks)) for row in rows
        ]
        write_atomically(self.path / "accuracy_matrix.csv", ("\n".join(lines) + "\n").encode())


def load_run(path: Path) -> Result:
    """The result of a finished run; FileNotFoundError for another, ValueError for damage."""
    file = path / "result.json"
    if not file.is_file():
        hint = f"; go on with `ntkcl resume {path}`" if RunFolder.is_run(path) else ""
        raise FileNotFoundError(
            f"[load_result] expected a finished run in '{path}', got no {file}{hint}"
        )
    return read_result(path)


def check_free(path: Path) -> None:
    """ValueError where a folder holds a run."""
    holds = [name for name in _OF_A_RUN if (path / name).exists()]
    if holds:
        raise ValueError(
            f"[output] '{path}' holds a run ({holds[0]}): give another output, go on with it by "
            "resume = true, or remove it"
        )


def _columns(of_images: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What an evaluation keeps of each test image, in the order of the images."""
    records = of_images["records"].to(torch.int32).unbind(1)
    prediction, within_task, rank, _finite, inferred_task = records
    return {
        "labels": of_images["labels"].to(torch.int32),
        "predictions": prediction,
        "within_task": within_task,
        "ranks": rank,
        "inferred_tasks": inferred_task,
        "confidences": of_images["confidences"],
    }


def check_same(config: Config, file: Path) -> None:
    """ValueError where a key that decides what is computed is not as in the configuration file of a
    run that was begun."""
    given, begun = config.flat(), resolve(file=file, any_method=True).flat()
    for key in given.keys() - _MAY_CHANGE:
        if given[key] != begun[key]:
            raise ValueError(
                f"[resume] '{key}': expected {begun[key]!r}, as the run in '{file.parent}' was "
                f"begun, got {given[key]!r}"
            )


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
