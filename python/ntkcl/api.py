"""The functions that a user calls."""

from __future__ import annotations

import inspect
import logging
import os
import platform
import signal
import subprocess
import threading
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self, overload

import numpy as np
import torch

from ntkcl import _C, memory, seeds
from ntkcl import config as _config
from ntkcl.backbones import Weights, backbone_info, load_backbone
from ntkcl.checkpoints import Checkpoint
from ntkcl.config import ARRAYS, SEEDS_FILE, Config, cautions, resolve, to_toml
from ntkcl.datasets import KNOWN_DATASETS, Dataset, load_dataset
from ntkcl.methods import Method, check_method, core_method, list_methods, register_own, way_on
from ntkcl.names import if_missing, shown
from ntkcl.progress import make_progress
from ntkcl.ranks import Order, Ranks, join
from ntkcl.result import Result, Results, result_of
from ntkcl.runfolder import RunFolder, check_same, load_run
from ntkcl.tensorboard import TensorBoardLog, summary_writer

logger = logging.getLogger("ntkcl")

Callback = Callable[[dict[str, Any]], object]
# What of the environment must be the same for a run that goes on, and on every rank.
_MUST_MATCH = {"weights_sha256": "weights", "dataset_manifest": "images"}


@overload
def train(
    config: str | os.PathLike[str] | None = None,
    *,
    seeds: Sequence[int],
    callbacks: Callback | Iterable[Callback] = (),
    **keywords: Any,
) -> Results: ...


@overload
def train(
    config: str | os.PathLike[str] | None = None,
    *,
    seeds: None = None,
    callbacks: Callback | Iterable[Callback] = (),
    **keywords: Any,
) -> Result: ...


def train(
    config: str | os.PathLike[str] | None = None,
    *,
    callbacks: Callback | Iterable[Callback] = (),
    **keywords: Any,
) -> Result | Results:
    """Trains a method on a sequence of tasks, tests it after each, and writes a run folder.

    With nothing given it runs the embedded default: NTK-CL on scikit-learn's handwritten digits.
    With `seeds` it runs once for each and gives `Results`: mean and standard deviation.

    Args:
      config: TOML file with the keys below; keywords win over it.
      method: also an own class or an object of it, see `ntkcl.Method`.
      callbacks: a function or several that are called with every event (what events.jsonl holds);
        one that returns True asks the run to stop, as Ctrl-C does. So does one that fails: its
        error is raised when the run has stopped.
      **keywords: the keys below. A method's own keys are given in its section,
        `ntk_cl={"eta": 0.03}`.

    Raises:
      ValueError, TypeError, FileNotFoundError: something given is wrong; nothing was written.
      OSError: the run folder cannot be written to.
      FloatingPointError: a loss is not finite. What was finished stays in the run folder.
      KeyboardInterrupt: Ctrl-C or SIGTERM, after the current step. `resume` goes on from there.
    """
    own = keywords.get("method")
    if isinstance(own, Method) or (isinstance(own, type) and issubclass(own, Method)):
        keywords["method"] = register_own(own)
    arrays = keywords.get("dataset")
    if isinstance(arrays, Mapping):
        keywords["dataset"] = ARRAYS
    else:
        arrays = None
    return _on_ranks(arrays, callbacks, lambda call: _run_resolved(resolve(keywords, config), call))


def run(
    config: Config,
    arrays: Mapping[str, Any] | None = None,
    callbacks: Callback | Iterable[Callback] = (),
) -> Result | Results:
    """Runs a resolved configuration; `arrays` are the images of dataset "arrays"."""
    return _on_ranks(arrays, callbacks, lambda call: _run_resolved(config, call))


