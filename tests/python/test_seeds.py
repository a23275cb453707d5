"""Several seeds in one call: a run folder each, mean and deviation, gone on with as a whole."""

import dataclasses
import io
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import fake_core
import ntkcl
from ntkcl import _C, Result, Results
from ntkcl.config import resolve, to_toml
from ntkcl.progress import results_table
from ntkcl.result import result_of
from run_comparison import differences
from test_cli import run
from test_resume import stop_after
from test_run_folder import names
from test_training import dataset, train

KEYS = {"method": "simple-cil"}


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> type[fake_core.FakeTrainer]:
    """The stand-in for the task loop: three tasks of known accuracies."""
    fake = type("Fake", (fake_core.FakeTrainer,), {})
    monkeypatch.setattr(_C, "Trainer", fake)
    return fake


def results_of(accuracies: Sequence[float]) -> Results:
    raw = fake_core.FakeTrainer("ntk-cl", {})._result()
    return Results(
        tuple(
            result_of(
                raw | {"final_accuracy": accuracy},
                Path(f"runs/x/seed-{seed}"),
                resolve({"seed": seed, "dataset": "<digits>"}),
            )
            for seed, accuracy in enumerate(accuracies)
        ),
        Path("runs/x"),
    )


# ---- what they give back -------------------------------------------------------------------------


def test_mean_and_sample_deviation() -> None:
    results = results_of([80.0, 81.0, 85.0])
    assert results.mean["final_accuracy"] == pytest.approx(82.0)
    assert results.std["final_accuracy"] == pytest.approx(math.sqrt(7.0))
    assert (results.mean["forgetting"], results.std["forgetting"]) == (3.75, 0.0)
    assert results.headline()["final accuracy"] == "82.00 ± 2.65 %"
    np.testing.assert_array_equal(results.accuracy, [[90.0, 88.75, 87.5]] * 3)


def test_one_seed_has_no_deviation() -> None:
    results = results_of([80.0])
    assert math.isnan(results.std["final_accuracy"])
    assert results.headline()["final accuracy"] == "80.00 %"


