"""A trained model in use: what it predicts is what the run tested, wherever it was loaded from; it
goes on learning as a longer run would have."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import ntkcl
from ntkcl.progress import Silent
from test_training import CLASSES, TEST, TRAIN, dataset, images_of, train

METHODS: dict[str, dict[str, Any]] = {
    "ntk-cl": {"ntk_cl": {"mode": "both"}},
    "lorac-ipc": {},
    "raa": {"initial_epochs": 1},
    "simple-cil": {},
    "ranpac": {"ranpac": {"projection": 64}},
    "ease": {},
    "fine-tune": {"fine_tune": {"peft": "lora", "rank": 4}},
    "joint": {},
}
# Joint wants the old images again (test_fine_tune.py).
GOES_ON = [method for method in METHODS if method != "joint"]
NATURAL = {"class_order": "natural", "threads": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each method, made when it is asked for."""
    root = tmp_path_factory.mktemp("runs")

    class Runs(dict[str, Path]):
        def __missing__(self, method: str) -> Path:
            self[method] = root / method
            train(root / method, method=method, **NATURAL, **METHODS[method])
            return self[method]

    return Runs()


def pixels_of_test() -> np.ndarray:
    pixels: np.ndarray = dataset()["test"][0]
    return pixels


def recorded(run: Path) -> tuple[list[str], np.ndarray]:
    """Labels that the run predicted after its last task, and its confidences."""
    file = load_file(run / "predictions.safetensors")
    names = json.loads((run / "model.json").read_text())["classes"]
    last = f"task_{CLASSES // 2 - 1}"
    labels = [names[int(c)] for c in file[f"{last}.predictions"]]
    return labels, file[f"{last}.confidences"].numpy()


def softmax_at_prediction(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores.astype(np.float64) - scores.max(1, keepdims=True))
    shares: np.ndarray = powers.max(1) / powers.sum(1)
    return shares


@pytest.mark.parametrize("method", METHODS)
def test_a_model_predicts_what_its_run_tested(runs: dict[str, Path], method: str) -> None:
    model = ntkcl.load(runs[method])
    labels, scores = model.predict(pixels_of_test())
    expected, confidences = recorded(runs[method])
    assert labels == expected
    assert scores.shape == (CLASSES * TEST, CLASSES)
    np.testing.assert_allclose(softmax_at_prediction(scores), confidences, rtol=1e-5)
    assert model.features(pixels_of_test()).shape[0] == CLASSES * TEST
    assert model.task_sizes == [2, 2, 2]
    assert model.classes == [str(c) for c in range(CLASSES)]


@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_tested_as_its_run_was(runs: dict[str, Path], method: str) -> None:
    expected = ntkcl.load_result(runs[method]).evaluations[-1]
    found = ntkcl.evaluate(runs[method], dataset())
    np.testing.assert_equal(vars(found), vars(expected))


@pytest.mark.parametrize("method", METHODS)
def test_an_exported_model_needs_nothing_else(
    tmp_path: Path, runs: dict[str, Path], method: str
) -> None:
    # Protects: one folder that can be given away.
    run = tmp_path / "run"
    shutil.copytree(runs[method], run)
    ntkcl.load(run).export(tmp_path / "given")
    shutil.rmtree(run)
    (tmp_path / "given").rename(tmp_path / "elsewhere")
    model = ntkcl.load(tmp_path / "elsewhere")
    assert model.predict(pixels_of_test()).labels == recorded(runs[method])[0]
    names = {path.name for path in (tmp_path / "elsewhere").iterdir()}
    assert names == {"model.json", "config.toml", "state.safetensors", "backbone.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere"}


@pytest.mark.filterwarnings("error:No complete tensor")
@pytest.mark.parametrize("method", [method for method in METHODS if method != "lorac-ipc"])
def test_a_program_scores_as_the_model_does(
    tmp_path: Path, runs: dict[str, Path], method: str
) -> None:
    model = ntkcl.load(runs[method])
    model.export(tmp_path / "given", program_batch=4)
    pixels = pixels_of_test()
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()  # 32 pixels: as they are
    code = (
        "import sys, torch\n"  # nothing of ntkcl
        "program = torch.export.load(sys.argv[1]).module()\n"
        "images = torch.load(sys.argv[2], weights_only=True)\n"
        "torch.save(torch.cat([program(part) for part in images.split(4)]), sys.argv[3])\n"
    )
    torch.save(images, tmp_path / "images.pt")
    words = [tmp_path / "given" / "program.pt2", tmp_path / "images.pt", tmp_path / "scores.pt"]
    subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True)
    scores = torch.load(tmp_path / "scores.pt", weights_only=True).numpy()
    np.testing.assert_allclose(scores, model.predict(pixels).scores, rtol=1e-4, atol=1e-5)
    assert ntkcl.load(tmp_path / "given").predict(pixels).labels == recorded(runs[method])[0]


