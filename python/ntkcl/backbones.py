"""Backbones: what each needs beside its weights, and how its weights are found and read.

Weights are safetensors files under timm's key names; pickled files are refused, as reading them
runs code.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ntkcl.names import did_you_mean, shown

DEFAULT_BACKBONE = "vit_formula_patch8_32"
_HALF = (0.5, 0.5, 0.5)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Backbone:
    """A pre-LN vision transformer in timm's layout and the preprocessing of its pretraining."""

    name: str  # timm's, with the tag of the weights
    width: int
    depth: int
    heads: int
    patch_size: int = 16
    image_size: int = 224  # of the pretraining, pixels
    mean: tuple[float, float, float] = _HALF  # of pixels in [0, 1], as pretrained
    std: tuple[float, float, float] = _HALF
    hub_id: str | None = None  # repository on the Hugging Face hub
    asset: str | None = None  # file in the package's folder `assets`


@dataclass(frozen=True)
class Weights:
    """Tensors of a backbone under timm's key names, and the file they came from."""

    tensors: dict[str, torch.Tensor]
    path: Path
    sha256: str


def _vit(size: str, tag: str) -> Backbone:
    width, depth, heads = {
        "tiny": (192, 12, 3),
        "small": (384, 12, 6),
        "base": (768, 12, 12),
        "large": (1024, 24, 16),
    }[size]
    name = f"vit_{size}_patch16_224.{tag}"
    return Backbone(name, width, depth, heads, hub_id=f"timm/{name}")


_BACKBONES = {
    backbone.name: backbone
    for backbone in (
        Backbone(
            DEFAULT_BACKBONE,
            width=96,
            depth=6,
            heads=3,
            patch_size=8,
            image_size=32,
            asset=f"{DEFAULT_BACKBONE}.safetensors",
        ),
        _vit("tiny", "augreg_in21k"),
        _vit("tiny", "augreg_in21k_ft_in1k"),
        _vit("small", "augreg_in21k"),
        _vit("small", "augreg_in21k_ft_in1k"),
        _vit("base", "augreg_in21k"),
        _vit("base", "augreg_in21k_ft_in1k"),
        _vit("base", "orig_in21k"),
        # MoCo v3 of 300 epochs, from a file: Chen et al., arXiv 2104.02057.
        Backbone(
            "vit_base_patch16_224.mocov3_in1k", 768, 12, 12, mean=_IMAGENET[0], std=_IMAGENET[1]
        ),
        _vit("large", "augreg_in21k"),
        _vit("large", "augreg_in21k_ft_in1k"),
    )
}


def list_backbones() -> list[str]:
    """Names of the backbones, the embedded one first."""
    return list(_BACKBONES)


def backbone_info(name: str) -> Backbone:
    """What is known of a backbone; ValueError with the nearest name where it is unknown."""
    if name not in _BACKBONES:
        raise ValueError(
            f"[backbone] expected one of: {', '.join(_BACKBONES)}, got '{name}'"
            + did_you_mean(name, _BACKBONES)
        )
    return _BACKBONES[name]


def load_backbone(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Weights:
    """Reads the weights of a backbone for `_C.VisionTransformer`, which checks keys and shapes.

    Args:
      name: one of `list_backbones()`.
      weights: safetensors file; None: the package's own or the Hugging Face hub's cache.
      dtype: torch.float32 or torch.float64; what is stored as half precision is widened.

    Raises:
      FileNotFoundError: no such file, or not in the cache and the hub cannot be reached.
      ValueError: not a safetensors file, or the weights of a transformer of another size.
    """
    info = backbone_info(name)
    path = _find(info) if weights is None else _given(weights)
    read = remap_keys(_read(path))
    if wrong := [key for key, tensor in read.items() if not tensor.is_floating_point()]:
        raise ValueError(
            f"[weights] {shown(wrong[0])}: expected a floating point tensor, got "
            f"{read[wrong[0]].dtype} in '{path}'"
        )
    tensors = {key: tensor.to(dtype) for key, tensor in read.items()}
    _check_size(info, tensors, path)
    return Weights(tensors, path, sha256_of(path))


def remap_keys(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published key names as the core knows them: timm's, without the classifier `head.*`."""
    return {key: tensor for key, tensor in tensors.items() if not key.startswith("head.")}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _given(weights: str | os.PathLike[str]) -> Path:
    path = Path(weights).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"[weights] expected a safetensors file, got '{path}': no such file"
        )
    return path


def _find(info: Backbone) -> Path:
    if info.asset is not None:
        path = Path(__file__).parent / "assets" / info.asset
        if not path.is_file():
            raise FileNotFoundError(f"[weights] '{path}' is missing from the installation of ntkcl")
        return path
    if info.hub_id is None:
        raise FileNotFoundError(
            f"[weights] '{info.name}' is on no hub under timm's key names: give "
            "weights=<safetensors file>"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(info.hub_id, "model.safetensors"))
    except Exception as error:
        raise FileNotFoundError(
            f"[weights] '{info.name}' is not in the Hugging Face hub's cache and cannot be "
            f"downloaded ({type(error).__name__}). Where there is a network, run "
            f"`hf download {info.hub_id} model.safetensors`, or give weights=<safetensors file>"
        ) from error


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt", ".pkl"):
        raise ValueError(
            f"[weights] expected a safetensors file, got '{path}': pickled weights are not read, "
            "as that runs code; convert them with safetensors.torch.save_file"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"[weights] '{path}' is not a safetensors file: {error!s:.200}") from None


def _check_size(info: Backbone, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """The number of heads comes with the name and cannot be read from the tensors: a file of
    another size would run with the wrong one."""
    patch = tensors.get("patch_embed.proj.weight")
    blocks = {key.split(".")[1] for key in tensors if key.startswith("blocks.")}
    if patch is None or patch.dim() != 4:
        return  # the core says what is missing
    got = (patch.shape[0], len(blocks), patch.shape[-1])
    expected = (info.width, info.depth, info.patch_size)
    if got != expected:
        raise ValueError(
            f"[weights] expected {_size_text(*expected)} for '{info.name}', "
            f"got {_size_text(*got)} in '{path}'"
        )


def _size_text(width: int, depth: int, patch: int) -> str:
    return f"{depth} blocks of width {width} with patches of {patch} pixels"
