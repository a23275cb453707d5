"""Finds the images of a data set and lists them class by class.

What is read, in which order and under which class index depends on names alone, never on the order
of files on a disk or in an archive. Pixels are read later, by the C++ loader.
"""

import difflib
import hashlib
import os
import re
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ntkcl import _C, plain_pickle

SPLITS = ("train", "test")
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

_FOLDER_LAYOUT = "train/<class>/*.jpg and test/<class>/*.jpg (or .jpeg, .png, .bmp, .webp)"
_AS_FOLDERS = f"as {_FOLDER_LAYOUT}, or a zip of that"
# How to get each known data set, for the error when it is not there.
KNOWN_DATASETS: Mapping[str, str] = {
    "digits": "part of scikit-learn",
    "cifar100": "download cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
    "imagenet-r": f"the 200 classes of ImageNet-R, split 24,000 / 6,000, {_AS_FOLDERS}",
    "imagenet-a": f"the 200 classes of ImageNet-A, split 5,981 / 1,519, {_AS_FOLDERS}",
    "domainnet": "the six domains' folders and lists <domain>_train.txt, <domain>_test.txt from "
    "https://ai.bu.edu/M3SDA/",
    "oxford-pets": f"the 37 breeds of Oxford-IIIT Pet, {_AS_FOLDERS}",
    "eurosat": f"the 10 classes of EuroSAT RGB, {_AS_FOLDERS}",
    "plantvillage": f"the 15 classes of PlantVillage, {_AS_FOLDERS}",
    "vtab": f"50 classes of five VTAB data sets, {_AS_FOLDERS}",
    "kvasir": f"the 8 classes of Kvasir, {_AS_FOLDERS}",
}

Arrays = Mapping[str, tuple[ArrayLike, ArrayLike]]


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


class _Item(NamedTuple):
    class_name: str
    name: str  # orders the images of a class
    fingerprint: str  # what the manifest says of the content
    source: Any  # what the store needs to find the image


_Items = dict[str, list[_Item]]  # by split
_MakeStore = Callable[[str, list[Any], list[int]], _C.ImageStore]  # split, sources, labels


def _error(message: str) -> ValueError:
    return ValueError(f"[load_dataset] {message}")


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
    limits = {"train": train_per_class, "test": test_per_class}
    for split, limit in limits.items():
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
            raise TypeError(f"[load_dataset] '{split}_per_class': expected int, got {limit!r}")
        if limit is not None and limit < 1:
            raise _error(f"'{split}_per_class': expected at least 1, got {limit}")
    if isinstance(dataset, Mapping):
        return _from_arrays("arrays", _checked_arrays(dataset), limits)
    if dataset == "digits":
        return _from_arrays("digits", _digits(), limits)
    name = os.fspath(dataset)
    return _from_path(name, _find(name, data_root), limits)


# Where the data is.


def _find(name: str, data_root: str | os.PathLike[str] | None) -> Path:
    root = None if data_root is None else Path(data_root).expanduser()
    known = name in KNOWN_DATASETS
    if known and root is None:
        raise _error(f"'data_root': expected the folder that holds '{name}', got None")
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


def _from_path(name: str, path: Path, limits: Mapping[str, int | None]) -> Dataset:
    if path.name.startswith("cifar-100-python"):
        return _from_arrays(name, _cifar100(path), limits)
    if path.is_dir() and (path / "cifar-100-python").is_dir():
        return _from_arrays(name, _cifar100(path / "cifar-100-python"), limits)
    if path.is_dir() and (lists := _domain_lists(path)):
        return _from_domain_lists(name, path, lists, limits)
    if path.is_dir():
        return _assemble(name, _folder_items(path), _file_store, limits)
    if zipfile.is_zipfile(path):
        return _assemble(name, _zip_items(path), _zip_store(path), limits)
    raise _error(f"expected a folder or a zip file with {_FOLDER_LAYOUT}, got the file {path}")


# From items to stores.


def _assemble(
    name: str,
    items: _Items,
    make_store: _MakeStore,
    limits: Mapping[str, int | None],
    class_names: list[str] | None = None,
) -> Dataset:
    _check_classes(name, items)
    classes = class_names or sorted({item.class_name for item in items["train"]})
    index_of = {class_name: index for index, class_name in enumerate(classes)}
    manifest = hashlib.sha256()
    stores = {}
    for split in SPLITS:
        ordered = sorted(items[split], key=lambda item: (index_of[item.class_name], item.name))
        kept = _first_of_each_class(ordered, limits[split])
        for item in kept:
            line = f"{split}\0{item.class_name}\0{item.name}\0{item.fingerprint}\n"
            manifest.update(line.encode("utf-8", "surrogateescape"))
        labels = [index_of[item.class_name] for item in kept]
        stores[split] = make_store(split, [item.source for item in kept], labels)
    return Dataset(name, classes, stores["train"], stores["test"], manifest.hexdigest())


