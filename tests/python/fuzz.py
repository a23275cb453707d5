"""Reads hostile files by the hundred thousand: each must be taken, or refused with a clear error.

    python tests/python/fuzz.py --inputs 100000                 # `make fuzz`: with sanitizers
    python tests/python/fuzz.py --replay build/fuzz/failures/FILE

Input n of a surface is drawn from the seed and n alone. One process reads them all; another watches
it, and starts it behind an input that it has died over or has been too long at. What fails is
written to build/fuzz/failures, under the name <surface>-<seed>-<number>.

A failure is: a crash, a report of a sanitizer, an exception that is not a refusal of the library's
own (tests/python/hostile_surfaces.py), more than SECONDS or MEBIBYTES for one input, or a file
written, a process started or a pickle's name looked up by a reader.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import importlib.util
import os
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hostile_surfaces import Surface

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 15.0  # for one input, twice
MEBIBYTES = 3072  # by which one input may raise the peak of memory: an image of 2^28 pixels
KEPT = 20  # failing inputs of a surface that are written


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="surfaces whose names begin so")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--core", type=Path, help="folder of another build's extension")
    parser.add_argument("--replay", type=Path, help="one file that failed")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.replay or arguments.worker:
        return work(arguments)
    return watch(arguments)


# ---- the process that reads ----------------------------------------------------------------------


def work(arguments: argparse.Namespace) -> int:
    """Reads the inputs from a place on, and tells the outcome of each in a line."""
    if arguments.core:
        use_core(arguments.core)
    import torch

    import hostile_surfaces

    faulthandler.enable()
    torch.set_num_threads(1)
    folder = arguments.work / "files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    surfaces = hostile_surfaces.make_surfaces(folder)
    guard = Guard(folder)
    if arguments.replay:
        name = arguments.replay.name.rsplit("-", 2)[0]
        print(hostile_surfaces.outcome(surfaces[name], arguments.replay.read_bytes()), *guard.seen)
        return int(bool(guard.seen))
    names = [n for n in surfaces if not arguments.only or n.startswith(tuple(arguments.only))]
    shares = sum(surfaces[name].share for name in names)
    begin = int(arguments.worker[1])
    for name in names[names.index(arguments.worker[0] or names[0]) :]:
        surface = surfaces[name]
        hostile_surfaces.outcome(surface, surface.seeds[0])  # imports and caches: no input's fault
        for number in range(begin, -(-arguments.inputs * surface.share // shares)):
            content = hostile_surfaces.input_of(surface, name, arguments.seed, number)
            (arguments.work / "current").write_bytes(content)
            print(f"begin\t{name}\t{number}", flush=True)
            began = time.perf_counter()
            found = watched_outcome(surface, content, guard)
            seconds = time.perf_counter() - began
            if found.startswith("FAILED"):
                keep(arguments, name, number)
            print(f"end\t{name}\t{number}\t{seconds:.6f}\t{found[:500]!r}", flush=True)
        begin = 0
    return 0


def watched_outcome(surface: Surface, content: bytes, guard: Guard) -> str:
    """The outcome of reading, with what the reader may not do."""
    from hostile_surfaces import outcome

    guard.seen.clear()
    before = peak_mebibytes()
    try:
        found = outcome(surface, content)
    except AssertionError as error:
        found = f"FAILED {place_of(error)}: {error}"
    grown = peak_mebibytes() - before
    if grown > MEBIBYTES:
        found = f"FAILED memory: {grown} MiB"
    return f"FAILED {guard.seen[0]}" if guard.seen else found


def use_core(folder: Path) -> None:
    """Takes the extension of another build for the installed one."""
    import torch  # noqa: F401  loads libtorch before our libraries

    (file,) = folder.glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("ntkcl._C", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["ntkcl._C"] = module


def place_of(error: AssertionError) -> str:
    """The last of our lines that the exception came through."""
    frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
    own = [frame for frame in frames if "ntkcl" in Path(frame.filename).parts]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "outside of ntkcl"


def peak_mebibytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


class Guard:
    """Sees what no reader of files may do, by Python's audit events."""

    _NEVER = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class",
              "socket.connect", "ctypes.dlopen", "os.kill")  # fmt: skip
    _CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link",
                "os.chmod", "shutil.rmtree")  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.seen: list[str] = []
        self._folder = os.path.realpath(folder)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self._NEVER:
            self.seen.append(f"{event}: {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[2], int):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self._check(event, arguments[:1])
        elif event in self._CHANGES and not (isinstance(arguments[-1], int) and arguments[-1] >= 0):
            # Without a folder's descriptor, which only rmtree gives.
            self._check(event, arguments[event in ("os.symlink", "os.link") :])

    def _check(self, event: str, arguments: tuple[Any, ...]) -> None:
        for path in arguments:
            if isinstance(path, str | bytes | os.PathLike):
                inside = os.path.realpath(os.fsdecode(path))
                if not f"{inside}/".startswith((f"{self._folder}/", "/dev/null")):
                    self.seen.append(f"{event} outside of the folder: {path!r}")


# ---- the process that watches --------------------------------------------------------------------


class Count:
    """What came of a surface's inputs."""

    def __init__(self) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.seconds = 0.0
        self.slowest = 0.0


def watch(arguments: argparse.Namespace) -> int:
    """Starts the reader as often as it takes, keeps what fails, prints the table."""
    failures = arguments.work / "failures"
    shutil.rmtree(failures, ignore_errors=True)
    failures.mkdir(parents=True)
    counts: dict[str, Count] = {}
    found: list[str] = []
    place: tuple[str, int] | None = ("", 0)
    while place is not None:
        place = watch_once(arguments, place, counts, found)
    print(table(counts), flush=True)
    total = sum((count.outcomes for count in counts.values()), collections.Counter())
    print(f"{total.total()} inputs, seed {arguments.seed}: {total['FAILED']} failures")
    return int(bool(found))


def watch_once(
    arguments: argparse.Namespace,
    place: tuple[str, int],
    counts: dict[str, Count],
    found: list[str],
) -> tuple[str, int] | None:
    """One life of the reader. Where the next one has to begin; None where all is read."""
    log = (arguments.work / "log.txt").open("w+b")
    at: tuple[str, int] | None = None
    hangs = False
    with subprocess.Popen(reader(place), stdout=subprocess.PIPE, stderr=log) as process:
        for line in lines_of(process):
            kind, *fields = line.split("\t")
            if kind == "begin":
                at = (fields[0], int(fields[1]))
            elif kind == "end":
                assert at is not None
                count = counts.setdefault(fields[0], Count())
                count.seconds += float(fields[2])
                count.slowest = max(count.slowest, float(fields[2]))
                note(arguments, at, fields[3][1:-1], count, found)
                at = None
            else:
                hangs = True
    log.seek(0)
    text = log.read().decode(errors="replace")
    log.close()
    if process.returncode == 0:
        return None
    if at is None:
        raise SystemExit(
            f"the reader ended between two inputs ({process.returncode}):\n{text[-4000:]}"
        )
    end = "took too long" if hangs else f"ended with {process.returncode}"
    report = [line for line in text.splitlines() if "ERROR" in line or "runtime error" in line]
    note(arguments, at, f"FAILED {end}: {' '.join(report[-2:])}", counts.setdefault(at[0], Count()),
         found)  # fmt: skip
    keep(arguments, *at).with_suffix(".log").write_text(text)
    return at[0], at[1] + 1


def reader(place: tuple[str, int]) -> list[str]:
    """The command that reads from a place on."""
    return [sys.executable, __file__, *sys.argv[1:], "--worker", place[0], str(place[1])]


def lines_of(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """What the reader says, until it ends or is killed for saying nothing for too long."""
    assert process.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    rest, limit = b"", 600.0  # it begins with imports and tiny runs
    while True:
        # Twice: all processes may have been stopped meanwhile.
        if not selector.select(limit) and not selector.select(limit):
            yield "hang"
            process.send_signal(signal.SIGABRT)  # tells where its threads are
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
            return
        got = os.read(process.stdout.fileno(), 1 << 16)
        if not got:
            return
        *lines, rest = (rest + got).split(b"\n")
        for line in lines:
            text = line.decode()
            limit = SECONDS if text.startswith("begin") else 600.0
            yield text


def note(
    arguments: argparse.Namespace, at: tuple[str, int], outcome: str, count: Count, found: list[str]
) -> None:
    if not outcome.startswith("FAILED"):
        count.outcomes[outcome] += 1
        return
    count.outcomes["FAILED"] += 1
    if count.outcomes["FAILED"] > KEPT:
        return
    found.append(f"{at[0]}-{arguments.seed}-{at[1]}: {outcome}")
    print(found[-1], flush=True)


def keep(arguments: argparse.Namespace, name: str, number: int) -> Path:
    """Keeps the input that is being read."""
    path: Path = arguments.work / "failures" / f"{name}-{arguments.seed}-{number}"
    if len(list(path.parent.glob(f"{name}-{arguments.seed}-*"))) < 2 * KEPT:
        shutil.copyfile(arguments.work / "current", path)
    return path


def table(counts: dict[str, Count]) -> str:
    """Markdown."""
    rows = ["| surface | inputs | accepted | refused | seconds | slowest, ms |",
            "|---|--:|--:|---|--:|--:|"]  # fmt: skip
    total = Count()
    for name, count in counts.items():
        rows.append(row(name, count))
        total.outcomes += count.outcomes
        total.seconds += count.seconds
        total.slowest = max(total.slowest, count.slowest)
    return "\n".join([*rows, row("all", total)])


def row(name: str, count: Count) -> str:
    refused = ", ".join(
        f"{kind} {number}" for kind, number in count.outcomes.most_common() if kind != "accepted"
    )
    inputs, accepted = sum(count.outcomes.values()), count.outcomes["accepted"]
    times = f"{count.seconds:.0f} | {1000 * count.slowest:.0f}"
    return f"| {name} | {inputs} | {accepted} | {refused} | {times} |"


if __name__ == "__main__":
    sys.exit(main())
