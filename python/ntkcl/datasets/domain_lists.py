"""DomainNet: lists of paths and labels beside a folder per domain."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from ntkcl.datasets.class_folders import file_store, size_of
from ntkcl.datasets.listing import Dataset, Item, Items, Limits, assemble, bad_data
from ntkcl.names import shown


def domain_lists(root: Path, splits: Iterable[str]) -> dict[str, list[Path]]:
    """The lists of each split: <domain>_train.txt of all domains, or domainnet_train.yaml."""
    for folder in (root, root / "splits"):
        for suffix in (".txt", ".yaml"):
            lists = {split: sorted(folder.glob(f"*_{split}{suffix}")) for split in splits}
            if all(lists.values()):
                return lists
    return {}


def from_domain_lists(
    name: str, root: Path, lists: Mapping[str, list[Path]], limits: Limits
) -> Dataset:
    class_of_label: dict[int, str] = {}
    items: Items = {split: [] for split in lists}
    for split in lists:
        for file in lists[split]:
            for listed, label in _read_list(file):
                parts = PurePosixPath(listed).parts[-3:]  # domain / class / image
                if len(parts) < 3 or ".." in parts:
                    raise bad_data(
                        f"{file}: expected <domain>/<class>/<image>, got {shown(listed)}"
                    )
                if class_of_label.setdefault(label, parts[1]) != parts[1]:
                    raise bad_data(
                        f"{file}: expected one class per label, got {shown(class_of_label[label])} "
                        f"and {shown(parts[1])} for {label}"
                    )
                path = root.joinpath(*parts)
                items[split].append(Item(parts[1], "/".join(parts), size_of(path, file), str(path)))
    labels = sorted(class_of_label)
    class_names = [class_of_label[label] for label in labels]
    if labels != list(range(len(labels))) or len(set(class_names)) < len(labels):
        raise bad_data(f"'{name}': expected the labels 0 .. n-1, one per class, got {len(labels)} "
                     f"labels up to {max(labels, default=-1)}")  # fmt: skip
    return assemble(name, items, file_store, limits, class_names)


def _read_list(file: Path) -> Iterator[tuple[str, int]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise bad_data(f"{file}: {error}") from None
    if file.suffix == ".txt":
        rows = [line.rsplit(maxsplit=1) for line in lines if line.strip()]
        if any(len(row) != 2 for row in rows):
            raise bad_data(f"{file}: expected lines '<path> <label>'")
        paths, labels = [row[0] for row in rows], [row[1] for row in rows]
    else:
        columns = _read_yaml_lists(file, lines)
        paths, labels = columns.get("data", []), columns.get("targets", [])
    if len(paths) != len(labels) or not all(map(_is_number, labels)):
        raise bad_data(f"{file}: expected one label per path, got {len(paths)} paths and "
                     f"{len(labels)} labels")  # fmt: skip
    return zip(paths, map(int, labels), strict=True)


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdecimal() and len(label) < 10


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
            raise bad_data(f"{file}: expected the lists 'data:' and 'targets:', got {shown(line)}")
    return columns