def resume(
    run: str | os.PathLike[str],
    *,
    dataset: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    data_root: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    callbacks: Callback | Iterable[Callback] = (),
) -> Result | Results:
    """Goes on with a run that was stopped or killed, from its last checkpoint.

    On the same machine, build and number of threads it ends as the uninterrupted run would have,
    bit for bit. A finished run gives its result again. Runs of several seeds go on one after the
    other, as far as they are not finished, and give `Results`.

    Args:
      run: its folder, or that of several seeds.
      dataset: where the same images are now, if they have moved; arrays are given again.
      data_root: the same of the folder that holds the named data sets.
      weights: the same of the backbone's safetensors file.
      progress: whether to show progress; none: as the run was begun.
      callbacks: as of `train`.

    Raises:
      FileNotFoundError: no run there.
      ValueError: its images or weights are others now; no checkpoint is whole; another process
        writes to it.
    """
    arrays = dataset if isinstance(dataset, Mapping) else None
    moved: dict[str, Any] = {
        "dataset": dataset if arrays is None else ARRAYS,
        "data_root": data_root,
        "weights": weights,
        "progress": progress,
    }
    given = {key: value for key, value in moved.items() if value is not None}
    return _on_ranks(arrays, callbacks, lambda call: _resume(Path(run).expanduser(), given, call))


def _resume(path: Path, given: Mapping[str, Any], call: _Call) -> Result | Results:
    several = seeds.are_in(path)
    RunFolder.check_run(path)
    if not several and not RunFolder.is_run(path):
        raise FileNotFoundError(
            f"[resume] expected the folder of a run, got no config.toml of one in '{path}'"
        )
    here = {**given, "output": path}
    if several:
        config = resolve(here | {"resume": True}, path / SEEDS_FILE, any_method=True)
        call.ranks.begin(config.device)
        return seeds.run_seeds(config, lambda one: _run_one(one, call))
    config = resolve(here, path / "config.toml", any_method=True)
    call.ranks.begin(config.device)
    return _go_on(config, call)


def list_datasets() -> list[str]:
    """Names of the data sets that are known; a folder, a zip or arrays serve as well."""
    return list(KNOWN_DATASETS)


