"""Training and test views equal a reference on PIL images that takes the same draws."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from ntkcl import _C

Pixels = NDArray[np.uint8]
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
SIZES = [(375, 500), (500, 333), (32, 32), (64, 64), (8, 8), (1, 1), (3, 400), (400, 3), (224, 224)]


def philox_words(key: int, counter: int) -> list[int]:
    """Philox4x32-10 (Salmon et al., 2011)."""
    c0, c1, c2, c3 = counter & 0xFFFFFFFF, counter >> 32, 0, 0
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (p1 >> 32) ^ c1 ^ k0,
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c3 ^ k1,
            p0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


class Stream:
    """Draws in the order that transform.h states."""

    def __init__(self, key: int) -> None:
        self.key, self.counter, self.words = key, 0, []

    def bits64(self) -> int:
        if not self.words:
            self.words = philox_words(self.key, self.counter)
            self.counter += 1
        high, low, *self.words = self.words
        return (high << 32) | low

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * ((self.bits64() >> 11) * 2.0**-53)

    def below(self, n: int) -> int:
        limit = n * ((2**64 - 1) // n)
        while (draw := self.bits64()) >= limit:
            pass
        return draw % n


def random_crop(height: int, width: int, min_scale: float, draws: Stream) -> tuple[int, ...]:
    """(top, left, height, width), after torchvision's RandomResizedCrop."""
    low, high = 3.0 / 4.0, 4.0 / 3.0
    for _ in range(10):
        area = height * width * draws.uniform(min_scale, 1.0)
        ratio = math.exp(draws.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return draws.below(height - h + 1), draws.below(width - w + 1), h, w
    h, w = height, width
    if width / height < low:
        h = round(width / low)
    elif width / height > high:
        w = round(height * high)
    return (height - h) // 2, (width - w) // 2, h, w


def reference_train(pixels: Pixels, kind: str, size: int, key: int) -> Pixels:
    image, draws = Image.fromarray(pixels), Stream(key)
    if kind == "resize":
        return reference_test(pixels, kind, size)
    if kind == "cars":
        side = round(size * 300 / 224)
        top, left = draws.below(side - size + 1), draws.below(side - size + 1)
        image = image.resize((side, side), BICUBIC)
        image = image.crop((left, top, left + size, top + size))
    else:
        scale, resample = (0.08, BICUBIC) if kind == "cifar" else (0.05, BILINEAR)
        top, left, h, w = random_crop(*pixels.shape[:2], scale, draws)
        image = image.crop((left, top, left + w, top + h)).resize((size, size), resample)
    if draws.uniform() < 0.5:
        image = ImageOps.mirror(image)
    if kind == "cifar":
        image = ImageEnhance.Brightness(image).enhance(draws.uniform(1 - 63 / 255, 1 + 63 / 255))
    return np.asarray(image)


def reference_test(pixels: Pixels, kind: str, size: int) -> Pixels:
    image = Image.fromarray(pixels)
    if kind == "resize":
        return np.asarray(image.resize((size, size), BICUBIC))
    short, long = round(size * 256 / 224), 0
    w, h = image.size
    long = int(short * max(w, h) / min(w, h))
    image = image.resize((short, long) if w <= h else (long, short), BICUBIC)
    left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def noise(height: int, width: int) -> Pixels:
    rng = np.random.default_rng(height * 1000 + width)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["inception", "cifar", "cars", "resize"])
def test_train_views_equal_the_reference(kind: str, size: tuple[int, int]) -> None:
    pixels = noise(*size)
    for image_size in (224, 56, 1):
        transform = _C.Transform(kind, image_size)
        for key in (0, 1, 2**63 + 12345, 999, 77):
            view = transform.train(pixels, key)
            assert np.array_equal(view, reference_train(pixels, kind, image_size, key))


@pytest.mark.parametrize("size", [*SIZES, (257, 300), (300, 257), (1, 600), (599, 1)])
@pytest.mark.parametrize("kind", ["inception", "cifar", "cars", "resize"])
def test_test_views_equal_the_reference(kind: str, size: tuple[int, int]) -> None:
    pixels = noise(*size)
    for image_size in (224, 223, 32, 7, 1):
        view = _C.Transform(kind, image_size).test(pixels)
        assert np.array_equal(view, reference_test(pixels, kind, image_size))


def test_random_crops_reach_everywhere_with_the_stated_areas() -> None:
    """The crop is read off a picture whose pixels hold their own coordinates."""
    side, views = 200, 400
    y, x = np.mgrid[0:side, 0:side]
    pixels = np.stack([y, x, 0 * x], -1).astype(np.uint8)
    transform = _C.Transform("inception", 224)
    corners, areas, flips = [], [], 0
    for key in range(views):
        rows, columns = (transform.train(pixels, key)[..., i].astype(int) for i in (0, 1))
        flips += columns[0, 0] > columns[0, -1]
        corners.append((rows.min(), columns.min()))
        areas.append((np.ptp(rows) + 1) * (np.ptp(columns) + 1) / side**2)
    assert 0.3 < flips / views < 0.7
    assert min(areas) >= 0.045 and 0.45 < np.mean(areas) < 0.58  # (0.05 + 1) / 2, crops that fit
    assert min(min(c) for c in corners) == 0 and np.max(corners) > 100
    assert len(set(corners)) > 100


def test_keys_decide_the_view() -> None:
    transform, pixels = _C.Transform("inception", 32), noise(40, 50)
    views = [transform.train(pixels, key).tobytes() for key in range(50)]
    assert len(set(views)) == 50
    assert views == [transform.train(pixels, key).tobytes() for key in range(50)]


@pytest.mark.parametrize("size", [(5000, 2), (2, 5000), (1, 400)])
def test_thin_images_fall_back_to_a_central_crop(size: tuple[int, int]) -> None:
    """No crop of the allowed ratios and areas fits, so all keys see the middle."""
    pixels = noise(*size)
    transform = _C.Transform("inception", 16)
    views = {transform.train(pixels, key).tobytes() for key in range(20)}
    assert len(views) <= 2  # flipped or not


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[transform\] 'transform': expected one of: inception"):
        _C.Transform("imagenet", 224)
    with pytest.raises(ValueError, match=r"\[transform\] 'image_size': expected >= 1"):
        _C.Transform("cifar", 0)
    with pytest.raises(ValueError, match="expected uint8 pixels"):
        _C.Transform("cifar", 8).test(np.zeros((4, 4), np.uint8))
