"""LoRAC-IPC on the embedded backbone and a few images: what holds beside its golden files."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ntkcl
from ntkcl import _C
from ntkcl.config import resolve
from test_training import (
    CLASSES,
    SIZE,
    TEST,
    backbone,
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
QUICK = {"rank": 4, "alignment_epochs": 3, "alignment_draws": 16, "alignment_clusters": 2}


def train(output: Path, data: dict[str, Any] | None = None, **keywords: Any) -> ntkcl.Result:
    section = QUICK | keywords.pop("lorac_ipc", {})
    return train_any(output, data, method="lorac-ipc", lorac_ipc=section, **keywords)


def session(options: dict[str, Any] | None = None, **keywords: Any) -> _C.MethodSession:
    return _C.MethodSession("lorac-ipc", QUICK | (options or {}), backbone(), 3, **keywords)


def a_task(method: _C.MethodSession, task: int = 0, steps: int = 2) -> None:
    """Trains two classes and runs the stages."""
    images, labels = images_of(2 * task + 2, 8, np.random.default_rng(task))
    batch, labels = pixels(images[16 * task :]), torch.from_numpy(labels[16 * task :])
    method.begin_task(task, 2 * task, 2, 2, 16, batch, labels, classes=CLASSES)
    for _ in range(steps):
        method.step(batch, labels, 0.005)
    method.run_stages()


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ntkcl.Result:
    output = tmp_path_factory.mktemp("reference") / "run"
    return train(output, transform="inception", seed=5, epochs=3, loader_threads=1)


def test_the_same_seed_gives_the_same_bits(tmp_path: Path, reference: ntkcl.Result) -> None:
    # Protects: clusters, draws and frozen matrices depend on the seed alone.
    again = train(tmp_path / "run", transform="inception", seed=5, epochs=3, loader_threads=3)
    np.testing.assert_array_equal(again.accuracy_matrix, reference.accuracy_matrix)
    assert same_bits(state(again), state(reference))
    assert same_bits(predictions(again), predictions(reference))
    assert step_losses(again) == step_losses(reference)


def test_a_run_learns_and_reports(reference: ntkcl.Result) -> None:
    chance = 100 / CLASSES
    assert reference.final_accuracy > 2 * chance
    assert all(0 <= e.inferred_task <= 100 for e in reference.evaluations)
    before = events(reference.output, "extra_evaluation")
    assert [(e["task"], e["tag"]) for e in before] == [
        (1, "before alignment"),
        (2, "before alignment"),
    ]
    assert {"ce", "l_orth", "grad_norm", "total"} == set(step_losses(reference)[0])


def test_a_matrix_freezes_after_each_task_and_then_rests(reference: ntkcl.Result) -> None:
    # 36 matrices, of which 5 % is one.
    tensors = state(reference)
    assert int((tensors["mask"] == 0).sum()) == len(reference.evaluations)
    types = {"attention": range(4), "fc1": [4], "fc2": [5]}
    resting = 0
    for group, rows in types.items():
        up = tensors[f"{group}.old_up"].unflatten(2, (-1, QUICK["rank"]))  # (L, g, T, r, out)
        bank = tensors[f"{group}.bank"]
        for (j, row), block in itertools.product(enumerate(rows), range(up.shape[0])):
            of_task = up[block, j].abs().sum((1, 2)) > 0
            assert of_task[0]
            if not of_task.all():  # frozen: no module since, and the weights of the old ones kept
                resting += 1
                first = int(of_task.long().argmin())
                assert tensors["mask"][row, block] == 0
                assert not of_task[first:].any()
                kept = bank[block, j, first - 1 :, :first]
                assert torch.equal(kept, kept[:1].expand_as(kept))
    assert resting == len(reference.evaluations) - 1  # the last froze after the last task


def test_what_an_evaluation_keeps_is_what_it_would_compute_anew() -> None:
    # Protects: features cached over evaluations, and the group of images of each snapshot.
    trainer = _C.Trainer(
        "lorac-ipc",
        QUICK,
        {"initial_classes": 2, "increment": 2, "epochs": 2, "batch_size": 8, "device": "cpu"}
        | {"optimizer": "adam", "learning_rate": 0.005, "weight_decay": 0.0},
        backbone(),
        {
            "train": _C.make_array_store(*map(as_store, images_of(6, 8, np.random.default_rng(1)))),
            "test": _C.make_array_store(*map(as_store, images_of(6, 4, np.random.default_rng(2)))),
            "class_order": [3, 1, 5, 0, 2, 4],
        },
        {"transform": "resize", "image_size": SIZE},
        {},
        [0.5] * 3,
        [0.5] * 3,
    )
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    images, labels = images_of(6, 4, np.random.default_rng(2))
    uint8 = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    number = torch.empty(6, dtype=torch.long)
    number[order] = torch.arange(6)
    of_image = number[torch.from_numpy(labels)]
    anew = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "evaluation":
            seen = of_image < 2 * event["task"] + 2
            found = trainer.scores(uint8[seen]).argmax(1)
            anew.append(sorted(zip(of_image[seen].tolist(), found.tolist(), strict=True)))

    result = trainer.run(listen, None)
    kept = [
        sorted(zip(p["labels"].tolist(), p["records"][:, 0].tolist(), strict=True))
        for p in result["predictions"]
    ]
    assert kept == anew
    assert any(label != found for label, found in kept[-1])  # else it would prove little


def as_store(array: np.ndarray) -> Any:
    return torch.from_numpy(array) if array.dtype == np.uint8 else array.tolist()


def test_a_state_loads_into_a_fresh_method() -> None:
    trained = bare_trainer("lorac-ipc", QUICK)
    trained.run(None, None)
    fresh = bare_trainer("lorac-ipc", QUICK)
    fresh.load_state(trained.state())
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    torch.testing.assert_close(fresh.scores(images), trained.scores(images), rtol=0, atol=1e-5)
    for name, change, message in [
        ("fc1.old_down", lambda t: t[..., :-1], r"fc1.old_down: expected \[6, 1, 96, 12\]"),
        ("inference.factor_rows", lambda t: t + 1, r"the tensors inference.\* do not fit"),
        ("inference.clusters", lambda t: torch.ones(24).long(), r"inference.\*"),
        ("attention.bank", lambda t: t[..., :2], r"attention.bank: expected \[6, 4, 3, 3\]"),
        ("head.weight", lambda t: t[:4], "head: expected weight"),
        ("task_sizes", lambda t: t - 2, "task_sizes: expected positive numbers"),
        ("class_ids", lambda t: t[:4], "class_ids: expected 6 or more"),
        ("alignment.means", lambda t: t[:, :, 1:], r"alignment.\*: expected means"),
    ]:
        broken = trained.state()
        broken[name] = change(broken[name])
        with pytest.raises(ValueError, match=rf"\[state\] {message}"):
            bare_trainer("lorac-ipc", QUICK).load_state(broken)


def test_a_state_with_the_head_as_trained_loads() -> None:
    options = QUICK | {"train_aligned_head": False}
    trained, fresh = (bare_trainer("lorac-ipc", options) for _ in range(2))
    trained.run(None, None)
    fresh.load_state(trained.state())
    assert same_bits(fresh.state(), trained.state())


# ---- switches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["release", "corrected"])
@pytest.mark.parametrize("placement", ["qkvo", "all"])
def test_both_variants_run_over_uneven_tasks(tmp_path: Path, variant: str, placement: str) -> None:
    result = train(
        tmp_path / "run",
        variant=variant,
        initial_classes=3,
        increment=2,
        lorac_ipc={
            **{"placement": placement, "lora_depth": 3, "ipc_threshold": 0.1},
            "small_clusters": "shrink",  # the images are few
        },
    )
    assert [e.count for e in result.evaluations] == [3 * TEST, 5 * TEST, 6 * TEST]
    assert state(result)["mask"].shape == (6 if placement == "all" else 4, 3)


def test_the_release_looks_up_the_wrong_task_where_the_classes_are_shuffled(tmp_path: Path) -> None:
    # 12.4: class 0 of the data set is learned last, so the first place is taken for the last task.
    order = [5, 4, 3, 2, 1, 0]
    right, wrong = (
        train(
            tmp_path / kind,
            dataset(train=24),
            class_order=order,
            lorac_ipc={"class_lookup": kind, "inference_clusters": 1},
        )
        for kind in ("class", "position")
    )
    assert right.evaluations[-1].inferred_task > 60
    assert wrong.evaluations[-1].inferred_task < 40
    assert right.evaluations[0].inferred_task == wrong.evaluations[0].inferred_task == 100


def test_classes_of_one_image(tmp_path: Path) -> None:
    # 12.5
    result = train(tmp_path / "run", dataset(train=1))
    assert result.evaluations[-1].count == CLASSES * TEST
    message = "at least 4 images for as many clusters, got 1"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "release", dataset(train=1), lorac_ipc={"small_clusters": "error"})


def test_old_weights_may_stand_still(tmp_path: Path) -> None:
    # A group's rate below the schedule's floor is not raised to it.
    tensors = state(train(tmp_path / "run", lorac_ipc={"omega_lr_factor": 0.0}))
    for group in ("attention", "fc1", "fc2"):
        assert tensors[f"{group}.omega"].eq(1).all()


def test_without_ipc_nothing_freezes(tmp_path: Path) -> None:
    result = train(tmp_path / "run", lorac_ipc={"ipc_threshold": 0.0})
    assert state(result)["mask"].min() == 1


def test_the_window_lies_at_the_end_of_a_task(tmp_path: Path) -> None:
    result = train(tmp_path / "run", epochs=3, lorac_ipc={"importance_window": 1})
    assert int((state(result)["mask"] == 0).sum()) == len(result.evaluations)


def test_the_head_as_trained_goes_on_where_the_aligned_one_does_not(tmp_path: Path) -> None:
    aligned, trained = (
        train(tmp_path / str(flag), lorac_ipc={"train_aligned_head": flag}, epochs=2)
        for flag in (True, False)
    )
    tensors = state(trained)
    assert not torch.equal(tensors["head.weight"], tensors["trained_head.weight"])
    assert "trained_head.weight" not in state(aligned)
    # The first alignment begins from the same head.
    assert aligned.evaluations[1].per_task == trained.evaluations[1].per_task


def test_orthogonal_modules(tmp_path: Path) -> None:
    # Untrained, the columns of all modules together are orthonormal.
    method = session({"init": "orthogonal", "inference": "none", "alignment": False})
    for task in range(2):
        a_task(method, task, steps=0)
    tensors = method.state()
    for group in ("attention", "fc1", "fc2"):
        old = tensors[f"{group}.old_down"]
        gram = old.transpose(2, 3) @ old
        torch.testing.assert_close(gram, torch.eye(8).expand_as(gram), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="at most 96 orthogonal columns for 3 tasks of rank 40"):
        train(tmp_path / "run", lorac_ipc={"init": "orthogonal", "rank": 40})


def test_a_prediction_within_the_inferred_task(tmp_path: Path) -> None:
    result = train(tmp_path / "run", lorac_ipc={"predict_within_task": True})
    for e in result.evaluations:
        assert e.task_id == e.inferred_task


def test_alignment_with_full_covariances(tmp_path: Path) -> None:
    result = train(tmp_path / "run", epochs=3, lorac_ipc={"alignment_covariance": "full"})
    tensors = state(result)
    assert result.final_accuracy > 2 * 100 / CLASSES
    assert tensors["alignment.full.means"].shape == (CLASSES, 96)
    assert tensors["alignment.means"].numel() == 0


def test_the_alignment_of_raa() -> None:
    # Section 5.3 of RAA's specification, with its published numbers, on LoRAC's own head.
    epochs, samples, seen = 5, 256, 4
    noise = torch.Generator().manual_seed(3)
    normals = torch.randn(epochs, seen, samples, 96, generator=noise, dtype=torch.float64)
    orders = [torch.randperm(seen * samples, generator=noise) for _ in range(epochs)]

    def draws(purpose: str, task: int, step: int, number: int, layer: int) -> torch.Tensor | None:
        given = {
            "alignment.order": lambda: orders[step],
            "alignment.normals": lambda: normals[step, number],
        }
        return given[purpose]() if purpose in given else None

    states = []
    for recipe in ({"alignment": False}, {"alignment_recipe": "raa"}):
        method = session(recipe, train={"precision": "float64"}, draws=draws)
        a_task(method, 0)
        a_task(method, 1)
        states.append(method.state())
    trained, aligned = states
    means = aligned["alignment.full.means"]
    features = [
        method.features(
            pixels(images_of(2 * t + 2, 8, np.random.default_rng(t))[0][16 * t :]).double()
        )["features"]
        for t in range(2)
    ]
    torch.testing.assert_close(means[2:], features[1].unflatten(0, (2, 8)).mean(1))
    covariances = [torch.cov(x.T) + 1e-3 * torch.eye(96) for x in features[1].unflatten(0, (2, 8))]
    factors = [factor_of(aligned["alignment.full.factors"][c]) for c in range(seen)]
    for factor, covariance in zip(factors[2:], covariances, strict=True):
        torch.testing.assert_close(factor @ factor.T, covariance)
    weight, bias = (
        trained[f"head.{name}"][:seen].clone().requires_grad_() for name in ("weight", "bias")
    )
    sgd = torch.optim.SGD([weight, bias], lr=0.01, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, epochs)
    kappa = [0.95, 0.95, 1.0, 1.0]
    for epoch in range(epochs):
        rows = torch.cat(
            [kappa[c] * means[c] + normals[epoch, c] @ factors[c].T for c in range(seen)]
        )
        for part in orders[epoch].split(samples):
            logits = torch.nn.functional.linear(rows[part], weight, bias)
            loss = torch.nn.functional.cross_entropy(logits, part // samples)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
        schedule.step()
    for name, expected in (("weight", weight), ("bias", bias)):
        torch.testing.assert_close(aligned[f"head.{name}"][:seen], expected.detach())
        assert torch.equal(aligned[f"head.{name}"][seen:], trained[f"head.{name}"][seen:])


def factor_of(packed: torch.Tensor) -> torch.Tensor:
    """The lower triangle, row after row."""
    factor = torch.zeros(96, 96, dtype=packed.dtype)
    factor[*torch.tril_indices(96, 96)] = packed
    return factor


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_drift_moves_the_means_of_old_classes(covariance: str) -> None:
    # RAA's drift: those of the new classes stay as they are, and what is inferred too.
    means, inference = {}, {}
    for drift in ("off", "paired"):
        method = session({"drift": drift, "alignment_covariance": covariance})
        a_task(method, 0)
        name = "alignment.full.means" if covariance == "full" else "alignment.means"
        first = method.state()[name].clone()
        a_task(method, 1)
        tensors = method.state()
        means[drift] = tensors[name]
        inference[drift] = tensors["inference.means"]
        assert torch.equal(tensors[name][:2], first) == (drift == "off")
        assert tensors["features_before"].numel() == 0
    assert torch.equal(means["off"][2:], means["paired"][2:])
    assert torch.equal(inference["off"], inference["paired"])


def test_votes_of_the_test_tasks_say_what_they_are(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="uses the labels of the test images"):
        voted = train(tmp_path / "run", lorac_ipc={"inference": "vote_by_test_task"}, epochs=2)
    third = 100 / 3
    assert voted.evaluations[-1].inferred_task in (
        0,
        *(pytest.approx(n * third) for n in (1, 2, 3)),
    )
    assert any("no result" in text for text in voted.headline().values())


def test_a_new_final_norm_is_trained(tmp_path: Path) -> None:
    # 12.6
    tensors = state(train(tmp_path / "run", lorac_ipc={"moco_norm": "new"}))
    assert tensors["head.norm.weight"].std() > 0
    assert "head.norm.weight" not in state(train(tmp_path / "own"))


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_other_precisions_learn_the_same(tmp_path: Path, precision: str) -> None:
    one, other = (
        train(tmp_path / kind, precision=kind, epochs=2) for kind in ("float32", precision)
    )
    tolerance = 1e-4 if precision == "float64" else 0.05
    for a, b in zip(step_losses(one)[:2], step_losses(other)[:2], strict=True):
        assert a["ce"] == pytest.approx(b["ce"], rel=tolerance, abs=tolerance)
        assert a["l_orth"] == pytest.approx(b["l_orth"], rel=1e-3)


def test_importance_is_measured_in_the_window_alone() -> None:
    images, labels = images_of(2, 8, np.random.default_rng(0))
    batch, labels = pixels(images), torch.from_numpy(labels)
    scores = {}
    for window, steps in ((2, 4), (10, 4), (0, 4)):
        method = session({"importance_window": window})
        method.begin_task(0, 0, 2, 2, 16, batch, labels, classes=2, steps=steps)
        measured, before = [], 0
        for _ in range(steps):
            method.step(batch, labels, 0.005)
            count = int(method.state()["importance.steps"])
            measured.append(count > before)
            before = count
        scores[window] = method.state()["importance.mean"]
        assert measured == [False] * max(0, steps - (window or 128)) + [True] * min(
            steps, window or 128
        )
    assert torch.equal(scores[10], scores[0])
    assert not torch.equal(scores[2], scores[0])


def test_plain_means_of_a_tasks_last_epoch() -> None:
    generator = torch.Generator().manual_seed(0)
    importance = torch.rand(7, 6, 3, generator=generator, dtype=torch.float64)
    average = _C.ImportanceAverage(plain=True)
    doubts = []
    for k, step in enumerate(importance):
        average.add(step)
        doubts.append((step - importance[: k + 1].mean(0)).abs())
    torch.testing.assert_close(average.mean, importance.mean(0))
    torch.testing.assert_close(average.uncertainty, torch.stack(doubts).mean(0))
    torch.testing.assert_close(average.score(), average.mean * average.uncertainty)


def test_the_last_epoch_alone_is_measured(tmp_path: Path) -> None:
    # Two classes of 8 images, batch 8: two steps an epoch.
    result = train(tmp_path / "run", epochs=3, lorac_ipc={"importance_average": "epoch"})
    assert int((state(result)["mask"] == 0).sum()) == len(result.evaluations)
    trainer, measured = bare_trainer("lorac-ipc", QUICK | {"importance_average": "epoch"}), []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["task"] == 0:
            measured.append(trainer.state().get("importance.steps"))

    trainer.run(listen, None)
    assert [None if n is None else n.item() for n in measured] == [1, 2]


def test_importance_of_every_entry() -> None:
    # One step: the average is the importance itself, times 0.15, and its mean is the matrix's.
    images, labels = images_of(2, 8, np.random.default_rng(0))
    batch, labels = pixels(images), torch.from_numpy(labels)
    states = {}
    for kind in ("matrix", "entry"):
        method = session({"importance_of": kind, "inference": "none", "alignment": False})
        method.begin_task(0, 0, 2, 2, 16, batch, labels, classes=2)
        method.step(batch, labels, 0.005)
        states[kind] = method.state()
        method.step(batch, labels, 0.005)
        method.run_stages()
        assert (method.state()["mask"] == 0).sum() == 1
    matrix, entry = states["matrix"]["importance.mean"], states["entry"]
    tables = [entry[f"importance.{group}.mean"] for group in ("attention", "fc1", "fc2")]
    assert tables[0].shape == (6, 4, 96, 96)
    of_types = torch.cat([table.mean((2, 3)).T for table in tables])
    torch.testing.assert_close(of_types.double(), matrix, rtol=1e-4, atol=0)


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_the_next_task_begins_from_the_last_snapshot(threshold: float) -> None:
    # B = 0: the composition of a fresh module is the snapshot, frozen matrices included (with 0.5
    # all are frozen by then).
    method = session({"ipc_threshold": threshold, "inference": "none", "alignment": False})
    for task in range(2):
        a_task(method, task)
    images, labels = images_of(6, 2, np.random.default_rng(9))
    before = method.scores(pixels(images))
    batch, new = pixels(images[8:]), torch.from_numpy(labels[8:])
    method.begin_task(2, 4, 2, 2, 4, batch, new, classes=CLASSES)
    losses = method.step(batch, new, 0.0)["losses"]
    tensors = method.state()
    assert (tensors["mask"] == 0).sum() == 2 * int(36 * threshold)
    method.run_stages()
    after = method.scores(pixels(images))
    torch.testing.assert_close(after[:, :4], before, rtol=1e-4, atol=1e-4)
    expected = torch.nn.functional.cross_entropy(after[8:, 4:], new - 4)
    assert losses["ce"] == pytest.approx(expected.item(), rel=1e-4)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rank": 97}, r"'rank': expected 1 to the smaller side of the matrices, 96, got 97"),
        ({"rank": 0}, r"'lorac_ipc.rank': expected int >= 1, got 0"),
        ({"lora_depth": 7}, r"'lora_depth': expected 1 to the 6 blocks of the backbone, got 7"),
        ({"ipc_threshold": 1.5}, r"'lorac_ipc.ipc_threshold': expected float >= 0 and <= 1"),
        ({"ipc_threshold": -0.1}, r"'lorac_ipc.ipc_threshold': expected float >= 0 and <= 1"),
        ({"inference_clusters": 0}, r"'lorac_ipc.inference_clusters': expected int >= 1, got 0"),
        ({"alignment_clusters": 0}, r"'lorac_ipc.alignment_clusters': expected int >= 1, got 0"),
        (
            {"ipc_threshold": 0.02, "selection": "release"},
            "cannot freeze 0 of 36 matrices: expected 0 or at least 1 / 36, got 0.02",
        ),
        ({"placement": "qv"}, r"'lorac_ipc.placement': expected one of: qkvo, all, got 'qv'"),
        ({"inference": "batch"}, r"'lorac_ipc.inference': expected one of: per_image, none"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", lorac_ipc=section)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.safetensors"))


def test_defaults_are_the_methods_own() -> None:
    config = resolve({"method": "lorac-ipc"})
    assert (config.optimizer, config.learning_rate, config.weight_decay) == ("adam", 0.005, 0)
    assert (config.hold_epochs, config.min_learning_rate) == (1, 1e-5)
    assert resolve({"method": "lorac-ipc", "optimizer": "sgd"}).optimizer == "sgd"
    assert resolve({"method": "ntk-cl"}).optimizer == "sgd"
