"""Variants of one computation, each in a process of its own, asked by turns.

A benchmark starts itself again with ``--worker <variant>``; the worker calls `serve`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Answers = Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]


@dataclass
class Process:
    """A worker and what it has measured."""

    name: str
    script: str  # the benchmark
    options: Mapping[str, object]  # its own, for the worker as well
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: list[Any] = field(default_factory=list)

    def __enter__(self) -> Process:
        command = [sys.executable, self.script, "--worker", self.name]
        for key, value in self.options.items():
            command += [f"--{key}", str(value)]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def ask(self, do: str, **more: object) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps({"do": do, **more}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the process ended ({self.process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        return answer

    @property
    def best(self) -> float:
        return min(self.seconds)


Difference = dict[str, float]


def verify(
    processes: list[Process],
    tolerance: Callable[[str], float],
    smallest: Callable[[dict[str, torch.Tensor]], float],
    skipped: Callable[[str], bool] = lambda _: False,
) -> dict[str, Difference]:
    """Asks each for the "losses" and "gradients" of one step and compares them with the first's.

    Returns the largest relative differences, which must be below tolerance(name of the process).
    A gradient's is that of its norm, or of `smallest` of all gradients where that is larger;
    gradients whose names are `skipped` do not count.
    """
    found: dict[str, Difference] = {}
    with tempfile.TemporaryDirectory() as folder:
        for process in processes:
            path = f"{folder}/{process.name}"
            losses, gradients = process.ask("verify", to=path)["losses"], load_file(path)
            if not found:
                expected_losses, expected = losses, gradients
                least = smallest(expected)
            assert set(gradients) == set(expected), f"{process.name} has other gradients"
            error = {
                "losses": max(
                    abs(losses[name] - value) / max(abs(value), 1.0)
                    for name, value in expected_losses.items()
                ),
                "gradients": max(
                    float((gradients[name] - g).norm() / g.norm().clamp_min(least))
                    for name, g in expected.items()
                    if not skipped(name)
                ),
            }
            found[process.name] = error
            assert all(e < tolerance(process.name) for e in error.values()), (
                f"{process.name} differs: {error}"
            )
    return found


def by_turns(processes: list[Process], rounds: int) -> None:
    """Each once in every round; a process that is called "floor" answers to that."""
    for _ in range(rounds):
        for process in processes:
            answer = process.ask("floor" if process.name == "floor" else "time")
            process.seconds.append(answer["seconds"])


def serve(answers: Answers) -> None:
    """Answers lines of JSON on standard input, one command each, until it is closed."""
    # The one of torch's default settings that plain does not keep: on GPUs convolutions, unlike
    # products, round to TF32, and its losses would not be float32's.
    torch.backends.cudnn.allow_tf32 = False
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(answers[command.pop("do")](command)), flush=True)


@cache
def float32_settings(device: str) -> tuple[str, ...]:
    """Settings of torch.set_float32_matmul_precision under which float32 products are float32.

    "medium" is, and faster, where torch's other library knows a processor better; on processors
    with AMX it computes in bfloat16.
    """
    if device != "cpu":
        return ("highest",)
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ x.double().t()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    error = ((x @ x.t()).double() - exact).norm() / exact.norm()
    torch.set_float32_matmul_precision(before)
    return ("highest", "medium") if error < 1e-5 else ("highest",)


def timed(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory(device: str, reset: bool = False) -> int:
    """Bytes: largest resident set of this process (or most that torch held of the GPU, as what
    graphs keep for themselves belongs to no tensor between their steps)."""
    if device == "cuda":
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_reserved()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    key = "VmRSS:" if reset else "VmHWM:"
    return int(status.split(key)[1].split()[0]) * 1024


def append_result(arguments: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Appends the result, with versions and machine, to the file of --json as one line."""
    if not arguments.json:
        return
    import ntkcl

    machine = {
        "ntkcl": ntkcl.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "threads": arguments.threads,
        "rounds": arguments.rounds,
    }
    with arguments.json.open("a") as file:
        file.write(json.dumps({**machine, **result}) + "\n")
