"""Checkpoints of a run: written whole or not at all, and checked before they are used.

    checkpoint/000012.safetensors   every tensor
    checkpoint/000012.json          where the run stands; checksums of both files

The JSON file is written last: tensors without it are no checkpoint. The last two are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch

from ntkcl import _C
from ntkcl.files import (
    read_object,
    read_tensors,
    remove_temporaries,
    safetensors_bytes,
    sync_folder,
    write_atomically,
)
from ntkcl.names import shown

logger = logging.getLogger("ntkcl")

FORMAT = 1
KEPT = 2
_NAME = re.compile(r"(\d{6,})\.(json|safetensors)")


@dataclass(frozen=True)
class Checkpoint:
    """What the core's trainer goes on from, and how long the event log was then."""

    path: Path
    progress: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    log_bytes: int

    def for_core(self) -> dict[str, Any]:
        return {"progress": self.progress, "tensors": self.tensors}


class _Manifest(pydantic.BaseModel):
    """The JSON file."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    format: int
    ntkcl: str
    torch: str
    log_bytes: int = pydantic.Field(ge=0)
    progress: dict[str, Any]
    tensors_sha256: str
    sha256: str = ""  # of the file without this key

    def sealed(self) -> bytes:
        """The file's content, its checksum in it."""
        content = self.model_dump()
        content["sha256"] = _checksum(content)
        return (json.dumps(content, indent=2) + "\n").encode()


class Checkpoints:
    """Those of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._damaged: set[int] = set()

    def save(self, checkpoint: Mapping[str, Any], log_bytes: int) -> None:
        """Writes one more, and removes all but the last two. OSError leaves those there are."""
        if not self.folder.exists():
            self.folder.mkdir()
            sync_folder(self.folder.parent)
        number = max((number for number, _ in self._files()), default=0) + 1
        content = safetensors_bytes(checkpoint["tensors"], {})
        manifest = _Manifest(
            format=FORMAT,
            ntkcl=str(_C.__version__),
            torch=torch.__version__,
            log_bytes=log_bytes,
            progress=checkpoint["progress"],
            tensors_sha256=hashlib.sha256(content).hexdigest(),
        )
        write_atomically(self._path(number, "safetensors"), content)
        write_atomically(self._path(number, "json"), manifest.sealed())
        kept = sorted({n for n, kind in self._files() if kind == "json"} - self._damaged)[-KEPT:]
        self._remove(lambda other: other not in kept)

    def latest(self) -> Checkpoint | None:
        """The last one that is whole, none where the run has written none yet.

        Raises:
          ValueError: another format wrote it; or none of those there are is whole.
        """
        numbers = sorted((n for n, kind in self._files() if kind == "json"), reverse=True)
        damages = []
        for number in numbers:
            try:
                return self._read(number)
            except _DamagedError as damage:
                damages.append(str(damage))
                self._damaged.add(number)
                if number != numbers[-1]:
                    logger.warning("[checkpoint] %s; the one before is used", damage)
        if damages:
            raise ValueError(
                f"[checkpoint] none is whole: {'; '.join(damages)}; remove '{self.folder}' to "
                "begin anew"
            )
        return None

    def tidy(self) -> None:
        """Removes what a killed process left half-written."""
        if self.folder.is_dir():
            remove_temporaries(self.folder)
            whole = {number for number, kind in self._files() if kind == "json"}
            self._remove(lambda number: number not in whole)

    def clear(self) -> None:
        """Removes all: the run is finished."""
        if self.folder.is_dir():
            remove_temporaries(self.folder)
            self._remove(lambda _: True)
            with contextlib.suppress(OSError):  # somebody else has put something there
                self.folder.rmdir()

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"{number:06d}.{kind}"

    def _files(self) -> list[tuple[int, str]]:
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return [(int(match[1]), match[2]) for match in matches if match]

    def _remove(self, doomed: Callable[[int], bool]) -> None:
        # JSON files first: what is left of a checkpoint in between is none.
        for number, kind in sorted(self._files(), key=lambda file: file[1]):
            if doomed(number):
                self._path(number, kind).unlink(missing_ok=True)

    def _read(self, number: int) -> Checkpoint:
        path, tensors = (self._path(number, kind) for kind in ("json", "safetensors"))
        manifest = self._read_manifest(path)
        try:
            loaded = read_tensors(tensors, manifest.tensors_sha256)
        except OSError as error:
            raise _DamagedError(f"'{tensors}' is damaged: {error}") from None
        except ValueError as damage:
            raise _DamagedError(str(damage)) from None
        return Checkpoint(path, manifest.progress, loaded, manifest.log_bytes)

    def _read_manifest(self, path: Path) -> _Manifest:
        try:
            found = read_object(path)
        except ValueError as damage:
            raise _DamagedError(str(damage)) from None
        if found.get("sha256") != _checksum(found):
            raise _DamagedError(f"'{path}' is damaged: its checksum does not fit")
        if found.get("format") != FORMAT:
            raise ValueError(
                f"[checkpoint] '{path}': expected format {FORMAT}, "
                f"got {shown(found.get('format'))}, written by ntkcl {found.get('ntkcl')!s:.80}: "
                f"finish the run with that version, or remove '{self.folder}' to begin it anew "
                "with this one"
            )
        try:
            return _Manifest.model_validate(found)
        except pydantic.ValidationError as error:
            raise _DamagedError(f"'{path}' is damaged: {error.errors()[0]['msg']}") from None


def _checksum(content: Mapping[str, Any]) -> str:
    """Of all but itself."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class _DamagedError(Exception):
    """A file is torn or was changed."""
