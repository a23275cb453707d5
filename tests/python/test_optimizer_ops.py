"""Steps of optimisers as operators, against their definitions in float64 and torch.optim."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ntkcl.ops import adam_step_, sam_ascend_, sam_step_, sgd_step_

# A matrix of more than one part, sizes around the vectors of processors, scalars and nothing.
SHAPES = [(2, 3, 40, 97), (33,), (), (7, 1), (2, 3, 0), (130, 131)]
STACKED = [2, 0, 0, 1, 1, 0]  # leading dimensions that are stacks of tensors
ROWS = [6, 1, 1, 7, 2, 1]
DTYPES = [torch.float32, torch.float64]
Lists = dict[str, list[Tensor]]


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(np.asarray(rng.normal(size=s))).to(dtype) for s in SHAPES]


def cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return [cloned(item) for item in value] if isinstance(value, list) else value


def assert_near(ours: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    for mine, theirs in zip(ours, wanted, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=tolerance, atol=tolerance)


class Sgd:
    """sgd_step_ as its definition says it, one parameter after another, in float64."""

    lists: tuple[str, ...] = ("momenta", "averages")
    settings: Mapping[str, Any] = {"momentum": 0.9}

    def call(self, lists: Lists, **settings: Any) -> Tensor:
        lists = dict(lists)
        return sgd_step_(
            lists.pop("parameters"), lists.pop("gradients"), **lists, **self.settings, **settings
        )

    def step(self, theta: Tensor, g: Tensor, kept: Lists, i: int, s: dict[str, Any]) -> Tensor:
        g = g + s.get("weight_decay", 0.0) * theta
        kept["momenta"][i] = self.settings["momentum"] * kept["momenta"][i] + g
        return theta - s["lr"] * kept["momenta"][i]


class Adam:
    """adam_step_, the third step, decay inside the gradient."""

    lists: tuple[str, ...] = ("means", "squares", "averages")
    settings: Mapping[str, Any] = {"betas": (0.8, 0.97), "eps": 1e-4, "decoupled": False}

    def call(self, lists: Lists, **settings: Any) -> Tensor:
        lists = dict(lists)
        places = [lists.pop(name) for name in ("parameters", "gradients", "means", "squares")]
        device = places[1][0].device
        steps = torch.tensor(3.0, device=device)
        return adam_step_(*places, steps, **lists, **{**self.settings, **settings})

    def step(self, theta: Tensor, g: Tensor, kept: Lists, i: int, s: dict[str, Any]) -> Tensor:
        decay = s.get("weight_decay", 0.0)
        if self.settings["decoupled"]:
            theta = (1 - s["lr"] * decay) * theta
        else:
            g = g + decay * theta
        first, second = self.settings["betas"]
        kept["means"][i] = first * kept["means"][i] + (1 - first) * g
        kept["squares"][i] = second * kept["squares"][i] + (1 - second) * g * g
        mean = kept["means"][i] / (1 - first**3)
        square = kept["squares"][i] / (1 - second**3)
        return theta - s["lr"] * mean / (square.sqrt() + self.settings["eps"])


class AdamW(Adam):
    settings: Mapping[str, Any] = {**Adam.settings, "decoupled": True}


KINDS = [Sgd(), Adam(), AdamW()]


def inputs(kind: Sgd | Adam, dtype: torch.dtype) -> Lists:
    names = ("parameters", "gradients", "anchors", *kind.lists)
    lists = {name: tensors(seed, dtype) for seed, name in enumerate(names)}
    if "squares" in lists:
        lists["squares"] = [t.square() for t in lists["squares"]]
    return lists


SETTINGS = {"lr": 0.05, "weight_decay": 0.3, "anchor_weight": 0.7, "average_decay": 0.75}


def by_definition(kind: Sgd | Adam, lists: Lists, s: dict[str, Any]) -> tuple[Lists, float]:
    lists = {
        name: [None if t is None else t.double() for t in given] for name, given in lists.items()
    }
    distance = 0.0
    for i, theta in enumerate(lists["parameters"]):
        g = lists["gradients"][i]
        anchors = lists.get("anchors", [])
        if anchors and anchors[i] is not None:
            moved = theta - anchors[i]
            distance += float(moved.square().sum())
            g = g + 2 * s.get("anchor_weight", 0.0) * moved
        theta = kind.step(theta, g, lists, i, s)
        lists["parameters"][i] = theta
        if lists.get("averages"):
            decay = s["average_decay"]
            lists["averages"][i] = decay * lists["averages"][i] + (1 - decay) * theta
    return lists, distance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_steps_are_those_of_the_definition(kind: Sgd | Adam, dtype: torch.dtype) -> None:
    lists = inputs(kind, dtype)
    lists["anchors"][1] = None
    wanted, distance = by_definition(kind, lists, SETTINGS)
    read = {name: cloned(lists[name]) for name in ("gradients", "anchors")}
    found = kind.call(lists, **SETTINGS)
    for name in ("parameters", *kind.lists):
        assert_near(lists[name], wanted[name], dtype)
    assert found.dtype == dtype and found.shape == ()
    assert found.item() == pytest.approx(distance, rel=1e-6 if dtype == torch.float32 else 1e-13)
    for name, before in read.items():
        for mine, kept in zip(lists[name], before, strict=True):
            assert mine is kept or torch.equal(mine, kept)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_what_is_absent_is_left_out(kind: Sgd | Adam) -> None:
    lists = inputs(kind, torch.float64)
    del lists["anchors"], lists["averages"]
    wanted, _ = by_definition(kind, lists, {"lr": 0.05})
    assert kind.call(lists, lr=0.05).item() == 0
    assert_near(lists["parameters"], wanted["parameters"], torch.float64)


def test_sgd_without_momentum_needs_no_buffers() -> None:
    parameters, gradients = tensors(0), tensors(1)
    wanted = [p - 0.5 * g for p, g in zip(parameters, gradients, strict=True)]
    sgd_step_(parameters, gradients, lr=0.5)
    assert_near(parameters, wanted, torch.float64)


def test_an_average_is_that_of_torch() -> None:
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    parameters, averages = tensors(0), tensors(1)
    theirs = cloned(averages)
    sgd_step_(parameters, tensors(2), lr=0.1, averages=averages, average_decay=0.9)
    get_ema_multi_avg_fn(0.9)(theirs, parameters, 0)
    assert_near(averages, theirs, torch.float64)


class Sam:
    """A step of SAM+ by its definition, in float64; gradients are given."""

    momentum, decay, lr, rho = 0.8, 0.02, 0.3, 0.4

    def rows(self, t: Tensor, i: int) -> list[Tensor]:
        return list(t.reshape(ROWS[i], -1)) if t.numel() else [t.reshape(-1)] * ROWS[i]

    def up(self, theta: list[Tensor], first: list[Tensor]) -> list[Tensor]:
        norm = math.sqrt(sum(float(g.square().sum()) for g in first))
        return [t + self.rho * g / norm for t, g in zip(theta, first, strict=True)]

    def gamma(self, v: Tensor, g: Tensor, tau: float) -> float:
        lengths = float(v.norm() * g.norm())
        cos = float(v @ g) / lengths if lengths > 0 else 0.0
        return min(max(tau * (1 - math.exp(cos - 1)), 0.0), 1.0)

    def step(
        self, theta: list[Tensor], v: list[Tensor], first: list[Tensor], second: list[Tensor],
        tau: float | None, together: bool,
    ) -> tuple[list[Tensor], list[Tensor], list[float]]:  # fmt: skip
        v = [
            self.momentum * old + g + self.decay * t
            for old, g, t in zip(v, second, theta, strict=True)
        ]
        gammas, moved = [], []
        flat = [torch.cat([t.flatten() for t in lists]) for lists in (v, first)]
        for i, t in enumerate(theta):
            of_rows = []
            for row, g in zip(self.rows(v[i], i), self.rows(first[i], i), strict=True):
                of_rows.append(
                    1.0 if tau is None else self.gamma(*(flat if together else (row, g)), tau)
                )
            gammas += of_rows
            factor = torch.tensor(of_rows, dtype=torch.float64)
            stacked = factor.reshape([*t.shape[: STACKED[i]], *[1] * (t.dim() - STACKED[i])])
            moved.append(t - self.lr * stacked * v[i])
        return moved, v, gammas


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tau", "together"), [(None, False), (2.0, False), (2.0, True)])
def test_sam_steps_are_those_of_the_definition(
    tau: float | None, together: bool, dtype: torch.dtype
) -> None:
    sam = Sam()
    theta, momenta, first, second = (tensors(seed, dtype) for seed in range(4))
    # Alignments of all sizes, and a gradient that is zero.
    spread = (0.2, 1.0, 0.0, 0.5, 0.0, 0.7)
    first = [
        sam.momentum * m + g + noise * f
        for m, g, f, noise in zip(momenta, second, first, spread, strict=True)
    ]
    first[3][2] = 0
    doubles = [[t.double().clone() for t in given] for given in (theta, momenta, first, second)]
    before, saved = cloned(theta), [torch.full_like(t, math.nan) for t in theta]

    sam_ascend_(theta, saved, first, sam.rho)
    assert_near(theta, sam.up(doubles[0], doubles[2]), dtype)
    assert all(torch.equal(s, b) for s, b in zip(saved, before, strict=True))

    settings: dict[str, Any] = {"tau": tau, "together": together, "stacked_dims": STACKED}
    gammas = sam_step_(
        theta, momenta, saved, first, second,
        lr=sam.lr, momentum=sam.momentum, weight_decay=sam.decay, **settings,
    )  # fmt: skip
    moved, v, wanted = sam.step(*doubles, tau, together)
    assert_near(theta, moved, dtype)
    assert_near(momenta, v, dtype)
    assert_near([gammas], [torch.tensor(wanted, dtype=torch.float64)], dtype)
    if tau is not None:
        assert any(0.1 < gamma < 0.9 for gamma in wanted), "the test sees damping"


def test_sam_numbers_may_differ_by_parameter() -> None:
    theta, momenta, saved = tensors(0), [torch.zeros_like(t) for t in tensors(0)], tensors(0)
    rates = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    decays = [0.5, 0.0, 0.5, 0.0, 0.5, 0.0]
    second = tensors(1)
    sam_step_(theta, momenta, saved, [], second, lr=rates, weight_decay=decays, tau=None)
    wanted = [
        t - lr * (g + wd * t) for t, g, lr, wd in zip(saved, second, rates, decays, strict=True)
    ]
    assert_near(theta, wanted, torch.float64)


def test_sam_of_no_gradient_stays() -> None:
    theta, saved = tensors(0), tensors(1)
    before = cloned(theta)
    sam_ascend_(theta, saved, [torch.zeros_like(t) for t in theta], 0.5)
    assert all(torch.equal(t, b) for t, b in zip(theta, before, strict=True))


# --- for every one of them -----------------------------------------------------------------------


def steps(
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[str, Lists, Callable[[Lists], Any]]]:
    """(name, lists, step of the lists) of each operator; all that is changed is in the lists."""
    for kind in KINDS:
        lists = inputs(kind, dtype)
        yield type(kind).__name__, lists, lambda lists, kind=kind: kind.call(lists, **SETTINGS)
    names = ("parameters", "momenta", "saved", "first", "second")
    lists = {name: tensors(seed, dtype) for seed, name in enumerate(names)}
    ascent = {"parameters": lists["parameters"], "saved": lists["saved"], "first": lists["first"]}
    yield "ascent", ascent, lambda lists: sam_ascend_(*lists.values(), 0.4)
    yield (
        "sam",
        lists,
        lambda lists: sam_step_(*lists.values(), lr=0.1, stacked_dims=STACKED, tau=0.7),
    )


NAMES = [name for name, _, _ in steps()]


def named(name: str, dtype: torch.dtype = torch.float32) -> tuple[Lists, Callable[[Lists], Any]]:
    return next((lists, step) for n, lists, step in steps(dtype) if n == name)


def outcome(lists: Lists, result: Any) -> list[Tensor]:
    return [t for given in lists.values() for t in given] + [result] * (result is not None)


@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_threads(name: str) -> None:
    found = []
    for threads in (1, 2, 5):
        lists, step = named(name)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            found.append(outcome(lists, step(lists)))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_bits_do_not_depend_on_vectors(kind: Sgd | Adam) -> None:
    # An element gets the same step at the end of a tensor as in its middle.
    whole = inputs(kind, torch.float32)
    apart = {name: [t.flatten()[:61].clone() for t in given[:1]] for name, given in whole.items()}
    kind.call(whole, **SETTINGS)
    kind.call(apart, **SETTINGS)
    for name, (part, *_) in apart.items():
        assert torch.equal(part, whole[name][0].flatten()[:61]), name


@pytest.mark.parametrize("name", NAMES)
def test_gradients_may_be_views(name: str) -> None:
    # What is read may have any layout; what is changed must be contiguous.
    wanted, step = named(name)
    given, _ = named(name)
    for read in READ:
        if read in given:
            given[read] = [
                t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t
                for t in given[read]
            ]
    a, b = outcome(wanted, step(wanted)), outcome(given, step(given))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


READ = ("gradients", "anchors", "first", "second")


@pytest.mark.parametrize("name", NAMES)
def test_bad_lists_are_errors_and_nothing_changes(name: str) -> None:
    lists, step = named(name)
    for key, given in lists.items():
        first, *others = given
        turned = first.transpose(0, 1).contiguous().transpose(0, 1)
        bad: list[tuple[type[Exception], str, list[Tensor]]] = [
            (TypeError, "of float32 or float64|'s type", [first.half(), *others]),
            (TypeError, "'s type", [*given[:-1], given[-1].double()]),
            (ValueError, "'s shape" if key != "parameters" else "", [first[:1], *others]),
            (ValueError, "expected .* got ", given[:-1] if key != "parameters" else []),
        ]
        if key not in READ:
            bad.append((ValueError, r"contiguous, got strides \[", [turned, *others]))
        for error, message, replaced in bad:
            broken = lists | {key: replaced}
            before = [t.clone() for tensors in broken.values() for t in tensors]
            with pytest.raises(error, match=r"^\[(sgd|adam|sam)_(step|ascend)_\] .*" + message):
                step(broken)
            after = [t for tensors in broken.values() for t in tensors]
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, "expected a finite lr >= 0, got -0.1"),
        ({"lr": math.nan}, "expected a finite lr >= 0, got nan"),
        ({"lr": math.inf}, "expected a finite lr >= 0, got inf"),
        ({"weight_decay": -1.0}, "expected a finite weight_decay >= 0"),
        ({"anchor_weight": -1.0}, "expected a finite anchor_weight >= 0"),
        ({"average_decay": 1.0}, "expected 0 <= average_decay < 1, got 1"),
        ({"anchors": [], "anchor_weight": 0.5}, r"expected anchors for an anchor_weight of 0\.5"),
        ({"anchors": [None] * 2}, "expected 6 tensors in anchors, one for each parameter, or none"),
    ],
)
def test_bad_numbers_are_errors(settings: dict[str, Any], message: str) -> None:
    for kind in KINDS:
        lists = inputs(kind, torch.float32)
        given = {"lr": 0.1} | settings
        if "anchors" in settings:
            lists["anchors"] = given.pop("anchors")
        with pytest.raises(ValueError, match=message):
            kind.call(lists, **given)


def test_bad_numbers_of_one_are_errors() -> None:
    lists, _ = named("sam")
    for change, message in [
        ({"tau": 0.0}, "expected tau > 0, got 0"),
        ({"momentum": 1.0}, "expected 0 <= momentum < 1"),
        ({"lr": [0.1]}, "expected 6 numbers in lr, one for each parameter, got 1"),
        ({"lr": [0.1, 0.1, 0.1, 0.1, 0.1, -1.0]}, "expected a finite lr >= 0, got -1"),
        ({"stacked_dims": 1}, r"expected stacked_dims\[2\] from 0 to 0, got 1"),
    ]:
        with pytest.raises(ValueError, match=r"^\[sam_step_\] " + message):
            sam_step_(*lists.values(), **{"lr": 0.1, **change})
    with pytest.raises(ValueError, match=r"\[sam_ascend_\] expected a finite rho >= 0"):
        sam_ascend_(lists["parameters"], lists["saved"], lists["first"], -1.0)
    with pytest.raises(ValueError, match="expected 6 tensors in first_gradients"):
        sam_step_(
            *(lists[n] for n in ("parameters", "momenta", "saved")), [], lists["second"], lr=1
        )
    a = inputs(KINDS[1], torch.float32)
    places = [a[name] for name in ("parameters", "gradients", "means", "squares")]
    for steps_, error, message in [
        (torch.tensor(0.0), ValueError, "expected steps >= 1, got 0"),
        (torch.tensor([1.0, 2.0]), ValueError, r"steps with one element, got shape \[2\]"),
        (torch.tensor(1), TypeError, "expected steps of float32, got Long"),
    ]:
        with pytest.raises(error, match=message):
            adam_step_(*places, steps_, lr=0.1)
    with pytest.raises(ValueError, match=r"expected 0 <= beta2 < 1, got 1\.5"):
        adam_step_(*places, torch.tensor(1.0), lr=0.1, betas=(0.9, 1.5))
    with pytest.raises(ValueError, match="expected 6 tensors in momenta"):
        sgd_step_(*places[:2], lr=0.1, momentum=0.9)


# --- in training ---------------------------------------------------------------------------------


def test_parameters_of_a_model_are_stepped_and_nothing_is_recorded() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1)
    images = torch.randn(4, 5)
    parameters = list(ours.parameters())
    means, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step in range(3):
        gradients = torch.autograd.grad(ours(images).square().sum(), parameters)
        count = torch.tensor(step + 1.0)
        distance = adam_step_(
            parameters, gradients, means, squares, count, lr=0.1, weight_decay=0.01
        )
        assert not distance.requires_grad and all(p.is_leaf for p in parameters)
        reference.zero_grad()
        theirs(images).square().sum().backward()
        reference.step()
    for mine, wanted in zip(parameters, theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_a_graph_that_needs_the_parameters_says_so() -> None:
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    sgd_step_([weight], [torch.ones(3)], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match="leaves of the autograd graph"):
        sgd_step_([weight * 2], [torch.ones(3)], lr=0.1)
    with torch.no_grad():
        sgd_step_([weight * 2], [torch.ones(3)], lr=0.1)


def test_changes_are_seen_from_within_inference_mode() -> None:
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    with torch.inference_mode():
        sgd_step_([weight], [torch.ones(3)], lr=0.1)
        made_there = torch.ones(3)
        sgd_step_([made_there], [torch.ones(3)], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=r"\[sgd_step_\] expected tensors made outside of"):
        sgd_step_([weight], [torch.ones(3)], [made_there], lr=0.1, momentum=0.9)
    assert torch.equal(weight, before) and made_there[0] == 0.9


def test_tensors_that_share_memory_are_refused() -> None:
    p, g, v = (torch.ones(6) for _ in range(3))
    for step in (
        lambda: sgd_step_([p, p], [g, g], lr=0.1),
        lambda: sgd_step_([p[:4], p[3:]], [g[:4], g[3:]], lr=0.1),
        lambda: sgd_step_([p], [g], [p], lr=0.1, momentum=0.9),
        lambda: adam_step_([p], [g], [v], [v], torch.tensor(1.0), lr=0.1),
        lambda: sam_ascend_([p], [p], [g]),
        lambda: sam_step_([p], [p], [v], [], [g], lr=0.1, tau=None),
    ):
        with pytest.raises(ValueError, match="expected to change tensors that share no memory"):
            step()
    assert torch.equal(p, torch.ones(6))
    sgd_step_([p[:3], p[3:]], [g[:3], g[3:]], lr=0.5)  # neighbours share none
    assert torch.equal(p, torch.full((6,), 0.5))


def test_infinite_parameters_stay_where_nothing_decays() -> None:
    for kind in KINDS:
        lists = {"parameters": [torch.tensor([math.inf, 1.0])]}
        for name in ("gradients", "anchors", *kind.lists):
            lists[name] = [torch.zeros(2)]
        kind.call(lists, lr=0.1)
        assert lists["parameters"][0].tolist() == [math.inf, 1.0]
    p, zeros = torch.tensor([math.inf, 1.0]), torch.zeros(2)
    sam_step_([p], [zeros.clone()], [p.clone()], [], [zeros], lr=0.1, tau=None)
    assert p.tolist() == [math.inf, 1.0]


def test_cuda_steps_of_sgd_have_the_cpus_bits(cuda: torch.device) -> None:
    kind = KINDS[0]
    here, there = inputs(kind, torch.float32), inputs(kind, torch.float32)
    there = {name: [t.to(cuda) for t in given] for name, given in there.items()}
    kind.call(here, **SETTINGS)
    kind.call(there, **SETTINGS)
    for name in ("parameters", *kind.lists):
        for mine, theirs in zip(here[name], there[name], strict=True):
            assert torch.equal(mine, theirs.cpu()), name


@pytest.mark.parametrize("name", NAMES)
def test_compiled_steps_equal_eager_ones(name: str) -> None:
    torch._dynamo.reset()
    wanted, step = named(name)
    given, _ = named(name)
    a = outcome(wanted, step(wanted))
    b = outcome(given, torch.compile(step, fullgraph=True)(given))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)
