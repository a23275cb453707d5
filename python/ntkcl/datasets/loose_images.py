"""Images that a person has at hand: paths, folders, arrays, PIL images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ntkcl import _C
from ntkcl.datasets.arrays import as_rgb, uint8_array
from ntkcl.datasets.class_folders import IMAGE_SUFFIXES, is_image

# A path, an array, a PIL image, or a list of these.
Images = Any
Pixels = NDArray[np.uint8]


def image_stores(images: Images) -> list[_C.ImageStore]:
    """Stores that hold all images in order; ValueError where there is none."""
    stores = []
    for run in _runs(list(_flat(images))):
        if isinstance(run[0], str):
            stores.append(_C.make_file_store([str(path) for path in run], [0] * len(run)))
        else:
            stores.append(_C.make_array_store(torch.from_numpy(np.stack(run)), [0] * len(run)))
    if not stores:
        raise ValueError("[images] expected at least one image, got none")
    return stores


def one_store(by_class: Mapping[str, Images], classes: Sequence[str]) -> _C.ImageStore:
    """All images of some classes as one store; labels are places in `classes`."""
    items, labels = [], []
    for name, images in by_class.items():
        found = list(_flat(images))
        if not found:
            raise ValueError(f"[images] class '{name}': expected at least one image, got none")
        items += found
        labels += [classes.index(name)] * len(found)
    if not items:
        return _C.make_array_store(torch.zeros((0, 1, 1, 3), dtype=torch.uint8), [])
    paths = [item for item in items if isinstance(item, str)]
    if len(paths) == len(items):
        return _C.make_file_store(paths, labels)
    shapes = {item.shape if not isinstance(item, str) else None for item in items}
    if None in shapes or len(shapes) > 1:
        raise ValueError(
            "[images] expected paths only, or arrays of one size only, to learn from, got both or "
            f"{len(shapes)} sizes"
        )
    return _C.make_array_store(torch.from_numpy(np.stack(items)), labels)


def _runs(items: list[Any]) -> Iterator[list[Any]]:
    """Neighbours that one store can hold: paths, or arrays of one shape."""
    run: list[Any] = []
    for item in items:
        if run and _kind(run[-1]) != _kind(item):
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def _kind(item: str | Pixels) -> object:
    return None if isinstance(item, str) else item.shape


def _flat(images: Images) -> Iterator[str | Pixels]:
    if isinstance(images, str | os.PathLike):
        yield from _files(Path(images).expanduser())
    elif isinstance(images, np.ndarray | torch.Tensor):
        yield from _arrays(uint8_array("[images]", images))
    elif hasattr(images, "convert"):  # a PIL image
        yield np.asarray(images.convert("RGB"))
    elif isinstance(images, Sequence):
        for item in images:
            yield from _flat(item)
    else:
        raise TypeError(
            "[images] expected a path, an array, a PIL image or a list of these, got "
            f"{type(images).__name__}"
        )


def image_paths(files: Sequence[str]) -> Iterator[str]:
    """Images in files and folders."""
    for file in files:
        yield from _files(Path(file).expanduser())


def other_files(files: Sequence[str]) -> Iterator[Path]:
    """What `image_paths` leaves out in folders, but for hidden files."""
    for file in files:
        for path in Path(file).expanduser().rglob("*"):
            if path.is_file() and not path.name.startswith(".") and not is_image(path.name):
                yield path


def _files(path: Path) -> Iterator[str]:
    if path.is_dir():
        found = sorted(str(p) for p in path.rglob("*") if p.is_file() and is_image(p.name))
        if not found:
            kinds = ", ".join(IMAGE_SUFFIXES)
            raise FileNotFoundError(f"[images] no image in the folder '{path}': expected {kinds}")
        yield from found
    elif path.is_file():
        yield str(path)
    else:
        raise FileNotFoundError(f"[images] no such file: '{path}'")


def _arrays(array: Pixels) -> Iterator[Pixels]:
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3):  # one image
        array = array[None]
    elif array.ndim == 3 and (array.shape[0] in (3, 4) or array.shape[2] in (1, 4)):
        raise ValueError(
            "[images] expected an image (h, w, 3), or several, (n, h, w, 3), got "
            f"{array.shape}; of (3, h, w) give image.permute(1, 2, 0), of (h, w, 4) image[..., :3],"
            " and 3 or 4 grey images as (n, h, w, 1)"
        )
    yield from as_rgb("[images]", array)
