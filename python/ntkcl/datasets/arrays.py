"""Images in memory: the user's arrays, and scikit-learn's digits."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ntkcl import _C
from ntkcl.datasets.listing import SPLITS, Dataset, Item, Items, Limits, assemble, bad_data

Arrays = Mapping[str, tuple[ArrayLike, ArrayLike]]


@dataclass(frozen=True)
class LabelledImages:
    """Images (n, h, w, 3), the class of each, and names that order them."""

    pixels: NDArray[np.uint8]
    classes: list[str]
    names: list[str]


def from_arrays(
    name: str,
    arrays: tuple[Mapping[str, LabelledImages], list[str]],
    limits: Limits,
) -> Dataset:
    images, class_names = arrays
    items: Items = {}
    for split in limits:
        part = images[split]
        items[split] = [
            Item(class_name, image_name, hashlib.sha256(pixels.tobytes()).hexdigest(), row)
            for row, (class_name, image_name, pixels) in enumerate(
                zip(part.classes, part.names, part.pixels, strict=True)
            )
        ]

    def make_store(split: str, rows: list[int], labels: list[int]) -> _C.ImageStore:
        chosen = np.ascontiguousarray(images[split].pixels[rows])
        return _C.make_array_store(torch.from_numpy(chosen), labels)

    return assemble(name, items, make_store, limits, class_names)


def checked_arrays(
    arrays: Arrays, splits: Sequence[str] = SPLITS
) -> tuple[dict[str, LabelledImages], list[str]]:
    if not set(splits) <= set(arrays) <= set(SPLITS):
        expected = " and ".join(f"'{split}'" for split in splits)
        raise bad_data(f"expected arrays {expected}, got {sorted(map(str, arrays))}")
    pairs: dict[str, tuple[NDArray[np.uint8], NDArray[Any]]] = {}
    for split in splits:
        pair = arrays[split]
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"[load_dataset] '{split}': expected a pair (images, labels)")
        where = f"[load_dataset] '{split}':"
        pairs[split] = (as_rgb(where, uint8_array(where, pair[0])), _as_labels(split, pair))
    classes = np.unique(np.concatenate([labels for _, labels in pairs.values()]))
    if any(len(labels) == 0 for _, labels in pairs.values()):
        raise bad_data(f"expected at least one image in {' and in '.join(splits)}, got none")
    images = {
        split: LabelledImages(pixels, [str(label) for label in labels], _numbered(len(labels)))
        for split, (pixels, labels) in pairs.items()
    }
    return images, [str(label) for label in classes]


def uint8_array(where: str, images: Any) -> NDArray[np.uint8]:
    """An array, or a tensor on any device, as numpy's."""
    given = images if isinstance(images, torch.Tensor) else np.asarray(images)
    if str(given.dtype).removeprefix("torch.") != "uint8":
        raise TypeError(f"{where} expected uint8 images, got {given.dtype}")
    return given.numpy(force=True) if isinstance(given, torch.Tensor) else given


def as_rgb(where: str, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, h, w, 3) of such images, or of grey ones, (n, h, w) or (n, h, w, 1)."""
    whole = pixels[..., np.newaxis] if pixels.ndim == 3 else pixels
    if whole.ndim != 4 or whole.shape[3] not in (1, 3) or 0 in whole.shape[1:]:
        planes = whole.ndim == 4 and whole.shape[1] in (1, 3, 4)
        hint = "; channels come last: images.permute(0, 2, 3, 1)" if planes else ""
        raise ValueError(
            f"{where} expected images (n, h, w, 3) or (n, h, w), got {pixels.shape}{hint}"
        )
    return np.broadcast_to(whole, (*whole.shape[:3], 3))


def _as_labels(split: str, pair: Sequence[ArrayLike]) -> NDArray[Any]:
    labels = np.asarray(pair[1])
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        raise bad_data(f"'{split}': expected one-dimensional labels, whole numbers or names, got "
                     f"{labels.dtype} {labels.shape}")  # fmt: skip
    if len(labels) != len(cast(Any, pair[0])):
        raise bad_data(f"'{split}': expected one label per image, got {len(labels)} labels for "
                     f"{len(cast(Any, pair[0]))} images")  # fmt: skip
    return labels


def _numbered(count: int) -> list[str]:
    return [f"{row:09d}" for row in range(count)]


_DIGITS_TEST_SIZE = 450


def digits() -> tuple[dict[str, LabelledImages], list[str]]:
    """1,797 grey images of 8x8: 1,347 for training and 450 for the test, spread evenly."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = ((bunch.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)  # from 0 .. 16
    labels = bunch.target
    is_test = np.zeros(len(labels), bool)
    for label, count in _shares(Counter(labels.tolist()), _DIGITS_TEST_SIZE).items():
        rows = np.flatnonzero(labels == label)
        steps = np.arange(len(rows) + 1) * count // len(rows)
        is_test[rows] = steps[1:] > steps[:-1]
    return checked_arrays(
        {
            "train": (pixels[~is_test], labels[~is_test]),
            "test": (pixels[is_test], labels[is_test]),
        }
    )


def _shares(sizes: Mapping[int, int], total: int) -> dict[int, int]:
    """`total` in proportion to the sizes: rounded down, the rest by the largest remainders."""
    whole = sum(sizes.values())
    shares = {label: total * size // whole for label, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda label: (-(total * sizes[label] % whole), label))
    for label in by_remainder[: total - sum(shares.values())]:
        shares[label] += 1
    return shares
