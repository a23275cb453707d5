"""Products of 8-bit floating point numbers: their rows, and the frozen backbone that multiplies
such."""

from __future__ import annotations

import pytest
import torch

import reference_vit
from ntkcl import _C
from ntkcl.ops import float8_rows
from test_training import SIZE, backbone

FLOAT8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 7), (64,), (4, 1)])
def test_rows_keep_their_entries_to_three_bits_of_fraction(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = random(*shape, dtype=dtype)
    x[..., 0] = x[..., 0] * 1e-3  # rows differ in size, entries in a row too
    x[0] = x[0] * 1e6
    values, scale = float8_rows(x)
    assert (values.dtype, values.shape) == (FLOAT8, x.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (*x.shape[:-1], 1))
    exact = x.double()
    # The largest entry of a row is 448; the smallest step of e4m3 is 2^-9.
    assert torch.equal(values.float().abs().amax(-1), torch.full(x.shape[:-1], 448.0))
    error = (values.double() * scale.double() - exact).abs()
    assert (error <= (exact.abs() / 16).maximum(scale.double() * 2**-10) * (1 + 1e-6)).all()


def test_every_float8_number_stays_as_it_is() -> None:
    # Protects: no rounding but that of e4m3, and none of the scale where the largest is 448.
    every = torch.arange(256, dtype=torch.uint8).view(FLOAT8)
    finite = every[every.float().isfinite()]
    values, scale = float8_rows(finite.float())
    assert scale.item() == 1.0
    assert torch.equal(values.view(torch.uint8), finite.view(torch.uint8))


def test_halves_are_rounded_to_even() -> None:
    # Between 16 and 32 the numbers are 2 apart.
    values, _ = float8_rows(torch.tensor([448.0, 17.0, 19.0, -21.0, 23.0]))
    assert values.float().tolist() == [448.0, 16.0, 20.0, -20.0, 24.0]


def test_rows_of_zeros_of_the_smallest_numbers_and_none() -> None:
    values, scale = float8_rows(torch.zeros(2, 3))
    assert values.float().tolist() == [[0, 0, 0]] * 2
    assert scale.tolist() == [[1], [1]]
    values, scale = float8_rows(torch.full((1, 4), 1e-45))  # a 448th of it is zero
    assert values.float().tolist() == [[0, 0, 0, 0]]
    assert scale.item() == 1
    for shape in ((0, 3), (2, 0), (0,)):
        values, scale = float8_rows(torch.zeros(shape))
        assert values.shape == shape
        assert scale.shape == (*shape[:-1], 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    values, scale = float8_rows(torch.tensor([[1.0, bad], [1.0, 2.0]]))
    product = values.float() * scale
    assert not product[0].isfinite().all()
    assert product[1].tolist() == [1.0, 2.0]


def test_rows_of_a_transposed_matrix() -> None:
    x = random(6, 5)
    for a, b in zip(float8_rows(x.t()), float8_rows(x.t().contiguous()), strict=True):
        assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.float64), TypeError, "float32 or bfloat16, got Double"),
        (torch.zeros(2, dtype=torch.int64), TypeError, "float32 or bfloat16, got Long"),
        (torch.zeros(()), ValueError, r"expected x \(..., K\), got a scalar"),
    ],
)
def test_what_has_no_rows_is_refused(x: torch.Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=rf"^\[float8_rows\] .*{message}"):
        float8_rows(x)


def test_no_gradient_goes_through() -> None:
    values, _ = float8_rows(random(2, 3).requires_grad_())
    with pytest.raises(RuntimeError, match="not implemented"):
        values.float().sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 4, 192, 770, 3072])
def test_a_gpu_rounds_as_the_cpu(cuda: torch.device, width: int, dtype: torch.dtype) -> None:
    x = random(37, width, dtype=dtype) * 3
    x[5] = 0
    for here, there in zip(float8_rows(x), float8_rows(x.to(cuda)), strict=True):
        assert torch.equal(here.float(), there.cpu().float())


# ---- the backbone --------------------------------------------------------------------------------


def features(images: torch.Tensor, precision: str, device: str = "cpu") -> torch.Tensor:
    options = {"precision": precision, "device": device}
    session = _C.MethodSession("simple-cil", {}, backbone(), 1, options, as_run=True)
    found: torch.Tensor = session.features(images)["features"]
    return found.cpu()


def test_the_backbone_computes_in_float8() -> None:
    # That the products are right is tested in tests/cpp/test_frozen_linear.cpp.
    images = random(16, 3, SIZE, SIZE)
    exact = features(images, "float32")
    error = {p: (features(images, p) - exact).norm() / exact.norm() for p in ("bfloat16", "float8")}
    assert 3 * error["bfloat16"] < error["float8"] < 0.08


def test_gradients_go_back_through_quantised_matrices() -> None:
    images, labels = random(8, 3, SIZE, SIZE), torch.arange(8) % 2
    gradients = {}
    for precision in ("float32", "float8"):
        session = _C.MethodSession("ease", {}, backbone(), 1, {"precision": precision}, as_run=True)
        session.begin_task(0, 0, 2, 2, 8, images, labels)
        parts = session.step(images, labels, 0.0)["gradients"]
        gradients[precision] = torch.cat([part.flatten() for part in parts])
    assert not torch.equal(gradients["float8"], gradients["float32"])
    cosine = torch.cosine_similarity(gradients["float8"], gradients["float32"], dim=0)
    assert cosine > 0.97


def test_matrices_that_do_not_fit_the_tiles_are_refused() -> None:
    weights = {
        name: torch.zeros(shape)
        for name, shape in reference_vit.expected_shapes(24, 1, 5, 16).items()
    }
    vit = _C.VisionTransformer(weights, 2)
    message = r"\[float8\] expected .* multiples of 16, got \[24, 24\]"
    with pytest.raises(ValueError, match=message):
        _C.MethodSession("simple-cil", {}, vit, 1, {"precision": "float8"})


def test_a_gpu_is_as_near_to_float32_as_the_cpu(cuda: torch.device) -> None:
    # Rows are rounded alike (above), but a last bit of bfloat16 can move a number of float8 far.
    images = random(16, 3, SIZE, SIZE)
    exact = features(images, "float32")
    here, there = (
        (features(images, "float8", device) - exact).norm() / exact.norm()
        for device in ("cpu", cuda.type)
    )
    assert 0.7 * here < there < 1.4 * here
