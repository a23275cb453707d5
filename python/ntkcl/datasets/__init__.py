"""Finds the images of a data set and lists them class by class.

What is read, in which order and under which class index depends on names alone, never on the order
of files on a disk or in an archive. Pixels are read later, by the C++ loader.
"""

import difflib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

from ntkcl.datasets.arrays import Arrays, checked_arrays, digits, from_arrays
from ntkcl.datasets.cifar import HOW_TO_GET as _CIFAR100
from ntkcl.datasets.cifar import read_cifar100
from ntkcl.datasets.class_folders import file_store, folder_items, zip_items, zip_store
from ntkcl.datasets.domain_lists import domain_lists, from_domain_lists
from ntkcl.datasets.listing import FOLDER_LAYOUT, Dataset, Limits, assemble, bad_data

__all__ = ["KNOWN_DATASETS", "Arrays", "Dataset", "load_dataset", "load_test_images"]

_AS_FOLDERS = f"as {FOLDER_LAYOUT}, or a zip of that"
# How to get each known data set, for the error when it is not there.
KNOWN_DATASETS: Mapping[str, str] = {
    "digits": "part of scikit-learn",
    "cifar100": _CIFAR100,
    "imagenet-r": f"the 200 classes of ImageNet-R, split 24,000 / 6,000, {_AS_FOLDERS}",
    "imagenet-a": f"the 200 classes of ImageNet-A, split 5,981 / 1,519, {_AS_FOLDERS}",
    "cub": f"the 200 classes of CUB-200-2011, split 9,430 / 2,358, {_AS_FOLDERS}",
    "cars": f"the 196 classes of Stanford Cars, split 8,144 / 8,041, {_AS_FOLDERS}",
    "domainnet": "the six domains' folders and lists <domain>_train.txt, <domain>_test.txt from "
    "https://ai.bu.edu/M3SDA/",
    "oxford-pets": f"the 37 breeds of Oxford-IIIT Pet, {_AS_FOLDERS}",
    "eurosat": f"the 10 classes of EuroSAT RGB, {_AS_FOLDERS}",
    "plantvillage": f"the 15 classes of PlantVillage, {_AS_FOLDERS}",
    "vtab": f"50 classes of five VTAB data sets, {_AS_FOLDERS}",
    "5-datasets": "the 50 classes of SVHN, MNIST, CIFAR-10, notMNIST and Fashion-MNIST, named so "
    f"that they sort in this order, {_AS_FOLDERS}",
    "kvasir": f"the 8 classes of Kvasir, {_AS_FOLDERS}",
}


def load_dataset(
    dataset: str | os.PathLike[str] | Arrays,
    data_root: str | os.PathLike[str] | None = None,
    *,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
) -> Dataset:
    """Lists the images of a data set.

    dataset is one of
      - a known name (see KNOWN_DATASETS), looked for in data_root as the folder <name>, as
        <name>.zip, or, for cifar100, as the python files cifar-100-python (folder or .tar.gz);
      - a folder with train/<class>/<image> and test/<class>/<image>, or a zip file of one;
      - arrays {"train": (images, labels), "test": (images, labels)}: images uint8 (n, h, w, 3) or
        grey (n, h, w), labels (n) numbers or names.
    train_per_class and test_per_class keep the first images of each class, by sorted names.

    Class indices are positions in the sorted class names (DomainNet's lists state their own).
    Raises FileNotFoundError that says what was looked for, where, and how to get it; ValueError for
    classes that are missing, empty, or not the same in train and test.
    """
    return _load(dataset, data_root, {"train": train_per_class, "test": test_per_class})


def load_test_images(
    dataset: str | os.PathLike[str] | Arrays,
    data_root: str | os.PathLike[str] | None = None,
    test_per_class: int | None = None,
) -> Dataset:
    """The same without training images: none are looked for, and `train` is empty."""
    return _load(dataset, data_root, {"test": test_per_class})


def _load(
    dataset: str | os.PathLike[str] | Arrays,
    data_root: str | os.PathLike[str] | None,
    limits: Limits,
) -> Dataset:
    for split, limit in limits.items():
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
            raise TypeError(f"[load_dataset] '{split}_per_class': expected int, got {limit!r}")
        if limit is not None and limit < 1:
            raise bad_data(f"'{split}_per_class': expected at least 1, got {limit}")
    if isinstance(dataset, Mapping):
        return from_arrays("arrays", checked_arrays(dataset, tuple(limits)), limits)
    if dataset == "digits":
        return from_arrays("digits", digits(), limits)
    name = os.fspath(dataset)
    return _from_path(name, _find(name, data_root), limits)


def _find(name: str, data_root: str | os.PathLike[str] | None) -> Path:
    root = None if data_root is None else Path(data_root).expanduser()
    known = name in KNOWN_DATASETS
    if known and root is None:
        raise bad_data(f"'data_root': expected the folder that holds '{name}', got None")
    places = [] if known else [Path(name).expanduser()]
    if root is not None:
        files = ["cifar-100-python", "cifar-100-python.tar.gz"] if name == "cifar100" else []
        places += [root / place for place in (name, f"{name}.zip", *files)]
    for place in dict.fromkeys(places):
        if place.exists():
            return place
    looked = ", ".join(str(place) for place in dict.fromkeys(places))
    if known:
        hint = f"how to get it: {KNOWN_DATASETS[name]}"
    else:
        close = difflib.get_close_matches(name, KNOWN_DATASETS, n=1)
        meant = f"; did you mean '{close[0]}'?" if close else ""
        hint = f"known names are {', '.join(KNOWN_DATASETS)}{meant}"
    raise FileNotFoundError(f"[load_dataset] no data set '{name}': looked for {looked}; {hint}")


def _from_path(name: str, path: Path, limits: Limits) -> Dataset:
    if path.name.startswith("cifar-100-python"):
        return from_arrays(name, read_cifar100(path, limits), limits)
    if path.is_dir() and (path / "cifar-100-python").is_dir():
        return from_arrays(name, read_cifar100(path / "cifar-100-python", limits), limits)
    if path.is_dir() and (lists := domain_lists(path, limits)):
        return from_domain_lists(name, path, lists, limits)
    if path.is_dir():
        return assemble(name, folder_items(path, limits), file_store, limits)
    if zipfile.is_zipfile(path):
        return assemble(name, zip_items(path, limits), zip_store(path), limits)
    raise bad_data(f"expected a folder or a zip file with {FOLDER_LAYOUT}, got the file {path}")
