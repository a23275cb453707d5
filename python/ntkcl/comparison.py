"""Finished runs beside each other: which are the same but for the seed, which may share a table.

A group is the runs of one configuration, which differ in their seeds. Groups share a table where
their protocol is the same: images, task split, class order, weights and preprocessing. What
differs is said in words.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard, overload

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ntkcl import _C
from ntkcl.config import PLACE_KEYS, Config, cautions
from ntkcl.files import read_object
from ntkcl.names import shown
from ntkcl.result import Result
from ntkcl.runfolder import RunFolder, load_run

Runs = str | os.PathLike[str] | Result
_ECE_BINS = 15
_WORDS = 60  # characters of a value that are shown

# Places and speed, and what the protocol has by its hash.
_NO_SETTING = PLACE_KEYS | {
    *("threads", "device", "seed", "class_order_seed", "preset", "dataset", "weights"),
    "forward_transfer",
}
_OF_PROTOCOL = [
    *("initial_classes", "increment", "train_per_class", "test_per_class", "validation_fraction"),
    *("backbone", "image_size", "transform", "normalize"),
]


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run as its folder tells it."""

    folder: Path
    result: Result
    environment: Mapping[str, Any]
    task_sizes: tuple[int, ...]  # empty where the names of the classes are not kept
    task_confusion: NDArray[np.float64]  # (T, T) in percent, see `task_confusion`; else NaN
    ece: float

    @property
    def config(self) -> Config:
        return self.result.config

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order in which they were learned."""
        return tuple(map(str, self.environment.get("classes") or ()))

    @property
    def order_by_seed(self) -> bool:
        """Whether the run's seed permuted its classes."""
        return self.config.class_order == "seed" and self.config.class_order_seed is None

    @cached_property
    def numbers(self) -> dict[str, float]:
        """Every scalar metric by name; NaN where the run has none."""
        stored = self.result.to_dict()
        numbers = {
            name: value
            for name, value in stored.items()
            if isinstance(value, (int, float)) and name != "seed"
        }
        last = self.result.evaluations[-1]
        diagonal = np.diagonal(self.result.accuracy_matrix)
        return {
            **numbers,
            "top5": last.top5,
            "task_id": last.task_id,
            "within_task": last.within_task,
            "inferred_task": last.inferred_task,
            "new_classes": float(diagonal.mean()),
            "ece": self.ece,
            "minutes": self.result.seconds / 60,
        }


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seeds only."""

    runs: tuple[Run, ...]
    settings: str = ""  # what tells it from others of its method and variant in the table

    @property
    def config(self) -> Config:
        return self.runs[0].config

    @property
    def name(self) -> str:
        name = f"{self.config.method} {self.config.variant}"
        return f"{name}, {self.settings}" if self.settings else name

    @property
    def seeds(self) -> str:
        """Seeds of the runs, and of their class orders where these have their own."""
        text = ", ".join(str(run.config.seed) for run in self.runs)
        if self.config.class_order != "seed" or self.runs[0].order_by_seed:
            return text
        return f"{text} (class order {self.order_seeds})"

    @property
    def order_seeds(self) -> str:
        """Seeds of their own that the class orders have."""
        seeds = (run.config.class_order_seed for run in self.runs)
        return ", ".join(str(seed) for seed in sorted({s for s in seeds if s is not None}))

    def statistics(self, key: str) -> tuple[float, float]:
        """Mean and sample standard deviation over the runs; the latter NaN with one run."""
        mean, std = mean_std([run.numbers[key] for run in self.runs])
        return float(mean), float(std)

    @property
    def curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """A_t, (T,) each: mean and standard deviation."""
        return mean_std([run.result.accuracy for run in self.runs])

    @property
    def accuracy_matrix(self) -> NDArray[np.float64]:
        """(T, T), the mean over the runs."""
        return mean_std([run.result.accuracy_matrix for run in self.runs])[0]

    @property
    def task_confusion(self) -> NDArray[np.float64]:
        """(T, T), the mean over the runs."""
        return mean_std([run.task_confusion for run in self.runs])[0]

    @property
    def cautions(self) -> list[str]:
        """What a reader of its numbers must know."""
        found = cautions(self.config)
        trained = [(run.config.seed, run.classes) for run in self.runs]
        if len(set(trained)) < len(trained):
            found.append("a seed stands here for several runs: the spread is not that of seeds")
        return found


@dataclass(frozen=True, eq=False)
class Table:
    """Groups that are shown together."""

    groups: tuple[Group, ...]
    differences: tuple[str, ...]  # from the first table's protocol; with `together`, of its groups

    @property
    def protocol(self) -> dict[str, str]:
        """What its first group has in common with the others, in words by name."""
        return {name: text for name, (_, text) in _protocol(self.groups[0]).items()}


@dataclass(frozen=True, eq=False)
class Comparison(Sequence[Table]):
    """The tables, and the runs that are in none of them."""

    tables: tuple[Table, ...]
    unfinished: tuple[Path, ...]  # of folders that hold finished ones, too

    @overload
    def __getitem__(self, index: int) -> Table: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Table, ...]: ...

    def __getitem__(self, index: int | slice) -> Table | tuple[Table, ...]:
        return self.tables[index]

    def __len__(self) -> int:
        return len(self.tables)


def compare(runs: Runs | Iterable[Runs], together: bool = False) -> Comparison:
    """Reads finished runs and groups them: one table for each protocol, or one for all.

    Args:
      runs: run folders, folders that hold some (of seeds, of a sweep, of those), or results.
      together: all in one table, whatever the protocols.

    Raises:
      FileNotFoundError: no finished run in a folder, or it is one that did not finish.
      ValueError: no run was given, or a run's predictions are not of its tasks.
    """
    folders, unfinished = _found(runs)
    return Comparison(_tables([_read(folder) for folder in folders], together), unfinished)


def _tables(runs: Sequence[Run], together: bool) -> tuple[Table, ...]:
    groups = _groups(runs)
    tables: list[list[Group]] = []
    for group in groups:
        shared = (t for t in tables if together or not _differences(group, t[0]))
        table = next(shared, None)
        if table is None:
            tables.append([group])
        else:
            table.append(group)
    named = [_told_apart(table) for table in tables]
    if together:
        return (Table(named[0], _all_differences(named[0])),)
    return tuple(Table(table, _differences(table[0], groups[0])) for table in named)


def task_confusion(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], task_sizes: Sequence[int]
) -> NDArray[np.float64]:
    """Share of the test images of task i that are predicted as a class of task j, in percent.

    Args:
      labels, predictions: (n,), classes counted in the order in which they were learned.
      task_sizes: classes of each of the T tasks.

    Returns:
      (T, T); rows sum to 100 and are NaN for a task without test images.
    """
    tasks = len(task_sizes)
    task_of = np.repeat(np.arange(tasks), task_sizes)
    counts = np.zeros((tasks, tasks))
    np.add.at(counts, (task_of[labels], task_of[predictions]), 1)
    with np.errstate(invalid="ignore"):
        return np.asarray(100 * counts / counts.sum(1, keepdims=True))


def calibration_error(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], confidences: NDArray[np.float32]
) -> float:
    """Expected calibration error in percent: the mean over the images of |accuracy - confidence|
    of the bin of their confidence, 15 bins of equal width (Guo et al. 2017, eq. 3).

    Args:
      labels, predictions: (n,).
      confidences: (n,), the probability given to the prediction, in [0, 1].
    """
    if not len(labels) or not np.isfinite(confidences).all():
        return math.nan
    bins = np.clip(np.ceil(confidences.astype(np.float64) * _ECE_BINS) - 1, 0, _ECE_BINS - 1)
    excess = (labels == predictions) - confidences.astype(np.float64)
    sums = np.bincount(bins.astype(np.int64), weights=excess, minlength=_ECE_BINS)
    return float(100 * np.abs(sums).sum() / len(labels))


def mean_std(values: Sequence[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and sample standard deviation over the first axis; the latter NaN for one value."""
    array = np.asarray(values, dtype=np.float64)
    mean = array.mean(0)
    return mean, array.std(0, ddof=1) if len(array) > 1 else np.full_like(mean, math.nan)


