"""The parts of LoRAC-IPC that stand already, against its golden files."""

from __future__ import annotations

import re

import pytest
import torch

import golden
from ntkcl import _C

DTYPES = [torch.float64, torch.float32]
RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-4}


def check(g, name, actual, tolerance64=1e-9):
    """The README's rule: float64 to 1e-9 * (1 + |expected|), float32 to 1e-4 of the largest."""
    expected = g[name].double()
    assert actual.shape == expected.shape, name
    difference = (actual.double() - expected).abs()
    allowed = tolerance64 * (1 + expected.abs())
    if actual.dtype == torch.float32:
        allowed = 1e-4 * expected.abs().max().clamp_min(1e-30)
    assert (difference <= allowed).all(), (name, (difference / allowed).max().item())


def check_scaled(expected, actual):
    """Tiny numbers, held to their largest."""
    allowed = RELATIVE[actual.dtype] * expected.abs().max()
    assert (actual.double() - expected).abs().max() <= allowed


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


# ---- The orthogonality penalty ----

TYPES = ["q", "k", "v", "o", "f1", "f2"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_orthogonality(dtype):
    model, g = golden.load("lorac_ipc", "model"), golden.load("lorac_ipc", "ortho")
    strength = g["lambda"].item()
    tasks = model["config"].long().tolist()[6]
    for t in range(tasks):
        total = 0.0
        for kind in TYPES:
            pool = model[f"A.{kind}"].to(dtype)
            free = model[f"mask.{kind}"][t - 1].to(dtype) if t else pool.new_ones(pool.shape[1])
            old = pool[:t].permute(1, 2, 0, 3).flatten(2)
            values, gradient = _C.Orthogonality(old)(pool[t])
            check(g, f"t{t}/value.{kind}", values * free)
            check(g, f"t{t}/grad_A.{kind}", strength * gradient * free[:, None, None])
            total += strength * (values * free).sum().double().item()
        assert total == pytest.approx(g[f"t{t}/loss"].item(), rel=RELATIVE[dtype])


@pytest.mark.parametrize("columns", [0, 3])
def test_orthonormal_columns_cost_nothing(columns):
    q = torch.eye(8, dtype=torch.float64)[None]
    values, gradient = _C.Orthogonality(q[:, :, :columns])(q[:, :, columns : columns + 4])
    assert torch.equal(values, torch.zeros(1, dtype=torch.float64))
    assert torch.equal(gradient, torch.zeros(1, 8, 4, dtype=torch.float64))


# ---- Importance and selection ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_importance_average(dtype):
    g = golden.load("lorac_ipc", "ipc")
    average = _C.ImportanceAverage()
    for step in range(len(g["ema/importance"])):
        importance = torch.stack(
            [
                _C.mean_importance(
                    g[f"ema/W.{kind}"][step].to(dtype), g[f"ema/G.{kind}"][step].to(dtype)
                )
                for kind in TYPES
            ]
        )
        average.add(importance)
        check_scaled(g["ema/importance"][step], importance)
        check_scaled(g["ema/mean"][step], average.mean)
        check_scaled(g["ema/uncertainty"][step], average.uncertainty)
    check_scaled(g["ema/score"], average.score())


@pytest.mark.parametrize("window", [None, 128])
def test_importance_of_the_last_steps(window):
    g = golden.load("lorac_ipc", "ipc")
    average = _C.ImportanceAverage()
    for importance in g["series/importance"].double()[-window if window else 0 :]:
        average.add(importance)
    check_scaled(g[f"series/score{f'_window{window}' if window else ''}"], average.score())


def selections():
    g = golden.load("lorac_ipc", "ipc")
    names = [name for name in g.tensors if re.fullmatch(r"select/thr.*/(release|corrected)", name)]
    names += [n.removesuffix("_fails_at_task") for n in g.tensors if n.endswith("_fails_at_task")]
    return sorted(set(names))


@pytest.mark.parametrize("name", selections())
def test_selection(name):
    g = golden.load("lorac_ipc", "ipc")
    threshold, which, variant = re.fullmatch(r"select/thr([\d.]+)/(\w+)/(\w+)", name).groups()
    arguments = {
        "threshold": float(threshold),
        "of_new": which == "new_mask",
        "rule": "release" if variant == "release" else "exact",
    }
    scores = g["select/score"].double()
    fails_at = -1
    if variant == "release":
        fails_at = int(g[f"{name}_fails_at_task"].item())
    mask = torch.ones_like(scores[0])
    for task, score in enumerate(scores):
        if task == fails_at:
            with pytest.raises(ValueError, match="cannot freeze 0 matrices"):
                _C.freeze_important(mask, score, **arguments)
            break
        mask = _C.freeze_important(mask, score, **arguments)
        assert torch.equal(mask, g[name][task].double()), task


def test_selection_refuses_what_cannot_be():
    mask, score = torch.ones(6, 3), torch.rand(6, 3)
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="expected a threshold from 0 to 1"):
            _C.freeze_important(mask, score, threshold)
    with pytest.raises(ValueError, match="expected the rule exact or release, got 'relase'"):
        _C.freeze_important(mask, score, 0.1, rule="relase")
    for rule in ("exact", "release"):
        with pytest.raises(FloatingPointError, match="expected finite scores"):
            _C.freeze_important(mask, score * torch.nan, 0.1, rule=rule)
    with pytest.raises(ValueError, match=r"mask of the score's shape \[6, 3\], got \[6, 2\]"):
        _C.freeze_important(mask[:, :2], score, 0.1)


