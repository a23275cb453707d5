"""The vision transformer that ships in the package: its file and what its features are worth."""

import json
import struct
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional

from ntkcl import _C
from ntkcl.datasets import load_dataset
from reference_vit import expected_shapes, reference_features

ROOT = Path(__file__).parents[2]
ASSET = ROOT / "python" / "ntkcl" / "assets" / "vit_formula_patch8_32.safetensors"
NUMBERS = ("image_size", "patch_size", "width", "depth", "heads")

# Nearest class mean on five held-out fifths of the training digits. The network reaches the figure
# in docs/embedded_backbone.md; nearest class mean on the pixels themselves reaches 90.
NEAREST_CLASS_MEAN_FLOOR = 95.0


@pytest.fixture(scope="module")
def metadata() -> dict[str, object]:
    with safe_open(ASSET, "pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items()}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    with safe_open(ASSET, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_file_stays_within_two_megabytes():
    assert ASSET.stat().st_size <= 2_000_000


def test_file_is_a_json_header_and_tensor_bytes_and_nothing_else():
    """No pickle can hide in it: header and tensors account for every byte of the file."""
    content = ASSET.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    spans = sorted(tensor["data_offsets"] for tensor in header.values())
    assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert 8 + length + spans[-1][1] == len(content)


def test_keys_and_shapes_are_those_of_a_headless_timm_transformer(metadata, weights):
    size, patch, width, depth, heads = (metadata[key] for key in NUMBERS)
    assert size % patch == 0
    assert width % heads == 0 and (width // heads) % 8 == 0
    expected = expected_shapes(width, depth, 1 + (size // patch) ** 2, patch)
    assert {key: tuple(value.shape) for key, value in weights.items()} == expected


def test_tensors_are_finite_half_precision(weights):
    for key, value in weights.items():
        assert value.dtype == torch.float16, key
        assert value.isfinite().all(), key


def test_metadata_tells_how_to_prepare_images_and_how_the_file_was_made(metadata):
    assert metadata["mean"] == metadata["std"] == [0.5, 0.5, 0.5]
    assert isinstance(metadata["seed"], int)
    assert metadata["recipe"]["steps"] > 0 and metadata["recipe"]["images"] > 0
    assert metadata["figures"].keys() == {"nearest_class_mean", "linear_probe"}


def test_timm_computes_the_same_features(metadata, weights):
    """The key names mean in timm what they mean here."""
    timm = pytest.importorskip("timm")
    size, patch, width, depth, heads = (metadata[key] for key in NUMBERS)
    model = timm.models.VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads,
        num_classes=0, global_pool="token",
    )  # fmt: skip
    double = {key: value.double() for key, value in weights.items()}
    model.load_state_dict(double)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, size, size, dtype=torch.double, generator=generator)
    with torch.no_grad():
        expected = model.double().eval()(images)
    torch.testing.assert_close(reference_features(double, images, heads), expected)


def test_features_of_unseen_digits_lie_nearest_to_their_class_mean(metadata, weights):
    images, labels = training_digits(metadata["image_size"])
    single = {key: value.float() for key, value in weights.items()}
    x = functional.normalize(reference_features(single, images, metadata["heads"]), dim=-1)
    accuracy = held_out_nearest_class_mean(x, labels)
    assert accuracy >= NEAREST_CLASS_MEAN_FLOOR
    assert accuracy == pytest.approx(metadata["figures"]["nearest_class_mean"], abs=0.5)


def training_digits(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The training images of the default data set, in [-1, 1]; sorted by class."""
    store = load_dataset("digits").train
    view = _C.Transform("resize", size)
    images = numpy.stack([view.test(store.load(index)) for index in range(len(store))])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    return (pixels - 0.5) / 0.5, torch.tensor(store.labels)


def held_out_nearest_class_mean(x: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent of each fifth that lies nearest, by cosine, to its mean over the other fifths."""
    fold = torch.arange(len(labels)) % 5
    hits = 0
    for held in range(5):
        fit = fold != held
        means = torch.stack([x[fit & (labels == c)].mean(0) for c in range(10)])
        scores = x[~fit] @ functional.normalize(means, dim=-1).T
        hits += (scores.argmax(1) == labels[~fit]).sum().item()
    return 100 * hits / len(labels)
