"""Prototypes and the compensation of their drift, against definitions and worked cases."""

import pytest
import torch
from torch import Tensor

from ntkcl import _C


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def slow_section_drift(
    before: Tensor, after: Tensor, old: Tensor, width: int, tau: float
) -> Tensor:
    shift = torch.zeros_like(old)
    for first in range(0, old.shape[1], width):
        part = slice(first, first + width)
        for k in range(len(old)):
            p = old[k, part] / old[k, part].norm()
            exponents = [
                -((b[part] / b[part].norm() - p) ** 2).sum() / (2 * tau**2) for b in before
            ]
            weights = torch.stack(exponents).softmax(0)
            for weight, b, a in zip(weights, before, after, strict=True):
                shift[k, part] += weight * (a[part] - b[part])
    return shift


def slow_gaussian_drift(before: Tensor, after: Tensor, old: Tensor, sigma: float) -> Tensor:
    rows = []
    for p in old:
        weights = torch.exp(-((before - p) ** 2).sum(1) / (2 * sigma**2)) + 1e-5
        rows.append((weights[:, None] * (after - before)).sum(0) / weights.sum())
    return torch.stack(rows)


@pytest.mark.parametrize("width", [4, 8, 24])
@pytest.mark.parametrize("tau", [0.05, 0.4, 10.0])
def test_section_drift_equals_its_definition(width: int, tau: float) -> None:
    before, after, old = random(17, 24), random(17, 24, seed=1), random(5, 24, seed=2)
    shift = _C.section_drift(before, after, old, width, tau)
    torch.testing.assert_close(
        shift, slow_section_drift(before, after, old, width, tau), rtol=1e-11, atol=1e-12
    )


def test_section_drift_by_hand() -> None:
    # Unit vectors at right angles and opposite: squared distances 0, 2 and 4; tau^2 = 1/2.
    before = torch.tensor([[2.0, 0], [0, 3], [-5, 0]], dtype=torch.float64)
    moved = torch.tensor([[1.0, 0], [0, 1], [7, 7]], dtype=torch.float64)
    old = torch.tensor([[4.0, 0]], dtype=torch.float64)
    weights = torch.exp(torch.tensor([0.0, -2, -4], dtype=torch.float64))
    wanted = weights @ moved / weights.sum()
    shift = _C.section_drift(before, before + moved, old, 2, 0.5**0.5)
    torch.testing.assert_close(shift[0], wanted, rtol=1e-13, atol=0)


def test_section_drift_of_zero_rows_is_finite() -> None:
    before, after = random(4, 6), random(4, 6, seed=1)
    before[2] = 0
    shift = _C.section_drift(before, after, torch.zeros(2, 6, dtype=torch.float64), 3, 0.4)
    assert torch.isfinite(shift).all()


def test_gaussian_drift_by_hand() -> None:
    # The case of RAA's specification, section 10.
    old = torch.tensor([[0.0, 0], [3, 4]], dtype=torch.float64)
    before = torch.tensor([[1.0, 0], [0, 8]], dtype=torch.float64)
    after = torch.tensor([[1.5, 0], [0, 7]], dtype=torch.float64)
    wanted = torch.tensor([[0.438735, -0.122530], [0.269491, -0.461018]], dtype=torch.float64)
    shift = _C.gaussian_drift(before, after, old, 4.0)
    torch.testing.assert_close(shift, wanted, rtol=0, atol=5e-7)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 4.0])
def test_gaussian_drift_equals_its_definition(sigma: float) -> None:
    before, after, old = random(23, 6), random(23, 6, seed=1), random(4, 6, seed=2)
    shift = _C.gaussian_drift(before, after, old, sigma)
    torch.testing.assert_close(
        shift, slow_gaussian_drift(before, after, old, sigma), rtol=1e-10, atol=1e-12
    )


def test_more_images_than_are_converted_at_once() -> None:
    before, after, old = random(20000, 4), random(20000, 4, seed=1), random(3, 4, seed=2)
    weights = (-(torch.cdist(old, before) ** 2) / 2).exp() + 1e-5
    wanted = weights @ (after - before) / weights.sum(1, keepdim=True)
    torch.testing.assert_close(_C.gaussian_drift(before, after, old, 1.0), wanted)


