"""Kills training runs at random moments and lets them go on: they must end as if nothing had been.

    python tests/python/kill_harness.py --kills 100

Every run is `ntkcl train --resume`, one of three methods on the digits. SIGKILL comes at a moment
drawn from the length of the run, again and again until it has been killed the given number of
times; what is left in the end must equal an uninterrupted run to the bit, with no file more.
"""

from __future__ import annotations

import argparse
import collections
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run_comparison import differences

METHODS = ("ntk-cl", "lorac-ipc", "raa")
KEYS = {
    "train-per-class": 24,
    "test-per-class": 6,
    "epochs": 3,
    "threads": 1,
    "loader-threads": 1,
    "checkpoint-steps": 2,
    "progress": "false",
}
EXTRA = {"ntk-cl": {"ntk-cl.mode": "both"}, "lorac-ipc": {}, "raa": {}}
POLL = 0.002  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--kills-a-run", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draws = random.Random(arguments.seed)
    moments: collections.Counter[str] = collections.Counter()
    kills, equal, runs = 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        references = {method: Reference(method, Path(folder)) for method in METHODS}
        while kills < arguments.kills:
            reference = references[METHODS[runs % len(METHODS)]]
            output = Path(folder) / f"run-{runs}"
            for _ in range(min(arguments.kills_a_run, arguments.kills - kills)):
                moment = reference.kill_one(output, draws)
                moments[moment] += 1
                kills += moment != "not killed: it had ended"
            finish(command(reference.method, output))
            found = differences(reference.output, output)
            runs, equal = runs + 1, equal + (not found)
            print(f"{reference.method}: {'; '.join(found) or 'equal'}", flush=True)
    for moment, count in moments.most_common():
        print(f"{count:4}  {moment}")
    print(f"{kills} kills, {equal} of {runs} runs equal to the bit")
    sys.exit(equal < runs)


class Reference:
    """An uninterrupted run of a method, and how long it takes from first event to result."""

    def __init__(self, method: str, folder: Path) -> None:
        self.method = method
        self.output = folder / f"{method}-reference"
        process = subprocess.Popen(command(method, self.output), stdout=subprocess.DEVNULL)
        wait_for_events(process, self.output)
        begun = time.monotonic()
        while process.poll() is None and not (self.output / "result.json").exists():
            time.sleep(POLL)
        self.seconds = time.monotonic() - begun
        assert process.wait() == 0, f"{method}: the uninterrupted run failed"

    def kill_one(self, output: Path, draws: random.Random) -> str:
        """Kills a run after a while; what it was about."""
        process = subprocess.Popen(command(self.method, output), stdout=subprocess.DEVNULL)
        wait_for_events(process, output)
        begun = time.monotonic()
        try:
            process.wait(draws.uniform(0, self.seconds))
            self.seconds = min(self.seconds, time.monotonic() - begun)  # the machine is faster now
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            return moment_of(output)
        assert process.returncode == 0, f"{self.method}: exit code {process.returncode}"
        return "not killed: it had ended"


def command(method: str, output: Path) -> list[str]:
    keys = {"method": method, "output": output, **KEYS, **EXTRA[method]}
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "ntkcl", "train", "--resume", *words]


def wait_for_events(process: subprocess.Popen[bytes], output: Path) -> None:
    """Until a run has begun: before that there is nothing to lose."""
    log = output / "events.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    while process.poll() is None and (not log.exists() or log.stat().st_mtime_ns == before):
        time.sleep(POLL)


def finish(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def moment_of(output: Path) -> str:
    """By what a killed run has left: its last event, or a file half-written."""
    if (output / "result.json").exists():
        return "after the result"
    if list(output.glob(".*.tmp")):
        return "writing a file"
    if list((output / "checkpoint").glob(".*.tmp")):
        return "writing a checkpoint"
    lines = (output / "events.jsonl").read_text(errors="replace").splitlines()
    kind = lines[-1].partition('"event": "')[2].partition('"')[0] if lines else "begin"
    about = {"step": "training", "epoch": "training", "stage": "statistics or evaluation"}
    return about.get(kind, f"after {kind}")


if __name__ == "__main__":
    main()
