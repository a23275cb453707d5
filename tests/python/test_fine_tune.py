"""Sequential fine-tuning against plain PyTorch, and the joint training that is built on it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import ntkcl
from ntkcl import _C
from ntkcl.backbones import DEFAULT_BACKBONE, backbone_info, load_backbone
from reference_vit import adapted_features, prompted_features, reference_features, with_lora
from test_raa import backbone, task_images
from test_training import CLASSES, TRAIN, events, images_of, same_bits, train

KINDS = ["adapter", "lora", "prompts"]
SMALL = {"rank": 4, "scale": 0.5}


def session(
    options: dict[str, Any], method: str = "fine-tune", **keywords: Any
) -> _C.MethodSession:
    keys = {"precision": "float64", "optimizer": "sgd"}
    return _C.MethodSession(method, SMALL | options, backbone(), 3, keys, **keywords)


def begin(method: _C.MethodSession, task: int) -> tuple[Tensor, Tensor]:
    images, labels = task_images(task)
    method.begin_task(task, 2 * task, 2, 2, 16, images, labels, classes=CLASSES)
    return images, labels


def learn(method: _C.MethodSession, tasks: int, rate: float = 0.05, steps: int = 2) -> None:
    for task in range(tasks):
        images, labels = begin(method, task)
        for _ in range(steps):
            method.step(images, labels, rate)
        method.run_stages()


def modules_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[5:]: tensor for name, tensor in state.items() if name.startswith("peft.")}


def features_by(kind: str, modules: dict[str, Tensor], images: Tensor) -> Tensor:
    """Plain PyTorch, float64."""
    weights = {k: t.double() for k, t in load_backbone(DEFAULT_BACKBONE).tensors.items()}
    heads = backbone_info(DEFAULT_BACKBONE).heads
    if kind == "adapter":
        return adapted_features(weights, images, heads, modules, SMALL["scale"])
    if kind == "prompts":
        return prompted_features(weights, images, heads, modules, SMALL["scale"])
    return reference_features(with_lora(weights, modules), images, heads)


def logits_by(head: str, scale: float, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if head == "linear":
        return features @ weight.T + bias
    return scale * functional.normalize(features) @ functional.normalize(weight).T


def gradients_by_name(kind: str, found: list[Tensor]) -> dict[str, Tensor]:
    """The gradients of a step, under the names of the state."""
    names = {
        "adapter": ["down.weight", "down.bias", "up.weight", "up.bias"],
        "lora": [f"{g}.{half}" for g in ("attention", "fc1", "fc2") for half in ("down", "up")],
        "prompts": ["mix.weight", "mix.bias", "norm.weight", "norm.bias", "gate"],
    }[kind]
    own = {
        f"peft.{block}.{name}": gradient
        for name, stacked in zip(names, found, strict=False)
        for block, gradient in enumerate(stacked)
    }
    heads = found[len(names) :]
    return own | dict(zip(["head.weight", "head.bias"], heads, strict=False))


def has_no_effect(kind: str, name: str) -> bool:
    """The bias that the LayerNorm of prompts takes away; the gate of the first block, which has no
    prompts yet; the last block's prompts, which nothing reads."""
    last = (
        len([key for key in load_backbone(DEFAULT_BACKBONE).tensors if "norm1.weight" in key]) - 1
    )
    unread = (f"peft.{last}.mix", f"peft.{last}.norm")
    return kind == "prompts" and (
        name.endswith("mix.bias") or name == "peft.0.gate" or name.startswith(unread)
    )