def test_onnx_scores_as_the_model_does(tmp_path: Path, runs: dict[str, Path]) -> None:
    model = ntkcl.load(runs["simple-cil"])
    model.export(tmp_path / "given", onnx_batch=4)
    session = onnxruntime.InferenceSession(tmp_path / "given" / "model.onnx")
    pixels = pixels_of_test()[:4]
    (scores,) = session.run(["scores"], {"images": pixels.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(scores, model.predict(pixels).scores, rtol=1e-4, atol=1e-5)


def test_without_onnxscript_it_says_what_to_install(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"\[as_onnx\] .*: pip install ntkcl\[onnx\]"):
        ntkcl.load(runs["simple-cil"]).as_onnx()


def test_a_method_that_decides_by_features_is_no_program(
    tmp_path: Path, runs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    model = ntkcl.load(runs["lorac-ipc"])
    with pytest.raises(ValueError, match=r"'lorac-ipc' cannot be a program .*: it looks at its"):
        model.export(tmp_path / "given", program_batch=1)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")  # Protects: torch prints the graph that it fails over.


def test_an_exported_model_is_not_written_to(tmp_path: Path, runs: dict[str, Path]) -> None:
    shutil.copytree(runs["simple-cil"], tmp_path / "run")
    model = ntkcl.load(tmp_path / "run")
    model.export(tmp_path / "given")
    model.add_task(new_classes(0, 1, 2, noise=5, name="new"))
    assert (tmp_path / "run" / "task-4").is_dir()
    assert not (tmp_path / "given" / "task-4").exists()


def test_a_task_that_an_exported_model_learned_has_its_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path]
) -> None:
    ntkcl.load(runs["simple-cil"]).export(tmp_path / "given")
    config = tmp_path / "given" / "config.toml"
    config.write_text(f'weights = "{tmp_path / "gone.safetensors"}"\n' + config.read_text())
    model = ntkcl.load(tmp_path / "given")
    model.add_task(new_classes(0, 1, 2, noise=5, name="new"))
    (tmp_path / "given").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere" / "task-4")
    assert ntkcl.load(".").classes == model.classes
    # Protects: a strange file in the folder above is no reason to fail.
    (tmp_path / "elsewhere" / "backbone.safetensors").write_bytes(b"another one")
    with pytest.raises(FileNotFoundError, match="gone"):
        ntkcl.load(".")


# ---- images --------------------------------------------------------------------------------------


def test_images_come_as_paths_folders_arrays_and_lists(
    tmp_path: Path, runs: dict[str, Path]
) -> None:
    model = ntkcl.load(runs["simple-cil"])
    pixels = pixels_of_test()[:4]
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    paths = [tmp_path / "folder" / name for name in ("b.png", "deep/a.png")]
    for path, image in zip(paths, pixels[:2], strict=True):
        Image.fromarray(image).save(path)
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    expected = model.predict(pixels).scores
    whole = model.predict([str(paths[0]), paths[1], pixels[2], Image.fromarray(pixels[3])])
    np.testing.assert_allclose(whole.scores, expected, atol=1e-6)
    np.testing.assert_allclose(model.predict(tmp_path / "folder").scores, expected[:2], atol=1e-6)
    np.testing.assert_allclose(model.predict(pixels[0]).scores, expected[:1], atol=1e-6)
    grey = np.full((9, 9), 128, np.uint8)
    assert model.predict(np.stack([grey, grey])).scores.shape == (2, CLASSES)
    np.testing.assert_allclose(
        model.predict([grey, pixels[1]]).scores[:1],
        model.predict(np.repeat(grey[..., None], 3, 2)).scores,
        atol=1e-6,
    )
    assert model.predict(grey[None]).scores.shape == (1, CLASSES)  # one image in both readings
    greys = np.stack([grey] * 3)[..., None]
    assert model.predict(greys).scores.shape == (3, CLASSES)
    np.testing.assert_array_equal(model.predict(torch.from_numpy(pixels)).scores, expected)
    np.testing.assert_array_equal(
        model.predict(torch.from_numpy(pixels[0])).labels, model.predict(pixels[0]).labels
    )


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("nowhere.png", FileNotFoundError, "no such file: 'nowhere.png'"),
        ([], ValueError, "at least one image, got none"),
        (np.zeros((2, 2, 3), np.float32), TypeError, "expected uint8 images, got float32"),
        (np.zeros((2, 2, 5, 4), np.uint8), ValueError, r"got \(2, 2, 5, 4\)$"),
        (np.zeros((3, 9, 9), np.uint8), ValueError, r"of \(3, h, w\) give image\.permute"),
        (torch.zeros(3, 9, 9, dtype=torch.uint8), ValueError, r"got \(3, 9, 9\)"),
        (np.zeros((4, 9, 9), np.uint8), ValueError, r"got \(4, 9, 9\)"),
        (np.zeros((9, 9, 4), np.uint8), ValueError, r"of \(h, w, 4\) image\[\.\.\., :3\]"),
        (np.zeros((9, 9, 1), np.uint8), ValueError, r"got \(9, 9, 1\)"),
        ([np.zeros((3, 9, 9), np.uint8)], ValueError, r"got \(3, 9, 9\)"),
        (np.zeros((2, 3, 9, 9), np.uint8), ValueError, r"images\.permute\(0, 2, 3, 1\)"),
        (torch.zeros(2, 2, 3, dtype=torch.bfloat16), TypeError, "images, got torch.bfloat16"),
        (7, TypeError, "a list of these, got int"),
    ],
)
def test_what_is_no_image_is_refused(
    runs: dict[str, Path], images: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ntkcl.load(runs["simple-cil"]).predict(images)


def test_a_corrupt_image_and_an_empty_folder_are_named(
    tmp_path: Path, runs: dict[str, Path]
) -> None:
    model = ntkcl.load(runs["simple-cil"])
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"bad\.png"):
        model.predict(tmp_path / "bad.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image in the folder"):
        model.predict(tmp_path / "empty")


