"""A folder per class, on the disk or in a zip archive."""

import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from ntkcl import _C
from ntkcl.datasets.listing import (
    FOLDER_LAYOUT,
    SPLITS,
    Item,
    Items,
    MakeStore,
    bad_data,
    shortened,
)
from ntkcl.names import shown

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def folder_items(root: Path, splits: Iterable[str]) -> Items:
    items: Items = {}
    for split in splits:
        folder = root / split
        if not folder.is_dir():
            raise FileNotFoundError(
                f"[load_dataset] no folder {folder}: expected {FOLDER_LAYOUT} in {root}"
            )
        items[split] = []
        for class_folder in folder.iterdir():
            if class_folder.name.startswith(".") or not class_folder.is_dir():
                continue
            found = list(_images_in(class_folder))
            if not found:
                raise bad_data(f"expected images in the class folder {class_folder}, got none")
            items[split] += found
    return items


def _images_in(class_folder: Path) -> Iterator[Item]:
    for folder, _, files in os.walk(class_folder):
        for file in files:
            path = Path(folder, file)
            if is_image(file):
                relative = path.relative_to(class_folder).as_posix()
                size = size_of(path, class_folder)
                yield Item(class_folder.name, relative, size, str(path))


def size_of(path: Path, listed_in: Path) -> str:
    """Bytes of an image that a folder or a list names."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"[load_dataset] no image {path}, which {listed_in} lists"
        ) from None
    except (OSError, ValueError) as error:  # a circle of links, a name that no file can have
        why = error.strerror if isinstance(error, OSError) else error
        raise bad_data(f"{listed_in}: expected a file, got {str(path)!r:.300}: {why}") from None
    if not stat.S_ISREG(status.st_mode):
        raise bad_data(f"{listed_in}: expected a file, got {path}")
    return str(status.st_size)


def is_image(name: str) -> bool:
    base = PurePosixPath(name)
    return base.suffix.lower() in IMAGE_SUFFIXES and not base.name.startswith(".")


def file_store(split: str, paths: list[str], labels: list[int]) -> _C.ImageStore:
    return _C.make_file_store(paths, labels)


def zip_items(path: Path, splits: Iterable[str]) -> Items:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise bad_data(f"expected a zip file, got {path}: {error}") from None
    for entry in entries:
        _check_zip_entry(path, entry)
    if repeated := [name for name, n in Counter(e.filename for e in entries).items() if n > 1]:
        raise bad_data(f"{path}: expected each entry once, got more of {shortened(repeated)}")
    prefix = _leading_folder(entries)
    items: Items = {split: [] for split in splits}
    folders, filled = set(), set()
    for entry in entries:
        parts = PurePosixPath(entry.filename).parts[prefix:]
        if len(parts) < 2 or parts[0] not in items or parts[1].startswith("."):
            continue
        if len(parts) > 2 or entry.is_dir():
            folders.add(parts[:2])
        if len(parts) > 2 and not entry.is_dir() and is_image(entry.filename):
            filled.add(parts[:2])
            item = Item(parts[1], "/".join(parts[2:]), f"{entry.file_size} {entry.CRC}", entry)
            items[parts[0]].append(item)
    if empty := sorted("/".join(folder) for folder in folders - filled):
        raise bad_data(f"{path}: expected images in each class, got none in {shortened(empty)}")
    if not folders:
        raise bad_data(f"expected a zip of {FOLDER_LAYOUT}, got {path}")
    return items


def _check_zip_entry(path: Path, entry: zipfile.ZipInfo) -> None:
    parts = re.split(r"[/\\]", entry.filename)
    if ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise bad_data(f"{path}: expected names inside the archive, got {shown(entry.filename)}")
    if entry.flag_bits & 1:
        raise bad_data(
            f"{path}: expected an archive without a password, got {shown(entry.filename)}"
        )
    if max(entry.file_size, entry.compress_size, entry.header_offset) >= 1 << 63:
        raise bad_data(f"{path}: expected sizes of a file, got others of {shown(entry.filename)}")


def _leading_folder(entries: Iterable[zipfile.ZipInfo]) -> int:
    """1 where train and test lie in a folder of the archive, else 0."""
    tops = {PurePosixPath(entry.filename).parts[:1] for entry in entries}
    return 0 if any(top and top[0] in SPLITS for top in tops) else 1


def zip_store(path: Path) -> MakeStore:
    def make(split: str, entries: list[zipfile.ZipInfo], labels: list[int]) -> _C.ImageStore:
        described = [
            _C.ZipEntry(e.filename, e.header_offset, e.compress_size, e.file_size,
                        e.compress_type, e.CRC)
            for e in entries
        ]  # fmt: skip
        return _C.make_zip_store(str(path), described, labels)

    return make
