"""Checkpoints of a run: written whole or not at all, and checked before they are used.

    checkpoint/000012.safetensors   every tensor
    checkpoint/000012.json          where the run stands; checksums of both files

The JSON file is written last: tensors without it are no checkpoint. The last two are kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import safetensors.torch
import torch

from ntkcl import _C
from ntkcl.files import remove_temporaries, safetensors_bytes, write_atomically

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
        content = self.model_dump() | {"sha256": self.checksum()}
        return (json.dumps(content, indent=2) + "\n").encode()

    def checksum(self) -> str:
        content = json.dumps(self.model_dump(exclude={"sha256"}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


class Checkpoints:
    """Those of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, checkpoint: Mapping[str, Any], log_bytes: int) -> None:
        """Writes one more, and removes all but the last two. OSError leaves those there are."""
        self.folder.mkdir(exist_ok=True)
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
        self._remove(lambda other: other <= number - KEPT)

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
                logger.warning("[checkpoint] %s; the one before is used", damage)
        if damages:
            raise ValueError(f"[checkpoint] none is whole: {'; '.join(damages)}")
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
            self.folder.rmdir()

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"{number:06d}.{kind}"

    def _files(self) -> list[tuple[int, str]]:
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return [(int(match[1]), match[2]) for match in matches if match]

    def _remove(self, doomed: Any) -> None:
        # JSON files first: what is left of a checkpoint in between is none.
        for number, kind in sorted(self._files(), key=lambda file: file[1]):
            if doomed(number):
                self._path(number, kind).unlink(missing_ok=True)

    def _read(self, number: int) -> Checkpoint:
        path = self._path(number, "json")
        try:
            found = json.loads(path.read_bytes())
            if isinstance(found, dict) and found.get("format", FORMAT) != FORMAT:
                raise ValueError(
                    f"[checkpoint] '{path}': expected format {FORMAT}, got {found['format']}, "
                    f"written by ntkcl {found.get('ntkcl')}: finish the run with that version, or "
                    f"remove '{self.folder}' to begin it anew with this one"
                )
            manifest = _Manifest.model_validate(found)
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _DamagedError(f"'{path}' is damaged: {error}") from None
        except pydantic.ValidationError as error:
            raise _DamagedError(f"'{path}' is damaged: {error.errors()[0]['msg']}") from None
        if manifest.checksum() != manifest.sha256:
            raise _DamagedError(f"'{path}' is damaged: its checksum does not fit")
        tensors = self._path(number, "safetensors")
        try:
            content = tensors.read_bytes()
            if hashlib.sha256(content).hexdigest() != manifest.tensors_sha256:
                raise _DamagedError(f"'{tensors}' is damaged: its checksum does not fit")
            loaded = safetensors.torch.load(content)
        except (OSError, safetensors.SafetensorError) as error:
            raise _DamagedError(f"'{tensors}' is damaged: {error}") from None
        return Checkpoint(path, manifest.progress, loaded, manifest.log_bytes)


class _DamagedError(Exception):
    """A file is torn or was changed."""
