"""Optimisers, schedules, clipping and running means against torch.optim and hand-worked numbers."""

import math

import pytest
import torch
from torch import Tensor

from ntkcl import _C

SHAPES = [(37, 19), (5,), (), (1,), (3, 4, 33), (64, 64)]
KINDS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 5e-3}),
    "sgd-plain": (torch.optim.SGD, {"momentum": 0.0, "weight_decay": 0.0}),
    "sgd-no-momentum": (torch.optim.SGD, {"momentum": 0.0, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.0}),
    "adam-decay": (torch.optim.Adam, {"weight_decay": 0.02}),
    "adam-betas": (torch.optim.Adam, {"weight_decay": 0.0, "betas": (0.7, 0.95), "eps": 1e-3}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.05}),
}
SAM_OPTIONS = {"optimizer": "sam+", "momentum": 0.9, "weight_decay": 5e-3}


def parameters(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in SHAPES]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def fill_gradients(tensors: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)


def our_options(kind: str) -> dict[str, object]:
    if kind == "sam+":
        return SAM_OPTIONS
    options = dict(KINDS[kind][1])
    if "betas" in options:
        options["beta1"], options["beta2"] = options.pop("betas")
    return {"optimizer": kind.split("-")[0], **options}


def assert_near(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Up to the rounding of some steps."""
    for mine, wanted in zip(ours, theirs, strict=True):
        tolerance = 2e-6 if mine.dtype == torch.float32 else 1e-14
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_torch_optim(kind: str, dtype: torch.dtype) -> None:
    ours = parameters(dtype)
    theirs = copies(ours)
    optimizer = _C.make_optimizer(our_options(kind), ours)
    torch_class, settings = KINDS[kind]
    reference = torch_class(theirs, **settings)
    for step in range(7):
        rate = 0.03 / (step + 1)
        optimizer.set_learning_rate(rate)
        optimizer.step(lambda _, step=step: fill_gradients(ours, step))
        fill_gradients(theirs, step)
        reference.param_groups[0]["lr"] = rate
        reference.step()
    assert_near(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_an_undefined_gradient_counts_as_zero(kind: str) -> None:
    ours = parameters(torch.float64)
    reference = copies(ours)
    optimizer = _C.make_optimizer(our_options(kind), ours)
    torch_optimizer = KINDS[kind][0](reference, **KINDS[kind][1])
    torch_optimizer.param_groups[0]["lr"] = 0.1
    optimizer.set_learning_rate(0.1)
    # Parameter 0 has a gradient in the first step only, parameter 1 never.
    with_gradient = [range(6), range(2, 6), range(2, 6)]
    with_gradient[0] = [0, 2, 3, 4, 5]
    start = ours[1].detach().clone()
    for step, present in enumerate(with_gradient):

        def gradients(_: int, step: int = step, present: list[int] = present) -> None:
            fill_gradients(ours, step)
            for i, tensor in enumerate(ours):
                if i not in present:
                    tensor.grad = None

        optimizer.step(gradients)
        fill_gradients(reference, step)
        for i, tensor in enumerate(reference):
            if i not in present:
                tensor.grad = torch.zeros_like(tensor)
        torch_optimizer.step()
    assert_near(ours, reference)
    decays = KINDS[kind][1]["weight_decay"] > 0
    assert torch.equal(ours[1], start) != decays


def quadratic(weight: Tensor, seen: list[Tensor]) -> None:
    """Gradient of |w|^2 / 2 at the parameters that the optimiser has set."""
    seen.append(weight.detach().clone())
    weight.grad = weight.detach().clone()


@pytest.mark.parametrize("kind", ["sam", "sam+"])
def test_sam_takes_the_second_gradient_up_the_slope(kind: str) -> None:
    weight = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    options = {"optimizer": kind, "rho": 0.5, "momentum": 0.0, "weight_decay": 0.0}
    optimizer = _C.make_optimizer(options, [weight])
    optimizer.set_learning_rate(0.1)
    seen: list[Tensor] = []
    optimizer.step(lambda _: quadratic(weight, seen))
    assert optimizer.passes == 2
    assert seen[0].tolist() == [3, 4]
    # The gradient (3, 4) has length 5: the perturbation is (0.3, 0.4).
    torch.testing.assert_close(seen[1], torch.tensor([3.3, 4.4], dtype=torch.float64))
    # The gradient there is parallel to the perturbation: SAM+ stands still.
    wanted = [3 - 0.33, 4 - 0.44] if kind == "sam" else [3.0, 4.0]
    assert weight.tolist() == pytest.approx(wanted, rel=1e-12)


def test_sam_plus_damps_by_the_cosine() -> None:
    # Ascent along x, second gradient at 8 degrees to it: gamma = 25 (1 - exp(cos - 1)) = 0.2421.
    weight = torch.zeros(2, dtype=torch.float64)
    options = {"optimizer": "sam+", "momentum": 0.0, "weight_decay": 0.0}
    optimizer = _C.make_optimizer(options, [weight])
    optimizer.set_learning_rate(1.0)
    angle = math.radians(8)
    rows = [[1.0, 0.0], [math.cos(angle), math.sin(angle)]]
    directions = torch.tensor(rows, dtype=torch.float64)

    def gradients(index: int) -> None:
        weight.grad = directions[index].clone()

    optimizer.step(gradients)
    gamma = 25 * (1 - math.exp(math.cos(angle) - 1))
    assert gamma == pytest.approx(0.2421, abs=1e-4)
    assert weight.tolist() == pytest.approx((-gamma * directions[1]).tolist(), rel=1e-9)


def test_one_gamma_for_all_tensors_or_one_each() -> None:
    def after_a_step(gamma: str) -> list[float]:
        tensors = [torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)]
        options = {"optimizer": "sam+", "momentum": 0.0, "weight_decay": 0.0, "gamma": gamma}
        optimizer = _C.make_optimizer(options, tensors)
        optimizer.set_learning_rate(1.0)

        def gradients(index: int) -> None:
            # Tensor 0 agrees with its ascent direction, tensor 1 opposes it.
            tensors[0].grad = torch.ones(1, dtype=torch.float64)
            tensors[1].grad = torch.full((1,), 1.0 - 2 * index, dtype=torch.float64)

        optimizer.step(gradients)
        return [t.item() for t in tensors]

    assert after_a_step("tensor") == pytest.approx([1, 2])
    assert after_a_step("global") == pytest.approx([0, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sam_without_a_perturbation_is_sgd(dtype: torch.dtype) -> None:
    ours, reference = parameters(dtype), parameters(dtype)
    sam = _C.make_optimizer({"optimizer": "sam+", "rho": 0.0}, ours)
    sgd = _C.make_optimizer({}, reference)
    for step in range(4):
        for optimizer, tensors in ((sam, ours), (sgd, reference)):
            optimizer.set_learning_rate(0.05)
            optimizer.step(lambda _, t=tensors, step=step: fill_gradients(t, step))
    for mine, wanted in zip(ours, reference, strict=True):
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance)


def test_sam_returns_to_its_parameters_when_the_second_pass_fails() -> None:
    weights = parameters(torch.float32)
    before = copies(weights)
    optimizer = _C.make_optimizer({"optimizer": "sam"}, weights)
    optimizer.set_learning_rate(0.1)

    def gradients(index: int) -> None:
        fill_gradients(weights, 0)
        if index == 1:
            assert not torch.equal(weights[0], before[0])
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(gradients)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_gradients_are_cleared_before_the_function_runs() -> None:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = _C.make_optimizer({"momentum": 0.0, "weight_decay": 0.0}, [weight])
    optimizer.set_learning_rate(1.0)
    seen = []

    def gradients(index: int) -> None:
        seen.append((index, weight.grad))
        (2 * weight).sum().backward()

    optimizer.step(gradients)
    optimizer.step(gradients)
    assert seen == [(0, None), (0, None)]
    assert weight.tolist() == [-3.0, -3.0, -3.0]
    assert weight.requires_grad


def test_gradients_may_be_transposed_views() -> None:
    weight = torch.zeros(2, 3, requires_grad=True)
    optimizer = _C.make_optimizer({"momentum": 0.0, "weight_decay": 0.0}, [weight])
    optimizer.set_learning_rate(1.0)

    def gradients(_: int) -> None:
        weight.grad = torch.arange(6.0).reshape(3, 2).t()

    optimizer.step(gradients)
    assert weight.tolist() == [[0.0, -2.0, -4.0], [-1.0, -3.0, -5.0]]


@pytest.mark.parametrize("kind", ["sgd", "adam-decay", "adamw"])
def test_groups_have_their_own_rate_and_decay(kind: str) -> None:
    ours = parameters(torch.float64)
    reference = copies(ours)
    groups = [
        _C.ParameterGroup("lists", ours[:2]),
        _C.ParameterGroup("omega", ours[2:4], learning_rate_scale=0.1),
        _C.ParameterGroup("empty", []),
        _C.ParameterGroup("sigma", ours[4:], decays=False),
    ]
    optimizer = _C.make_optimizer(our_options(kind), groups)
    optimizer.set_learning_rate(0.05)
    assert [optimizer.learning_rate(g) for g in range(4)] == [0.05, 0.05 * 0.1, 0.05, 0.05]
    torch_optimizer = KINDS[kind][0](
        [
            {"params": reference[:2], "lr": 0.05},
            {"params": reference[2:4], "lr": 0.05 * 0.1},
            {"params": reference[4:], "lr": 0.05, "weight_decay": 0.0},
        ],
        **KINDS[kind][1],
    )
    for step in range(4):
        optimizer.step(lambda _, step=step: fill_gradients(ours, step))
        fill_gradients(reference, step)
        torch_optimizer.step()
    assert_near(ours, reference)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "sam+"])
def test_state_continues_a_run(kind: str) -> None:
    straight = parameters(torch.float32)
    first = _C.make_optimizer(our_options(kind), straight)
    first.set_learning_rate(0.01)
    for step in range(3):
        first.step(lambda _, step=step: fill_gradients(straight, step))
    resumed = copies(straight)
    second = _C.make_optimizer(our_options(kind), resumed)
    second.set_learning_rate(0.01)
    saved, restored = first.state(), second.state()
    assert saved.keys() == restored.keys()
    names = {"mean", "square", "steps"} if kind.startswith("adam") else {"momentum"}
    assert {name.split(".")[-1] for name in saved} == names
    for name, value in restored.items():
        value.copy_(saved[name])
    for step in range(3, 6):
        first.step(lambda _, step=step: fill_gradients(straight, step))
        second.step(lambda _, step=step: fill_gradients(resumed, step))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_optimizer_refuses_what_it_cannot_train() -> None:
    def refused(groups: list[object], message: str, **options: object) -> None:
        with pytest.raises(ValueError, match=r"^\[optimizer\] .*" + message):
            _C.make_optimizer(options, groups)

    weight = torch.zeros(2, 3)
    refused([weight.to(torch.bfloat16)], "expected float32 or float64, got BFloat16")
    refused([weight.t()], "expected a contiguous tensor")
    refused([weight, weight], r"parameter parameters.1 is listed twice")
    refused([weight, weight.double()], r"parameters.1: expected .*like the first one")
    same_name = [_C.ParameterGroup("a", [weight]), _C.ParameterGroup("a", [weight.clone()])]
    refused(same_name, "two groups are named 'a'")
    refused([weight], "'optimizer': expected one of: sgd, adam", optimizer="lion")
    refused([weight], "unknown key 'momentun'; did you mean 'momentum'", momentun=0.9)
    refused([weight], "'beta2': expected >= 0 and < 1, got 1", beta2=1.0)


def test_step_refuses_a_gradient_that_does_not_fit() -> None:
    weight = torch.zeros(2, 3)
    holder = torch.zeros(3, 2)

    def gradients(_: int) -> None:
        weight.data = holder
        weight.grad = torch.ones(3, 2)
        weight.data = torch.zeros(2, 3)

    optimizer = _C.make_optimizer({}, [weight])
    with pytest.raises(ValueError, match=r"parameter parameters.0: expected .*\[2, 3\]"):
        optimizer.step(gradients)
    with pytest.raises(ValueError, match="learning rate >= 0, got -1"):
        optimizer.set_learning_rate(-1)


def test_an_error_in_the_gradient_function_reaches_the_caller() -> None:
    weight = torch.ones(2)
    optimizer = _C.make_optimizer({}, [weight])
    optimizer.set_learning_rate(1.0)

    def gradients(_: int) -> None:
        raise KeyError("loss")

    with pytest.raises(KeyError, match="loss"):
        optimizer.step(gradients)
    assert weight.tolist() == [1.0, 1.0]


def test_cosine_schedule_by_hand() -> None:
    rates = [_C.learning_rate_at({"schedule": "cosine"}, 0.02, e, 4) for e in range(4)]
    half = math.sqrt(0.5)
    wanted = [0.02, 0.01 * (1 + half), 0.01, 0.01 * (1 - half)]
    assert rates == pytest.approx(wanted, rel=1e-14)
    floored = {"min_learning_rate": 0.004}
    assert _C.learning_rate_at(floored, 0.02, 2, 4) == pytest.approx(0.012, rel=1e-14)


def test_cosine_schedule_equals_torchs() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([weight], lr=0.025)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=20, eta_min=1e-4)
    for epoch in range(20):
        rate = _C.learning_rate_at({"min_learning_rate": 1e-4}, 0.025, epoch, 20)
        assert rate == pytest.approx(annealing.get_last_lr()[0], rel=1e-12)
        reference.step()
        annealing.step()


def test_cosine_schedule_may_hold_its_first_rate() -> None:
    plain = [_C.learning_rate_at({}, 0.1, e, 5) for e in range(5)]
    held = [_C.learning_rate_at({"hold_epochs": 1}, 0.1, e, 5) for e in range(5)]
    assert held == [plain[0], *plain[:4]]


def test_multistep_and_constant_schedules() -> None:
    steps = {"schedule": "multistep", "milestones": [2, 4], "milestone_factor": 0.5}
    rates = [_C.learning_rate_at(steps, 0.8, e, 6) for e in range(6)]
    assert rates == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]
    assert [_C.learning_rate_at({"schedule": "constant"}, 0.3, e, 3) for e in range(3)] == [0.3] * 3


def test_schedule_refuses_what_makes_no_sense() -> None:
    for epoch in (-1, 5):
        with pytest.raises(ValueError, match=rf"\[schedule\] .* 0 .. 4, got {epoch}"):
            _C.learning_rate_at({}, 0.1, epoch, 5)
    with pytest.raises(ValueError, match=r"min_learning_rate <= the learning rate 0.1, got 0.2"):
        _C.learning_rate_at({"min_learning_rate": 0.2}, 0.1, 0, 5)
    with pytest.raises(ValueError, match="expected one of: cosine, multistep, constant"):
        _C.learning_rate_at({"schedule": "linear"}, 0.1, 0, 5)


def test_groups_share_the_floor_of_the_schedule() -> None:
    groups = [
        _C.ParameterGroup("a", [torch.zeros(1)]),
        _C.ParameterGroup("b", [torch.zeros(1)], learning_rate_scale=0.1),
    ]
    optimizer = _C.make_optimizer({}, groups)
    floored = {"min_learning_rate": 0.02}
    assert _C.schedule_learning_rates(optimizer, floored, 1.0, 2, 4) == pytest.approx(0.51)
    assert optimizer.learning_rate(0) == pytest.approx(0.51)
    assert optimizer.learning_rate(1) == pytest.approx(0.06)


@pytest.mark.parametrize("max_norm", [1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_equals_torchs(dtype: torch.dtype, max_norm: float) -> None:
    ours = parameters(dtype)
    fill_gradients(ours, 1)
    ours[1].grad = None
    reference = copies(ours)
    for mine, theirs in zip(ours, reference, strict=True):
        theirs.grad = None if mine.grad is None else mine.grad.clone()
    norm = _C.clip_grad_norm_(ours, max_norm)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(reference, max_norm))
    assert ours[1].grad is None
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine.grad is theirs.grad or torch.equal(mine.grad, theirs.grad)


def test_clipping_by_hand_and_without_gradients() -> None:
    a, b = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert _C.clip_grad_norm_([a, b], 1.0).item() == 0
    a.grad, b.grad = torch.tensor([3.0]).double(), torch.tensor([4.0]).double()
    assert _C.clip_grad_norm_([a, b], 1.0).item() == 5
    assert a.grad.item() == pytest.approx(3 / 5.000001, rel=1e-14)
    with pytest.raises(ValueError, match=r"\[clip_grad_norm_\] expected max_norm > 0, got 0"):
        _C.clip_grad_norm_([a], 0.0)
    with pytest.raises(ValueError, match="at least one parameter"):
        _C.clip_grad_norm_([], 1.0)


def test_running_mean_is_the_mean_over_tasks() -> None:
    history = [parameters(torch.float64, seed) for seed in range(4)]
    kept = [torch.full_like(t, math.nan, requires_grad=True) for t in history[0]]
    for n, current in enumerate(history):
        _C.running_mean_(kept, current, n)
    for i, mean in enumerate(kept):
        wanted = torch.stack([h[i] for h in history]).mean(0)
        torch.testing.assert_close(mean, wanted, rtol=1e-13, atol=1e-13)
        assert mean.requires_grad and mean.is_leaf
    assert not torch.equal(kept[0], history[3][0])


def test_running_mean_refuses_lists_that_do_not_match() -> None:
    with pytest.raises(ValueError, match=r"\[running_mean_\] expected 1 current tensors, got 0"):
        _C.running_mean_([torch.zeros(1)], [], 1)
    with pytest.raises(ValueError, match=r"tensor 0: expected \[1\], got \[2\]"):
        _C.running_mean_([torch.zeros(1)], [torch.zeros(2)], 1)
    with pytest.raises(ValueError, match="n >= 0, got -1"):
        _C.running_mean_([torch.zeros(1)], [torch.zeros(1)], -1)