def test_they_are_a_sequence_that_cannot_be_changed() -> None:
    results = results_of([80.0, 81.0])
    assert [result.final_accuracy for result in results] == [80.0, 81.0]
    assert results[-1] is results.runs[1]
    assert results[:1] == results.runs[:1]
    assert (len(results), results.seeds) == (2, (0, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        results.runs = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        results[0] = results[1]  # type: ignore[index]


def test_they_read_well_in_a_shell_and_in_a_notebook() -> None:
    results = results_of([80.0, 82.0])
    assert "ntk-cl on <digits>, seeds 0, 1: final accuracy 81.00 ± 1.41 %" in repr(results)
    html = results._repr_html_()
    assert "&lt;digits&gt;" in html
    assert "<digits>" not in html
    assert html.count("<tr>") == 3
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results_table(results))
    text = console.export_text()
    assert re.search(r"1 +82\.00 % +88\.75 % +3\.75 % +-3\.75 %", text)
    assert re.search(r"final accuracy +81\.00 ± 1\.41 %", text)


# ---- what they leave -----------------------------------------------------------------------------


def test_each_seed_is_the_run_that_it_is_alone(tmp_path: Path) -> None:
    results = train(tmp_path / "all", **KEYS, seeds=[3, 1])
    assert isinstance(results, Results)
    assert results.seeds == (3, 1)
    assert names(tmp_path / "all") == {"seeds.toml", "seed-1", "seed-3"}
    for seed, result in zip((3, 1), results, strict=True):
        alone = train(tmp_path / f"alone-{seed}", **KEYS, seed=seed)
        assert differences(alone.output, result.output) == []
        again = ntkcl.resume(result.output)
        np.testing.assert_array_equal(again.accuracy_matrix, result.accuracy_matrix)


def test_without_seeds_it_is_one_result(
    tmp_path: Path, trainer: type[fake_core.FakeTrainer]
) -> None:
    assert isinstance(ntkcl.train(output=tmp_path / "run", progress=False), Result)
    assert isinstance(ntkcl.resume(tmp_path / "run"), Result)


def test_the_stored_configuration_starts_the_same_seeds_in_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: type[fake_core.FakeTrainer]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = ntkcl.train(seeds=(4, 0), epochs=7, progress=False)
    second = ntkcl.train(first.output / "seeds.toml")
    assert second.seeds == (4, 0)
    assert second.output != first.output
    assert second[0].config.epochs == 7
    # Protects: the file of a run serves for several seeds, and the other way round.
    third = ntkcl.train(first[0].output / "config.toml", seeds=[5], output="third")
    assert third.seeds == (5,)
    one = ntkcl.train(first.output / "seeds.toml", seed=6, output="one")
    assert one.config.seed == 6


@pytest.mark.parametrize("preset", [None, "ntk-cl/cifar100-in21k"])
def test_written_and_read_back_it_is_the_same(tmp_path: Path, preset: str | None) -> None:
    config = resolve({"seeds": [2, 0], "preset": preset})
    (tmp_path / "seeds.toml").write_text(to_toml(config))
    assert resolve(file=tmp_path / "seeds.toml") == config


def test_the_command_prints_each_seed_and_the_mean(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainer: type[fake_core.FakeTrainer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("train", "--seeds", "0", "7", "--output", "here") == 0
    printed = capsys.readouterr()
    assert re.search(r" 7 +87\.50 % +88\.75 %", printed.out)
    assert re.search(r"final accuracy +87\.50 ± 0\.00 %", printed.out)
    assert "ntk-cl on digits: 6.0 s, in here" in printed.out
    assert "seed 7, 2 of 2\n" in printed.err
    assert run("resume", "here") == 0
    assert "87.50 ± 0.00 %" in capsys.readouterr().out


def test_their_folder_gives_their_results(
    tmp_path: Path, trainer: type[fake_core.FakeTrainer]
) -> None:
    results = ntkcl.train(seeds=[3, 7], output=tmp_path / "run", progress=False)
    again = ntkcl.load_result(tmp_path / "run")
    assert isinstance(again, Results)
    assert repr(again) == repr(results)
    (tmp_path / "run" / "seed-7" / "result.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"finished run in '.*/seed-7'.*`ntkcl resume"):
        ntkcl.load_result(tmp_path / "run")


def test_their_folder_holds_no_model_but_says_where_some_are(
    tmp_path: Path, trainer: type[fake_core.FakeTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    ntkcl.train(seeds=[3, 7], output=path, progress=False)
    with pytest.raises(FileNotFoundError) as refused:
        ntkcl.load(path)
    assert str(refused.value) == (
        f"[load] expected a trained model, got no {path}/model.json; there is one in "
        f"'{path}/seed-3', '{path}/seed-7'"
    )
    for command in ("evaluate", "predict"):
        assert run(command, str(path), *(["x.png"] if command == "predict" else [])) == 2
        assert f"there is one in '{path}/seed-3'" in capsys.readouterr().err
    for folder in (path / "seed-3", path / "seed-7"):
        (folder / "model.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"; finish it with `ntkcl resume {path}`"):
        ntkcl.load(path)


# ---- stopped, and gone on with -------------------------------------------------------------------


def test_stopped_and_gone_on_with_they_end_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keywords: dict[str, Any] = {"method": "ntk-cl", "seeds": [0, 1, 2], "checkpoint_steps": 2}
    data = dataset(train=4, test=2)
    with monkeypatch.context() as patch:
        stops = stop_after(patch)
        whole = train(tmp_path / "whole", data, **keywords)
    path = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_after(patch, stops.asked // 2)
        with pytest.raises(KeyboardInterrupt) as stopped:
            train(path, data, **keywords)
    assert stopped.value.__notes__[-1] == f"with all seeds by `ntkcl resume {path}`"
    assert (path / "seed-0" / "result.json").exists()
    assert not (path / "seed-1" / "result.json").exists()
    assert not (path / "seed-2").exists()
    shutil.copytree(path, tmp_path / "copy")
    for again in (
        ntkcl.resume(path, dataset=data),
        train(tmp_path / "copy", data, **keywords, resume=True),
    ):
        for seed in range(3):
            assert differences(whole[seed].output, again[seed].output) == []
    finished = ntkcl.resume(path)  # Protects: no image is needed to read what is finished.
    np.testing.assert_array_equal(finished.accuracy, whole.accuracy)


def test_seeds_are_added_to_those_that_are_there(
    tmp_path: Path, trainer: type[fake_core.FakeTrainer]
) -> None:
    keywords: dict[str, Any] = {"output": tmp_path / "run", "progress": False}
    ntkcl.train(seeds=[0, 1], **keywords)
    log = (tmp_path / "run" / "seed-1" / "events.jsonl").read_bytes()
    assert ntkcl.train(seeds=[1, 2], resume=True, **keywords).seeds == (1, 2)
    assert (tmp_path / "run" / "seed-1" / "events.jsonl").read_bytes() == log
    assert ntkcl.resume(tmp_path / "run").seeds == (0, 1, 2)


def test_resume_begins_where_nothing_is(
    tmp_path: Path, trainer: type[fake_core.FakeTrainer]
) -> None:
    results = ntkcl.train(seeds=[0], output=tmp_path / "run", resume=True, progress=False)
    assert names(tmp_path / "run") == {"seeds.toml", "seed-0"}
    assert results[0].config.resume is False


def test_a_loss_that_is_not_finite_keeps_the_seeds_before(
    tmp_path: Path, trainer: type[fake_core.FakeTrainer]
) -> None:
    class FailsLater(trainer):  # type: ignore[misc, valid-type]
        def run(self, *arguments: Any) -> dict[str, Any]:
            type(self).fail_at = 1 if (tmp_path / "run" / "seed-1").exists() else None
            return super().run(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_C, "Trainer", FailsLater)
        with pytest.raises(FloatingPointError):
            ntkcl.train(seeds=[0, 1], output=tmp_path / "run", progress=False)
    assert ntkcl.load_result(tmp_path / "run" / "seed-0").final_accuracy == 87.5


# ---- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "error", "expected"),
    [
        ([0, 1, 0], ValueError, "'seeds': expected one or more, each once, got [0, 1, 0]"),
        ([], ValueError, "'seeds': expected one or more, each once, got []"),
        ([0, -1], ValueError, "'seeds': expected list[int] >= 0, got [0, -1]"),
        ([0, "1"], TypeError, "'seeds': expected list[int] >= 0, got [0, '1']"),
        (3, TypeError, "'seeds': expected list[int] >= 0, got 3"),
        ([2**32], ValueError, "'seeds': expected less than 2**32 where it permutes the classes"),
    ],
)
def test_wrong_seeds_are_refused(
    tmp_path: Path, seeds: Any, error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=re.escape(f"[config] {expected}")):
        ntkcl.train(seeds=seeds, output=tmp_path / "run")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("seeds", [range(3), (0, 1, 2), np.arange(3), [np.int64(0), 1, np.int8(2)]])
def test_every_sequence_of_seeds_is_taken(seeds: Any) -> None:
    assert resolve({"seeds": seeds}).seeds == [0, 1, 2]


def test_a_seed_and_seeds_together_are_refused() -> None:
    message = r"\[config\] 'seeds': expected either seeds or a seed, got \[0, 1\] and seed 0"
    with pytest.raises(ValueError, match=message):
        ntkcl.train(seed=0, seeds=[0, 1])
    assert resolve({"seed": 1, "seeds": None}).seed == 1


def test_bad_input_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    for resume in (False, True):
        with pytest.raises(FileNotFoundError):
            ntkcl.train(
                seeds=[0, 1], output=tmp_path / "a" / "b", dataset="no such data", resume=resume
            )
        assert names(tmp_path) == set()
    with pytest.raises(ValueError, match="expected the arrays"):
        ntkcl.train(seeds=[0, 1], output=tmp_path / "run", dataset="arrays")
    assert names(tmp_path) == set()


def test_folders_that_hold_runs_are_refused(
    tmp_path: Path, trainer: type[fake_core.FakeTrainer]
) -> None:
    keywords: dict[str, Any] = {"output": tmp_path / "run", "progress": False}
    ntkcl.train(seeds=[0], **keywords)
    for wrong in ({"seeds": [0]}, {"seeds": [1]}, {"seed": 1}, {"seed": 1, "resume": True}):
        with pytest.raises(ValueError, match=r"holds a run \((seeds|config)\.toml\)"):
            ntkcl.train(**keywords, **wrong)
    with pytest.raises(ValueError, match=r"\[resume\] 'epochs': expected \d+, .* got 77"):
        ntkcl.train(seeds=[0], epochs=77, resume=True, **keywords)

    ntkcl.train(seed=5, output=tmp_path / "other" / "seed-5", progress=False)
    with pytest.raises(ValueError, match=r"seed-5' holds a run"):
        ntkcl.train(seeds=[4, 5], output=tmp_path / "other", progress=False)
    assert names(tmp_path / "other") == {"seed-5"}
    with pytest.raises(ValueError, match=r"holds a run \(config\.toml\)"):
        ntkcl.train(seeds=[4], output=tmp_path / "other" / "seed-5", resume=True)
    with pytest.raises(ValueError, match="expected an 'output' to go on with, got none"):
        ntkcl.train(seeds=[4], resume=True)