# ---- reading -------------------------------------------------------------------------------------


def _found(runs: Runs | Iterable[Runs]) -> tuple[list[Path], tuple[Path, ...]]:
    """Folders of finished runs and of others, each once."""
    given = [runs] if isinstance(runs, (str, os.PathLike, Result)) else list(runs)
    if not given:
        raise ValueError("[report] expected at least one run, got none")
    found: dict[Path, Path] = {}
    unfinished: dict[Path, Path] = {}
    for item in given:
        path = item.output if isinstance(item, Result) else Path(item).expanduser()
        folders = list(_runs_in(path, set()))
        # A run that was named itself must have finished: to read it says so.
        done = [folder for folder in folders if folder == path or RunFolder(folder, []).finished]
        if not done:
            raise FileNotFoundError(_no_run(path, folders))
        for folder in folders:
            (found if folder in done else unfinished).setdefault(folder.resolve(), folder)
    return list(found.values()), tuple(unfinished.values())


def _runs_in(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """The run that a folder is, or those in the folders that it holds, however deep. A folder
    that links lead to again counts once."""
    if not folder.is_dir() or folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    if RunFolder.is_run(folder):
        yield folder
        return
    for child in sorted(folder.iterdir(), key=lambda child: _natural(child.name)):
        if not child.name.startswith("."):
            yield from _runs_in(child, seen)


def _no_run(path: Path, unfinished: Sequence[Path]) -> str:
    if unfinished:
        return (
            f"[report] expected finished runs in '{path}', got {len(unfinished)} unfinished; go on "
            f"with `ntkcl resume {unfinished[0]}`"
        )
    got = "a model alone" if (path / "model.json").is_file() else "none"
    return f"[report] expected the folder of a run, or one that holds some, got {got} in '{path}'"


def _natural(name: str) -> tuple[str, int, str]:
    """seed-10 comes after seed-9."""
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or -1), name