def test_a_data_set_with_other_classes_is_refused(runs: dict[str, Path]) -> None:
    images, labels = dataset()["test"]
    other = {split: (images, np.where(labels == 0, 77, labels)) for split in ("train", "test")}
    with pytest.raises(ValueError, match="expected classes that the model knows, got 77"):
        ntkcl.evaluate(runs["simple-cil"], other)


@pytest.mark.parametrize("kind", ["arrays", "folder", "zip"])
def test_test_images_are_enough_for_a_test(
    tmp_path: Path, runs: dict[str, Path], kind: str
) -> None:
    images, labels = dataset()["test"]
    data: Any = {"test": (images, labels)}
    if kind != "arrays":
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = tmp_path / "data" / "test" / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:03d}.png")
        data = tmp_path / "data"
    if kind == "zip":
        data = shutil.make_archive(str(tmp_path / "zipped"), "zip", data)
    expected = ntkcl.evaluate(runs["simple-cil"], dataset())
    np.testing.assert_equal(vars(ntkcl.evaluate(runs["simple-cil"], data)), vars(expected))
    with pytest.raises((ValueError, FileNotFoundError), match="train"):
        train(tmp_path / "run", data)


def test_arrays_must_be_given_again_for_a_test(runs: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"\[evaluate\] expected the test images again"):
        ntkcl.evaluate(runs["simple-cil"])
    with pytest.raises(ValueError, match=r"expected arrays 'test', got \['train'\]"):
        ntkcl.evaluate(runs["simple-cil"], {"train": dataset()["train"]})


# ---- another task --------------------------------------------------------------------------------


def new_classes(
    first: int, count: int, per_class: int, noise: int, name: str = ""
) -> dict[str, np.ndarray]:
    images, labels = images_of(CLASSES, per_class, np.random.default_rng(noise))
    return {f"{name}{c}": images[labels == c] for c in range(first, first + count)}


def first_classes(count: int) -> dict[str, Any]:
    return {
        split: tuple(part[dataset()[split][1] < count] for part in dataset()[split])
        for split in ("train", "test")
    }


@pytest.mark.parametrize("method", [method for method in GOES_ON if method != "ntk-cl"])
def test_a_model_goes_on_learning_as_a_longer_run_would(
    tmp_path: Path, runs: dict[str, Path], method: str
) -> None:
    # NTK-CL is not here: it averages into its frozen lists after every task but the last.
    keys = NATURAL | METHODS[method]
    train(tmp_path / "short", first_classes(4), method=method, **keys)
    model = ntkcl.load(tmp_path / "short")
    images, labels = dataset()["train"]
    new = {str(c): images[labels == c] for c in (4, 5)}
    tested, test_labels = dataset()["test"]
    test = {str(c): tested[test_labels == c] for c in range(CLASSES)}
    found = model.add_task(new, test=test)
    assert found is not None
    np.testing.assert_equal(vars(found), vars(ntkcl.load_result(runs[method]).evaluations[-1]))
    whole = load_file(runs[method] / "state.safetensors")
    extended = load_file(tmp_path / "short" / "task-3" / "state.safetensors")
    for name, tensor in whole.items():
        if name not in ("class_ids",):
            assert extended[name].equal(tensor), name


