"""CIFAR-100's python files, read without running what their pickles name."""

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ntkcl.datasets import plain_pickle
from ntkcl.datasets.arrays import LabelledImages
from ntkcl.datasets.listing import bad_data
from ntkcl.names import shown

_LARGEST = 1 << 30  # bytes of a file; the largest of the data set has 155 million
_BAD_ARCHIVE = (tarfile.TarError, zlib.error, lzma.LZMAError)
HOW_TO_GET = "download cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html"


def read_cifar100(path: Path, splits: Iterable[str]) -> tuple[dict[str, LabelledImages], list[str]]:
    read = _cifar_member_reader(path)
    names = _entry(read("meta"), "fine_label_names", path / "meta")
    if any(not isinstance(name, str) for name in names):
        raise bad_data(f"{path / 'meta'}: expected names of classes, got {shown(names)}")
    images = {}
    for split in splits:
        content = read(split)
        where = path / split
        pixels = _entry(content, "data", where, np.ndarray)
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
                content = file.read(_LARGEST + 1)
            if len(content) > _LARGEST:
                raise ValueError(f"expected at most {_LARGEST} bytes, got more")
            return plain_pickle.loads(content)
        except (FileNotFoundError, KeyError):
            raise FileNotFoundError(
                f"[load_dataset] no file '{member}' in {path}; how to get it: {HOW_TO_GET}"
            ) from None
        except (ValueError, EOFError, OSError, *_BAD_ARCHIVE) as error:
            raise bad_data(f"{path / member}: {error}") from None

    return read


def _entry(content: Any, key: str, where: Path, kind: type = list) -> Any:
    if not isinstance(content, dict) or not isinstance(content.get(key), kind):
        raise bad_data(f"{where}: expected a dict with '{key}' of type {kind.__name__}")
    return content[key]