def _read(folder: Path) -> Run:
    try:
        result = load_run(folder)
        environment: dict[str, Any] = {}
        if (folder / "environment.json").is_file():
            environment = _read_environment(folder / "environment.json")
        sizes = _task_sizes(result, len(environment.get("classes") or []))
        confusion, ece = _of_predictions(folder, result, sizes)
    except (ValueError, TypeError) as error:
        error.add_note(f"in the run '{folder}'")
        raise
    return Run(folder, result, environment, sizes, confusion, ece)


def _read_environment(file: Path) -> dict[str, Any]:
    try:
        environment = read_object(file)
    except ValueError as damage:
        raise ValueError(f"[report] {damage}") from None
    classes = environment.get("classes") or []
    if not isinstance(classes, list):
        raise ValueError(f"[report] '{file}': expected names of classes, got {shown(classes)}")
    return environment


def _of_predictions(
    folder: Path, result: Result, sizes: Sequence[int]
) -> tuple[NDArray[np.float64], float]:
    """Task confusion and calibration error of the test after the last task; NaN where the run
    has kept too little."""
    tasks = len(result.evaluations)
    file = folder / "predictions.safetensors"
    if not file.is_file() or not sizes:
        return np.full((tasks, tasks), math.nan), math.nan
    try:
        tensors = load_file(file)
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        # The last ones of types that numpy does not have.
        raise ValueError(
            f"[report] expected a safetensors file, got '{file}': {error!s:.200}"
        ) from None
    names = ("labels", "predictions", "confidences")
    labels, predictions, confidences = (tensors.get(f"task_{tasks - 1}.{name}") for name in names)
    if (
        not _are_classes(labels, sum(sizes))
        or not _are_classes(predictions, sum(sizes))
        or labels.shape != predictions.shape
        or (confidences is not None and confidences.shape != labels.shape)
        or (confidences is not None and confidences.dtype.kind != "f")
    ):
        raise ValueError(
            f"[report] expected labels and predictions of {sum(sizes)} classes in {tasks} "
            f"tasks, got others in '{file}'"
        )
    ece = math.nan if confidences is None else calibration_error(labels, predictions, confidences)
    return task_confusion(labels, predictions, sizes), ece


def _task_sizes(result: Result, classes: int) -> tuple[int, ...]:
    if not classes:
        return ()
    sizes = _C.split_classes(classes, result.config.initial_classes, result.config.increment)
    return tuple(sizes[: len(result.evaluations)])


def _are_classes(given: NDArray[Any] | None, classes: int) -> TypeGuard[NDArray[np.int64]]:
    return (
        given is not None
        and (given.ndim, given.dtype.kind) == (1, "i")
        and (not len(given) or 0 <= given.min() <= given.max() < classes)
    )


# ---- what is the same and what differs -----------------------------------------------------------


