"""CIFAR-100's python files, read without running what their pickles name."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ntkcl.datasets import plain_pickle
from ntkcl.datasets.arrays import LabelledImages
from ntkcl.datasets.listing import SPLITS, bad_data

HOW_TO_GET = "download cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html"


def read_cifar100(path: Path) -> tuple[dict[str, LabelledImages], list[str]]:
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
            raise bad_data(f"{where}: expected n images of 3072 bytes, n labels and n names, got "
                         f"{pixels.shape}, {len(labels)} and {len(files)}")  # fmt: skip
        if any(not isinstance(label, int) or not 0 <= label < len(names) for label in labels):
            raise bad_data(f"{where}: expected labels in 0 .. {len(names) - 1}")
        planes = pixels.reshape(-1, 3, 32, 32)
        images[split] = LabelledImages(
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
                f"[load_dataset] no file '{member}' in {path}; how to get it: {HOW_TO_GET}"
            ) from None
        except (ValueError, tarfile.TarError, EOFError, OSError) as error:
            raise bad_data(f"{path / member}: {error}") from None

    return read


def _entry(content: Any, key: str, where: Path) -> Any:
    if not isinstance(content, dict) or key not in content:
        raise bad_data(f"{where}: expected a dict with '{key}'")
    return content[key]
