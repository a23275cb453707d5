"""The published settings are what the specifications list."""

import pytest

from ntkcl import list_backbones, list_presets
from ntkcl.config import resolve
from ntkcl.presets import PUBLISHED, PUBLISHED_TASK_MEANS

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
    lorac = {f"lorac-ipc/{name}" for name in LORAC}
    raa = {f"raa/{dataset}-in21k" for dataset in RAA}
    assert set(list_presets()) == names | lorac | raa
    assert names | raa == set(PUBLISHED) | {"raa/vtab-in21k"}  # published for all but VTAB
    assert set(PUBLISHED_TASK_MEANS) <= lorac
    assert all(average > final for average, final in PUBLISHED.values())
    assert PUBLISHED["ntk-cl/cifar100-in21k"] == (93.76, 90.27)
    assert set(WEIGHTS.values()) <= set(list_backbones())


# Of section 10 of the LoRAC-IPC specification, learning rates as the release is called with:
# weights, tasks of so many classes, placement, r, E, lr, first lr, lambda, omega scale, IPC,
# clusters for task inference (none without sections 6 and 7).
ORIG, AUGREG, MOCO = (
    f"vit_base_patch16_224.{tag}" for tag in ("orig_in21k", "augreg_in21k", "mocov3_in1k")
)
LORAC = {
    "cifar100-orig-in21k": (ORIG, 10, "all", 32, 20, 0.02, 0.01, 1, 0.1, 0.05, 4),
    "cifar100-orig-in21k-lorac": (ORIG, 10, "all", 16, 20, 0.02, 0.01, 10, 0.1, 0, 4),
    "cifar100-in21k": (AUGREG, 10, "all", 16, 10, 0.006, 0, 0.5, 1, 0.05, 4),
    "cifar100-moco": (MOCO, 10, "all", 16, 20, 0.003, 0.01, 0.1, 1, 0.05, 4),
    "cifar100-moco-lorac": (MOCO, 10, "all", 16, 20, 0.01, 0, 1, 1, 0, 4),
    "imagenet-r-orig-in21k": (ORIG, 20, "all", 32, 50, 0.01, 0, 1, 0.1, 0.05, 2),
    "imagenet-r-orig-in21k-qkvo": (ORIG, 20, "qkvo", 48, 50, 0.01, 0, 0.1, 0.5, 0.05, 2),
    "imagenet-r-in21k": (AUGREG, 20, "all", 32, 50, 0.006, 0, 1, 1, 0.05, 2),
    "imagenet-r-moco": (MOCO, 20, "all", 16, 20, 0.005, 0.01, 0.1, 1, 0.05, 2),
    "imagenet-r-moco-lorac": (MOCO, 20, "all", 16, 20, 0.01, 0.01, 1, 1, 0, 2),
    "domainnet-in21k": (AUGREG, 69, "qkvo", 64, 50, 0.006, 0, 0.5, 1, 0.05, None),
    "5-datasets-orig-in21k": (ORIG, 10, "qkvo", 4, 5, 0.01, 0, 10, 0.1, 0.05, 4),
    "5-datasets-orig-in21k-plain": (ORIG, 10, "qkvo", 8, 5, 0.01, 0, 1, 1, 0.1, None),
}


@pytest.mark.parametrize("name", LORAC)
def test_a_preset_of_lorac_resolves_to_the_published_settings(name: str) -> None:
    weights, classes, *settings, clusters = LORAC[name]
    c = resolve({"preset": f"lorac-ipc/{name}"})
    o = c.lorac_ipc
    assert [
        *(o.placement, o.rank, c.epochs, pytest.approx(c.learning_rate * 256 / 64)),
        *(c.initial_learning_rate, o.model_dump()["lambda"], o.omega_lr_factor, o.ipc_threshold),
    ] == settings
    assert (c.backbone, c.initial_classes, c.increment) == (weights, classes, classes)
    assert (c.method, c.variant, c.class_order) == ("lorac-ipc", "release", "natural")
    assert (c.batch_size, c.optimizer, c.weight_decay) == (128, "adam", 0)
    assert (c.schedule, c.hold_epochs, c.min_learning_rate) == ("cosine", 1, 1e-5)
    assert (o.inference, o.alignment) == (
        ("none", False) if clusters is None else ("per_image", True)
    )
    assert clusters is None or o.inference_clusters == clusters
    assert (o.alignment_clusters, o.alignment_epochs, o.alignment_learning_rate) == (10, 50, 0.005)
    assert o.moco_norm == ("new" if weights == MOCO else "pretrained")
    assert c.transform == ("cifar" if name.startswith("cifar100-orig") else "inception")
    assert (c.normalize == "none") == (not name.startswith("cifar100-orig"))


# Of section 6 of the RAA specification: classes of a task, epochs, rho, margin.
RAA = {
    "cifar100": (10, 10, 0.01, 0),
    "imagenet-r": (20, 10, 0.1, 0),
    "imagenet-a": (20, 10, 0.1, 0.3),
    "cub": (20, 10, 0.1, 0),
    "cars": (20, 10, 0.05, 0.3),
    "vtab": (10, 15, 0.01, 0.3),
}


@pytest.mark.parametrize("dataset", RAA)
def test_a_preset_of_raa_resolves_to_the_published_settings(dataset: str) -> None:
    c = resolve({"preset": f"raa/{dataset}-in21k"})
    o = c.raa
    assert (c.initial_classes, c.epochs, c.rho, o.margin) == RAA[dataset]
    assert (c.increment, c.initial_epochs) == (c.initial_classes, 20)
    assert (c.method, c.variant, c.dataset, c.backbone) == ("raa", "release", dataset, AUGREG)
    assert (c.batch_size, c.learning_rate, c.momentum, c.weight_decay) == (48, 0.01, 0.9, 5e-4)
    assert (c.optimizer, c.gamma, c.tau, c.schedule) == ("sam+", "tensor", 25, "cosine")
    assert (c.seed, c.class_order) == (1993, "natural" if dataset == "vtab" else "seed")
    assert (c.transform == "cars") == (dataset == "cars") == (c.normalize != "none")
    assert (o.n_adapters, o.rank, o.scale, o.adapter_dropout) == (2, 64, 0.1, 0.1)
    assert (o.branch_loss_weight, o.logit_scale, o.alpha) == (2, 20, "uniform_norm")
    assert (o.alignment_epochs, o.alignment_samples, o.alignment_learning_rate) == (5, 256, 0.01)
    assert (o.amalgamation, o.drift, o.kappa, o.stale_gradient, o.share_noise) == (
        *("code", "unpaired", "release"),
        *(True, False),
    )
