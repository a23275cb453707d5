"""Golden files: float64 numbers of an oracle, with settings in their metadata."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

_ROOT = Path(os.environ.get("NTKCL_GOLDEN_DIR") or Path(__file__).parents[1] / "golden")


@dataclass
class Golden:
    """One file: tensors by name (floats as float64), the dtype each is stored in, settings."""

    tensors: dict[str, torch.Tensor]
    stored: dict[str, str]
    config: dict

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names begin with `prefix`, without it."""
        cut = len(prefix)
        return {name[cut:]: t for name, t in self.tensors.items() if name.startswith(prefix)}

    def check(
        self,
        name: str,
        actual: torch.Tensor,
        relative32: float,
        absolute32: float = 1e-6,
        columns: slice = slice(None),
    ):
        """`actual` is the golden tensor `name`: float64 to 1e-10 of its largest entry (2e-7 where
        it is stored as F32), float32 to 5 times the README's figure `relative32`.

        With `columns`, `actual` is those columns alone.
        """
        expected = self.tensors[name]
        actual = actual.detach()
        largest = expected.abs().max().item() if expected.numel() else 0.0
        expected = expected[..., columns]
        assert actual.numel() == expected.numel(), f"{name}: {actual.shape} {expected.shape}"
        if actual.dtype == torch.float64:
            tolerance = max(largest * (2e-7 if self.stored[name] == "F32" else 1e-10), 1e-13)
        else:
            tolerance = 5 * relative32 * largest + absolute32
        error = (actual.double().reshape(expected.shape) - expected).abs()
        worst = error.max().item() if error.numel() else 0.0
        assert worst <= tolerance, (
            f"{name}: error {worst:.3e} > {tolerance:.3e} (max {largest:.3e})"
        )


def names(method: str, prefix: str) -> list[str]:
    """The files of a method whose names begin with `prefix`; never none."""
    found = sorted(path.stem for path in (_ROOT / method).glob(f"{prefix}*.safetensors"))
    assert found, f"no golden file {prefix}*.safetensors in {_ROOT / method}"
    return found


def load(method: str, name: str) -> Golden:
    tensors, stored = {}, {}
    with safe_open(_ROOT / method / f"{name}.safetensors", "pt") as file:
        config = json.loads((file.metadata() or {}).get("config", "{}"))
        for key in file.keys():  # noqa: SIM118
            stored[key] = file.get_slice(key).get_dtype()
            tensor = file.get_tensor(key)
            tensors[key] = tensor.double() if tensor.is_floating_point() else tensor
    return Golden(tensors, stored, config)
