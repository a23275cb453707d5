"""The examples run as they are, on little data, the way a reader starts them."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NUMBER = r"\d+\.\d+"


def start(where: Path, script: str, *arguments: object) -> str:
    """What a script prints, started in an empty folder."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, arguments)],
        cwd=where,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four classes of noise around a colour, 20 x 24 pixels: 4 training and 2 test images each."""
    noise = np.random.default_rng(2)
    for index, colour in enumerate([(220, 60, 60), (60, 200, 60), (60, 60, 220), (210, 210, 60)]):
        for split, count in (("train", 4), ("test", 2)):
            place = tmp_path / "images" / split / f"class_{index}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = (np.array(colour) + noise.normal(0, 20, (20, 24, 3))).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return tmp_path / "images"


def test_digits(tmp_path: Path) -> None:
    # Protects: the first thing that a newcomer runs.
    printed = start(tmp_path, "digits.py", "--epochs", 1, "--train-per-class", 6)
    assert re.search(rf"ntk-cl on digits, 5 tasks: final accuracy {NUMBER} %", printed)
    assert len(re.findall(r"^ ?\[+", printed, re.M)) == 5  # rows of the accuracy matrix
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "result.json").is_file()


TWO_TASKS = ("--initial-classes", 2, "--increment", 2, "--epochs", 1)


def test_a_folder_of_images(tmp_path: Path, folder: Path) -> None:
    # Protects: own images of any size, in a run folder of one's choice.
    output = tmp_path / "mine"
    printed = start(tmp_path, "folder_of_images.py", folder, *TWO_TASKS, "--output", output)
    assert re.search(rf"after task 2: +{NUMBER} % +by task: +{NUMBER} +{NUMBER}\n", printed)
    assert (output / "result.json").is_file()


def test_a_zip_of_images_under_a_preset_with_other_weights(tmp_path: Path, folder: Path) -> None:
    # Protects: what is given wins over the preset, the rest of the preset stays.
    import ntkcl.backbones as backbones

    weights = backbones.load_backbone(backbones.DEFAULT_BACKBONE).path
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        for path in sorted(folder.rglob("*.png")):
            file.write(path, path.relative_to(folder))
    start(
        tmp_path,
        "folder_of_images.py",
        tmp_path / "images.zip",
        *("--preset", "ntk-cl/kvasir-in21k", "--backbone", backbones.DEFAULT_BACKBONE),
        *("--weights", weights, "--image-size", 32, "--output", tmp_path / "run", "--epochs", 1),
    )
    config = (tmp_path / "run" / "config.toml").read_text()
    for line in ('variant = "release"', "batch_size = 96", "image_size = 32", "epochs = 1"):
        assert f"\n{line}\n" in config


def test_adapters_in_any_model(tmp_path: Path) -> None:
    lines = start(tmp_path, "adapter_in_any_model.py").splitlines()
    assert re.fullmatch(r"4,516 of [\d,]+ parameters are trained", lines[0])
    losses = [float(line.split()[-1]) for line in lines[1:]]
    assert len(losses) == 4
    assert losses[-1] < 0.1 < losses[0]


def test_compare_methods(tmp_path: Path) -> None:
    # Protects: one row a method, a spread over seeds, the same tasks for all.
    settings = ("epochs=1", "train_per_class=4", "test_per_class=3", "progress=false")
    printed = start(tmp_path, "compare_methods.py", "--seeds", 0, 1, "--set", *settings)
    head, *rows = printed.strip().splitlines()
    assert head.split() == ["method", "final", "accuracy", "average", "accuracy", "forgetting"]
    assert [row.split()[0] for row in rows] == ["lorac-ipc", "ntk-cl", "raa", "simple-cil"]
    assert all(len(re.findall(rf"{NUMBER} ± {NUMBER}", row)) == 3 for row in rows)
    assert len(list((tmp_path / "runs").glob("*/seed-*"))) == 8
