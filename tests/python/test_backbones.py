"""Backbones: the table, how weights are found, and what is refused before it is run."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ntkcl.backbones as backbones
from ntkcl import _C, list_backbones
from ntkcl.backbones import DEFAULT_BACKBONE, Backbone, backbone_info, load_backbone, sha256_of

TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def embedded() -> dict[str, torch.Tensor]:
    return load_backbone(DEFAULT_BACKBONE).tensors


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = folder / "weights.safetensors"
    save_file(tensors, path)
    return path


def transformer(path: Path) -> _C.VisionTransformer:
    weights = load_backbone(DEFAULT_BACKBONE, path)
    return _C.VisionTransformer(weights.tensors, backbone_info(DEFAULT_BACKBONE).heads)


def test_the_embedded_backbone_is_what_the_table_says() -> None:
    info = backbone_info(DEFAULT_BACKBONE)
    vit = _C.VisionTransformer(embedded(), info.heads)
    assert (vit.width, vit.depth, vit.heads) == (info.width, info.depth, info.heads)
    assert (vit.patch_size, vit.image_size) == (info.patch_size, info.image_size)


@pytest.mark.parametrize("name", [n for n in list_backbones() if backbone_info(n).hub_id])
def test_the_table_agrees_with_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    info = backbone_info(name)
    published = timm.get_pretrained_cfg(name)
    assert (published.mean, published.std) == (info.mean, info.std)
    assert published.input_size == (3, info.image_size, info.image_size)
    assert published.hf_hub_id == info.hub_id
    with torch.device("meta"):
        model = timm.create_model(name.split(".")[0], num_classes=0)
    assert (model.embed_dim, len(model.blocks)) == (info.width, info.depth)
    assert model.blocks[0].attn.num_heads == info.heads
    assert model.patch_embed.patch_size == (info.patch_size, info.patch_size)


def test_real_weights_are_widened_and_lose_their_head(assets: Path) -> None:
    weights = load_backbone(TINY, assets / f"{TINY}.fp16.safetensors")
    assert {tensor.dtype for tensor in weights.tensors.values()} == {torch.float32}
    assert not [key for key in weights.tensors if key.startswith("head")]
    vit = _C.VisionTransformer(weights.tensors, backbone_info(TINY).heads, 112)
    assert (vit.image_size, vit.tokens) == (112, 50)


def test_half_precision_becomes_the_precision_asked_for(tmp_path: Path) -> None:
    halves = {key: tensor.half() for key, tensor in embedded().items()}
    weights = load_backbone(DEFAULT_BACKBONE, saved(tmp_path, halves), dtype=torch.float64)
    for key, tensor in weights.tensors.items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, halves[key].double(), rtol=0, atol=0)


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, embedded())
    before = load_backbone(DEFAULT_BACKBONE, path).sha256
    changed = embedded()
    changed["norm.bias"] += 1
    assert load_backbone(DEFAULT_BACKBONE, saved(tmp_path, changed)).sha256 != before
    path.write_bytes(b"abc")
    assert sha256_of(path).startswith("ba7816bf8f01cfea")  # FIPS 180-2, appendix B.1


# ---- what is refused -----------------------------------------------------------------------------


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'vit_base_patch16_224\.augreg_in21k'"):
        backbone_info("vit_base_patch16_224.augreg_in21")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"\[weights\].*no\.safetensors"):
        load_backbone(DEFAULT_BACKBONE, tmp_path / "no.safetensors")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, suffix: str) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (ran,))

    path = tmp_path / f"weights{suffix}"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="pickled weights are not read"):
        load_backbone(DEFAULT_BACKBONE, path)
    assert not ran.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.safetensors' is not a safetensors file"):
        load_backbone(DEFAULT_BACKBONE, path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, embedded())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_backbone(DEFAULT_BACKBONE, path)


def test_missing_unexpected_and_misshapen_keys_are_listed(tmp_path: Path) -> None:
    tensors = embedded()
    del tensors["blocks.1.attn.qkv.bias"]
    tensors["stranger"] = torch.zeros(1)
    tensors["norm.weight"] = torch.zeros(5)
    with pytest.raises(ValueError) as caught:
        transformer(saved(tmp_path, tensors))
    message = str(caught.value)
    assert "missing: blocks.1.attn.qkv.bias" in message
    assert "unexpected: stranger" in message
    assert "norm.weight" in message


def test_weights_of_another_size_are_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path, embedded())
    with pytest.raises(ValueError) as caught:
        load_backbone(TINY, path)
    assert "expected 12 blocks of width 192 with patches of 16 pixels" in str(caught.value)
    assert "got 6 blocks of width 96 with patches of 8 pixels" in str(caught.value)


def test_without_a_network_the_error_says_how_to_get_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(FileNotFoundError) as caught:
        load_backbone(TINY)
    assert f"hf download timm/{TINY} model.safetensors" in str(caught.value)
    assert "weights=" in str(caught.value)


def test_the_hub_file_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    path = saved(tmp_path, embedded())
    asked = []

    def cached(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(path)

    hub = Backbone("small", 96, 6, 3, patch_size=8, image_size=32, hub_id="somebody/small")
    monkeypatch.setitem(backbones._BACKBONES, "small", hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    assert load_backbone("small").path == path
    assert asked == [("somebody/small", "model.safetensors")]
