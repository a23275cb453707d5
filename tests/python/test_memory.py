"""The peak of memory is that of a run, on the device that it runs on: not of what the process did
before."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fake_core
import ntkcl
from ntkcl import _C, memory

MUCH = 400 * 2**20  # bytes


def use_much() -> None:
    assert np.ones(MUCH, np.uint8)[-1] == 1


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the system counts since the start"
)
def test_a_run_does_not_count_what_was_used_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class UsesMuch(fake_core.FakeTrainer):
        def run(self, *arguments: Any) -> dict[str, Any]:
            use_much()
            return super().run(*arguments)

    def peak(trainer: type[fake_core.FakeTrainer], name: str) -> int:
        monkeypatch.setattr(_C, "Trainer", trainer)
        keywords = {"device": "cpu", "output": tmp_path / name, "progress": False}
        return int(ntkcl.train(**keywords).peak_memory)

    little = peak(fake_core.FakeTrainer, "first")
    much = peak(UsesMuch, "second")
    assert much > little + MUCH // 2
    use_much()
    assert peak(fake_core.FakeTrainer, "third") < much - MUCH // 2


def test_on_a_gpu_it_is_the_gpus_and_is_counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("init", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory.forget_peak("cpu")
    assert calls == []
    assert memory.peak_bytes("cpu") > 2**20
    for device in ("auto", "cuda"):
        memory.forget_peak(device)
        assert memory.peak_bytes(device) == 7
    assert calls == ["init", "empty_cache", "reset_peak_memory_stats"] * 2


def test_a_gpu_counts_anew(cuda: torch.device) -> None:
    block = torch.zeros(MUCH, dtype=torch.uint8, device=cuda)
    del block
    memory.forget_peak("cuda")
    assert memory.peak_bytes("cuda") < MUCH


def test_where_linux_does_not_tell_it_is_the_process_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> str:
        raise PermissionError("no /proc")

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    memory.forget_peak("cpu")
    assert memory.peak_bytes("cpu") > 2**20
