"""The run folder: written whole or not at all, never over another run, and what was finished stays
when a run fails. Where a test says when to fail, the task loop is a stand-in."""

import inspect
import itertools
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import fake_core
import ntkcl
from ntkcl import _C
from ntkcl.backbones import DEFAULT_BACKBONE, load_backbone
from ntkcl.cli import main
from ntkcl.config import options, resolve
from ntkcl.runfolder import RunFolder, write_atomically

FILES = {
    "config.toml",
    "environment.json",
    "events.jsonl",
    "accuracy_matrix.csv",
    "result.json",
    "predictions.safetensors",
    "state.safetensors",
    "model.json",
    "accuracy.png",
}


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> type[fake_core.FakeTrainer]:
    """The stand-in for the task loop: three tasks of known accuracies."""
    fake = type("Fake", (fake_core.FakeTrainer,), {})
    monkeypatch.setattr(_C, "Trainer", fake)
    return fake


def train(output: Path, **keywords: Any) -> ntkcl.Result:
    return ntkcl.train(output=output, progress=False, **keywords)


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(words)
    return int(stop.value.code or 0)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- what a run leaves ---------------------------------------------------------------------------


def test_a_run_of_the_real_core_leaves_every_file(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b"
    result = train(output, train_per_class=4, test_per_class=3, epochs=1, seed=3)
    assert names(output) == FILES
    assert result.output == output

    stored = json.loads((output / "result.json").read_text())
    assert stored["final_accuracy"] == result.final_accuracy
    assert stored["accuracy_matrix"][0][1] is None
    assert stored["accuracy_matrix"][4][4] == result.accuracy_matrix[4, 4]
    matrix = np.genfromtxt(output / "accuracy_matrix.csv", delimiter=",")
    np.testing.assert_array_equal(matrix, result.accuracy_matrix)
    assert np.isnan(matrix[0, 1])

    assert resolve({}, output / "config.toml") == result.config
    kinds = [event["event"] for event in events(output)]
    assert kinds[0] == "run_begin"
    assert [kinds.count(kind) for kind in ("task_begin", "evaluation", "task_end")] == [5, 5, 5]
    assert (output / "accuracy.png").read_bytes().startswith(b"\x89PNG")

    environment = json.loads((output / "environment.json").read_text())
    assert environment["ntkcl"] == ntkcl.__version__
    assert len(environment["weights_sha256"]) == len(environment["dataset_manifest"]) == 64
    order = np.random.RandomState(3).permutation(10)
    assert environment["classes"] == [str(index) for index in order]


def test_the_accuracies_can_be_counted_again_from_the_predictions(tmp_path: Path) -> None:
    result = train(tmp_path / "run", train_per_class=4, test_per_class=3, epochs=1)
    predictions = load_file(tmp_path / "run" / "predictions.safetensors")
    for task, accuracy in enumerate(result.accuracy):
        labels = predictions[f"task_{task}.labels"]
        assert len(labels) == 3 * 2 * (task + 1)
        right = (labels == predictions[f"task_{task}.predictions"]).double().mean()
        assert 100 * right.item() == pytest.approx(accuracy)


def test_the_state_is_stored_under_its_names(
    tmp_path: Path, trainer: type[fake_core.FakeTrainer]
) -> None:
    train(tmp_path / "run")
    assert set(load_file(tmp_path / "run" / "state.safetensors")) == {"head.weight", "prototypes"}


def test_undefined_numbers_are_null(tmp_path: Path, trainer: type[fake_core.FakeTrainer]) -> None:
    train(tmp_path / "run")
    text = (tmp_path / "run" / "result.json").read_text()
    assert "NaN" not in text + (tmp_path / "run" / "events.jsonl").read_text()
    assert json.loads(text)["evaluations"][0]["top5"] is None


def test_the_default_folder_names_method_data_and_time_and_is_never_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: type[fake_core.FakeTrainer]
) -> None:
    monkeypatch.chdir(tmp_path)
    outputs = [ntkcl.train(progress=False).output for _ in range(3)]
    assert len(set(outputs)) == 3
    for output in outputs:
        assert output.parent == Path("runs")
        assert output.name.startswith("ntk-cl-digits-2")
        assert names(output) == FILES


def test_a_stored_configuration_starts_the_same_run_in_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: type[fake_core.FakeTrainer]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = ntkcl.train(progress=False, epochs=2)
    second = ntkcl.train(config=first.output / "config.toml")
    assert second.config == first.config
    assert second.output != first.output


