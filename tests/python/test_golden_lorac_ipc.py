"""The parts of LoRAC-IPC that stand already, against its golden files."""

from __future__ import annotations

import re

import pytest
import torch

import golden
from ntkcl import _C


def test_learning_rates():
    g = golden.load("lorac_ipc", "schedule_metrics")
    for name, rates in g.under("lr/").items():
        base, epochs = re.fullmatch(r"lr([\d.]+)_epochs(\d+)", name).groups()
        groups = [
            _C.ParameterGroup("adapters", [torch.zeros(1)]),
            _C.ParameterGroup("omega", [torch.zeros(1)], learning_rate_scale=0.1),
        ]
        optimizer = _C.make_optimizer({"optimizer": "adam"}, groups)
        schedule = {"hold_epochs": 1, "min_learning_rate": 1e-5}
        for epoch, expected in enumerate(rates.tolist()):
            _C.schedule_learning_rates(optimizer, schedule, float(base), epoch, int(epochs))
            ours = [optimizer.learning_rate(group) for group in range(2)]
            assert ours == pytest.approx(expected, rel=1e-12), (name, epoch)


def test_metrics():
    g = golden.load("lorac_ipc", "schedule_metrics")
    # Stored with a row for each test set.
    matrix = g["metrics/acc_matrix"].t()
    averages = []
    for task, (average, forgetting, backward) in enumerate(
        g["metrics/average_forgetting_backward"].tolist()
    ):
        seen = matrix[: task + 1, : task + 1]
        averages.append(average)
        assert seen[task].mean().item() == pytest.approx(average)
        assert _C.forgetting(seen) == pytest.approx(forgetting)
        assert _C.backward_transfer(seen) == pytest.approx(backward)
    assert sum(averages) / len(averages) == pytest.approx(g["metrics/cumulative"].item())
