"""Kills training runs and lets them go on: their results must be as if nothing had been.

    python tests/python/kill_harness.py --runs 100 --folder build/kills

Every run is `ntkcl train --resume` on the digits, of one method after the other. SIGKILL comes once
or more at places drawn beforehand, and what is left in the end must equal an uninterrupted run to
the bit, with no file more. A run counts when it is finished and was killed. With a folder the
harness itself goes on after Ctrl-C, which prints the counts so far.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run_comparison import differences

OWN = "own-method"  # in Python: the example's
METHODS: dict[str, dict[str, object]] = {
    "ntk-cl": {"ntk-cl.mode": "both"},
    OWN: {},
    "lorac-ipc": {},
    "raa": {},
    "ranpac": {"ranpac.projection": 64, "ranpac.ridge": 1.0},
    "ease": {},
    "fine-tune": {},
}
KEYS = {
    "train-per-class": 24,
    "test-per-class": 6,
    "epochs": 3,
    "threads": 1,
    "loader-threads": 1,
    "checkpoint-steps": 2,
    "progress": "false",
}
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
REGISTER_AND_RUN = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import ntkcl.cli, own_method
ntkcl.register({OWN!r}, lambda: own_method.RidgeOfRandomFeatures(projections=64))
ntkcl.cli.main()
"""
PLACES = ("training", "statistics", "evaluation", "checkpoint writing")
AT_THE_END = "after the last task"
STRAY = "is in one of them alone"  # what `differences` says of a file
POLL = 0.002  # seconds


@dataclasses.dataclass
class Killed:
    """A finished run: the places of its kills, and what differs from the uninterrupted one."""

    method: str
    kills: list[str]
    differences: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills-a-run", type=int, default=3, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keeps the finished runs' record")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "killed.jsonl"
        lines = record.read_text().splitlines() if record.exists() else []
        runs = [Killed(**json.loads(line)) for line in lines][: arguments.runs]
        try:
            while len(runs) < arguments.runs:
                method = list(METHODS)[len(runs) % len(METHODS)]
                draws = random.Random(f"{arguments.seed} {len(runs)}")
                runs.append(killed_run(method, folder, draws, arguments.kills_a_run))
                with record.open("a") as log:
                    log.write(json.dumps(dataclasses.asdict(runs[-1])) + "\n")
                report(runs[-1], len(runs))
        except KeyboardInterrupt:
            print("stopped")
    sys.exit(not summary(runs, arguments.runs))


def report(run: Killed, number: int) -> None:
    result = "; ".join(run.differences) or "equal"
    print(f"{number} {run.method}, killed in {', '.join(run.kills)}: {result}", flush=True)


def summary(runs: list[Killed], wanted: int) -> bool:
    """Prints the counts; whether all runs that were wanted are there and equal."""
    places = collections.Counter(place for run in runs for place in run.kills)
    print(f"{len(runs)} finished runs of {wanted}, each killed at least once")
    print(f"{places.total()} kills")
    for place in (*PLACES, AT_THE_END):
        print(f"{places[place]:5}  {place}")
    equal = sum(not run.differences for run in runs)
    stray = sum(found.endswith(STRAY) for run in runs for found in run.differences)
    print(f"{equal} of {len(runs)} results equal to the bit, {stray} stray files")
    return equal == wanted


# ---- One run -------------------------------------------------------------------------------------


def killed_run(method: str, folder: Path, draws: random.Random, most: int) -> Killed:
    """Begins a run, kills it once or more, lets it finish and compares it."""
    reference, output = folder / f"{method}-uninterrupted", folder / "killed"
    if not (reference / "result.json").exists():
        finish(command(method, reference))
    seconds = json.loads((reference / "result.json").read_text())["seconds"]
    kills: list[str] = []
    while not kills:
        shutil.rmtree(output, ignore_errors=True)
        for _ in range(draws.randint(1, most)):
            place = kill(command(method, output), output, draws.choice(PLACES), draws, seconds)
            kills += [place] if place else []
    finish(command(method, output))
    return Killed(method, kills, differences(reference, output))


def command(method: str, output: Path) -> list[str]:
    start = ["-c", REGISTER_AND_RUN] if method == OWN else ["-m", "ntkcl"]
    keys = {"method": method, "output": output, **KEYS, **METHODS[method]}
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return [sys.executable, *start, "train", "--resume", *words]


def finish(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def kill(
    words: list[str], output: Path, place: str, draws: random.Random, seconds: float
) -> str | None:
    """Kills a run at the first such place after a random while; where it was, none where it had
    ended before."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_events(process, output)
        moment = time.monotonic() + draws.uniform(0, seconds)
        while process.poll() is None and not (
            time.monotonic() > moment and place_of(output) == place
        ):
            time.sleep(POLL)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if process.returncode == -signal.SIGKILL:
        return place_of(output)
    assert process.returncode == 0, f"exit code {process.returncode} of {words}"
    return None


def wait_for_events(process: subprocess.Popen[bytes], output: Path) -> None:
    """Until a run has begun: before that there is nothing to lose."""
    log = output / "events.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    while process.poll() is None and (not log.exists() or log.stat().st_mtime_ns == before):
        time.sleep(POLL)


def place_of(output: Path) -> str:
    """By what there is on the disk: a checkpoint half-written, or the last whole event."""
    try:
        names = [path.name for path in (output / "checkpoint").iterdir()]
    except FileNotFoundError:  # not yet, or put aside for the next one
        names = []
    whole = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    if any(name.partition(".")[0] not in whole for name in names):
        return "checkpoint writing"
    log = (output / "events.jsonl").read_text()
    events = [json.loads(line) for line in log[: log.rfind("\n") + 1].splitlines()]
    if not events:
        return "training"
    last = events[-1]
    if last["event"] == "task_end" and last["task"] + 1 == events[0]["tasks"]:
        return AT_THE_END
    if "evaluation" in (last["event"], last.get("name")):
        return "evaluation"
    trained = last["event"] == "epoch" and last["epoch"] + 1 == last["epochs"]
    return "statistics" if trained or last["event"] == "stage" else "training"


if __name__ == "__main__":
    main()
