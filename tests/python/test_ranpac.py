"""RanPAC against NumPy and plain PyTorch, in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ntkcl import _C
from ntkcl.backbones import DEFAULT_BACKBONE, backbone_info, load_backbone
from reference_vit import adapted_features, reference_features
from test_fine_tune import features_by, gradients_by_name, logits_by, modules_of
from test_raa import backbone, task_images
from test_training import CLASSES, bare_trainer, same_bits, state, train

Array = NDArray[np.float64]
SMALL = {"rank": 4, "scale": 0.5, "projection": 64}
WIDTH = 96


def draws_of(projection: int, images: int) -> dict[str, Array]:
    """Given numbers for what the method draws, of NumPy."""
    generator = np.random.default_rng(3)
    return {
        "projection": generator.standard_normal((WIDTH, projection)),
        **{f"ridge.split {task}": generator.permutation(images) for task in range(3)},
    }


def session(options: dict[str, Any], given: dict[str, Array] | None = None) -> _C.MethodSession:
    def draws(purpose: str, task: int, *_: int) -> Tensor | None:
        assert given is not None
        value = given.get(purpose, given.get(f"{purpose} {task}"))
        return None if value is None else torch.from_numpy(value)

    keys = {"precision": "float64", "optimizer": "sgd"}
    extra = {} if given is None else {"draws": draws}
    return _C.MethodSession("ranpac", SMALL | options, backbone(), 3, keys, **extra)


def begin(method: _C.MethodSession, task: int, per_class: int = 8) -> tuple[Tensor, Tensor]:
    images, labels = task_images(task, per_class)
    method.begin_task(task, 2 * task, 2, 2, 16, images, labels, classes=CLASSES)
    return images, labels


def best_by(rows: Array, targets: Array, order: Array) -> float:
    """The parameter by solving for each candidate."""
    count = int(0.8 * len(rows))
    fitted, held = order[:count], order[count:]
    h, y = rows[fitted], targets[fitted]
    errors = {}
    for exponent in range(-8, 10):
        ridge = 10.0**exponent
        if len(h) <= h.shape[1]:
            weights = h.T @ np.linalg.solve(h @ h.T + ridge * np.eye(len(h)), y)
        else:
            weights = np.linalg.solve(h.T @ h + ridge * np.eye(h.shape[1]), h.T @ y)
        errors[ridge] = float(np.mean((rows[held] @ weights - targets[held]) ** 2))
    return min(errors, key=lambda ridge: errors[ridge])


@pytest.mark.parametrize("first_session", [True, False])
@pytest.mark.parametrize("projection", [8, 64])  # fewer and more than the images fitted on
def test_statistics_and_scores_equal_numpy(projection: int, first_session: bool) -> None:
    # Protects: projection, sums over tasks, the choice of the ridge, the regression.
    given = draws_of(projection, 16)
    options = {"projection": projection, "first_session": first_session}
    method = session(options, given)
    gram, sums = np.zeros((projection, projection)), np.zeros((projection, 0))
    weights = {k: t.double() for k, t in load_backbone(DEFAULT_BACKBONE).tensors.items()}
    heads = backbone_info(DEFAULT_BACKBONE).heads
    test_images = task_images(2)[0]
    ridges = set()
    for task in range(3):
        images, labels = begin(method, task)
        if first_session and task == 0:
            for _ in range(3):
                method.step(images, labels, 0.05)
        method.run_stages()
        found = method.state()
        both = torch.cat([images, test_images])
        if first_session:
            features = adapted_features(weights, both, heads, modules_of(found), SMALL["scale"])
        else:
            features = reference_features(weights, both, heads)
        h = np.maximum(features.numpy() @ given["projection"], 0)
        rows, tested = h[: len(images)], h[len(images) :]
        targets = np.eye(2)[labels.numpy() - 2 * task]
        gram += rows.T @ rows
        sums = np.hstack([sums, rows.T @ targets])
        ridge = best_by(rows, targets, given[f"ridge.split {task}"])
        ridges.add(ridge)
        assert found["ridge"].item() == pytest.approx(ridge, rel=1e-12)
        np.testing.assert_allclose(found["gram"].numpy(), gram, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found["class_sums"].numpy(), sums, rtol=1e-9, atol=1e-9)
        solved = np.linalg.solve(gram + ridge * np.eye(projection), sums)
        scores = method.scores(test_images).numpy()
        assert scores.shape == (len(test_images), 2 * task + 2)
        np.testing.assert_allclose(scores, tested @ solved, rtol=1e-6, atol=1e-7)
    assert all(1e-8 < ridge < 1e8 for ridge in ridges)  # not an end of the candidates


def test_a_step_of_the_first_session_equals_plain_pytorch() -> None:
    method = session({"logit_scale": 9.0})
    images, labels = begin(method, 0)
    method.step(images, labels, 0.05)
    found = method.state()
    step = method.step(images, labels, 0.0)
    leaves = {
        name: tensor.clone().requires_grad_()
        for name, tensor in found.items()
        if name.startswith(("peft.", "head."))
    }
    features = features_by("adapter", modules_of(leaves), images)
    logits = logits_by("cosine", 9.0, features, leaves["head.weight"], leaves["head.bias"])
    expected = functional.cross_entropy(logits, labels)
    expected.backward()
    assert step["losses"]["total"] == pytest.approx(expected.item(), rel=1e-10)
    gradients = gradients_by_name("adapter", step["gradients"])
    assert set(gradients) == set(leaves) - {"head.bias"}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, leaves[name].grad, rtol=1e-8, atol=1e-11, msg=name)


def test_after_the_first_task_nothing_is_trained() -> None:
    method = session({})
    images, labels = begin(method, 0)
    method.step(images, labels, 0.05)
    method.run_stages()
    before = modules_of(method.state())
    assert method.state()["head.weight"].numel() == 0  # thrown away
    images, labels = begin(method, 1)
    with pytest.raises(ValueError, match=r"\[step\] expected a task that trains"):
        method.step(images, labels, 0.05)
    method.run_stages()
    assert same_bits(modules_of(method.state()), before)
    begin(frozen := session({"first_session": False}), 0)
    assert modules_of(frozen.state()) == {}
    with pytest.raises(ValueError, match=r"\[step\] expected a task that trains"):
        frozen.step(*task_images(0), 0.05)


def test_a_ridge_may_be_given_and_grows_where_rounding_asks_for_it() -> None:
    # Protects: 6 images leave 64 x 64 sums singular, and 1e-15 is lost beside them.
    for given, grows in ((1e3, False), (1e-15, True)):
        method = session({"first_session": False, "ridge": given})
        images, labels = begin(method, 0, per_class=3)
        method.run_stages()
        found = method.state()
        ridge = found["ridge"].item()
        assert given < ridge < 1e-6 if grows else ridge == given
        assert torch.equal(method.scores(images).argmax(1), labels)
        if not grows:
            shifted = found["gram"] + ridge * torch.eye(64, dtype=torch.float64)
            torch.testing.assert_close(shifted @ found["weights"], found["class_sums"])


def test_one_image_is_too_few_to_choose_a_ridge() -> None:
    images, labels = task_images(0)
    for options, fails in (({}, True), ({"ridge": 1.0}, False)):
        method = session({"first_session": False, **options})
        method.begin_task(0, 0, 1, 1, 16, images[:1], labels[:1], classes=CLASSES)
        if fails:
            with pytest.raises(ValueError, match=r"'ridge': expected at least two .* got 1; give"):
                method.run_stages()
        else:
            method.run_stages()


def test_a_class_without_images_and_features_that_are_not_finite_are_refused() -> None:
    images, labels = task_images(0)
    method = session({"first_session": False})
    method.begin_task(0, 0, 2, 2, 16, images[labels == 0], labels[labels == 0], classes=CLASSES)
    with pytest.raises(ValueError, match=r"\[data\] class 1: expected at least one readable"):
        method.run_stages()
    images[0, 0, 0, 0] = float("nan")
    method.begin_task(0, 0, 2, 2, 16, images, labels, classes=CLASSES)
    with pytest.raises(FloatingPointError, match=r"\[ranpac\] expected finite features"):
        method.run_stages()


def test_the_projection_follows_from_the_seed_and_is_not_stored(tmp_path: Path) -> None:
    keys = {"method": "ranpac", "class_order": "natural", "ranpac": SMALL}
    one, again, other = (
        train(tmp_path / name, **keys, seed=seed)
        for name, seed in (("one", 5), ("again", 5), ("other", 6))
    )
    assert same_bits(state(one), state(again))
    assert not torch.equal(state(one)["gram"], state(other)["gram"])
    sizes = {tuple(tensor.shape) for tensor in state(one).values()}
    assert (WIDTH, 64) not in sizes
    assert one.final_accuracy > 2 * 100 / CLASSES


def test_a_state_that_does_not_fit_is_refused() -> None:
    trained = bare_trainer("ranpac", SMALL)
    trained.run(None, None)
    fresh = bare_trainer("ranpac", SMALL)
    fresh.load_state(trained.state())
    assert same_bits(fresh.state(), trained.state())
    for name, change, message in [
        ("gram", lambda t: t[1:], r"gram: expected \[64, 64\], got \[63, 64\]"),
        ("gram", lambda t: t[:0, :0], r"gram: expected \[64, 64\], got \[0, 0\]"),
        ("class_sums", lambda t: t[1:], r"class_sums: expected \(64, classes\)"),
        ("weights", lambda t: t[:, 1:], r"weights: expected \[64, 6\], got \[64, 5\]"),
        ("ridge", lambda t: t[:0], r"ridge: expected \[1\]"),
    ]:
        broken = trained.state()
        broken[name] = change(broken[name])
        with pytest.raises(ValueError, match=rf"\[state\] {message}"):
            bare_trainer("ranpac", SMALL).load_state(broken)
    with pytest.raises(ValueError, match=r"class_sums: expected the 2 classes learned before"):
        begin(session({}), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": 0}, "'projection': expected >= 1, got 0"),
        ({"ridge": -1.0}, "'ridge': expected >= 0, got -1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        session(options)
