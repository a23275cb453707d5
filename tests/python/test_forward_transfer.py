"""Forward transfer: what the features learned so far are worth for classes to come."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import dataset_of

import ntkcl
from test_training import dataset, events, predictions, same_bits, state, train

METHODS = ["simple-cil", "ntk-cl", "lorac-ipc", "raa", "ranpac", "ease", "fine-tune", "joint"]


def keys_of(method: str, **keywords: Any) -> dict[str, Any]:
    own = {"ranpac": {"projection": 64}} if method == "ranpac" else {}
    return {"class_order": "natural", "precision": "float64", "method": method} | own | keywords


def part(data: dict[str, Any], classes: range) -> dict[str, Any]:
    kept = {name: np.isin(labels, classes) for name, (_, labels) in data.items()}
    return {name: (x[kept[name]], y[kept[name]]) for name, (x, y) in data.items()}


def nearest_mean_accuracy(model: ntkcl.Model, data: dict[str, Any]) -> float:
    """By cosines with the classes' mean features."""
    (train_images, train_labels), (test_images, test_labels) = data["train"], data["test"]
    features, tested = model.features(train_images), model.features(test_images)
    classes = np.unique(train_labels)
    means = np.stack([features[train_labels == c].mean(0) for c in classes])
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (tested, means)]
    nearest = classes[(unit[0] @ unit[1].T).argmax(1)]
    return float(100 * np.mean(nearest == test_labels))


@pytest.mark.parametrize("method", METHODS)
def test_it_is_that_of_the_models_before_each_task(tmp_path: Path, method: str) -> None:
    keywords = keys_of(method, learning_rate=0.01)
    data = dataset()
    result = train(tmp_path / "run", data, forward_transfer=True, **keywords)
    plain = train(tmp_path / "plain", part(data, range(2)), **keys_of("simple-cil"))
    told = events(result.output, "forward_transfer")
    assert [event["task"] for event in told] == [1, 2]
    gains = []
    for event in told:
        finished, classes = (
            range(2 * event["task"]),
            range(2 * event["task"], 2 * event["task"] + 2),
        )
        # Two classes of the same run, learned first, and then asked for features of others.
        before = train(tmp_path / f"of-{len(finished)}", part(data, finished), **keywords)
        images = part(data, classes)
        learned = nearest_mean_accuracy(ntkcl.load(before.output), images)
        pretrained = nearest_mean_accuracy(ntkcl.load(plain.output), images)
        assert event["pretrained"] == pytest.approx(pretrained)
        if method != "ntk-cl":  # which averages its modules after every task but a run's last
            assert event["learned"] == pytest.approx(learned)
        gains.append(event["learned"] - event["pretrained"])
    assert result.forward_transfer == pytest.approx(np.mean(gains))
    stored = json.loads((result.output / "result.json").read_text())
    assert stored["forward_transfer"] == result.forward_transfer
    if method == "simple-cil":
        assert gains == [0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_it_changes_no_result(tmp_path: Path, method: str) -> None:
    keywords = keys_of(method, transform="inception", precision="auto")
    one, other = (
        train(tmp_path / str(on), forward_transfer=on, **keywords) for on in (False, True)
    )
    assert same_bits(state(one), state(other))
    assert same_bits(predictions(one), predictions(other))
    assert math.isnan(one.forward_transfer)
    assert not events(one.output, "forward_transfer")


def test_one_task_has_none(tmp_path: Path) -> None:
    result = train(tmp_path / "run", method="simple-cil", initial_classes=6, forward_transfer=True)
    assert math.isnan(result.forward_transfer)


def test_a_class_whose_images_are_all_corrupt_is_named(tmp_path: Path) -> None:
    folder = dataset_of("corrupt", tmp_path / "images")
    for file in (folder / "train" / "class3").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"expected an image of every class, got none of class 3"):
        ntkcl.train(
            dataset=folder,
            output=tmp_path / "run",
            **(keys_of("simple-cil") | {"on_corrupt": "skip", "forward_transfer": True}),
            **{"initial_classes": 2, "increment": 2, "image_size": 32, "device": "cpu"},
            progress=False,
        )
