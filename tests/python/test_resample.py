"""Resampling equals Pillow bit for bit."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ntkcl import _C

Box = tuple[float, float, float, float]
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def pillow(
    array: NDArray[np.uint8], height: int, width: int, name: str, box: Box | None = None
) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(array).resize((width, height), FILTERS[name], box=box))


def random_image(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Noise, or only black and white, which overshoots most under the bicubic filter."""
    if rng.random() < 0.5:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(rng.random((height, width, 3)) < 0.5, 0, 255).astype(np.uint8)


def random_side(rng: np.random.Generator, limit: int) -> int:
    """Uniform in the logarithm, so that 1 is common."""
    return int(np.exp(rng.uniform(0, np.log(limit + 0.99))))


def random_box(rng: np.random.Generator, height: int, width: int, whole: bool) -> Box:
    def interval(size: int) -> tuple[float, float]:
        if whole:
            low = int(rng.integers(0, size))
            return low, int(rng.integers(low + 1, size + 1))
        low, high = np.sort(rng.uniform(0, size, 2).astype(np.float32))
        return (0.0, float(size)) if high - low < 1e-3 else (float(low), float(high))

    left, right = interval(width)
    top, bottom = interval(height)
    return left, top, right, bottom


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("box_kind", ["none", "whole numbers", "fractions"])
def test_random_cases(name: str, box_kind: str) -> None:
    """6 x 250 cases: shrinking, enlarging, thin and one-pixel images, with and without a box."""
    rng = np.random.default_rng(list(f"{name} {box_kind}".encode()))
    for case in range(250):
        height, width, out_height, out_width = (random_side(rng, 150) for _ in range(4))
        array = random_image(rng, height, width)
        box = (
            None
            if box_kind == "none"
            else random_box(rng, height, width, box_kind == "whole numbers")
        )
        ours = _C.resample(array, out_height, out_width, name, box)
        theirs = pillow(array, out_height, out_width, name, box)
        assert np.array_equal(ours, theirs), (
            case, (height, width), (out_height, out_width), box, np.abs(ours - theirs).max()
        )  # fmt: skip


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(
    ("size", "out"),
    [
        ((1, 1), (224, 224)),
        ((1, 900), (224, 224)),
        ((900, 1), (7, 300)),
        ((1, 5000), (256, 3)),
        ((2000, 3), (1, 1)),
        ((375, 500), (224, 224)),
        ((375, 500), (256, 341)),
        ((32, 32), (224, 224)),
        ((375, 500), (375, 224)),
        ((375, 500), (224, 500)),
        ((375, 500), (375, 500)),
    ],
)
def test_chosen_sizes(name: str, size: tuple[int, int], out: tuple[int, int]) -> None:
    """Sizes of real use, extreme ratios, and the cases where a pass is left out."""
    array = random_image(np.random.default_rng(7), *size)
    assert np.array_equal(_C.resample(array, *out, name), pillow(array, *out, name))


@pytest.mark.parametrize("name", FILTERS)
def test_box_that_only_shifts_one_axis(name: str) -> None:
    array = random_image(np.random.default_rng(8), 40, 60)
    for box, out in [
        ((5, 3, 25, 33), (60, 20)),
        ((5, 3, 25, 33), (30, 77)),
        ((5, 3, 25, 33), (30, 20)),
    ]:
        assert np.array_equal(_C.resample(array, *out, name, box), pillow(array, *out, name, box))


def test_bad_arguments_are_named() -> None:
    array = np.zeros((4, 5, 3), np.uint8)
    with pytest.raises(ValueError, match=r"\[resample\] expected a size of at least 1x1"):
        _C.resample(array, 0, 3, "bilinear")
    with pytest.raises(ValueError, match=r"expected one of: bilinear, bicubic, got 'nearest'"):
        _C.resample(array, 3, 3, "nearest")
    with pytest.raises(ValueError, match=r"'box': expected 0 <= left < right <= 5"):
        _C.resample(array, 3, 3, "bilinear", (0, 0, 6, 4))
    with pytest.raises(ValueError, match=r"expected uint8 pixels \(height, width, 3\)"):
        _C.resample(array[..., :2], 3, 3, "bilinear")