# ---- Clusters and task inference ----


def test_kmeans():
    g = golden.load("lorac_ipc", "task_inference")
    centers, labels = _C.kmeans(g["kmeans/x"].double(), g["kmeans/init"].double())
    assert torch.equal(labels, g["kmeans/labels"].long())
    g.check("kmeans/centers", centers, 0)


def test_kmeans_keeps_every_cluster():
    # Two centers so far off that no row is theirs: each gets one.
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0]]).double()
    centers, labels = _C.kmeans(x, torch.tensor([[1.0], [100.0], [200.0]]).double())
    assert sorted(torch.bincount(labels, minlength=3).tolist()) == [1, 1, 2]
    for cluster in range(3):
        assert torch.equal(centers[cluster], x[labels == cluster].mean(0))


def test_kmeans_plus_plus_draws_distinct_rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator).repeat(2, 1)
    draws = torch.rand(200, 8, generator=generator, dtype=torch.float64)
    for row in draws:
        assert len(_C.kmeans_plus_plus(x, row).unique(dim=0)) == 8
    # Fewer distinct rows than clusters: all of them, once.
    few = torch.tensor([[1.0], [3.0], [1.0], [3.0]])
    assert sorted(_C.kmeans_plus_plus(few, torch.full((3,), 0.9)).flatten().tolist()) == [1.0, 3.0]


def test_kmeans_plus_plus_draws_by_squared_distance():
    # From row 0, the rows at distance 1 and 2 have probabilities 1/5 and 4/5.
    x = torch.tensor([[0.0], [1.0], [2.0]])
    second = [
        _C.kmeans_plus_plus(x, torch.tensor([0.0, draw], dtype=torch.float64))[1].item()
        for draw in (0.0, 0.19, 0.21, 0.99)
    ]
    assert second == [1.0, 1.0, 2.0, 2.0]


def inference(g, dtype, order):
    gaussians = _C.ClusterGaussians()
    for c in order:
        rows = torch.nn.functional.normalize(g["train_features"][c].to(dtype))
        gaussians.add_class(rows, g["cluster_labels"][c].long())
    return gaussians