def _groups(runs: Sequence[Run]) -> list[Group]:
    """Runs of one configuration together, in the order in which they were given."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        identities = {name: identity for name, (identity, _) in _traits(run).items()}
        key = json.dumps([_settings(run.config), identities, run.order_by_seed])
        found.setdefault(key, []).append(run)
    return [Group(tuple(group)) for group in found.values()]


def _settings(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.flat().items() if key not in _NO_SETTING}


def _told_apart(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups, named by the settings in which those of one method and variant differ."""
    texts = [_setting_texts(group) for group in groups]
    alike: dict[tuple[str, str], list[dict[str, str]]] = {}
    for group, text in zip(groups, texts, strict=True):
        alike.setdefault((group.config.method, group.config.variant), []).append(text)
    named = []
    for group, text in zip(groups, texts, strict=True):
        others = alike[group.config.method, group.config.variant]
        differs = [key for key in text if any(other[key] != text[key] for other in others)]
        settings = ", ".join(f"{key.rpartition('.')[2]} {text[key]}" for key in differs)
        named.append(dataclasses.replace(group, settings=settings))
    return tuple(named)


def _setting_texts(group: Group) -> dict[str, str]:
    settings = {key: _shown(value) for key, value in _settings(group.config).items()}
    traits = {name: text for name, (_, text) in _protocol(group).items()}
    return {key: text for key, text in (settings | traits).items() if key != "class_order"}


def _protocol(group: Group) -> dict[str, tuple[str, str]]:
    run = group.runs[0]
    return {**_traits(run), "class order": (str(run.order_by_seed), _order_text(group))}


def _traits(run: Run) -> dict[str, tuple[str, str]]:
    """What must be the same for accuracies to compare, but for the class order: by name, what is
    compared and how it reads."""
    config, known = run.config, run.environment
    values = {key: config.flat()[key] for key in _OF_PROTOCOL}
    images, weights = (str(known.get(key)) for key in ("dataset_manifest", "weights_sha256"))
    return {
        "images": (images, f"{_shown(config.dataset_name)} ({images[:12]})"),
        **{key: (json.dumps(value), _shown(value)) for key, value in values.items()},
        "weights sha256": (weights, weights[:12]),
    }


def _order_text(group: Group) -> str:
    config = group.config
    if group.runs[0].order_by_seed:
        return "by the run's seed"
    if config.class_order == "seed":
        return f"class_order_seed {group.order_seeds}"
    if config.class_order == "natural":
        return "natural"
    digest = hashlib.sha256(json.dumps(config.class_order).encode()).hexdigest()
    return f"given ({digest[:12]})"


def _differences(group: Group, first: Group) -> tuple[str, ...]:
    """How the protocol of a group differs from another's."""
    here, there = _protocol(group), _protocol(first)
    found = [
        f"{name}: {here[name][1]} here, {there[name][1]} there"
        for name in here
        if name != "class order" and here[name][0] != there[name][0]
    ]
    if not _same_order(group, first):
        found.append(f"class order: {here['class order'][1]} here, {there['class order'][1]} there")
    return tuple(found)


def _same_order(group: Group, first: Group) -> bool:
    """Whether the classes came in the same order: for the same seed where it decides, else in the
    same set of orders or in some of them. Other classes say nothing of their order."""
    by_seed = group.runs[0].order_by_seed
    if by_seed != first.runs[0].order_by_seed:
        return False
    if sorted(group.runs[0].classes) != sorted(first.runs[0].classes):
        texts = {_order_text(one) for one in (group, first)}
        return len(texts) == 1
    if by_seed:
        orders = {run.config.seed: run.classes for run in first.runs}
        return all(orders.get(run.config.seed, run.classes) == run.classes for run in group.runs)
    mine, others = ({run.classes for run in one.runs} for one in (group, first))
    return mine <= others or others <= mine


def _all_differences(groups: Sequence[Group]) -> tuple[str, ...]:
    return tuple(
        f"{group.name}: {difference}"
        for group in groups[1:]
        for difference in _differences(group, groups[0])
    )


def _shown(value: Any) -> str:
    """A value on one line, shortened."""
    if value is None:
        return "none"
    text = " ".join((value if isinstance(value, str) else json.dumps(value)).split())
    return text if len(text) <= _WORDS else text[: _WORDS - 3] + "..."