def _check_classes(name: str, items: _Items) -> None:
    classes = {split: {item.class_name for item in items[split]} for split in SPLITS}
    for split in SPLITS:
        if not classes[split]:
            raise _error(f"'{name}': expected at least one class in {split}, got none")
    for split, other in (SPLITS, SPLITS[::-1]):
        if missing := sorted(classes[other] - classes[split]):
            raise _error(
                f"'{name}': expected the same classes in train and test, got {len(missing)} of "
                f"{other} that {split} has not: {_shortened(missing)}"
            )


def _first_of_each_class(ordered: list[_Item], limit: int | None) -> list[_Item]:
    if limit is None:
        return ordered
    taken: Counter[str] = Counter()
    kept = []
    for item in ordered:
        taken[item.class_name] += 1
        if taken[item.class_name] <= limit:
            kept.append(item)
    return kept


def _shortened(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(repr(name) for name in names[:count]) + more


# A folder per class.


def _folder_items(root: Path) -> _Items:
    items: _Items = {}
    for split in SPLITS:
        folder = root / split
        if not folder.is_dir():
            raise FileNotFoundError(
                f"[load_dataset] no folder {folder}: expected {_FOLDER_LAYOUT} in {root}"
            )
        items[split] = []
        for class_folder in folder.iterdir():
            if class_folder.name.startswith(".") or not class_folder.is_dir():
                continue
            found = list(_images_in(class_folder))
            if not found:
                raise _error(f"expected images in the class folder {class_folder}, got none")
            items[split] += found
    return items


def _images_in(class_folder: Path) -> Iterator[_Item]:
    for folder, _, files in os.walk(class_folder):
        for file in files:
            path = Path(folder, file)
            if _is_image(file):
                relative = path.relative_to(class_folder).as_posix()
                yield _Item(class_folder.name, relative, str(path.stat().st_size), str(path))


def _is_image(name: str) -> bool:
    base = PurePosixPath(name)
    return base.suffix.lower() in IMAGE_SUFFIXES and not base.name.startswith(".")


def _file_store(split: str, paths: list[str], labels: list[int]) -> _C.ImageStore:
    return _C.make_file_store(paths, labels)


# A zip of a folder per class.


def _zip_items(path: Path) -> _Items:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise _error(f"expected a zip file, got {path}: {error}") from None
    for entry in entries:
        _check_zip_entry(path, entry)
    if repeated := [name for name, n in Counter(e.filename for e in entries).items() if n > 1]:
        raise _error(f"{path}: expected each entry once, got more of {_shortened(repeated)}")
    prefix = _leading_folder(entries)
    items: _Items = {split: [] for split in SPLITS}
    folders, filled = set(), set()
    for entry in entries:
        parts = PurePosixPath(entry.filename).parts[prefix:]
        if len(parts) < 2 or parts[0] not in SPLITS or parts[1].startswith("."):
            continue
        if len(parts) > 2 or entry.is_dir():
            folders.add(parts[:2])
        if len(parts) > 2 and not entry.is_dir() and _is_image(entry.filename):
            filled.add(parts[:2])
            item = _Item(parts[1], "/".join(parts[2:]), f"{entry.file_size} {entry.CRC}", entry)
            items[parts[0]].append(item)
    if empty := sorted("/".join(folder) for folder in folders - filled):
        raise _error(f"{path}: expected images in each class, got none in {_shortened(empty)}")
    if not folders:
        raise _error(f"expected a zip of {_FOLDER_LAYOUT}, got {path}")
    return items


def _check_zip_entry(path: Path, entry: zipfile.ZipInfo) -> None:
    parts = re.split(r"[/\\]", entry.filename)
    if ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise _error(f"{path}: expected names inside the archive, got {entry.filename!r}")
    if entry.flag_bits & 1:
        raise _error(f"{path}: expected an archive without a password, got {entry.filename!r}")


def _leading_folder(entries: Iterable[zipfile.ZipInfo]) -> int:
    """1 where train and test lie in a folder of the archive, else 0."""
    tops = {PurePosixPath(entry.filename).parts[:1] for entry in entries}
    return 0 if any(top and top[0] in SPLITS for top in tops) else 1


def _zip_store(path: Path) -> _MakeStore:
    def make(split: str, entries: list[zipfile.ZipInfo], labels: list[int]) -> _C.ImageStore:
        described = [
            _C.ZipEntry(e.filename, e.header_offset, e.compress_size, e.file_size,
                        e.compress_type, e.CRC)
            for e in entries
        ]  # fmt: skip
        return _C.make_zip_store(str(path), described, labels)

    return make


# DomainNet: lists of paths and labels beside a folder per domain.


def _domain_lists(root: Path) -> dict[str, list[Path]]:
    """The lists of each split: <domain>_train.txt of all domains, or domainnet_train.yaml."""
    for folder in (root, root / "splits"):
        for suffix in (".txt", ".yaml"):
            lists = {split: sorted(folder.glob(f"*_{split}{suffix}")) for split in SPLITS}
            if all(lists.values()):
                return lists
    return {}


def _from_domain_lists(
    name: str, root: Path, lists: Mapping[str, list[Path]], limits: Mapping[str, int | None]
) -> Dataset:
    class_of_label: dict[int, str] = {}
    items: _Items = {split: [] for split in SPLITS}
    for split in SPLITS:
        for file in lists[split]:
            for listed, label in _read_list(file):
                parts = PurePosixPath(listed).parts[-3:]  # domain / class / image
                if len(parts) < 3 or ".." in parts:
                    raise _error(f"{file}: expected <domain>/<class>/<image>, got {listed!r}")
                if class_of_label.setdefault(label, parts[1]) != parts[1]:
                    raise _error(
                        f"{file}: expected one class per label, got '{class_of_label[label]}' and "
                        f"'{parts[1]}' for {label}"
                    )
                path = root.joinpath(*parts)
                items[split].append(
                    _Item(parts[1], "/".join(parts), _size_of(path, file), str(path))
                )
    labels = sorted(class_of_label)
    class_names = [class_of_label[label] for label in labels]
    if labels != list(range(len(labels))) or len(set(class_names)) < len(labels):
        raise _error(f"'{name}': expected the labels 0 .. n-1, one per class, got {len(labels)} "
                     f"labels up to {max(labels, default=-1)}")  # fmt: skip
    return _assemble(name, items, _file_store, limits, class_names)


def _size_of(path: Path, listed_in: Path) -> str:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"[load_dataset] no image {path}, which {listed_in} lists"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise _error(f"{listed_in}: expected a file, got {path}")
    return str(status.st_size)


def _read_list(file: Path) -> Iterator[tuple[str, int]]:
    lines = file.read_text(encoding="utf-8").splitlines()
    if file.suffix == ".txt":
        rows = [line.rsplit(maxsplit=1) for line in lines if line.strip()]
        if any(len(row) != 2 for row in rows):
            raise _error(f"{file}: expected lines '<path> <label>'")
        paths, labels = [row[0] for row in rows], [row[1] for row in rows]
    else:
        columns = _read_yaml_lists(file, lines)
        paths, labels = columns.get("data", []), columns.get("targets", [])
    if len(paths) != len(labels) or not all(label.isdecimal() for label in labels):
        raise _error(f"{file}: expected one label per path, got {len(paths)} paths and "
                     f"{len(labels)} labels")  # fmt: skip
    return zip(paths, map(int, labels), strict=True)


def _read_yaml_lists(file: Path, lines: Iterable[str]) -> dict[str, list[str]]:
    """The part of YAML that the published lists use: keys with lists of plain scalars."""
    columns: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in lines:
        if match := re.fullmatch(r"(\w+):\s*", line):
            current = columns.setdefault(match[1], [])
        elif (match := re.fullmatch(r"\s*- +['\"]?(.*?)['\"]?\s*", line)) and current is not None:
            current.append(match[1])
        elif line.strip() and not line.startswith("#"):
            raise _error(f"{file}: expected 'data:' and 'targets:' with a list each, got {line!r}")
    return columns


# Arrays.


@dataclass(frozen=True)
class _Images:
    """Images (n, h, w, 3), the class of each, and names that order them."""

    pixels: NDArray[np.uint8]
    classes: list[str]
    names: list[str]


def _from_arrays(
    name: str,
    arrays: tuple[Mapping[str, _Images], list[str]],
    limits: Mapping[str, int | None],
) -> Dataset:
    images, class_names = arrays
    items: _Items = {}
    for split in SPLITS:
        part = images[split]
        items[split] = [
            _Item(class_name, image_name, hashlib.sha256(pixels.tobytes()).hexdigest(), row)
            for row, (class_name, image_name, pixels) in enumerate(
                zip(part.classes, part.names, part.pixels, strict=True)
            )
        ]

    def make_store(split: str, rows: list[int], labels: list[int]) -> _C.ImageStore:
        chosen = np.ascontiguousarray(images[split].pixels[rows])
        return _C.make_array_store(torch.from_numpy(chosen), labels)

    return _assemble(name, items, make_store, limits, class_names)


def _checked_arrays(arrays: Arrays) -> tuple[dict[str, _Images], list[str]]:
    if set(arrays) != set(SPLITS):
        raise _error(f"expected arrays 'train' and 'test', got {sorted(map(str, arrays))}")
    pairs: dict[str, tuple[NDArray[np.uint8], NDArray[Any]]] = {}
    for split in SPLITS:
        pair = arrays[split]
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"[load_dataset] '{split}': expected a pair (images, labels)")
        pairs[split] = (_as_rgb(split, np.asarray(pair[0])), _as_labels(split, pair))
    classes = np.unique(np.concatenate([pairs[split][1] for split in SPLITS]))
    if any(len(labels) == 0 for _, labels in pairs.values()):
        raise _error("expected at least one image in train and in test, got none")
    images = {
        split: _Images(pixels, [str(label) for label in labels], _numbered(len(labels)))
        for split, (pixels, labels) in pairs.items()
    }
    return images, [str(label) for label in classes]