@pytest.mark.parametrize("dtype", DTYPES)
def test_task_inference(dtype):
    g = golden.load("lorac_ipc", "task_inference")
    tests = torch.nn.functional.normalize(g["test_features"].to(dtype), dim=2)
    per_task = len(g["train_features"]) // len(tests)
    for t in range(len(tests)):
        distances = inference(g, dtype, range((t + 1) * per_task)).distances(
            tests[: t + 1].flatten(0, 1)
        )
        check(g, f"after_task{t}/distance", distances, 1e-8)
        expected = g[f"after_task{t}/predicted_task"].long()
        assert torch.equal(distances.argmin(1) // per_task, expected)
    # The task is looked up by the class, not by its place (repair 12.4).
    classes = g["shuffled_order/classes"].long()
    nearest = inference(g, dtype, classes.flatten().tolist()).distances(tests.flatten(0, 1))
    task_of = torch.arange(len(tests)).repeat_interleave(per_task)
    assert torch.equal(task_of[nearest.argmin(1)], g["shuffled_order/predicted_task"].long())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cluster_of_one_image(dtype):
    g = golden.load("lorac_ipc", "task_inference")
    gaussians = _C.ClusterGaussians()
    rows = torch.nn.functional.normalize(g["train_features"][0].to(dtype))
    gaussians.add_class(rows, g["singleton/labels"].long())
    tests = torch.nn.functional.normalize(g["test_features"].to(dtype), dim=2).flatten(0, 1)
    check(g, "singleton/distance", gaussians.distances(tests)[:, 0], 1e-8)


def test_task_inference_refuses_what_cannot_be():
    gaussians = _C.ClusterGaussians()
    with pytest.raises(ValueError, match="expected at least one class"):
        gaussians.distances(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="a row in each of 3 clusters, got none in cluster 1"):
        gaussians.add_class(torch.zeros(2, 4), torch.tensor([0, 2]))
    gaussians.add_class(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected features \(b, 4\), got \[1, 5\]"):
        gaussians.distances(torch.zeros(1, 5))


# ---- Head alignment ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_cluster_moments(dtype):
    g = golden.load("lorac_ipc", "head_alignment")
    labels = g["stats/labels"].long()
    clusters = len(g["stats/means"])
    means, variances = _C.cluster_moments(g["stats/features"].to(dtype), labels, clusters)
    check(g, "stats/means", means)
    check(g, "stats/variances", variances)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["plain", "fc_norm"])
def test_head_alignment(dtype, case):
    model, g = golden.load("lorac_ipc", "model"), golden.load("lorac_ipc", "head_alignment")
    normals = g["z"].to(dtype)  # (epochs, classes, K, rows, C)
    epochs, classes, _, rows, width = normals.shape
    asked = []

    def draws(epoch, numbers):
        asked.append(len(numbers))
        return normals[epoch].reshape(-1, width)[numbers]

    weight, bias = (model[f"backbone.head.{n}"].to(dtype).clone() for n in ("weight", "bias"))
    norm = (torch.ones(width, dtype=dtype), torch.zeros(width, dtype=dtype))
    task = int(g["task"].item())
    n_old = classes // (task + 1) * task
    losses = _C.align_head(
        weight,
        bias,
        *(norm if case == "fc_norm" else (None, None)),
        g["means"].to(dtype),
        g["variances"].to(dtype),
        n_old,
        epochs,
        g["lr"].item(),
        rows,
        _C.AlignmentDraws(lambda epoch, count: g["permutation"][epoch].long(), draws),
    )
    assert asked == [n_old * rows] * epochs  # no draw is made that no step uses
    check(g, f"{case}/loss", torch.tensor(losses, dtype=torch.float64).to(dtype))
    check(g, f"{case}/head_weight", weight)
    check(g, f"{case}/head_bias", bias)
    if case == "fc_norm":
        check(g, "fc_norm/norm_weight", norm[0])
        check(g, "fc_norm/norm_bias", norm[1])


def test_head_alignment_refuses_what_cannot_be():
    head = (torch.zeros(3, 4), torch.zeros(3), None, None)
    draws = _C.AlignmentDraws(lambda epoch, count: None, lambda epoch, numbers: None)
    moments = torch.zeros(2, 1, 4)
    with pytest.raises(ValueError, match="expected 0 to 1 old classes, got 2"):
        _C.align_head(*head, moments, moments, 2, 1, 0.1, 5, draws)
    with pytest.raises(ValueError, match=r"\(n, K, C\) for a head \[3, 4\], got"):
        _C.align_head(*head, moments, torch.zeros(2, 2, 4), 1, 1, 0.1, 5, draws)
    with pytest.raises(ValueError, match="a row in each of 3 clusters"):
        _C.cluster_moments(torch.zeros(2, 4), torch.tensor([0, 2]), 3)
