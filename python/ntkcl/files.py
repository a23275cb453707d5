"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from ntkcl.names import shown


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, also when the power goes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder last when the power goes."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_temporaries(folder: Path) -> None:
    """Removes what `write_atomically` was killed over."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; ValueError for any other content."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' is damaged: expected an object, got {shown(found)}")
    return found


def read_tensors(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file of this checksum; ValueError for any other content."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"'{path}' is damaged: its checksum does not fit")
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"'{path}' is damaged: {error!s:.200}") from None


def safetensors_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(ready, metadata=dict(metadata))