def _as_rgb(split: str, pixels: NDArray[Any]) -> NDArray[np.uint8]:
    if pixels.dtype != np.uint8:
        raise TypeError(f"[load_dataset] '{split}': expected uint8 images, got {pixels.dtype}")
    if pixels.ndim == 3:
        pixels = pixels[..., np.newaxis]
    if pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or 0 in pixels.shape[1:]:
        raise _error(f"'{split}': expected images (n, h, w, 3) or (n, h, w), got {pixels.shape}")
    return np.broadcast_to(pixels, (*pixels.shape[:3], 3))


def _as_labels(split: str, pair: Sequence[ArrayLike]) -> NDArray[Any]:
    labels = np.asarray(pair[1])
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        raise _error(f"'{split}': expected one-dimensional labels, whole numbers or names, got "
                     f"{labels.dtype} {labels.shape}")  # fmt: skip
    if len(labels) != len(cast(Any, pair[0])):
        raise _error(f"'{split}': expected one label per image, got {len(labels)} labels for "
                     f"{len(cast(Any, pair[0]))} images")  # fmt: skip
    return labels


def _numbered(count: int) -> list[str]:
    return [f"{row:09d}" for row in range(count)]


# scikit-learn's handwritten digits.

_DIGITS_TEST_SIZE = 450


