"""A grid of settings, each point of it an ordinary run folder.

    output = "runs/eta"        # folder of all points; none: runs/<name of the file>

    [base]                     # keys that all points share
    epochs = 5
    seeds = [0, 1, 2]

    [grid]                     # every combination of these values is a point
    learning_rate = [0.01, 0.05]
    ntk_cl.eta = [0.03, 0.2]

    [[points]]                 # and points beside the grid
    method = "simple-cil"

Points run one after the other, in processes of their own, as a Slurm array or by Ray. Each goes on
where it was stopped, so that the same sweep again does what is left of it.

    <output>/<point>/          its run folder, or that of its seeds
    <output>/jobs/<point>.*    configuration and log of a point that ran in a process of its own
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ntkcl.api import run
from ntkcl.config import ARRAYS, Config, flatten, override, plain_value, read_toml, resolve, to_toml
from ntkcl.files import write_atomically
from ntkcl.methods import import_words
from ntkcl.names import did_you_mean
from ntkcl.progress import announce
from ntkcl.ranks import are_several
from ntkcl.result import Result, Results
from ntkcl.runfolder import RunFolder, check_same, load_run
from ntkcl.seeds import each_seed

Grid = Mapping[str, Any] | str | os.PathLike[str]

_LONGEST_NAME = 120  # of a folder; a file system takes 255 bytes
_PLACED = ("output", "resume")  # keys that a sweep sets itself
_POLL = 0.1  # seconds


class SweepError(RuntimeError):
    """Some points failed: `failures` by name; `results` are those of the others."""

    def __init__(
        self, results: dict[str, Result | Results], failures: dict[str, Exception]
    ) -> None:
        text = "; ".join(f"'{name}': {error}" for name, error in failures.items())
        count = len(results) + len(failures)
        super().__init__(f"[sweep] {len(failures)} of {count} points failed: {text}")
        self.results = results
        self.failures = failures


@dataclass(frozen=True, eq=False)
class Point:
    """One combination of settings, resolved, with its folder."""

    name: str  # "learning_rate=0.01,ntk_cl.eta=0.03", also of the folder
    config: Config

    @property
    def output(self) -> Path:
        return Path(str(self.config.output)).expanduser()

    @property
    def runs(self) -> dict[Path, Config]:
        """Its run folder, or one for each seed."""
        several = each_seed(self.config, self.output) or [self.config]
        return {Path(str(one.output)).expanduser(): one for one in several}

    @property
    def state(self) -> str:
        """ "finished", "begun", "1 of 3 seeds", or "-"."""
        done = sum(RunFolder(path, []).finished for path in self.runs)
        if done == len(self.runs):
            return "finished"
        if done:
            return f"{done} of {len(self.runs)} seeds"
        return "begun" if any(map(RunFolder.is_run, self.runs)) else "-"

    def check(self) -> None:
        """ValueError where it was begun with other settings."""
        for path, config in self.runs.items():
            if RunFolder.is_run(path):
                check_same(config, path / "config.toml")

    def load(self) -> Result | Results:
        """What it has given, when it is finished."""
        results = tuple(load_run(path) for path in self.runs)
        return results[0] if self.config.seeds is None else Results(results, self.output)


def sweep(grid: Grid, *, jobs: int = 1, ray: bool = False) -> dict[str, Result | Results]:
    """Runs every point of a grid, or what is left of it, and gives the results by their names.

    A point that fails does not stop the others.

    Args:
      grid: TOML file, or its content as a mapping: "output", "base" (keys of `train`), "grid" (a
        list of values for each key) and "points" (keys each). Arrays as "dataset" in "base" are
        for jobs=1.
      jobs: processes at a time; with 1 everything runs in this one. Processes share the processor:
        each computes with as many threads as come to it, unless `threads` or OMP_NUM_THREADS says
        how many.
      ray: run each point as a Ray task instead.

    Raises:
      ValueError, TypeError, FileNotFoundError: something given is wrong; nothing was run.
      SweepError: points failed.
      KeyboardInterrupt: Ctrl-C or SIGTERM; the same call goes on.
    """
    if are_several():
        raise ValueError("[sweep] expected a process alone, got one of several ranks")
    points, arrays = read_grid(grid)
    if jobs < 1:
        raise ValueError(f"[sweep] 'jobs': expected int >= 1, got {jobs}")
    if arrays is not None and (ray or jobs > 1):
        raise ValueError(
            "[sweep] 'dataset': expected a name or a path for several jobs, got arrays"
        )
    for point in points:
        point.check()
    try:
        if ray:
            failures = _by_ray(points)
        elif jobs > 1:
            failures = _in_processes(points, jobs)
        else:
            failures = _one_after_the_other(points, arrays)
    except KeyboardInterrupt as stop:
        stop.add_note("the same sweep again does what is left")
        raise
    results = {point.name: point.load() for point in points if point.name not in failures}
    if failures:
        raise SweepError(results, failures) from next(iter(failures.values()))
    return results


def read_grid(grid: Grid) -> tuple[list[Point], Mapping[str, Any] | None]:
    """The points in order (the grid's last key changes fastest), and arrays as data.

    Raises:
      ValueError, TypeError, FileNotFoundError: something is wrong in any of the points.
    """
    content, default = (grid, None) if isinstance(grid, Mapping) else (read_toml(grid), Path(grid))
    _check_parts(content)
    output = content.get("output", default and str(Path("runs") / default.stem))
    if not isinstance(output, (str, os.PathLike)) or not str(output):
        raise ValueError(f"[sweep] 'output': expected a folder, got {output!r}")
    base = dict(content.get("base", {}))
    arrays = base.get("dataset") if isinstance(base.get("dataset"), Mapping) else None
    if arrays is not None:
        base["dataset"] = ARRAYS
    points: dict[str, Point] = {}
    for settings in _settings(content):
        name = _name_of(settings)
        if name in points:
            raise ValueError(f"[sweep] expected each point once, got '{name}' twice")
        points[name] = Point(name, _resolved(name, base, settings, Path(output) / name))
    return list(points.values()), arrays


def write_slurm_script(grid: str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
    """Writes a job array for the grid as it is now, each task of it one point, and makes the folder
    of its logs, without which Slurm starts nothing."""
    points, _ = read_grid(grid)
    for point in points:
        point.check()
    jobs = _jobs_folder(points[0]).resolve()
    words = [sys.executable, "-m", "ntkcl", "sweep", str(Path(grid).resolve()), *import_words()]
    text = f"""#!/bin/bash
#SBATCH --job-name="ntkcl {Path(grid).stem}"
#SBATCH --array=0-{len(points) - 1}
#SBATCH --output="{jobs}/%a.log"
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
# Add what the cluster asks for: --partition, --time, --cpus-per-task, --gres.
# A point that was stopped goes on when this script is submitted again.

cd {shlex.quote(str(Path.cwd()))} || exit
exec {shlex.join(words)} --point "$SLURM_ARRAY_TASK_ID"
"""
    jobs.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(file).expanduser(), text.encode())


# ---- the grid ------------------------------------------------------------------------------------


def _check_parts(content: Mapping[str, Any]) -> None:
    kinds: dict[str, tuple[Any, str]] = {
        "output": (object, ""),
        "base": (Mapping, "a table of keys"),
        "grid": (Mapping, "a table of lists"),
        "points": (list, "a list of tables"),
    }
    for key, value in content.items():
        if key not in kinds:
            near = did_you_mean(key, kinds) or f"; expected one of: {', '.join(kinds)}"
            raise ValueError(f"[sweep] unknown key '{key}'{near}")
        if not isinstance(value, kinds[key][0]):
            raise TypeError(f"[sweep] '{key}': expected {kinds[key][1]}, got {value!r}")
    for settings in content.get("points", []):
        if not isinstance(settings, Mapping):
            raise TypeError(f"[sweep] 'points': expected a list of tables, got {settings!r} in it")
    if not content.get("grid") and not content.get("points"):
        raise ValueError("[sweep] expected a [grid] or [[points]], got none")


def _settings(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The keys in which each point differs from the base."""
    grid = flatten(content.get("grid", {}))
    for key, values in grid.items():
        if not isinstance(values, list):
            raise TypeError(f"[sweep] '{key}': expected a list of values, got {values!r}")
        if not values:
            raise ValueError(f"[sweep] '{key}': expected a list of values, got an empty one")
    if grid:
        for combination in itertools.product(*grid.values()):
            yield dict(zip(grid, combination, strict=True))
    for settings in content.get("points", []):
        yield flatten(settings)


def _resolved(
    name: str, base: Mapping[str, Any], settings: Mapping[str, Any], output: Path
) -> Config:
    given = flatten(base)
    for key in _PLACED:
        if key in given or key in settings:
            raise ValueError(
                f"[sweep] in point '{name}': expected no '{key}', as a sweep sets it, got one"
            )
    placed = {"output": str(output), "resume": True}
    try:
        return resolve(override(given, settings) | placed)
    except (ValueError, TypeError) as error:
        raise type(error)(f"[sweep] in point '{name}': {error}") from None


def _name_of(settings: Mapping[str, Any]) -> str:
    """Readable, and a folder's name everywhere."""
    pairs = [f"{key}={_text_of(plain_value(value))}" for key, value in settings.items()]
    name = re.sub(r"[^A-Za-z0-9_.,=+-]+", "-", ",".join(pairs)) or "base"
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(','.join(pairs).encode()).hexdigest()[:8]}"


