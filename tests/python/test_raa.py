"""RAA on the embedded backbone and a few images: what holds beside its golden files."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ntkcl
import reference_vit
from ntkcl import _C
from ntkcl.backbones import DEFAULT_BACKBONE, backbone_info, load_backbone
from ntkcl.config import resolve
from ntkcl.datasets import load_dataset
from ntkcl.ops import philox_keep_mask
from test_golden_raa import branch_state
from test_training import (
    CLASSES,
    SIZE,
    TEST,
    TRAIN,
    bare_trainer,
    dataset,
    events,
    images_of,
    pixels,
    predictions,
    same_bits,
    state,
    step_losses,
)
from test_training import train as train_any

# Few draws in the alignment: the images are few too.
QUICK = {"rank": 4, "alignment_epochs": 2, "alignment_samples": 16}
ONE = {"n_adapters": 1, "amalgamation": "none"}
RATE = 1e-3  # of the small network


def train(output: Path, data: dict[str, Any] | None = None, **keywords: Any) -> ntkcl.Result:
    section = QUICK | keywords.pop("raa", {})
    keywords = {"learning_rate": RATE, "initial_epochs": 0} | keywords
    return train_any(output, data, method="raa", raa=section, **keywords)


def backbone(dtype: torch.dtype = torch.float32) -> _C.VisionTransformer:
    weights = {k: t.to(dtype) for k, t in load_backbone(DEFAULT_BACKBONE).tensors.items()}
    return _C.VisionTransformer(weights, backbone_info(DEFAULT_BACKBONE).heads)


def session(
    options: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **keywords: Any
) -> _C.MethodSession:
    train = {"optimizer": "sam+", "precision": "float64"} | (train or {})
    return _C.MethodSession("raa", QUICK | (options or {}), backbone(), 3, train, **keywords)


def task_images(task: int, per_class: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = images_of(2 * task + 2, per_class, np.random.default_rng(task))
    first = 2 * task * per_class
    return pixels(images[first:]).double(), torch.from_numpy(labels[first:])


def begin(method: _C.MethodSession, task: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch, labels = task_images(task)
    method.begin_task(task, 2 * task, 2, 2, 16, batch, labels, classes=CLASSES)
    return batch, labels


def a_task(method: _C.MethodSession, task: int = 0, steps: int = 2) -> None:
    """Trains two classes and runs the stages."""
    batch, labels = begin(method, task)
    for _ in range(steps):
        method.step(batch, labels, 0.01)
    method.run_stages()


def branch(tensors: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    prefix = f"branch{number}."
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ntkcl.Result:
    output = tmp_path_factory.mktemp("reference") / "run"
    return train(output, transform="inception", seed=5, epochs=3, loader_threads=1)


@pytest.mark.parametrize("variant", ["corrected", "release"])
def test_the_same_seed_gives_the_same_bits(tmp_path: Path, variant: str) -> None:
    # Protects: mixtures, dropout, draws and the order of unpaired drift depend on the seed alone.
    one, other = (
        train(
            tmp_path / str(threads),
            **{"transform": "inception", "seed": 5, "variant": variant, "loader_threads": threads},
        )
        for threads in (1, 3)
    )
    np.testing.assert_array_equal(one.accuracy_matrix, other.accuracy_matrix)
    assert same_bits(state(one), state(other))
    assert same_bits(predictions(one), predictions(other))
    assert step_losses(one) == step_losses(other)


def test_a_run_learns_and_reports(reference: ntkcl.Result) -> None:
    assert reference.final_accuracy > 2 * 100 / CLASSES
    before = events(reference.output, "extra_evaluation")
    assert [(e["task"], e["tag"]) for e in before] == [
        (1, "before alignment"),
        (2, "before alignment"),
    ]
    assert {"branches", "mixture", "total"} == set(step_losses(reference)[0])


def test_a_state_loads_into_a_fresh_method() -> None:
    trained = bare_trainer("raa", QUICK)
    trained.run(None, None)
    fresh = bare_trainer("raa", QUICK)
    fresh.load_state(trained.state())
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    torch.testing.assert_close(fresh.scores(images), trained.scores(images), rtol=0, atol=1e-5)
    for name, change, message in [
        ("branch1.0.up.bias", lambda t: t[:-1], r"branch1.0.up.bias: expected \[96\], got \[95\]"),
        ("head", lambda t: t[:4], r"head: expected \[6, 96\], got \[4, 96\]"),
        ("task_sizes", lambda t: t - 1, r"head: expected \[3, 96\], got \[6, 96\]"),
        ("task_sizes", lambda t: t - 2, "task_sizes: expected positive int64 numbers"),
        ("stale_gradient", lambda t: torch.zeros(3, 96), "stale_gradient: .* n = 0, 4 or 6, got"),
        ("gaussians.factors", lambda t: t[:, 1:], r"gaussians.\*: expected means"),
        ("gaussians.means", lambda t: t[1:], r"gaussians.\*: expected means"),
        ("features_before", lambda t: t[:, 1:], "features_before: expected"),
    ]:
        broken = trained.state()
        broken[name] = change(broken[name])
        with pytest.raises(ValueError, match=rf"\[state\] {message}"):
            bare_trainer("raa", QUICK).load_state(broken)
    with pytest.raises(ValueError, match=r"a tensor 'branch2.0.down.bias', but it is missing"):
        bare_trainer("raa", QUICK | {"n_adapters": 3}).load_state(trained.state())
    without = session({"alignment": False})
    a_task(without)
    later = session()
    later.load_state(without.state())
    with pytest.raises(ValueError, match=r"expected the 2 classes learned before, got 0"):
        begin(later, 1)


# ---- branches ------------------------------------------------------------------------------------


def test_the_first_branch_rests_after_the_first_task_and_becomes_the_mean_of_all() -> None:
    method = session({"n_adapters": 3})
    initial = method.state()
    begin(method, 0)
    before = method.state()
    assert same_bits(branch(initial, 0), branch(before, 0))
    for task in range(3):
        batch, labels = begin(method, task)
        before = method.state()
        for _ in range(2):
            method.step(batch, labels, 0.01)
        trained = method.state()
        moved = [not same_bits(branch(trained, i), branch(before, i)) for i in range(3)]
        assert moved == [task == 0, True, True]
        method.run_stages()
        merged = method.state()
        assert all(same_bits(branch(merged, i), branch(trained, i)) for i in (1, 2))
        for name, tensor in branch(merged, 0).items():
            mean = sum(branch(trained, i)[name] for i in range(3)) / 3
            torch.testing.assert_close(tensor, mean)


def test_one_branch_alone_trains_in_every_task() -> None:
    method = session(ONE, {"optimizer": "sgd"})
    for task in range(2):
        batch, labels = begin(method, task)
        before = method.state()
        losses = method.step(batch, labels, 0.01)["losses"]
        method.step(batch, labels, 0.01)
        assert set(losses) == {"branches", "total"}
        trained = method.state()
        assert not same_bits(branch(trained, 0), branch(before, 0))
        method.run_stages()
        assert same_bits(branch(method.state(), 0), branch(trained, 0))


def test_branches_without_a_mixture_merge_all_the_same() -> None:
    method = session({"amalgamation": "none"})
    batch, labels = begin(method, 0)
    assert set(method.step(batch, labels, 0.01)["losses"]) == {"branches", "total"}
    method.step(batch, labels, 0.01)
    trained = method.state()
    method.run_stages()
    for name, tensor in branch(method.state(), 0).items():
        mean = (branch(trained, 0)[name] + branch(trained, 1)[name]) / 2
        torch.testing.assert_close(tensor, mean)


def random_branches(count: int, blocks: int = 6, rank: int = 4, width: int = 96) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rank, width), (rank,), (width, rank), (width,)]
    return [
        torch.randn(count, blocks, *shape, generator=generator, dtype=torch.float64) / 10
        for shape in shapes
    ]


def naive_features(
    images: torch.Tensor, branches: list[Any], alpha: torch.Tensor, mode: str, masks: list[Any]
) -> torch.Tensor:
    """Every stream through the whole network in plain PyTorch; masks (s, b, N, r) of each block."""
    weights = {k: t.to(images.dtype) for k, t in load_backbone(DEFAULT_BACKBONE).tensors.items()}
    heads = backbone_info(DEFAULT_BACKBONE).heads
    count, functional = len(branches[0]), torch.nn.functional
    x = torch.stack([reference_vit.tokens_of(weights, images)] * (count + 1))
    for block in range(reference_vit.depth_of(weights)):
        streams, inputs = [], []
        for s in x:
            name = f"blocks.{block}"
            norms = [partial(reference_vit.layer_norm, weights, f"{name}.norm{i}") for i in (1, 2)]
            h = s + reference_vit.attention(weights, f"{name}.attn", norms[0](s), heads)
            inputs.append(h)
            streams.append(h + reference_vit.mlp(weights, f"{name}.mlp", norms[1](h)))

        def adapter(h: torch.Tensor, tensors: list[Any], mask: Any) -> torch.Tensor:
            hidden = functional.relu(functional.linear(h, tensors[0], tensors[1]))
            hidden = hidden if mask is None else hidden * mask / (1 - P)
            return functional.linear(hidden, tensors[2], tensors[3])

        of = [[t[i, block] for t in branches] for i in range(count)]
        mask = masks[block] if masks else [None] * (count + 1)
        out = [adapter(inputs[i], of[i], mask[i]) for i in range(count)]
        if mode == "code":
            out.append(sum(alpha[block, i] * out[i] for i in range(count)))
        else:
            kinds = range(4)
            mixed = [sum(alpha[block, i] * of[i][k] for i in range(count)) for k in kinds]
            out.append(adapter(inputs[-1], mixed, mask[-1]))
        x = torch.stack([s + 0.1 * a for s, a in zip(streams, out, strict=True)])
    return reference_vit.layer_norm(weights, "norm", x)[:, :, 0]


P = 0.1


def shares(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    alpha = torch.rand(6, count, generator=generator, dtype=torch.float64)
    return alpha / alpha.sum(1, keepdim=True)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("mode", ["paper", "code"])
def test_streams_equal_passes_through_the_whole_network(count: int, mode: str) -> None:
    # Protects: stacked streams, the shared prefix, the last block for the class token alone.
    images, branches = task_images(0)[0][:3], random_branches(count)
    masks = [
        keep_mask(block, (count + (mode == "paper"), 3, backbone().tokens, 4)) for block in range(6)
    ]
    vit = backbone(torch.float64)
    ours = _C.stream_pass(vit, images, branches, shares(count), mode, 0.1, masks, P)
    expected = naive_features(images, branches, shares(count), mode, masks)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def keep_mask(key: int, shape: tuple[int, ...]) -> torch.Tensor:
    return philox_keep_mask(torch.tensor(key), shape, P)


@pytest.mark.parametrize("mode", ["paper", "code", "none"])
def test_a_later_step_equals_plain_pytorch_with_dropout(mode: str) -> None:
    # Protects: the frozen stream and its dropout, which the second pass draws anew; both losses.
    tokens, alpha, seen = backbone().tokens, shares(2), {}

    def draws(purpose: str, task: int, step: int, number: int, block: int) -> Any:
        if purpose == "amalgamation":
            return alpha
        if not purpose.startswith("adapter.dropout") or task == 0:
            return None
        frozen = purpose.endswith("frozen")
        streams = 1 if frozen else 1 + (mode == "paper")
        mask = keep_mask(100 * number + 10 * frozen + block, (streams, 16, tokens, 4))
        seen[number, frozen, block] = mask
        return mask

    options = {"amalgamation": mode, "adapter_dropout": P, "alignment": False}
    method = session(options, {"rho": 0.0}, draws=draws)
    a_task(method, 0)
    method.load_state(branch_state(random_branches(2)))
    batch, labels = begin(method, 1)
    head = method.state()["head"][2:]
    passes = method.step(batch, labels, 0.0)["passes"]
    assert passes[0]["losses"] != passes[1]["losses"]
    for number, of_pass in enumerate(passes):
        masks = [
            torch.cat([seen[number, True, block], seen[number, False, block]]) for block in range(6)
        ]
        if mode == "none":
            masks = [torch.cat([mask, mask[:1]]) for mask in masks]  # of the stream that is not
        features = naive_features(batch, random_branches(2), alpha, mode, masks)
        rows = [_C.cosface(f, head, labels - 2, 20.0, 0.0).mean().item() for f in features]
        assert of_pass["losses"]["branches"] == pytest.approx(rows[0] + rows[1], rel=1e-9)
        if mode != "none":
            assert of_pass["losses"]["mixture"] == pytest.approx(rows[2], rel=1e-9)


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_equal_branches_mix_to_themselves(mode: str) -> None:
    vit, images = backbone(), task_images(0)[0][:3].float()
    branches = [t.float().repeat(3, *[1] * (t.dim() - 1)) for t in random_branches(1)]
    alpha = torch.rand(6, 3)
    alpha = alpha / alpha.sum(1, keepdim=True)
    features = _C.stream_pass(vit, images, branches, alpha, mode, 0.1)
    assert features.shape == (4, 3, 96)
    for stream in features[1:]:
        torch.testing.assert_close(stream, features[0], rtol=1e-4, atol=1e-4)
    for merged, tensor in zip(_C.merged_branches(branches), branches, strict=True):
        torch.testing.assert_close(merged, tensor[0])


def test_shares() -> None:
    uniform = torch.rand(2000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for kind in ("uniform_norm", "dirichlet"):
        shares = _C.shares_of(uniform, kind)
        torch.testing.assert_close(shares.sum(1), torch.ones(2000, dtype=torch.float64))
        assert shares.min() > 0
    # A flat Dirichlet of three: the variance of a share is 1/18; normalised uniforms vary less.
    assert _C.shares_of(uniform, "dirichlet").var(0).mean() == pytest.approx(1 / 18, rel=0.05)
    assert _C.shares_of(uniform, "uniform_norm").var(0).mean() < 1 / 25
    assert torch.equal(_C.shares_of(torch.zeros(2, 4)), torch.full((2, 4), 0.25))


def test_adapters_by_hand() -> None:
    # The example of section 10 of the specification.
    down = torch.tensor([[[1, -1], [0.5, 2]], [[-1, 1], [1, 0.5]]])[:, None].double()
    down_bias = torch.tensor([[0.1, -0.2], [0, 0.3]])[:, None].double()
    up = torch.tensor([[[1, 0], [0.5, 1]], [[2, -1], [0, 1]]])[:, None].double()
    up_bias = torch.tensor([[0.1, 0], [0, -0.1]])[:, None].double()
    hidden = torch.tensor([[1, 2], [1.5, 1], [1.2, 1.4]]).double().view(3, 1, 1, 2)
    alpha = torch.tensor([[0.3, 0.7]], dtype=torch.float64)
    for mode, mixture in (("code", [-0.158, 0.283]), ("paper", [-0.1533, 0.24465])):
        branches = [down, down_bias, up, up_bias]
        out = 0.1 * _C.stream_adapters(hidden, branches, alpha, mode).flatten(1)
        expected = torch.tensor([[0.01, 0.43], [-0.23, 0.22], mixture], dtype=torch.float64)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-7)


def test_cosface_by_hand() -> None:
    # Cosines as given: features whose first coordinates they are, on the axes as weights.
    cosines = torch.tensor([[0.5, 0.3, 0.1], [0.2, 0.25, -0.1]], dtype=torch.float64)
    rest = (1 - cosines.square().sum(1, keepdim=True)).sqrt()
    features, weight = torch.cat([cosines, rest], 1), torch.eye(3, 4, dtype=torch.float64)
    for margin, expected in ((0.0, 0.166203704), (0.3, 3.576053057)):
        loss = _C.cosface(3 * features, 2 * weight, torch.tensor([0, 1]), 20.0, margin)
        assert loss.mean().item() == pytest.approx(expected, abs=1e-8)


# ---- steps ---------------------------------------------------------------------------------------


def test_old_heads_have_no_gradient_and_decay_alone() -> None:
    method = session({"alignment": False}, {"weight_decay": 5e-4})
    a_task(method, 0)
    batch, labels = begin(method, 1)
    old = method.state()["head"][:2]
    momentum, factor = 0.0, 1.0
    for _ in range(3):
        passes = method.step(batch, labels, 0.1)["passes"]
        for of_pass in passes:  # four kinds of adapters, the old head, the new one
            assert of_pass["gradients"][4].eq(0).all()
            assert of_pass["gradients"][5].ne(0).any()
        momentum = 0.9 * momentum + 5e-4 * factor
        factor -= 0.1 * momentum
    torch.testing.assert_close(method.state()["head"][:2], old * factor)


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "sam", "sam+"])
def test_the_gradient_that_the_release_leaves_over(stale: bool, optimizer: str) -> None:
    # 8.6: from the third task on, of old heads, in the ascent of the first step.
    method = session({"stale_gradient": stale}, {"optimizer": optimizer})
    for task in range(3):
        batch, labels = begin(method, task)
        for step in range(2):
            passes = method.step(batch, labels, 0.01)["passes"]
            for number, of_pass in enumerate(passes):
                *old, _ = of_pass["gradients"][4:]
                ascent = len(passes) == 2 and number == 0
                expected = stale and task == 2 and step == 0 and ascent
                assert [gradient.ne(0).any().item() for gradient in old] == [expected] * len(old)
                assert len(old) == (task if stale else min(task, 1))
        method.run_stages()


def test_a_left_over_gradient_of_the_state_is_left_alone_without_the_switch() -> None:
    release, corrected = session({"stale_gradient": True}), session()
    for task in range(2):
        a_task(release, task)
    corrected.load_state(release.state())
    batch, labels = begin(corrected, 2)
    first, _ = corrected.step(batch, labels, 0.01)["passes"]
    assert first["gradients"][4].eq(0).all()


def test_a_repeated_stage_changes_nothing_more() -> None:
    method = session()
    for task in range(2):
        a_task(method, task)
    once = method.state()
    with pytest.raises(ValueError, match="a task that trains, begun and not yet at its stages"):
        method.step(*task_images(1), 0.01)
    method.run_stages()
    again = method.state()
    assert same_bits(branch(once, 0), branch(again, 0))
    assert torch.equal(once["gaussians.means"], again["gaussians.means"])


def test_without_a_perturbation_and_with_the_same_noise_both_passes_are_one() -> None:
    for options in ({}, {"amalgamation": "code"}, {"n_adapters": 3}):
        same = session({"share_noise": True} | options, {"rho": 0.0})
        a_task(same, 0)
        batch, labels = begin(same, 1)
        for _ in range(2):
            first, second = same.step(batch, labels, 0.01)["passes"]
            assert first["losses"] == second["losses"]
            for a, b in zip(first["gradients"], second["gradients"], strict=True):
                assert torch.equal(a, b)
        other = session(options, {"rho": 0.0})
        a_task(other, 0)
        batch, labels = begin(other, 1)
        first, second = other.step(batch, labels, 0.01)["passes"]
        assert first["losses"] != second["losses"]


def test_no_perturbation_is_sgd() -> None:
    states = []
    for train_options in ({"optimizer": "sam", "rho": 0.0}, {"optimizer": "sgd"}):
        method = session({"share_noise": True}, train_options)
        batch, labels = begin(method, 0)
        for _ in range(3):
            method.step(batch, labels, 0.01)
        states.append(method.state())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-9, atol=1e-12)


def test_scores_ignore_the_lengths_of_the_heads_rows() -> None:
    method = session()
    a_task(method)
    images = task_images(0)[0]
    before = method.scores(images)
    method.load_state({"head": method.state()["head"] * torch.tensor([[2.0], [0.1]]).double()})
    torch.testing.assert_close(method.scores(images), before)


# ---- class statistics and alignment --------------------------------------------------------------


def test_class_gaussians_draw_what_they_were_given() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(5, 5, generator=generator, dtype=torch.float64) + 3
    gaussians = _C.ClassGaussians(5, rows)
    gaussians.add_class(rows, 0.5)
    covariance = rows.T.cov() + 0.5 * torch.eye(5, dtype=torch.float64)
    factor = gaussians.factor(0)
    torch.testing.assert_close(factor @ factor.T, covariance)
    assert torch.equal(factor, factor.tril())
    normals = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    expected = 0.9 * rows.mean(0) + normals @ factor.T
    torch.testing.assert_close(gaussians.draw(0, 0.9, normals), expected)
    gaussians.add_class(rows[:1], 0.25)  # one image
    torch.testing.assert_close(gaussians.factor(1), 0.5 * torch.eye(5, dtype=torch.float64))
    gaussians.move(torch.ones(1, 5, dtype=torch.float64))
    torch.testing.assert_close(gaussians.means[0], rows.mean(0) + 1)
    torch.testing.assert_close(gaussians.means[1], rows[0])
    gaussians.keep(1)
    assert gaussians.classes == 1


def test_class_gaussians_refuse_what_cannot_be() -> None:
    gaussians = _C.ClassGaussians(4, torch.zeros(1))
    with pytest.raises(ValueError, match=r"rows \(n, 4\) of at least one image, got"):
        gaussians.add_class(torch.zeros(0, 4), 1e-3)
    with pytest.raises(ValueError, match=r"rows \(n, 4\) of at least one image, got"):
        gaussians.add_class(torch.zeros(3, 5), 1e-3)
    with pytest.raises(FloatingPointError, match=r"of its 3 features .* a larger covariance_eps"):
        gaussians.add_class(torch.randn(3, 4), 0.0)
    with pytest.raises(FloatingPointError, match="expected finite features, got NaN or infinity"):
        gaussians.add_class(torch.full((3, 4), torch.nan), 1e-3)
    assert gaussians.classes == 0
    with pytest.raises(ValueError, match="expected a class from 0 to -1, got 0"):
        gaussians.factor(0)
    with pytest.raises(ValueError, match="expected eps >= 0, got -1"):
        gaussians.add_class(torch.randn(3, 4), -1.0)


def test_factors_of_the_means_by_the_tasks_of_classes() -> None:
    # 8.5, in a run of tasks of 3, 2 and 1 classes: as released c // 1 instead of 0 0 0 1 1 2.
    tasks = {kind: _C.tasks_of_classes([3, 2, 1], kind) for kind in ("cumulative", "release")}
    assert tasks == {"cumulative": [0, 0, 0, 1, 1, 2], "release": [0, 1, 2, 3, 4, 5]}
    assert _C.mean_factors(tasks["cumulative"], 2, 0.7) == pytest.approx(
        [0.8, 0.8, 0.8, 0.9, 0.9, 1.0]
    )
    assert _C.mean_factors(tasks["release"], 2, 0.7)[-1] == pytest.approx(1.3)


def test_kappa_reaches_the_alignment() -> None:
    heads = {}
    for kappa in ("cumulative", "release"):
        method = session({"kappa": kappa, "alignment_mean": 0.1})
        first, labels = task_images(0)
        more, others = task_images(1)
        batch, labels = torch.cat([first, more[:8]]), torch.cat([labels, others[:8]])
        method.begin_task(0, 0, 3, 3, 16, batch, labels, classes=4)
        method.step(batch, labels, 0.01)
        method.run_stages()
        method.begin_task(1, 3, 1, 1, 16, more[8:], others[8:], classes=4)
        method.step(more[8:], others[8:], 0.01)
        method.run_stages()
        heads[kappa] = method.state()["head"]
    assert (heads["cumulative"] - heads["release"]).norm() > 1e-3


def test_old_means_move_with_the_features() -> None:
    means = {}
    for drift in ("off", "paired", "unpaired"):
        method = session({"drift": drift})
        a_task(method, 0)
        old = method.state()["gaussians.means"]
        a_task(method, 1)
        means[drift] = method.state()["gaussians.means"]
        assert torch.equal(means[drift][:2], old) == (drift == "off")
        assert method.state()["features_before"].numel() == 0  # not kept after use
    torch.testing.assert_close(means["paired"][2:], means["off"][2:])


def test_unpaired_drift_reads_the_images_as_training_does(tmp_path: Path) -> None:
    # 8.4. Protects: augmentation and order of the features before training.
    images = load_dataset(dataset())
    before = {}
    for drift in ("paired", "unpaired"):
        trainer = _C.Trainer(
            "raa",
            QUICK | {"drift": drift},
            {"initial_classes": 2, "increment": 2, "epochs": 1, "batch_size": 8, "device": "cpu"},
            backbone(),
            {"train": images.train, "test": images.test, "class_order": list(range(CLASSES))},
            *({"transform": "inception", "image_size": SIZE}, {}, [0.5] * 3, [0.5] * 3),
        )

        def listen(event: dict[str, Any], drift: str = drift, trainer: Any = trainer) -> None:
            if event["event"] == "epoch" and event["task"] == 1:
                before[drift] = trainer.state()["features_before"]

        trainer.run(listen, None)
    paired, unpaired = before["paired"], before["unpaired"]
    assert paired.shape == unpaired.shape == (2 * TRAIN, 96)
    distances = torch.cdist(unpaired, paired)
    assert distances.min(1).values.median() > 1e-2  # other crops


def test_without_alignment_there_are_no_statistics(tmp_path: Path) -> None:
    result = train(tmp_path / "run", raa={"alignment": False})
    assert state(result)["gaussians.means"].numel() == 0
    assert not events(result.output, "extra_evaluation")


# ---- switches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["release", "corrected"])
def test_both_variants_run_over_uneven_tasks(tmp_path: Path, variant: str) -> None:
    result = train(tmp_path / "run", variant=variant, initial_classes=3, increment=2)
    assert [e.count for e in result.evaluations] == [3 * TEST, 5 * TEST, 6 * TEST]
    assert state(result)["task_sizes"].tolist() == [3, 2, 1]


@pytest.mark.parametrize(
    ("optimizer", "section"),
    [
        ("sgd", ONE),
        ("sgd", {}),
        ("sam", ONE),
        ("sam+", ONE | {"drift": "off"}),
        ("sam+", {"amalgamation": "code", "alpha": "dirichlet"}),
        ("sam+", {"n_adapters": 4, "adapter_dropout": 0.0, "margin": 0.3}),
    ],
)
def test_rows_of_the_ablation_run(tmp_path: Path, optimizer: str, section: dict[str, Any]) -> None:
    result = train(tmp_path / "run", optimizer=optimizer, raa=section)
    assert result.final_accuracy > 100 / CLASSES


def test_classes_of_one_image(tmp_path: Path) -> None:
    result = train(tmp_path / "run", dataset(train=1))
    assert result.evaluations[-1].count == CLASSES * TEST


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_other_precisions_have_the_same_gradients(precision: str) -> None:
    found = []
    for kind in ("float64", precision):
        method = session({"adapter_dropout": 0.0}, {"precision": kind})
        method.load_state(branch_state(random_branches(2)))
        batch, labels = begin(method, 0)
        found.append(method.step(batch, labels, 0.0)["passes"])
    tolerance = 1e-3 if precision == "float32" else 0.06
    for exact, other in zip(*found, strict=True):
        for a, b in zip(exact["gradients"], other["gradients"], strict=True):
            assert (a - b.double()).norm() <= tolerance * a.norm()


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"rho": -0.1}, ValueError, r"'rho': expected float >= 0, got -0.1"),
        (
            {"raa": {"n_adapters": 1}},
            ValueError,
            r"'amalgamation': expected two adapters or more to mix, got n_adapters = 1",
        ),
        ({"raa": {"n_adapters": 0}}, ValueError, r"'raa.n_adapters': expected int >= 1, got 0"),
        ({"raa": {"alignment_samples": 0}}, ValueError, r"'raa.alignment_samples': expected int"),
        ({"raa": {"sigma": 0.0}}, ValueError, r"'raa.sigma': expected float > 0, got 0"),
        ({"raa": {"alignment_mean": 1.5}}, ValueError, r"'raa.alignment_mean': expected float"),
        ({"raa": {"amalgamation": "mean"}}, ValueError, r"expected one of: paper, code, none"),
        (
            {"raa": {"covariance_eps": 0.0}},
            FloatingPointError,
            "not positive definite with 0 on the diagonal",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(tmp_path / "run", **keywords)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.safetensors"))


def test_defaults_are_the_methods_own() -> None:
    config = resolve({"method": "raa", "dataset": "cifar100"})
    assert (config.optimizer, config.learning_rate, config.batch_size) == ("sam+", 0.01, 48)
    assert (config.initial_epochs, config.epochs) == (20, 10)
    assert resolve({"method": "raa"}).initial_epochs == 0  # digits
    assert resolve({"method": "raa", "optimizer": "sgd"}).optimizer == "sgd"
