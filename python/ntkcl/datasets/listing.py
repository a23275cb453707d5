"""What every source of images comes down to: items of both splits, and the data set they make."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ntkcl import _C
from ntkcl.names import shown

SPLITS = ("train", "test")
FOLDER_LAYOUT = "train/<class>/*.jpg and test/<class>/*.jpg (or .jpeg, .png, .bmp, .webp)"
Limits = Mapping[str, int | None]  # images kept per class, of each split that is read


@dataclass(frozen=True)
class Dataset:
    """Labelled images, split in train and test.

    A store's labels are positions in class_names; its images are sorted by class, then by name.
    manifest_hash is the SHA-256 over classes, names and sizes (contents, for arrays).
    """

    name: str
    class_names: list[str]
    train: _C.ImageStore
    test: _C.ImageStore
    manifest_hash: str


class Item(NamedTuple):
    class_name: str
    name: str  # orders the images of a class
    fingerprint: str  # what the manifest says of the content
    source: Any  # what the store needs to find the image


Items = dict[str, list[Item]]  # by split
MakeStore = Callable[[str, list[Any], list[int]], _C.ImageStore]  # split, sources, labels


def bad_data(message: str) -> ValueError:
    return ValueError(f"[load_dataset] {message}")


def assemble(
    name: str,
    items: Items,
    make_store: MakeStore,
    limits: Limits,
    class_names: list[str] | None = None,
) -> Dataset:
    """Checks the classes, sorts, keeps the first of each class and makes the stores.

    class_names gives the order of the classes; sorted by name without it.
    """
    _check_classes(name, items)
    classes = class_names or sorted({item.class_name for item in items["test"]})
    index_of = {class_name: index for index, class_name in enumerate(classes)}
    manifest = hashlib.sha256()
    stores = {}
    for split in items:
        ordered = sorted(items[split], key=lambda item: (index_of[item.class_name], item.name))
        kept = _first_of_each_class(ordered, limits[split])
        for item in kept:
            line = f"{split}\0{item.class_name}\0{item.name}\0{item.fingerprint}\n"
            manifest.update(line.encode("utf-8", "surrogateescape"))
        labels = [index_of[item.class_name] for item in kept]
        stores[split] = make_store(split, [item.source for item in kept], labels)
    if "train" not in stores:
        stores["train"] = _C.make_array_store(torch.zeros((0, 1, 1, 3), dtype=torch.uint8), [])
    return Dataset(name, classes, stores["train"], stores["test"], manifest.hexdigest())


def _check_classes(name: str, items: Items) -> None:
    classes = {split: {item.class_name for item in found} for split, found in items.items()}
    for split in classes:
        if not classes[split]:
            raise bad_data(f"'{name}': expected at least one class in {split}, got none")
    for split, other in itertools.permutations(classes, 2):
        if missing := sorted(classes[other] - classes[split]):
            raise bad_data(
                f"'{name}': expected the same classes in train and test, got {len(missing)} of "
                f"{other} that {split} has not: {shortened(missing)}"
            )


def _first_of_each_class(ordered: list[Item], limit: int | None) -> list[Item]:
    if limit is None:
        return ordered
    taken: Counter[str] = Counter()
    kept = []
    for item in ordered:
        taken[item.class_name] += 1
        if taken[item.class_name] <= limit:
            kept.append(item)
    return kept


def shortened(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(shown(name) for name in names[:count]) + more