def _digits() -> tuple[dict[str, _Images], list[str]]:
    """1,797 grey images of 8x8: 1,347 for training and 450 for the test, spread evenly."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = ((digits.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)  # from 0 .. 16
    labels = digits.target
    is_test = np.zeros(len(labels), bool)
    for label, count in _shares(Counter(labels.tolist()), _DIGITS_TEST_SIZE).items():
        rows = np.flatnonzero(labels == label)
        steps = np.arange(len(rows) + 1) * count // len(rows)
        is_test[rows] = steps[1:] > steps[:-1]
    return _checked_arrays(
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


# CIFAR-100's python files.


def _cifar100(path: Path) -> tuple[dict[str, _Images], list[str]]:
    read = _cifar_member_reader(path)
    names = _entry(read("meta"), "fine_label_names", path / "meta")
    images = {}
    for split in SPLITS:
        content = read(split)
        where = path / split
        pixels = np.asarray(_entry(content, "data", where))
        labels = _entry(content, "fine_labels", where)
        files = _entry(content, "filenames", where)
        if pixels.shape != (len(labels), 3 * 32 * 32) or len(files) != len(labels):
            raise _error(f"{where}: expected n images of 3072 bytes, n labels and n names, got "
                         f"{pixels.shape}, {len(labels)} and {len(files)}")  # fmt: skip
        if any(not isinstance(label, int) or not 0 <= label < len(names) for label in labels):
            raise _error(f"{where}: expected labels in 0 .. {len(names) - 1}")
        planes = pixels.reshape(-1, 3, 32, 32)
        images[split] = _Images(
            np.ascontiguousarray(planes.transpose(0, 2, 3, 1)),
            [names[label] for label in labels],
            [str(file) for file in files],
        )
    return images, sorted(names)


def _cifar_member_reader(path: Path) -> Callable[[str], Any]:
    """A function that reads 'train', 'test' or 'meta' from the folder or the .tar.gz."""

    def read(member: str) -> Any:
        try:
            if path.is_dir():
                return plain_pickle.loads((path / member).read_bytes())
            with tarfile.open(path) as archive:
                file = archive.extractfile(f"cifar-100-python/{member}")
                if file is None:
                    raise KeyError(member)
                return plain_pickle.loads(file.read())
        except (FileNotFoundError, KeyError):
            raise FileNotFoundError(
                f"[load_dataset] no file '{member}' in {path}; {KNOWN_DATASETS['cifar100']}"
            ) from None
        except (ValueError, tarfile.TarError, EOFError, OSError) as error:
            raise _error(f"{path / member}: {error}") from None

    return read


def _entry(content: Any, key: str, where: Path) -> Any:
    if not isinstance(content, dict) or key not in content:
        raise _error(f"{where}: expected a dict with '{key}'")
    return content[key]
