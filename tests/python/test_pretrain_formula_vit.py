"""The pretraining script: its images are reproducible, its classes real, and it resumes exactly."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def formula():
    sys.path.insert(0, str(EXAMPLES))
    import formula_images

    yield formula_images
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def pretrain(formula, monkeypatch):
    import pretrain_formula_vit as script

    monkeypatch.setitem(script.RECIPE, "stroke_classes", 4)
    monkeypatch.setitem(script.RECIPE, "other_classes", 1)
    monkeypatch.setitem(script.SHAPE, "depth", 1)
    monkeypatch.setattr(script, "digit_figures", lambda model: {})
    return script


def family_images(formula, family: str, seed: int) -> torch.Tensor:
    vigour = (0.5,) if family == "strokes" else ()
    return getattr(formula, family)(formula.Draw(seed), 6, 4, 32, *vigour)


@pytest.mark.parametrize("family", ["strokes", "contours", "fractals", "textures"])
def test_images_follow_from_the_seed_alone(formula, family):
    images = family_images(formula, family, seed=1)
    assert images.shape == (24, 3, 32, 32)
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, family_images(formula, family, seed=1))
    assert not torch.equal(images, family_images(formula, family, seed=2))


def test_strokes_of_a_class_resemble_each_other_more_than_strokes_of_others(formula):
    images = formula.strokes(formula.Draw(0), 40, 6, 32, 0.2)[:, 0].flatten(1)
    x = functional.normalize(images - images.mean(0), dim=-1)
    cosine = (x @ x.T).view(40, 6, 40, 6)
    own = cosine[range(40), :, range(40), :].mean()
    assert own > cosine.mean() + 0.3


def test_more_vigour_deforms_more(formula):
    def spread(vigour: float) -> float:
        images = formula.strokes(formula.Draw(0), 40, 6, 32, vigour)[:, 0].flatten(1)
        return images.view(40, 6, -1).std(1).mean().item()

    assert spread(1.0) > 1.1 * spread(0.2)


def test_a_stopped_run_continues_to_the_same_weights(pretrain, tmp_path, monkeypatch):
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    pretrain.train(whole, steps=4, seed=3, report=2)

    draw_batch, calls = pretrain.formula_batch, []

    def stopped(draw, vigour):
        calls.append(vigour)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return draw_batch(draw, vigour)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "formula_batch", stopped)
        with pytest.raises(KeyboardInterrupt):
            pretrain.train(resumed, steps=4, seed=3, report=2)
    assert not resumed.exists()
    pretrain.train(resumed, steps=4, seed=3, report=2)

    first, second = load_file(whole), load_file(resumed)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    assert [path.name for path in tmp_path.iterdir() if "resume." in path.name] == []


def test_progress_of_another_run_is_refused(pretrain, tmp_path, monkeypatch):
    def disk_full(*_):
        raise OSError("no space left")

    out = tmp_path / "vit.safetensors"
    monkeypatch.setattr(pretrain, "write_checkpoint", disk_full)
    with pytest.raises(OSError, match="no space"):
        pretrain.train(out, steps=2, seed=0, report=1)
    with pytest.raises(ValueError, match=r"\[pretrain\] expected .* got"):
        pretrain.train(out, steps=2, seed=1, report=1)
