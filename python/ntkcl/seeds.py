"""Runs that differ in their seed alone: begun, stopped and gone on with as a whole.

seeds.toml   the resolved configuration, with its seeds
seed-0/ ...  an ordinary run each, see runfolder.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ntkcl.config import SEEDS_FILE, Config, resolve, to_toml
from ntkcl.files import write_atomically
from ntkcl.methods import way_on
from ntkcl.progress import announce
from ntkcl.result import Result, Results
from ntkcl.runfolder import RunFolder, check_free, check_same, load_run


def are_in(path: Path) -> bool:
    """Whether runs of several seeds were begun there."""
    return (path / SEEDS_FILE).is_file()


def each_seed(config: Config, folder: Path) -> list[Config]:
    """The configuration of each seed's run."""
    return [
        config.model_copy(
            update={"seeds": None, "seed": seed, "output": str(folder / f"seed-{seed}")}
        )
        for seed in config.seeds or ()
    ]


def run_seeds(config: Config, run: Callable[[Config], Result]) -> Results:
    """Runs each seed by `run`.

    With `config.resume` finished seeds give their results again, stopped ones go on, and seeds that
    the folder does not have are added to it.
    """
    folder, begun = _folder_of(config)
    new = [seed for seed in config.seeds or () if seed not in begun]
    runs = each_seed(config, folder.path)
    results = []
    try:
        if new:
            whole = config.model_copy(update={"seeds": begun + new, "resume": False})
            write_atomically(folder.path / SEEDS_FILE, to_toml(whole).encode())
        for number, one in enumerate(runs, start=1):
            announce(config.progress, f"seed {one.seed}, {number} of {len(runs)}")
            results.append(run(one))
    except BaseException as error:
        if not begun and not any(RunFolder.is_run(Path(str(one.output))) for one in runs):
            (folder.path / SEEDS_FILE).unlink(missing_ok=True)
            folder.discard()
        elif not isinstance(error, FloatingPointError):
            error.add_note(f"with all seeds by {way_on(folder.path, config.method)}")
        raise
    return Results(tuple(results), folder.path)


def load_result(folder: str | os.PathLike[str]) -> Result | Results:
    """The result of a finished run, read from its folder; of a folder of several seeds their
    `Results`. The method may be an own one that is not registered here.

    Raises:
      FileNotFoundError: no such folder, or its run did not finish.
      ValueError: result.json or a configuration is damaged.
    """
    path = Path(folder).expanduser()
    if not are_in(path):
        return load_run(path)
    runs = each_seed(_begun(path), path)
    return Results(tuple(load_run(Path(str(one.output))) for one in runs), path)


def _begun(path: Path) -> Config:
    """The configuration of the seeds in a folder."""
    return resolve(file=path / SEEDS_FILE, any_method=True)


def _folder_of(config: Config) -> tuple[RunFolder, list[int]]:
    """The folder of all seeds, and those that were begun there."""
    if config.output is None:
        return RunFolder.reserve(config), []
    path = Path(config.output).expanduser()
    if config.resume and are_in(path):
        check_same(config, path / SEEDS_FILE)
        return RunFolder(path, []), _begun(path).seeds or []
    if not config.resume:
        for one in each_seed(config, path):
            check_free(Path(str(one.output)))
    return RunFolder.reserve(config), []
