"""The accuracy benchmark: what it runs, what it skips, what it records and what it reports."""

import dataclasses
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


def load(name: str) -> ModuleType:
    """A module of the folder benchmarks, which is no package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


accuracy = load("accuracy")
report = load("accuracy_report")
runs = load("accuracy_runs")

TINY = dataclasses.replace(
    runs.PROTOCOLS["cpu"],
    dataset="tiny.zip",
    backbone="vit_formula_patch8_32",
    weights=None,
    train_per_class=4,
    test_per_class=2,
    seeds=(0, 1),
    settings={"initial_classes": 2, "increment": 2, "epochs": 1},
)


@pytest.fixture
def places(tmp_path: Path):
    """A zip of four classes of noise around a colour, and an empty file of records."""
    draw = np.random.default_rng(0)
    data = tmp_path / "tiny.zip"
    with zipfile.ZipFile(data, "w") as archive:
        for split, count in (("train", 5), ("test", 3)):
            for label in range(4):
                for image in range(count):
                    pixels = draw.integers(0, 90, (8, 8, 3)) + 40 * label
                    file = io.BytesIO()
                    Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
                    archive.writestr(f"{split}/class{label}/{image}.png", file.getvalue())
    records = tmp_path / "results" / "accuracy.jsonl"
    return accuracy.Places(data, None, records, tmp_path / "runs", threads=1, device="cpu")


def fabricated(name: str, normalize: str, seed: int, final: float, **changed) -> dict:
    """A record of two tasks."""
    case = runs.Case(runs.PROTOCOLS["cpu"], name, normalize, seed)
    return {
        "protocol": "cpu",
        "name": name,
        "normalize": normalize,
        "seed": seed,
        "validation": 0.0,
        "command": case.command(2),
        "date": "2026-01-02T03:04:05+00:00",
        "device": "cpu",
        "settings": case.settings(),
        "final_accuracy": final,
        "average_accuracy": final + 10,
        "forgetting": 4.0,
        "accuracy": [final + 20, final],
        "accuracy_matrix": [[final + 20, None], [final - 1, final + 1]],
        "test_images": 40,
        "images_per_second": 0.0 if name == "simple-cil" else 31.5,
        "wall_seconds": 90.0,
        "versions": {"ntkcl": "1.2.3", "torch": "2.11"},
        "hashes": {"weights_sha256": "abc"},
        "torch_threads": 2,
        **changed,
    }


def full_comparison() -> list[dict]:
    finals = {"simple-cil": 50.0, "release": 60.0, "corrected": 66.0}
    return [
        fabricated(name, normalize, seed, finals.get(name, 70.0) + 2 * seed)
        for name, normalizations in runs.MAIN.items()
        for normalize in normalizations
        for seed in (0, 1, 2)
    ]


@pytest.mark.parametrize("name", runs.RUNS)
def test_every_named_run_is_a_valid_configuration_that_does_what_it_says(name: str) -> None:
    run = runs.RUNS[name]
    settings = runs.Case(runs.PROTOCOLS["cpu"], name, "none", 1).settings()
    for key, value in run.settings.items():
        assert settings[key] == value
    assert (settings["method"], settings["variant"], settings["seed"]) == (
        run.method,
        run.variant,
        1,
    )
    assert (settings["train_per_class"], settings["test_per_class"], settings["epochs"]) == (
        40,
        10,
        3,
    )


def test_named_runs_differ_from_each_other() -> None:
    # A repair that is already part of its variant would be measured twice under two names.
    settings = [
        json.dumps(runs.Case(runs.PROTOCOLS["cpu"], name, "none", 0).settings(), sort_keys=True)
        for name in runs.RUNS
    ]
    assert len(set(settings)) == len(settings)


def test_runs_record_once_and_continue_where_they_stopped(places, capsys) -> None:
    cases = accuracy.cases_of(TINY, ["simple-cil", "corrected"], ["weights"], [0])
    assert accuracy.run_all(cases[:1], places) == []  # a sitting that ended early
    assert accuracy.run_all(cases, places) == []
    first = places.records.read_bytes()
    capsys.readouterr()

    accuracy.run_all(cases, places)
    assert capsys.readouterr().out == ""
    assert places.records.read_bytes() == first

    records = runs.read_records(places.records)
    assert [record["name"] for record in records] == ["simple-cil", "corrected"]
    record = records[1]
    assert np.array(record["accuracy_matrix"], dtype=float).shape == (2, 2)
    assert record["accuracy_matrix"][0][1] is None
    assert record["final_accuracy"] == record["accuracy"][-1]
    assert record["test_images"] == 8
    assert record["images_per_second"] > 0
    assert record["torch_threads"] == 1
    assert record["versions"]["torch"]
    assert str(places.data.parent) not in places.records.read_text()  # no machine's paths


def test_validation_tests_on_training_images(places) -> None:
    case = runs.Case(TINY, "simple-cil", "weights", 0, validation=0.25)
    record = accuracy.run_case(case, places)
    assert record["test_images"] == 4  # one of the four training images of each class
    assert "--validation 0.25" in record["command"]
    assert accuracy.records_file(places.runs, 0.25).name == "validation.jsonl"
    assert accuracy.records_file(places.runs, 0.0).name == "accuracy.jsonl"


def test_settings_name_files_as_they_are_on_any_machine() -> None:
    # Protects: records of other working directories, which would all be run again.
    protocol = runs.PROTOCOLS["cpu"]
    settings = runs.Case(protocol, "release", "none", 0).settings()
    assert (settings["dataset"], settings["weights"]) == (protocol.dataset, protocol.weights)


def test_a_record_of_other_settings_is_not_taken_for_the_run() -> None:
    case = runs.Case(runs.PROTOCOLS["cpu"], "corrected", "none", 0)
    record = fabricated("corrected", "none", 0, 60.0)
    assert case.is_recorded_by(record)
    assert not dataclasses.replace(case, seed=1).is_recorded_by(record)
    assert not dataclasses.replace(case, normalize="weights").is_recorded_by(record)
    assert not dataclasses.replace(case, validation=0.25).is_recorded_by(record)
    record["settings"]["ntk_cl.rank"] = 4
    assert not case.is_recorded_by(record)


def test_a_record_outlives_options_that_are_added_later() -> None:
    case = runs.Case(runs.PROTOCOLS["cpu"], "corrected", "none", 0)
    record = fabricated("corrected", "none", 0, 60.0)
    del record["settings"]["momentum"]
    assert runs.find_record(case, [record]) is record


def test_the_latest_of_two_records_counts() -> None:
    case = runs.Case(runs.PROTOCOLS["cpu"], "release", "none", 0)
    old, new = (fabricated("release", "none", 0, final) for final in (60.0, 61.0))
    assert runs.find_record(case, [old, new]) is new
    assert "61.00 (one seed)" in report.render([old, new], [])


def test_a_loss_that_is_not_finite_does_not_hold_up_the_rest(places, monkeypatch) -> None:
    def diverge(case, _places):
        if case.seed == 0:
            raise FloatingPointError("[train] loss is nan")
        return {**fabricated("release", "none", 1, 60.0), "settings": case.settings()}

    monkeypatch.setattr(accuracy, "run_case", diverge)
    cases = accuracy.cases_of(TINY, ["release"], ["none"], [0, 1])
    assert accuracy.run_all(cases, places) == cases[:1]
    assert [record["seed"] for record in runs.read_records(places.records)] == [1]


def test_a_record_that_was_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.jsonl"
    runs.append_record(path, {"name": "release"})
    with path.open("a") as file:
        file.write('{"name": "corr')
    with pytest.raises(ValueError, match=r"accuracy\.jsonl, line 2: expected a record as JSON"):
        runs.read_records(path)


def test_the_report_gives_means_standard_errors_and_differences() -> None:
    text = report.render(full_comparison(), [])
    assert "All 60 runs of the main comparison are recorded." in text
    assert "62.00 ± 1.15" in text  # release: 60, 62, 64
    assert "| corrected - release | none | 0, 1, 2 | 6.00 ± 0.00 | 6.00 ± 0.00 | 0.00" in text
    assert "| corrected - simple-cil | weights | 0, 1, 2 | 16.00 ± 0.00 | 16.00 ± 0.00 |" in text
    assert "| lorac-ipc - corrected | weights | 0, 1, 2 | 4.00 ± 0.00 |" in text
    assert "| lorac-ipc - corrected | none" not in text
    assert "| 1 | 86.0 |  |\n| 2 | 65.0 | 67.0 |" in text  # corrected's matrix of seed 0
    assert "--only corrected --normalize weights --seeds 2" in text
    assert "wall" not in text  # the machine is shared: no times


def test_the_report_says_what_is_missing() -> None:
    records = [
        record
        for record in full_comparison()
        if (record["name"], record["normalize"]) != ("corrected", "none") or record["seed"] == 0
    ]
    text = report.render(records, [])
    assert "Incomplete: 2 of the 60 runs" in text
    assert "Missing: corrected none seeds 1, 2." in text
    assert "66.00 (one seed)" in text
    assert "Incomplete: 60 of the 60" in report.render([], [])


def test_the_report_warns_of_seeds_run_with_different_settings() -> None:
    records = full_comparison()
    records[0]["settings"]["image_size"] = 112
    assert "its seeds differ in image_size" in report.render(records, [])
    assert "differ in" not in report.render(full_comparison(), [])


def test_validation_and_ablations_stand_apart_from_the_main_comparison() -> None:
    ablation = fabricated("corrected-both", "weights", 0, 77.0)
    choice = fabricated("corrected-patch", "weights", 0, 33.0, validation=0.25)
    text = report.render([*full_comparison(), ablation], [choice])
    main, rest = text.split("### Other settings, on the test images")
    assert "77.00" not in main and "77.00" in rest
    tests, choices = text.split("## Choices")
    assert "33.00" not in tests and "33.00" in choices


def test_the_report_is_written_beside_its_records(tmp_path: Path) -> None:
    for record in full_comparison():
        runs.append_record(tmp_path / "results" / "accuracy.jsonl", record)
    accuracy.write_report(tmp_path)
    assert "All 60 runs" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_sigterm_stops_as_ctrl_c_does() -> None:
    program = (
        "import accuracy, time\naccuracy.stop_on_signals()\nprint('ready', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('stopped')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=BENCHMARKS,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell's "&" does
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=50)[0] == "stopped\n"
