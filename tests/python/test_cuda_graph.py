"""Runs whose training steps are replayed (cuda_graph = true). On the CPU the same steps run from
the same buffers, so that all but the graph itself is tested there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from run_comparison import differences
from test_resume import resume, stop_after
from test_training import events, train

# Five full batches an epoch and a short one.
MANY = {"batch_size": 3, "epochs": 2, "transform": "inception"}
REPEATING: dict[str, dict[str, Any]] = {
    "ntk-cl": {"method": "ntk-cl", "ntk_cl": {"mode": "both", "frozen_lists": 2}},
    "ntk-cl release": {"method": "ntk-cl", "variant": "release", "initial_classes": 4},
    "ntk-cl adamw": {"method": "ntk-cl", "optimizer": "adamw", "precision": "bfloat16"},
    "raa": {"method": "raa", "initial_epochs": 2},
    "raa release": {"method": "raa", "variant": "release", "initial_epochs": 2},
    "ranpac": {"method": "ranpac", "initial_epochs": 2, "ranpac": {"projection": 64}},
    "ease": {"method": "ease"},
    "fine-tune": {"method": "fine-tune", "fine_tune": {"peft": "lora"}},
    "joint": {"method": "joint", "joint": {"head": "linear"}},
}
OTHERS: dict[str, dict[str, Any]] = {
    "lorac-ipc": {"method": "lorac-ipc"},
    "simple-cil": {"method": "simple-cil"},
}


def assert_replayed_steps_learn_the_same(folder: Path, **keywords: Any) -> None:
    train(folder / "plain", **(MANY | keywords))
    train(folder / "replayed", **(MANY | keywords), cuda_graph=True)
    assert differences(folder / "plain", folder / "replayed") == ["config.toml differs"]


@pytest.mark.parametrize("keywords", REPEATING.values(), ids=REPEATING.keys())
def test_replayed_steps_learn_the_same_to_the_bit(tmp_path: Path, keywords: dict[str, Any]) -> None:
    # Protects: every draw, label and pixel of a step reaches it by a place that stays.
    assert_replayed_steps_learn_the_same(tmp_path, **keywords)


@pytest.mark.parametrize("keywords", OTHERS.values(), ids=OTHERS.keys())
def test_methods_whose_steps_do_not_repeat_run_as_ever(
    tmp_path: Path, keywords: dict[str, Any]
) -> None:
    assert_replayed_steps_learn_the_same(tmp_path, **keywords)


def test_a_loss_that_is_not_finite_names_its_step_though_it_is_read_later(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"loss '\w+' is .* at step 1 of task 0 .epoch 0"):
        train(tmp_path / "run", **MANY, learning_rate=1e30, cuda_graph=True)
    assert [event["step"] for event in events(tmp_path / "run", "step")] == [0]


@pytest.mark.parametrize("stop_at", [2, 7, 9])
def test_a_stopped_run_goes_on_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    # Protects: what is reported late is in the checkpoint, and a graph can be begun at any step.
    keys = MANY | {"method": "ntk-cl", "cuda_graph": True, "checkpoint_steps": 1}
    train(tmp_path / "whole", **keys)
    with monkeypatch.context() as patch:
        stop_after(patch, stop_at)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped", **keys)
    resume(tmp_path / "stopped")
    assert differences(tmp_path / "whole", tmp_path / "stopped") == []


@pytest.mark.parametrize("keywords", (REPEATING | OTHERS).values(), ids=(REPEATING | OTHERS).keys())
def test_graphs_on_a_gpu_learn_what_plain_steps_learn(
    tmp_path: Path, cuda: torch.device, keywords: dict[str, Any]
) -> None:
    assert_replayed_steps_learn_the_same(tmp_path, **keywords, device=cuda.type)


@pytest.mark.parametrize("method", ["ntk-cl", "lorac-ipc", "raa"])
def test_a_gpu_learns_what_the_cpu_learns(tmp_path: Path, cuda: torch.device, method: str) -> None:
    keys = MANY | {"method": method, "precision": "float64"}
    on_cpu = train(tmp_path / "cpu", **keys)
    on_gpu = train(tmp_path / "gpu", **(keys | {"device": cuda.type}))
    of_cpu, of_gpu = (events(result.output, "step") for result in (on_cpu, on_gpu))
    for expected, got in zip(of_cpu, of_gpu, strict=True):
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("transform", ["inception", "cifar", "cars", "resize"])
def test_views_made_by_a_gpu_are_those_of_the_threads(
    tmp_path: Path, cuda: torch.device, transform: str
) -> None:
    keys = MANY | {"transform": transform, "device": cuda.type}
    for augment_on in ("threads", "device"):
        train(tmp_path / augment_on, **keys, augment_on=augment_on)
    assert differences(tmp_path / "threads", tmp_path / "device") == ["config.toml differs"]