def info() -> dict[str, str]:
    """Versions, devices and build options."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "ntkcl": str(_C.__version__),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "gpu": ", ".join(devices) or "none",
        **{f"built with {key}": str(value) for key, value in _C.build_info.items()},
    }


@dataclass(frozen=True)
class _Call:
    """What a run needs beside its configuration."""

    arrays: Mapping[str, Any] | None
    callbacks: tuple[Callback, ...]
    ranks: Ranks


def _on_ranks(
    arrays: Mapping[str, Any] | None,
    callbacks: Callback | Iterable[Callback],
    lead: Callable[[_Call], Result | Results],
) -> Result | Results:
    """What rank 0 makes, on every rank."""
    listeners = _checked_callbacks(callbacks)
    ranks = join()
    call = _Call(arrays, listeners, ranks)
    if not ranks.leads:
        return _result_told(ranks.follow(lambda order: _train_along(order, call)))
    if ranks.size == 1:
        return lead(call)
    with ranks.leading():
        made = lead(call)
    results = made if isinstance(made, Results) else [made]
    ranks.dismiss(
        {
            "folder": str(made.output) if isinstance(made, Results) else None,
            "runs": [[r.to_dict(), str(r.output), to_toml(r.config)] for r in results],
        }
    )
    return made


def _checked_callbacks(given: Callback | Iterable[Callback]) -> tuple[Callback, ...]:
    if callable(given):
        return (given,)
    callbacks = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(callable(callback) for callback in callbacks):
        raise TypeError(
            f"[callbacks] expected a function or a list of functions, got {shown(given)}"
        )
    return callbacks


def _result_told(outcome: Mapping[str, Any]) -> Result | Results:
    results = [
        result_of(numbers, Path(output), resolve(tomllib.loads(config), any_method=True))
        for numbers, output, config in outcome["runs"]
    ]
    folder = outcome["folder"]
    return results[0] if folder is None else Results(tuple(results), Path(folder))


def _train_along(order: Order, call: _Call) -> None:
    """Trains with rank 0 what that has begun."""
    trainer, environment = _prepare(order.config, call)
    for key, what in _MUST_MATCH.items():
        if environment[key] != order.must_match[key]:
            raise ValueError(
                f"[ranks] rank {call.ranks.rank}: expected the {what} of rank 0 ({key} "
                f"{order.must_match[key]}), got others ({environment[key]})"
            )
    with _StopSignal() as stop:
        trainer.run(None, stop, None, order.checkpoint)


def _run_resolved(config: Config, call: _Call) -> Result | Results:
    for caution in cautions(config):
        warnings.warn(f"[config] {caution}", stacklevel=5)
    if config.resume and config.output is None:
        raise ValueError("[config] 'resume': expected an 'output' to go on with, got none")
    call.ranks.begin(config.device)
    if config.seeds is not None:
        return seeds.run_seeds(config, lambda one: _run_one(one, call))
    return _run_one(config, call)


def _run_one(config: Config, call: _Call) -> Result:
    """One run; with `config.resume` the one that its folder holds."""
    if config.resume:
        config = config.model_copy(update={"resume": False})
        path = Path(str(config.output)).expanduser()
        RunFolder.check_run(path)
        if RunFolder.is_run(path):
            return _go_on(config, call)
    _check_arrays(config, call.arrays)
    folder = RunFolder.reserve(config)
    try:
        trainer, environment = _prepare(config, call)
        folder.begin(config, environment)
    except BaseException:
        folder.discard()
        raise
    return _run(config, trainer, folder, call, environment)


def _go_on(config: Config, call: _Call) -> Result:
    """The run in `config.output`, which holds one."""
    path = Path(str(config.output)).expanduser()
    check_same(config, path / "config.toml")
    folder = RunFolder.reopen(path)
    with folder:
        if folder.finished:
            folder.checkpoints.clear()
            return load_run(path)
        check_method(config.method)
        _check_arrays(config, call.arrays)
        checkpoint = folder.checkpoints.latest()
        if checkpoint is None:
            logger.warning("[resume] '%s' has no checkpoint yet: the run begins anew", path)
        with if_missing("what has moved is found by dataset (--dataset), data_root or weights"):
            trainer, environment = _prepare(config, call)
        _check_environment(config, environment, folder.environment())
        folder.go_back(checkpoint.log_bytes if checkpoint else 0)
        return _run(config, trainer, folder, call, environment, checkpoint)


def _check_arrays(config: Config, arrays: Mapping[str, Any] | None) -> None:
    if config.dataset == ARRAYS and arrays is None:
        raise ValueError(
            '[config] \'dataset\': expected the arrays {"train": (images, labels), "test": ...}, '
            "as a file does not hold them, got 'arrays'"
        )


def _check_environment(config: Config, now: Mapping[str, Any], begun: Mapping[str, Any]) -> None:
    for key, what in _MUST_MATCH.items():
        if now[key] != begun.get(key):
            raise ValueError(
                f"[resume] expected the {what} that the run was begun with ({key} "
                f"{begun.get(key)!s:.80}), got others ({now[key]})"
            )
    may_round = ("ntkcl", "torch", "cpu", "gpu", "ranks")
    for key in (*may_round, *(["threads"] if config.threads == 0 else [])):
        if now[key] != begun.get(key, now[key]):
            logger.warning(
                "[resume] %s: %s, the run was begun with %.80s: the result may differ from an "
                "uninterrupted run's in the last bits",
                *(key, now[key], begun.get(key)),
            )


def _prepare(config: Config, call: _Call) -> tuple[_C.Trainer, dict[str, Any]]:
    if config.tensorboard:
        summary_writer()  # refuses before there is a folder
    memory.forget_peak(config.device)
    dataset = load_dataset(
        config.dataset if call.arrays is None else call.arrays,
        config.data_root,
        train_per_class=config.train_per_class,
        test_per_class=config.test_per_class,
    )
    weights = load_backbone(config.backbone, config.weights)
    order = _class_order(config, len(dataset.class_names))
    return (
        _make_trainer(config, dataset, weights, order, call.ranks.groups(config.device)),
        _environment(weights, dataset, order, call.ranks),
    )


def _run(
    config: Config,
    trainer: _C.Trainer,
    folder: RunFolder,
    call: _Call,
    environment: Mapping[str, Any],
    checkpoint: Checkpoint | None = None,
) -> Result:
    happened = False
    place = checkpoint.for_core() if checkpoint else None
    order = Order(config, {key: environment[key] for key in _MUST_MATCH}, place)
    try:
        with folder, make_progress(config.progress) as progress, _StopSignal() as stop:
            board = [TensorBoardLog(folder.path / "tensorboard")] if config.tensorboard else []
            listeners = _Listeners([*call.callbacks, *board], stop)

            def on_event(event: dict[str, Any]) -> None:
                nonlocal happened
                happened = True
                folder.record(event)
                if event["event"] == "warning":
                    logger.warning(event["message"])
                progress(event)
                listeners(event)

            call.ranks.order(order)
            with listeners.raising(), call.ranks.training():
                raw = trainer.run(on_event, stop, folder.save, place)
            raw["peak_memory"] = memory.peak_bytes(config.device)
            result = result_of(raw, folder.path, config)
            folder.finish(result, raw)
        return result
    except BaseException as error:
        note = f"what was finished is in '{folder.path}'"
        # Not where it would happen again, or an error comes before anything else.
        stopped = isinstance(error, KeyboardInterrupt)
        if (happened or stopped) and not isinstance(error, FloatingPointError):
            note += f"; go on with {way_on(folder.path, config.method)}"
        error.add_note(note)
        raise


def _make_trainer(
    config: Config,
    dataset: Dataset,
    weights: Weights,
    class_order: list[int],
    group: tuple[str, str] | None = None,
) -> _C.Trainer:
    backbone = backbone_info(config.backbone)
    transformer = _C.VisionTransformer(weights.tensors, backbone.heads, config.image_size)
    return _C.Trainer(
        core_method(config.method),
        config.method_options(),
        config.train_options(),
        transformer,
        {
            "train": dataset.train,
            "test": dataset.test,
            "class_order": class_order,
        },
        config.transform_options(),
        config.loader_options(),
        *config.mean_std(),
        group=group,
    )


def _class_order(config: Config, count: int) -> list[int]:
    order = config.class_order
    if order == "natural":
        return list(range(count))
    if order == "seed":
        seed = config.seed if config.class_order_seed is None else config.class_order_seed
        return [int(index) for index in _C.numpy_permutation(seed, count)]
    if len(order) != count:
        raise ValueError(
            f"[config] 'class_order': expected {count} class indices, as '{config.dataset}' has "
            f"classes, got {len(order)}"
        )
    return [int(index) for index in order]


def _environment(
    weights: Weights, dataset: Dataset, class_order: list[int], ranks: Ranks
) -> dict[str, Any]:
    return {
        **info(),
        "weights": str(weights.path),
        "weights_sha256": weights.sha256,
        "dataset_manifest": dataset.manifest_hash,
        "git_commit": _git_commit(),
        "ranks": ranks.size,
        "classes": [dataset.class_names[index] for index in class_order],  # as learned
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Commit of the folder that the run was started in."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


class _StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request that the task loop asks for after every
    step; the second one interrupts at once. Only the main thread can listen to signals."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self._asked

    def ask(self) -> None:
        """Stops the run after the step under way."""
        self._asked = True

    def _ask(self, _signal: int, _frame: FrameType | None) -> None:
        self.ask()
        for number in self._before:
            signal.signal(number, signal.default_int_handler)


class _Listeners:
    """Those who hear every event. One that fails stops the run, which saves what was learned; its
    error is raised then."""

    def __init__(self, listeners: Iterable[Callback], stop: _StopSignal) -> None:
        self._listeners = list(listeners)
        self._stop = stop
        self._failure: Exception | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        if self._failure is not None:
            return
        try:
            if True in [listener(event) for listener in self._listeners]:
                self._stop.ask()
        except Exception as failure:
            self._failure = failure
            self._stop.ask()

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Raises what a listener has raised within, in place of the stop that it led to."""
        try:
            yield
        except KeyboardInterrupt:
            if self._failure is None:
                raise
        if self._failure is not None:
            raise self._failure


def _document_train() -> None:
    """Adds every key to the signature and the docstring of `train`, for help() and completion."""
    lines = [train.__doc__ or "", "    Keys:"]
    parameters = [
        inspect.Parameter("config", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    ]
    for option in _config.options():
        allowed = f", {option.allowed}" if option.allowed else ""
        lines.append(f"      {option.key} ({option.type}{allowed}): {option.doc}.")
        lines[-1] += f" Default: {option.default!r}."
        if "." not in option.key:
            parameters.append(
                inspect.Parameter(
                    option.key, inspect.Parameter.KEYWORD_ONLY, default=option.default
                )
            )
    train.__doc__ = "\n".join(lines)
    sections = [
        inspect.Parameter(
            _config.method_section(name), inspect.Parameter.KEYWORD_ONLY, default=None
        )
        for name in list_methods()
    ]
    train.__signature__ = inspect.Signature(parameters + sections)  # type: ignore[attr-defined]


_document_train()