def test_drift_of_float32_features_is_computed_in_float64() -> None:
    before, after = random(40, 8, dtype=torch.float32), random(40, 8, seed=1, dtype=torch.float32)
    old = random(3, 8, seed=2, dtype=torch.float32)
    doubles = (before.double(), after.double(), old.double())
    section = _C.section_drift(before, after, old, 4, 0.4)
    assert torch.equal(section, _C.section_drift(*doubles, 4, 0.4).float())
    assert torch.equal(
        _C.gaussian_drift(before, after, old, 4.0), _C.gaussian_drift(*doubles, 4.0).float()
    )


def test_features_that_do_not_move_shift_nothing() -> None:
    before, old = random(9, 8), random(3, 8, seed=2)
    assert not _C.section_drift(before, before, old, 4, 0.4).any()
    assert not _C.gaussian_drift(before, before, old, 4.0).any()


def test_a_common_movement_shifts_every_prototype_by_it() -> None:
    before, old, step = random(9, 8), random(3, 8, seed=2), random(8, seed=3)
    for shift in (
        _C.section_drift(before, before + step, old, 4, 0.4),
        _C.gaussian_drift(before, before + step, old, 4.0),
    ):
        torch.testing.assert_close(shift, step.expand(3, 8))


def test_drift_refuses_what_does_not_fit() -> None:
    x = random(5, 8)
    with pytest.raises(ValueError, match=r"^\[section_drift\] .*width that divides 8, got 3"):
        _C.section_drift(x, x, x, 3, 0.4)
    with pytest.raises(ValueError, match="expected tau > 0, got 0"):
        _C.section_drift(x, x, x, 4, 0.0)
    with pytest.raises(ValueError, match=r"^\[gaussian_drift\] .*sigma > 0"):
        _C.gaussian_drift(x, x, x, -1.0)
    with pytest.raises(ValueError, match=r"at least one image, got .*\[0, 8\]"):
        _C.gaussian_drift(x[:0], x[:0], x, 4.0)
    with pytest.raises(ValueError, match=r"after training of shape \[5, 8\], got .*\[4, 8\]"):
        _C.gaussian_drift(x, x[:4], x, 4.0)
    with pytest.raises(ValueError, match=r"prototypes \(k, 8\), got .*\[5, 4\]"):
        _C.section_drift(x, x, x[:, :4].contiguous(), 4, 0.4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_class_means_over_batches(dtype: torch.dtype) -> None:
    features = random(50, 6, dtype=dtype)
    labels = torch.arange(50).remainder(3) + 10
    means = _C.ClassMeans(10, 3, 6)
    for part in torch.randperm(50, generator=torch.Generator().manual_seed(1)).split(16):
        means.add(features[part], labels[part])
    assert means.counts.tolist() == [17, 17, 16]
    wanted = torch.stack([features[labels == c].double().mean(0) for c in (10, 11, 12)])
    torch.testing.assert_close(means.result(torch.float64), wanted, rtol=1e-13, atol=1e-13)
    assert torch.equal(means.result(torch.float32), means.result(torch.float64).float())


def test_class_means_sum_in_float64() -> None:
    # In float32, 2^24 + 1 + ... + 1 stays at 2^24.
    features = torch.ones(64, 1)
    features[0] = 2.0**24
    means = _C.ClassMeans(0, 1, 1)
    means.add(features, torch.zeros(64, dtype=torch.int64))
    assert means.result(torch.float64).item() == (2.0**24 + 63) / 64


def test_a_class_without_an_image_is_named() -> None:
    means = _C.ClassMeans(10, 4, 2)
    means.add(torch.ones(2, 2), torch.tensor([11, 13]))
    with pytest.raises(ValueError, match=r"^\[prototypes\] .*got none of class 10, 12$"):
        means.result(torch.float32)


def test_class_means_refuse_what_does_not_fit() -> None:
    means = _C.ClassMeans(10, 2, 2)
    with pytest.raises(ValueError, match=r"expected labels in 10 .. 11, got 9 .. 10"):
        means.add(torch.ones(2, 2), torch.tensor([9, 10]))
    with pytest.raises(ValueError, match=r"features \(b, 2\), got .*\[1, 3\]"):
        means.add(torch.ones(1, 3), torch.tensor([10]))
    with pytest.raises(ValueError, match=r"int64 labels \(2\)"):
        means.add(torch.ones(2, 2), torch.tensor([10]))
    assert means.counts.tolist() == [0, 0]
    means.add(torch.tensor([[1.0, torch.nan], [1, 1]]), torch.tensor([10, 11]))
    with pytest.raises(FloatingPointError, match="expected finite features"):
        means.result(torch.float32)
    with pytest.raises(ValueError, match="at least one class"):
        _C.ClassMeans(0, 0, 2)
