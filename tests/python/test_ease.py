"""EASE against NumPy and plain PyTorch, in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ntkcl import _C
from ntkcl.backbones import DEFAULT_BACKBONE, backbone_info, load_backbone
from reference_vit import adapted_features
from test_fine_tune import logits_by
from test_raa import backbone, task_images
from test_training import CLASSES, bare_trainer, same_bits

Array = NDArray[np.float64]
SMALL = {"rank": 4, "scale": 0.5}
KINDS = ["down.weight", "down.bias", "up.weight", "up.bias"]


def session(options: dict[str, Any] | None = None) -> _C.MethodSession:
    keys = {"precision": "float64", "optimizer": "sgd"}
    return _C.MethodSession("ease", SMALL | (options or {}), backbone(), 3, keys)


def begin(method: _C.MethodSession, task: int) -> tuple[Tensor, Tensor]:
    images, labels = task_images(task)
    method.begin_task(task, 2 * task, 2, 2, 16, images, labels, classes=CLASSES)
    return images, labels


def learn(method: _C.MethodSession, task: int) -> None:
    images, labels = begin(method, task)
    for _ in range(3):
        method.step(images, labels, 0.05)
    method.run_stages()


def adapters_of(state: dict[str, Tensor], task: int) -> dict[str, Tensor]:
    """The adapters of a task, by block."""
    stacked = {kind: state[f"adapters.{kind}"][task] for kind in KINDS}
    blocks = range(len(stacked["down.bias"]))
    return {f"{block}.{kind}": t[block] for kind, t in stacked.items() for block in blocks}


def subspace(state: dict[str, Tensor], task: int, images: Tensor) -> Tensor:
    weights = {k: t.double() for k, t in load_backbone(DEFAULT_BACKBONE).tensors.items()}
    heads = backbone_info(DEFAULT_BACKBONE).heads
    return adapted_features(weights, images, heads, adapters_of(state, task), SMALL["scale"])


def cosines(a: Array, b: Array) -> Array:
    product: Array = a @ b.T / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    return product


def test_a_later_step_equals_plain_pytorch() -> None:
    # Protects: the task's own adapters alone are trained, over its own classes.
    method = session({"logit_scale": 9.0})
    learn(method, 0)
    images, labels = begin(method, 1)
    method.step(images, labels, 0.05)
    state = method.state()
    step = method.step(images, labels, 0.0)
    leaves = {
        name: tensor.clone().requires_grad_()
        for name, tensor in state.items()
        if name.startswith(("adapters.", "head."))
    }
    features = subspace(leaves, 1, images)
    logits = logits_by("cosine", 9.0, features, leaves["head.weight"], leaves["head.bias"])
    expected = functional.cross_entropy(logits, labels - 2)
    expected.backward()
    assert step["losses"]["total"] == pytest.approx(expected.item(), rel=1e-10)
    assert len(step["gradients"]) == 5
    for kind, gradient in zip([*KINDS, "head"], step["gradients"], strict=True):
        name = "head.weight" if kind == "head" else f"adapters.{kind}"
        reference = leaves[name].grad
        assert reference is not None
        reference = reference if kind == "head" else reference[1]
        assert reference.abs().max() > 0
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_prototypes_and_scores_equal_numpy(alpha: float) -> None:
    # Protects: subspaces, the mapping of old prototypes, the weight of other tasks' subspaces.
    method = session({"alpha": alpha})
    prototypes: dict[tuple[int, int], Array] = {}  # of a class in a subspace
    for task in range(3):
        learn(method, task)
        state = method.state()
        images, labels = task_images(task)
        new = [2 * task, 2 * task + 1]
        for s in range(task + 1):
            features = subspace(state, s, images).numpy()
            for c in new:
                prototypes[c, s] = features[labels.numpy() == c].mean(0)
        for old in range(2 * task):
            own = old // 2
            there = np.stack([prototypes[c, own] for c in new])
            powers = np.exp(cosines(prototypes[old, own][None], there)[0])
            shares = powers / powers.sum()
            prototypes[old, task] = sum(
                share * prototypes[c, task] for share, c in zip(shares, new, strict=True)
            )
        expected = np.stack(
            [[prototypes[c, s] for s in range(task + 1)] for c in range(2 * task + 2)]
        )
        np.testing.assert_allclose(state["prototypes"].numpy(), expected, rtol=1e-9, atol=1e-10)

        tested = task_images(1)[0]
        scores = np.zeros((len(tested), 2 * task + 2))
        for s in range(task + 1):
            found = cosines(subspace(state, s, tested).numpy(), expected[:, s])
            for c in range(2 * task + 2):
                scores[:, c] += found[:, c] * (1.0 if c // 2 == s else alpha)
        np.testing.assert_allclose(method.scores(tested).numpy(), scores, rtol=1e-9, atol=1e-10)
        every = torch.cat([subspace(state, s, tested) for s in range(task + 1)], 1)
        torch.testing.assert_close(method.features(tested)["features"], every)


def test_adapters_of_earlier_tasks_are_frozen() -> None:
    method = session()
    learn(method, 0)
    first = adapters_of(method.state(), 0)
    assert all(tensor.abs().max() > 0 for tensor in first.values())
    assert method.state()["head.weight"].numel() == 0  # thrown away
    learn(method, 1)
    assert same_bits(adapters_of(method.state(), 0), first)
    assert not same_bits(adapters_of(method.state(), 1), first)


def test_a_state_that_does_not_fit_is_refused() -> None:
    trained = bare_trainer("ease", SMALL)
    trained.run(None, None)
    fresh = bare_trainer("ease", SMALL)
    fresh.load_state(trained.state())
    assert same_bits(fresh.state(), trained.state())
    for name, change, message in [
        ("adapters.down.bias", lambda t: t[1:], r"adapters\.down\.weight: expected \[2, 6, 4, 96"),
        ("adapters.down.bias", lambda t: t[0], r"adapters\.down\.weight: expected \[0, "),
        ("adapters.up.weight", lambda t: t[:, 1:], r"adapters\.up\.weight: expected \[3, 6, 96, 4"),
        ("prototypes", lambda t: t[:, 1:], r"prototypes: expected \[6, 3, 96\], got \[6, 2, 96\]"),
        ("prototypes", lambda t: t[1:], "task_sizes: expected positive numbers, 5 in all"),
        ("task_sizes", lambda t: t - 2, "task_sizes: expected positive numbers, 6 in all"),
        ("task_sizes", lambda t: t.fill_(2**62), "task_sizes: expected positive numbers"),
        ("task_sizes", lambda t: torch.tensor([6]), "those of 1 finished tasks, or of one more"),
    ]:
        broken = trained.state()
        broken[name] = change(broken[name])
        with pytest.raises(ValueError, match=rf"\[state\] .*{message}"):
            bare_trainer("ease", SMALL).load_state(broken)
    with pytest.raises(ValueError, match=r"\[state\] expected adapters of 1 tasks and prototypes"):
        begin(session(), 1)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'alpha': expected >= 0, got -0\.1"):
        session({"alpha": -0.1})