@pytest.mark.parametrize("method", GOES_ON)
def test_tasks_are_added_and_saved_one_after_another(
    tmp_path: Path, runs: dict[str, Path], method: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[method], run)
    model = ntkcl.load(run)
    noise = np.random.default_rng(3).integers(0, 256, (2, TRAIN, 32, 32, 3), np.uint8)
    assert model.add_task({"ant": noise[0]}, epochs=2) is None
    model.add_task({"bee": list(noise[1])})
    assert model.task_sizes == [2, 2, 2, 1, 1]
    assert model.classes[-2:] == ["ant", "bee"]
    again = ntkcl.load(run / "task-5")
    assert again.classes == model.classes
    np.testing.assert_array_equal(
        again.predict(pixels_of_test()).scores, model.predict(pixels_of_test()).scores
    )
    assert again.predict(pixels_of_test()).scores.shape[1] == CLASSES + 2
    assert ntkcl.load(run).classes == model.classes[:-2]  # the run itself stays


def test_a_folder_of_new_classes_is_learned(tmp_path: Path, runs: dict[str, Path]) -> None:
    for name, images in new_classes(0, 2, 3, noise=5).items():
        folder = tmp_path / "new" / f"class {name}"
        folder.mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{number}.png")
    model = ntkcl.load(runs["simple-cil"])
    model.add_task(tmp_path / "new", output=tmp_path / "extended")
    assert ntkcl.load(tmp_path / "extended").classes[-2:] == ["class 0", "class 1"]