@pytest.mark.parametrize("loss", ["seen", "task"])
@pytest.mark.parametrize("head", ["linear", "cosine"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_later_step_equals_plain_pytorch(kind: str, head: str, loss: str) -> None:
    # Protects: features, the loss and its classes, the gradient of every parameter.
    method = session({"peft": kind, "head": head, "loss": loss, "logit_scale": 7.0})
    learn(method, 1)
    images, labels = begin(method, 1)
    state = method.state()
    step = method.step(images, labels, 0.0)

    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    features = features_by(kind, modules_of(leaves), images)
    first = 0 if loss == "seen" else 2
    weight, bias = leaves["head.weight"], leaves["head.bias"]
    logits = logits_by(head, 7.0, features, weight[first:], bias[first:])
    expected = functional.cross_entropy(logits, labels - first)
    expected.backward()

    torch.testing.assert_close(method.features(images)["features"], features.detach())
    everything = logits_by(head, 7.0, features, weight, bias).detach()
    torch.testing.assert_close(method.scores(images), everything)
    assert everything.shape == (len(images), 4)
    assert step["losses"]["total"] == pytest.approx(expected.item(), rel=1e-10)
    found = gradients_by_name(kind, step["gradients"])
    assert set(found) == set(leaves) - ({"head.bias"} if head == "cosine" else set())
    for name, gradient in found.items():
        if has_no_effect(kind, name):
            assert not gradient.any(), name
            continue
        reference = leaves[name].grad
        assert reference is not None
        reference = reference[first:] if name.startswith("head.") else reference
        assert reference.abs().max() > 0, name
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("loss", ["seen", "task"])
def test_the_loss_over_the_task_alone_leaves_old_rows_as_they_are(loss: str) -> None:
    method = session({"loss": loss})
    learn(method, 1)
    before = method.state()["head.weight"]
    images, labels = begin(method, 1)
    method.step(images, labels, 0.05)
    rows = method.state()["head.weight"]
    assert torch.equal(rows[:2], before) == (loss == "task")


@pytest.mark.parametrize("kind", KINDS)
def test_before_a_step_the_backbone_is_as_it_was(kind: str) -> None:
    method = session({"peft": kind})
    images, _ = begin(method, 0)
    weights = {k: t.double() for k, t in load_backbone(DEFAULT_BACKBONE).tensors.items()}
    plain = reference_features(weights, images, backbone_info(DEFAULT_BACKBONE).heads)
    torch.testing.assert_close(method.features(images)["features"], plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_loads_into_a_fresh_method(kind: str) -> None:
    method = session({"peft": kind})
    learn(method, 2)
    fresh = session({"peft": kind})
    fresh.load_state(method.state())
    images, _ = task_images(0)
    assert torch.equal(fresh.scores(images), method.scores(images))
    module = {"adapter": "0.down.weight", "lora": "1.fc1.up", "prompts": "1.mix.weight"}[kind]
    for name, change, message in [
        (f"peft.{module}", lambda t: t[..., 1:], rf"peft\.{module}: expected \["),
        ("head.weight", lambda t: t[:, 1:], r"head\.\*: expected weight \(classes, 96\)"),
        ("head.weight", lambda t: t[0], r"head\.\*: expected weight"),
        ("head.bias", lambda t: t[1:], r"head\.\*: expected weight"),
    ]:
        broken = method.state()
        broken[name] = change(broken[name])
        with pytest.raises(ValueError, match=rf"\[state\] {message}"):
            session({"peft": kind}).load_state(broken)
    with pytest.raises(ValueError, match=r"\[state\] head: expected the 4 classes learned before"):
        begin(session({"peft": kind}), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft": "prefix"}, "'peft': expected one of: adapter, lora, prompts, got 'prefix'"),
        ({"peft": "lora", "rank": 97}, r"\[lora\] 'rank': expected 1 to .* 96, got 97"),
        ({"rank": 0}, "'rank': expected >= 1, got 0"),
        ({"head": "none"}, "'head': expected one of: linear, cosine, got 'none'"),
        ({"logit_scale": 0.0}, "'logit_scale': expected > 0, got 0"),
        ({"loss": "all"}, "'loss': expected one of: seen, task, got 'all'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        session(options)


# ---- joint ---------------------------------------------------------------------------------------


def test_joint_trains_on_the_images_of_all_classes_seen(tmp_path: Path) -> None:
    # Protects: an upper and a lower bound that are such.
    keys = {"class_order": "natural", "learning_rate": 0.001, "epochs": 6}
    result = train(tmp_path / "joint", method="joint", **keys)
    begun = events(result.output, "task_begin")
    assert [event["train_images"] for event in begun] == [2 * TRAIN, 4 * TRAIN, 6 * TRAIN]
    assert [event["classes"] for event in begun] == [[0, 1], [2, 3], [4, 5]]
    images: dict[int, int] = {}
    for event in events(result.output, "step"):
        images[event["task"]] = images.get(event["task"], 0) + event["images"]
    assert images == {task: 6 * 2 * TRAIN * (task + 1) for task in range(3)}
    forgetting = train(tmp_path / "fine-tune", method="fine-tune", **keys)
    assert forgetting.accuracy_matrix[1, 1] > 80 > 20 > forgetting.accuracy_matrix[2, 1]
    assert result.final_accuracy > forgetting.final_accuracy + 15
    assert "caution" not in forgetting.headline()
    assert "keeps the images of all tasks" in result.headline()["caution"]


def test_joint_begins_every_task_anew() -> None:
    # Protects: nothing of the training before is left but the images.
    trained, fresh = (session({"peft": "lora"}, "joint") for _ in range(2))
    learn(trained, 2)
    begin(trained, 2)
    begin(fresh, 2)
    assert same_bits(trained.state(), fresh.state())
    assert trained.state()["head.weight"].shape == (6, 96)


def test_joint_does_not_go_on_without_the_old_images(tmp_path: Path) -> None:
    run = train(tmp_path / "run", method="joint").output
    images, _ = images_of(1, TRAIN, np.random.default_rng(0))
    model = ntkcl.load(run)
    message = rf"\[add_task\] class '{model.classes[0]}': expected its training images, which this"
    with pytest.raises(ValueError, match=message):
        model.add_task({"new": images})


def test_joint_is_fine_tuning_in_the_first_task() -> None:
    one, other = session({}), session({}, "joint")
    for method in (one, other):
        learn(method, 1)
    assert same_bits(one.state(), other.state())