def _text_of(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(_text_of, value)) if isinstance(value, list) else str(value)


# ---- running -------------------------------------------------------------------------------------


def _one_after_the_other(
    points: Sequence[Point], arrays: Mapping[str, Any] | None
) -> dict[str, Exception]:
    failures: dict[str, Exception] = {}
    for number, point in enumerate(points, start=1):
        announce(point.config.progress, f"{point.name}, {number} of {len(points)}")
        try:
            run(point.config, arrays)
        except Exception as error:
            failures[point.name] = error
            announce(point.config.progress, f"{point.name}: failed: {error}")
    return failures


def _in_processes(points: Sequence[Point], jobs: int) -> dict[str, Exception]:
    failures: dict[str, Exception] = {}
    stop = threading.Event()
    threads = max(1, torch.get_num_threads() // jobs)
    with _termination_interrupts(), ThreadPoolExecutor(jobs) as pool:
        try:
            futures = {
                pool.submit(_run_job, job, threads, stop.is_set): point
                for point, job in _jobs(points)
            }
            for future in as_completed(futures):
                _note(futures[future], future.result(), failures)
        except BaseException:
            stop.set()
            raise
    return failures


def _by_ray(points: Sequence[Point]) -> dict[str, Exception]:
    """One task a point, with a GPU where the cluster has some. Its machines share the files."""
    try:
        import ray
    except ImportError:
        raise ValueError(
            "[sweep] 'ray': expected Ray to be installed (pip install 'ntkcl[ray]'), got none"
        ) from None
    ray.init(ignore_reinit_error=True)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    task = ray.remote(_run_job).options(num_gpus=gpus, max_retries=0)
    tasks = [(point, task.remote(job)) for point, job in _jobs(points)]
    failures: dict[str, Exception] = {}
    try:
        for point, reference in tasks:
            _note(point, ray.get(reference), failures)
    except BaseException:
        for _, reference in tasks:
            ray.cancel(reference)
        raise
    return failures


@dataclass(frozen=True)
class _Job:
    """A point that runs in a process of its own."""

    command: tuple[str, ...]
    log: Path
    folder: Path  # where the process starts


def _jobs(points: Sequence[Point]) -> list[tuple[Point, _Job]]:
    """What is left to do; the configurations are written to files."""
    jobs = []
    for point in points:
        if point.state == "finished":
            continue
        file = (_jobs_folder(point) / f"{point.name}.toml").absolute()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, to_toml(point.config).encode())
        train = ("train", "--config", str(file), "--resume", *import_words())
        command = (sys.executable, "-m", "ntkcl", *train)
        jobs.append((point, _Job(command, file.with_name(f"{point.name}.log"), Path.cwd())))
    return jobs


def _run_job(
    job: _Job, threads: int | None = None, stopped: Callable[[], bool] = lambda: False
) -> str | None:
    """What went wrong, none where nothing did. When this is stopped, the process is asked to stop
    too, and writes its checkpoint."""
    if stopped():
        raise KeyboardInterrupt
    environment = dict(os.environ)
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=job.folder,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which tells them once
        )
        try:
            while process.poll() is None:
                if stopped():
                    raise KeyboardInterrupt
                time.sleep(_POLL)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        return f"ended by signal {-process.returncode}, see {job.log}"
    last = job.log.read_text(errors="replace").rstrip().rpartition("\n")[2]
    return f"{last.removeprefix('ntkcl: ')}, see {job.log}"


def _jobs_folder(point: Point) -> Path:
    return point.output.parent / "jobs"


def _note(point: Point, failure: str | None, failures: dict[str, Exception]) -> None:
    """Keeps what went wrong with a point, and tells how it ended."""
    if failure is not None:
        failures[point.name] = RuntimeError(failure)
    state = "finished" if failure is None else f"failed: {failure}"
    announce(point.config.progress, f"{point.name}: {state}")


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """SIGTERM as Ctrl-C, where signals can be listened to."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
