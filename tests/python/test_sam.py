"""ntkcl.optim.SAM in a model of plain PyTorch, against its definition in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkcl.optim import SAM

RHO, TAU, MOMENTUM, DECAY = 0.3, 2.0, 0.9, 0.02


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(11, 5, generator=generator).double(), torch.arange(11) % 3


def closure_of(network: nn.Module) -> Callable[[], Tensor]:
    images, labels = batch()

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        return loss

    return closure


class ByDefinition:
    """One parameter after another, as the papers write it."""

    def __init__(self, network: nn.Module, gamma: str) -> None:
        self.network, self.gamma = network, gamma
        self.parameters = list(network.parameters())
        self.momentum = [torch.zeros_like(p) for p in self.parameters]

    def gradients(self) -> list[Tensor]:
        images, labels = batch()
        self.loss = nn.functional.cross_entropy(self.network(images), labels)
        return list(torch.autograd.grad(self.loss, self.parameters))

    def step(self, lr: float) -> float:
        first = self.gradients()
        loss = self.loss.item()
        norm = math.sqrt(sum(float((g * g).sum()) for g in first))
        up = [RHO * g / norm for g in first]
        with torch.no_grad():
            for p, e in zip(self.parameters, up, strict=True):
                p += e
        second = self.gradients()
        with torch.no_grad():
            for i, (p, e, g) in enumerate(zip(self.parameters, up, second, strict=True)):
                p -= e
                self.momentum[i] = MOMENTUM * self.momentum[i] + g + DECAY * p
            for p, v, e in zip(self.parameters, self.momentum, up, strict=True):
                p -= lr * self.damping(v, e, up) * v
        return loss

    def damping(self, v: Tensor, e: Tensor, up: list[Tensor]) -> float:
        if self.gamma == "none":
            return 1.0
        if self.gamma == "global":
            v = torch.cat([m.flatten() for m in self.momentum])
            e = torch.cat([u.flatten() for u in up])
        cos = float((v * e).sum() / (v.norm() * e.norm()))
        return min(max(TAU * (1 - math.exp(cos - 1)), 0.0), 1.0)


def sam(network: nn.Module, gamma: str, **more: Any) -> SAM:
    kind = {"plus": False} if gamma == "none" else {"gamma": gamma}
    settings = {"momentum": MOMENTUM, "weight_decay": DECAY, "rho": RHO, "tau": TAU}
    return SAM(network.parameters(), 0.2, **(settings | kind | more))


@pytest.mark.parametrize("gamma", ["none", "tensor", "global"])
def test_steps_are_those_of_the_definition(gamma: str) -> None:
    ours, theirs = model(), model()
    optimizer, reference = sam(ours, gamma), ByDefinition(theirs, gamma)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    rate = 0.2
    for _ in range(6):
        loss = optimizer.step(closure_of(ours))
        assert loss.item() == pytest.approx(reference.step(rate), rel=1e-12)
        scheduler.step()
        rate *= 0.7
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_groups_have_their_own_rate_and_decay() -> None:
    network = model()
    first, last = list(network[0].parameters()), list(network[2].parameters())
    before = [p.detach().clone() for p in network.parameters()]
    groups = [{"params": first, "lr": 0.0}, {"params": last, "decays": False}]
    optimizer = SAM(groups, 0.1, weight_decay=1.0)
    optimizer.step(closure_of(network))
    after = list(network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(after[:2], before[:2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(after[2:], before[2:], strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.1]


def test_a_state_continues_a_run() -> None:
    whole, halves = model(), model()
    optimizer, first = sam(whole, "tensor"), sam(halves, "tensor")
    for _ in range(4):
        optimizer.step(closure_of(whole))
    for _ in range(2):
        first.step(closure_of(halves))
    second = sam(halves, "tensor")
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.step(closure_of(halves))
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_model_is_refused_and_nothing_changes() -> None:
    optimizer = sam(model(), "tensor")
    optimizer.step(closure_of(model()))
    before = optimizer.state_dict()["state"]
    other = SAM(nn.Linear(2, 2).double().parameters(), 0.1)
    with pytest.raises(ValueError, match=r"\[SAM\] expected the state of parameters"):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_cannot_be_trained_is_refused() -> None:
    network = model()
    with pytest.raises(TypeError, match=r"\[SAM\] expected a closure"):
        sam(network, "tensor").step()
    with pytest.raises(ValueError, match=r"\[SAM\] expected all groups"):
        sam(network, "tensor").add_param_group({"params": [torch.zeros(1)]})
    with pytest.raises(ValueError, match="'gamma': expected one of: tensor, global, got 'layer'"):
        sam(network, "layer")
    with pytest.raises(ValueError, match="float32 or float64, got Half"):
        SAM([torch.zeros(2, dtype=torch.float16)], 0.1)
    with pytest.raises(ValueError, match="learning rate >= 0"):
        SAM(network.parameters(), -0.1)
    with pytest.raises(TypeError, match="Tensors"):
        SAM([1.0], 0.1)  # type: ignore[list-item]


def test_a_closure_that_fails_leaves_the_parameters() -> None:
    network = model()
    before = [p.detach().clone() for p in network.parameters()]
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no second")
        return closure_of(network)()

    with pytest.raises(RuntimeError, match="no second"):
        sam(network, "tensor").step(closure)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))


def test_gradients_may_come_in_the_same_memory_twice() -> None:
    # As those of torch's DistributedDataParallel with gradient_as_bucket_view do.
    ours, theirs = model(), model()
    optimizer, reference = sam(ours, "tensor"), ByDefinition(theirs, "tensor")
    images, labels = batch()
    kept = [torch.zeros_like(p) for p in ours.parameters()]

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(ours(images), labels)
        gradients = torch.autograd.grad(loss, list(ours.parameters()))
        for parameter, place, gradient in zip(ours.parameters(), kept, gradients, strict=True):
            parameter.grad = place.copy_(gradient)
        return loss

    for _ in range(3):
        optimizer.step(closure)
        reference.step(0.2)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_step_of_no_length_has_no_direction() -> None:
    # cos(v, 0) = 0: gamma is tau (1 - 1/e) where that is below 1.
    ours, theirs = model(), model()
    optimizer = sam(ours, "tensor", rho=0.0, tau=1.0, momentum=0.0, weight_decay=0.0)
    optimizer.step(closure_of(ours))
    closure_of(theirs)()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        wanted = b - 0.2 * (1 - math.exp(-1)) * b.grad
        torch.testing.assert_close(a, wanted, rtol=1e-12, atol=1e-12)


def test_a_step_that_is_refused_leaves_the_parameters() -> None:
    network = model()
    before = [p.detach().clone() for p in network.parameters()]
    optimizer = SAM(network.parameters(), lr=math.inf, rho=0.5)
    with pytest.raises(ValueError, match="expected a finite lr"):
        optimizer.step(closure_of(network))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))
