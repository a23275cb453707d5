"""The published settings are what section 6 of the NTK-CL specification lists."""

import pytest

from ntkcl import list_backbones, list_presets
from ntkcl.config import resolve
from ntkcl.presets import PUBLISHED

# data set: first classes, increment, learning rate, batch, epochs, weight decay, eta, plain feature
SETTINGS = {
    "cifar100": (10, 10, 0.025, 16, 20, 5e-4, 0.03, False),
    "imagenet-r": (20, 20, 0.02, 16, 20, 5e-3, 0.2, False),
    "imagenet-a": (20, 20, 0.02, 16, 20, 5e-3, 0.2, False),
    "domainnet": (23, 23, 0.02, 96, 50, 5e-3, 0.2, False),
    "oxford-pets": (7, 5, 0.02, 96, 5, 5e-3, 0.2, True),
    "eurosat": (2, 2, 1e-4, 96, 5, 5e-3, 0.2, True),
    "plantvillage": (3, 3, 5e-3, 96, 5, 5e-3, 0.2, True),
    "vtab": (10, 10, 0.03, 96, 45, 5e-3, 0.2, True),
    "kvasir": (2, 2, 5e-3, 96, 5, 5e-3, 0.2, True),
}
WEIGHTS = {
    "in21k": "vit_base_patch16_224.augreg_in21k",
    "in1k": "vit_base_patch16_224.augreg_in21k_ft_in1k",
}


@pytest.mark.parametrize("tag", WEIGHTS)
@pytest.mark.parametrize("dataset", SETTINGS)
def test_a_preset_resolves_to_the_published_settings(dataset: str, tag: str) -> None:
    c = resolve({"preset": f"ntk-cl/{dataset}-{tag}"})
    assert (
        *(c.initial_classes, c.increment, c.learning_rate, c.batch_size, c.epochs, c.weight_decay),
        *(c.ntk_cl.eta, c.ntk_cl.pretrained_feature),
    ) == SETTINGS[dataset]
    assert (c.method, c.variant, c.dataset) == ("ntk-cl", "release", dataset)
    assert c.backbone == WEIGHTS[tag]
    assert (c.optimizer, c.momentum, c.schedule, c.min_learning_rate) == ("sgd", 0.9, "cosine", 0)
    assert (c.transform, c.image_size, c.normalize, c.class_order) == (
        *("inception", 224),
        *("none", "seed"),
    )
    special = c.ntk_cl
    assert (special.upsilon, special.rank, special.prompt_tokens) == (1e-4, 16, 10)
    assert (special.frozen_lists, special.mode) == (1, "both")
    assert special.model_dump()["lambda"] == 1e-3


def test_every_preset_has_its_published_accuracies_and_nothing_else_is_listed() -> None:
    names = {f"ntk-cl/{dataset}-{tag}" for dataset in SETTINGS for tag in WEIGHTS}
    assert set(list_presets()) == names == set(PUBLISHED)
    assert all(average > final for average, final in PUBLISHED.values())
    assert PUBLISHED["ntk-cl/cifar100-in21k"] == (93.76, 90.27)
    assert set(WEIGHTS.values()) <= set(list_backbones())
