"""The parts of RAA that stand already, against its golden files: float64 and float32."""

from __future__ import annotations

import pytest
import torch

import golden
from ntkcl import _C

DTYPES = [torch.float64, torch.float32]
KINDS = {
    "": {"optimizer": "sam+"},
    "global.": {"optimizer": "sam+", "gamma": "global"},
    "sam.": {"optimizer": "sam"},
}
# The README's float32 figure for parameters after a step: gamma magnifies errors of the cosine.
STEP, SHIFT = 1e-3, 1e-5


def load(name: str) -> golden.Golden:
    return golden.load("raa", name)


def sam_options(config: dict, **kind) -> dict:
    names = {"momentum": "momentum", "rho": "rho", "tau": "tau", "wd": "weight_decay"}
    return {ours: config[theirs] for theirs, ours in names.items()} | kind


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", KINDS)
def test_sam_steps(prefix, dtype):
    g = load("sam")
    count, steps = g.config["n_tensors"], g.config["steps"]
    theta = [g[f"theta0.t{j}"].to(dtype).requires_grad_() for j in range(count)]
    optimizer = _C.make_optimizer(sam_options(g.config, **KINDS[prefix]), theta)
    assert optimizer.passes == 2
    for step in range(steps):
        passes = []

        def gradients(index: int, step: int = step, passes: list[int] = passes) -> None:
            passes.append(index)
            # Up to its first step the parameters are the same for all kinds.
            if index == 1 and (prefix == "" or step == 0):
                for j, tensor in enumerate(theta):
                    g.check(f"{step}.perturbed.t{j}", tensor, STEP)
            for j, tensor in enumerate(theta):
                gradient = g[f"{step}.g{index + 1}.t{j}"].to(dtype)
                tensor.grad = gradient if gradient.any() else None

        optimizer.set_learning_rate(g["lr"][step].item())
        optimizer.step(gradients)
        assert passes == [0, 1]
        for j, tensor in enumerate(theta):
            g.check(f"{prefix}{step}.theta.t{j}", tensor, STEP)
            if prefix == "":
                g.check(f"{step}.v.t{j}", optimizer.state()[f"parameters.{j}.momentum"], STEP)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sgd_steps(dtype):
    g = load("sam")
    theta = [g[f"theta0.t{j}"].to(dtype) for j in range(g.config["n_tensors"])]
    options = {"momentum": g.config["momentum"], "weight_decay": g.config["wd"]}
    optimizer = _C.make_optimizer(options, theta)
    for step in range(g.config["steps"]):

        def gradients(_: int, step: int = step) -> None:
            for j, tensor in enumerate(theta):
                tensor.grad = g[f"{step}.g2.t{j}"].to(dtype)

        optimizer.set_learning_rate(g["lr"][step].item())
        optimizer.step(gradients)
        for j, tensor in enumerate(theta):
            g.check(f"sgd.{step}.theta.t{j}", tensor, STEP)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prototypes_and_their_drift(dtype):
    g = load("proto_drift")
    labels = g["y"]
    first = int(labels.min())
    means = _C.ClassMeans(first, len(g["mu"]), g["f"].shape[1])
    means.add(g["f"].to(dtype), labels)
    g.check("mu", means.result(dtype), SHIFT)
    before, old = g["drift.F_old"].to(dtype), g["drift.mu"].to(dtype)
    settings = g.config["sigma"], g.config["floor"]
    for pairing in ("paired", "unpaired"):
        after = g[f"drift.F_new_{pairing}"].to(dtype)
        shift = _C.gaussian_drift(before, after, old, *settings)
        g.check(f"drift.shift_{pairing}", shift, SHIFT)


def test_protocol():
    g = load("protocol")
    for name, order in g.under("order.").items():
        classes, seed = map(int, name.split("."))
        assert _C.numpy_permutation(seed, classes) == order.tolist(), name
    for name, sizes in g.under("sizes.").items():
        assert _C.split_classes(*map(int, name.split("."))) == sizes.tolist(), name
    for name, rates in g.under("lr.").items():
        epochs = int(name)
        ours = [_C.learning_rate_at({}, 0.01, epoch, epochs) for epoch in range(epochs)]
        assert ours == pytest.approx(rates.tolist(), rel=1e-12), name


def test_metrics():
    g = load("protocol")
    labels, scores = g["metric.y"], g["metric.logits"]
    old = int(g["metric.nb_old"])
    evaluation = _C.Evaluation([old, scores.shape[1] - old], 1)
    evaluation.add(labels, scores)
    assert evaluation.top1 == pytest.approx(g["metric.top1"].item())
    assert evaluation.top5 == pytest.approx(g["metric.top5"].item())
    assert evaluation.old_classes == pytest.approx(g["metric.old_rounded"].item(), abs=0.005001)
    assert evaluation.new_classes == pytest.approx(g["metric.new_rounded"].item(), abs=0.005001)
    assert _C.forgetting(g["metric.matrix"]) == pytest.approx(g["metric.forgetting"].item())