def test_arrays_in_memory_are_trained_on(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(["ant", "bee", "cat", "dog"], 4)
    images = random.integers(0, 256, (16, 8, 8, 3), np.uint8)
    arrays = {"train": (images, labels), "test": (images[::2], labels[::2])}
    keywords = {"epochs": 1, "initial_classes": 2, "increment": 2, "transform": "resize"}
    result = train(tmp_path / "run", dataset=arrays, class_order=[3, 2, 1, 0], **keywords)
    assert [evaluation.count for evaluation in result.evaluations] == [4, 8]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["classes"] == ["dog", "cat", "bee", "ant"]
    with pytest.raises(ValueError, match=r"'dataset': expected the arrays.*does not hold them"):
        ntkcl.train(tmp_path / "run" / "config.toml", output=tmp_path / "again")
    again = ntkcl.train(tmp_path / "run" / "config.toml", dataset=arrays, output=tmp_path / "again")
    assert again.accuracy == result.accuracy


# ---- paths ---------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with images in "fd", and weights in "w.safetensors" beside it."""
    here = tmp_path / "here"
    for split, name in itertools.product(("train", "test"), ("ant", "bee")):
        folder = here / "fd" / split / name
        folder.mkdir(parents=True)
        pixels = np.full((8, 8, 3), 40 if name == "ant" else 200, np.uint8)
        Image.fromarray(pixels).save(folder / "a.png")
    shutil.copy(load_backbone(DEFAULT_BACKBONE).path, here / "w.safetensors")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(here)
    return here / "fd"


PATHS = {
    "method": "simple-cil",
    "initial_classes": 1,
    "increment": 1,
    "device": "cpu",
    "weights": "w.safetensors",
}


def stop_at_a_test(event: dict[str, Any]) -> bool:
    return event["event"] == "evaluation"


@pytest.mark.parametrize("given", [{"dataset": "fd"}, {"dataset": "fd", "data_root": "."}])
def test_a_run_goes_on_and_is_tested_from_another_working_directory(
    images: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(Path("run"), **PATHS, **given, callbacks=[stop_at_a_test])
    config = resolve(file="run/config.toml")
    assert config.dataset == str(images)
    assert config.weights == str(images.parent / "w.safetensors")
    run = images.parent / "run"
    monkeypatch.chdir(images.parent.parent / "there")
    assert resolve(file=run / "config.toml") == config
    assert "on fd, " in repr(ntkcl.resume(run))
    assert ntkcl.evaluate(run).top1 == 100


def test_names_of_data_sets_stay_names(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("digits", "arrays", "cub", "elsewhere"):
        (images / name).mkdir()
    monkeypatch.chdir(images)
    for name in ("digits", "arrays", "cub", "fd"):
        assert resolve({"dataset": name, "data_root": "data"}).dataset == name
    assert resolve({"dataset": "elsewhere"}).dataset == str(images / "elsewhere")
    assert resolve({"data_root": "data"}).data_root == str(images / "data")
    for name in ("~nobody/x", "x" * 5000, "a\0b"):
        assert resolve({"dataset": name}).dataset == name
    monkeypatch.setenv("HOME", str(images))
    assert resolve({"dataset": "~/elsewhere"}).dataset == str(images / "elsewhere")


def test_images_and_weights_that_have_moved_are_asked_for(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(Path("run"), **PATHS, dataset="fd", callbacks=[stop_at_a_test])
    images.rename("moved")
    assert command("resume", "run") == 2
    assert "what has moved is found by dataset (--dataset)" in capsys.readouterr().err
    assert command("resume", "run", "--dataset", "moved") == 0
    assert command("evaluate", "run") == 2
    error = capsys.readouterr().err
    assert re.search(r"no data set '.*/fd'.*have moved, give dataset=.* \(--dataset\)", error)
    Path("w.safetensors").rename("w2.safetensors")
    assert command("evaluate", "run", "--dataset", "moved") == 2
    assert "if it has moved, give weights=<safetensors file>" in capsys.readouterr().err
    words = ["--dataset", "moved", "--weights", "w2.safetensors"]
    assert command("evaluate", "run", *words) == 0


# ---- refused before any work ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.toml", "events.jsonl", "result.json"])
def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("kept")
    with pytest.raises(ValueError, match=r"\[output\].*holds a run.*give another output"):
        train(tmp_path)
    assert names(tmp_path) == {name}
    assert (tmp_path / name).read_text() == "kept"


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_data_is_read(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"\[output\] cannot write to .*file/run': Not a directory"):
        train(tmp_path / "file" / "run", dataset="no such data")


@pytest.mark.parametrize(
    ("keywords", "error"),
    [
        ({"dataset": "no such data"}, FileNotFoundError),
        ({"weights": "no such file"}, FileNotFoundError),
        ({"class_order": [0, 1, 2]}, ValueError),
        ({"initial_classes": 11}, ValueError),
        ({"ntk_cl.frozen_lists": 6}, ValueError),
    ],
)
def test_bad_input_leaves_nothing_on_the_disk(
    tmp_path: Path, keywords: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        train(tmp_path / "new" / "run", **keywords)
    assert names(tmp_path) == set()
    (tmp_path / "own").mkdir()
    with pytest.raises(error):
        train(tmp_path / "own", **keywords)
    assert names(tmp_path) == {"own"}


# ---- a run that fails ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [FloatingPointError("[train] loss is nan"), KeyboardInterrupt(), RuntimeError("bug")]
)
def test_a_failing_run_keeps_what_was_finished(
    tmp_path: Path, trainer: type[fake_core.FakeTrainer], error: BaseException
) -> None:
    trainer.fail_at, trainer.error = 2, error
    output = tmp_path / "run"
    with pytest.raises(type(error)):
        train(output)
    assert names(output) == {"config.toml", "environment.json", "events.jsonl"} | {
        "accuracy_matrix.csv"
    }
    assert [event["task"] for event in events(output) if event["event"] == "task_end"] == [0, 1]
    matrix = np.genfromtxt(output / "accuracy_matrix.csv", delimiter=",")
    np.testing.assert_array_equal(matrix, [[90, math.nan, math.nan], [87.5, 90, math.nan]])
    with pytest.raises(ValueError, match="holds a run"):
        train(output)


def test_an_error_while_writing_stops_the_real_core_and_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: RunFolder, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "record", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        train(tmp_path / "run", train_per_class=2, test_per_class=1, epochs=1)
    run = tmp_path / "run"
    assert caught.value.__notes__ == [
        f"what was finished is in '{run}'; go on with `ntkcl resume {run}`"
    ]


def test_help_lists_every_key() -> None:
    signature = inspect.signature(ntkcl.train)
    for option in options():
        name, *_ = option.key.split(".")
        assert name in signature.parameters, option.key
        assert f"{option.key} ({option.type}" in (ntkcl.train.__doc__ or "")
    assert signature.parameters["epochs"].default == 20


def test_events_are_on_the_disk_when_they_happen(
    tmp_path: Path, trainer: type[fake_core.FakeTrainer]
) -> None:
    seen = []

    class Watching(trainer):  # type: ignore[misc, valid-type]
        def _task(self, task: int, tell: Any) -> None:
            super()._task(task, tell)
            seen.append(events(tmp_path / "run")[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_C, "Trainer", Watching)
        train(tmp_path / "run")
    assert [(event["event"], event["task"]) for event in seen] == [
        ("task_end", task) for task in range(3)
    ]


# ---- writes --------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"result.json"}


def test_content_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (steps.append("rename"), replace(self, to))[1]
    )
    write_atomically(tmp_path / "file", b"content")
    assert steps == ["fsync", "rename", "fsync"]
    assert (tmp_path / "file").read_bytes() == b"content"


def test_two_runs_cannot_begin_in_one_folder(tmp_path: Path) -> None:
    config = resolve({"output": tmp_path / "run"})
    first, second = RunFolder.reserve(config), RunFolder.reserve(config)
    with first:
        first.begin(config, {})
        with pytest.raises(ValueError, match="is in use: another process runs there"), second:
            second.begin(config, {"other": 1})
    third = RunFolder(tmp_path / "run", [])
    with third, pytest.raises(ValueError, match="holds a run"):
        third.begin(config, {"other": 1})
    assert json.loads((tmp_path / "run" / "environment.json").read_text()) == {}


def test_what_somebody_else_put_into_the_folder_stays(tmp_path: Path) -> None:
    folder = RunFolder.reserve(resolve({"output": tmp_path / "run"}))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    folder.discard()
    assert names(tmp_path / "run") == {"notes.txt"}


def test_the_csv_rows_are_padded_to_all_tasks(tmp_path: Path) -> None:
    config = resolve({"output": tmp_path / "run"})
    with RunFolder.reserve(config) as folder:
        folder.begin(config, {})
        folder.record({"event": "run_begin", "tasks": 3})
        folder.record({"event": "evaluation", "per_task": [12.5]})
    assert (tmp_path / "run" / "accuracy_matrix.csv").read_text() == "12.5,,\n"