@pytest.mark.parametrize(
    ("images", "keys", "message"),
    [
        ({"0": pixels_of_test()}, {}, "expected new classes, got 0 again"),
        ({}, {}, "expected at least one class"),
        ({"new": []}, {}, "class 'new': expected at least one image"),
        ({"new": pixels_of_test()}, {"epoch": 3}, "'epoch': expected an option of training"),
        (
            {"new": pixels_of_test()},
            {"test": {"x": pixels_of_test()}},
            "old and new classes, got x",
        ),
        ({"new": [pixels_of_test()[0], np.zeros((5, 5, 3), np.uint8)]}, {}, "got both or 2 sizes"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(
    tmp_path: Path, runs: dict[str, Path], images: Any, keys: dict[str, Any], message: str
) -> None:
    model = ntkcl.load(runs["simple-cil"])
    before = model.classes.copy()
    with pytest.raises(ValueError, match=message):
        model.add_task(images, output=tmp_path / "out", **keys)
    assert model.classes == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("images", [[pixels_of_test()], pixels_of_test(), None])
def test_images_without_the_names_of_classes_are_refused(
    runs: dict[str, Path], images: Any
) -> None:
    model = ntkcl.load(runs["simple-cil"])
    message = rf"images by the name of their class, or the path .* got {type(images).__name__}"
    for keys in ({"images": images}, {"images": {"new": pixels_of_test()}, "test": images}):
        if keys.get("test", 0) is None:  # no test
            continue
        with pytest.raises(TypeError, match=message):
            model.add_task(**keys)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: a shell's background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("method", GOES_ON)
def test_a_task_that_is_stopped_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: dict[str, Path], method: str
) -> None:
    class Stops(Silent):
        def on_stage(self, event: Any) -> None:
            signal.raise_signal(signal.SIGINT)

        on_step = on_stage

    shutil.copytree(runs[method], tmp_path / "run")
    model = ntkcl.load(tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    state = {name: tensor.clone() for name, tensor in model._state.items()}
    scores = model.predict(pixels_of_test()).scores
    monkeypatch.setattr(ntkcl.model, "make_progress", lambda _: Stops())
    with pytest.raises(KeyboardInterrupt, match="stopped; nothing was saved: the model is as it"):
        model.add_task(new_classes(0, 1, 8, noise=5, name="new"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert model.task_sizes == [2, 2, 2]
    assert model.classes == [str(c) for c in range(CLASSES)]
    assert all(model._state[name].equal(tensor) for name, tensor in state.items())
    np.testing.assert_array_equal(model.predict(pixels_of_test()).scores, scores)


def test_a_task_that_cannot_be_saved_is_not_lost(tmp_path: Path, runs: dict[str, Path]) -> None:
    model = ntkcl.load(runs["simple-cil"])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to .*: Not a directory") as error:
        model.add_task(
            new_classes(0, 1, 2, noise=5, name="new"), output=tmp_path / "file" / "x" / "y"
        )
    assert error.value.__notes__ == ["the task is learned, and not saved: Model.export writes it"]
    model.export(tmp_path / "given")
    assert ntkcl.load(tmp_path / "given").classes[-1] == "new0"


# ---- what is damaged -----------------------------------------------------------------------------


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda f: (f / "model.json").unlink(),
            FileNotFoundError,
            r"finish it with `ntkcl resume \S+/run`",
        ),
        (lambda f: (f / "model.json").write_text("{"), ValueError, "is damaged"),
        (lambda f: (f / "model.json").write_text("[" * 100000), ValueError, "is damaged"),
        (lambda f: change(f / "model.json", format=2), ValueError, "expected format 1, got 2"),
        (lambda f: change(f / "model.json", classes=["a"]), ValueError, "expected tasks of 1"),
        (lambda f: change(f / "model.json", more=1), ValueError, "is damaged"),
        (lambda f: change(f / "model.json", weights_sha256="0"), ValueError, "of SHA-256 0, got"),
        (lambda f: (f / "state.safetensors").write_bytes(b""), ValueError, "checksum does not fit"),
        (lambda f: (f / "state.safetensors").unlink(), FileNotFoundError, "is missing"),
    ],
)
def test_a_damaged_model_is_refused(
    tmp_path: Path, runs: dict[str, Path], damage: Any, error: type[Exception], message: str
) -> None:
    shutil.copytree(runs["simple-cil"], tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(error, match=message):
        ntkcl.load(tmp_path / "run")


def test_nothing_is_overwritten(tmp_path: Path, runs: dict[str, Path]) -> None:
    model = ntkcl.load(runs["simple-cil"])
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="expected a new folder, got"):
        model.export(tmp_path / "there")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to '.*/file/x/y': Not a directory"):
        model.export(tmp_path / "file" / "x" / "y")
    with pytest.raises(TypeError, match=r"\[export\] expected the path of a folder, got None"):
        model.export(None)  # type: ignore[arg-type]


def test_what_is_no_folder_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"\[load\] .* got '.*/nope': no such folder"):
        ntkcl.load(tmp_path / "nope")
    with pytest.raises(TypeError, match=r"\[load\] expected the path of a folder, got None"):
        ntkcl.load(None)  # type: ignore[arg-type]


def test_a_model_is_not_resumed(tmp_path: Path, runs: dict[str, Path]) -> None:
    ntkcl.load(runs["simple-cil"]).export(tmp_path / "given")
    before = {path.name for path in (tmp_path / "given").iterdir()}
    for go_on in (
        lambda: ntkcl.resume(tmp_path / "given", dataset=dataset()),
        lambda: train(tmp_path / "given", method="simple-cil", resume=True),
    ):
        with pytest.raises(
            ValueError, match=r"expected a run, got a model in .*; ntkcl\.load reads"
        ):
            go_on()
    assert {path.name for path in (tmp_path / "given").iterdir()} == before


# ---- the command line ----------------------------------------------------------------------------


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ntkcl", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_commands(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ntkcl.train(
        method="simple-cil", train_per_class=4, test_per_class=3, output=run, progress=False
    )
    done = command("evaluate", run)
    assert done.returncode == 0, done.stderr
    assert "top1" in done.stdout
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "black.png")
    done = command("predict", run, tmp_path / "black.png", tmp_path / "black.png")
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [str(tmp_path / "black.png")] * 2
    assert lines[0][1] in [str(digit) for digit in range(10)]
    assert command("predict", run, tmp_path / "none.png").returncode == 2

    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "c.png", "deep/d.png"):
        shutil.copy(tmp_path / "black.png", folder / name)
    (folder / "b.png").write_bytes(b"no picture")
    for name in ("x.gif", "y.tif", "deep/z.TIF", ".hidden"):
        (folder / name).write_bytes(b"")
    done = command("predict", run, folder)
    assert done.returncode == 1
    found = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert found == [str(folder / name) for name in ("a.png", "c.png", "deep/d.png")]
    first, second, last = done.stderr.splitlines()
    assert first == "ntkcl: skipped files that are no images by name: 1 .gif, 2 .tif"
    assert "b.png: expected" in second
    assert last == "ntkcl: [predict] 1 of 4 images could not be read"
