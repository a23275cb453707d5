"""A sweep: every point of a grid is an ordinary run folder, wrong points are found before anything
runs, and the same sweep again does what is left."""

import itertools
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_core
import ntkcl
from ntkcl import _C, Result, Results, sweeping
from ntkcl.comparison import compare
from run_comparison import differences
from test_cli import run
from test_resume import stop_after
from test_run_folder import names
from test_training import TINY, dataset

ROOT = Path(__file__).resolve().parents[2]
GRID = """
output = "here"
[base]
progress = false
epochs = 3
[grid]
ntk_cl.eta = [0.03, 0.2]
seed = [0, 1]
[[points]]
method = "simple-cil"
seeds = [0, 1]
"""
NAMES = [
    "ntk_cl.eta=0.03,seed=0",
    "ntk_cl.eta=0.03,seed=1",
    "ntk_cl.eta=0.2,seed=0",
    "ntk_cl.eta=0.2,seed=1",
    "method=simple-cil,seeds=0+1",
]
DIGITS = """
output = "here"
[base]
method = "simple-cil"
train_per_class = 4
test_per_class = 2
[grid]
seed = [0, 1]
"""


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[fake_core.FakeTrainer]:
    """The stand-in for the task loop, and GRID in grid.toml, in a folder of their own."""
    fake = type("Fake", (fake_core.FakeTrainer,), {})
    monkeypatch.setattr(_C, "Trainer", fake)
    in_folder(tmp_path, monkeypatch, GRID)
    return fake


def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, grid: str) -> None:
    monkeypatch.chdir(folder)
    Path("grid.toml").write_text(grid)


def points_of(grid: dict[str, Any]) -> list[sweeping.Point]:
    return sweeping.read_grid({"output": "here", **grid})[0]


# ---- the grid ------------------------------------------------------------------------------------


def test_every_combination_is_a_point_and_explicit_points_follow(
    trainer: type[fake_core.FakeTrainer],
) -> None:
    points, arrays = sweeping.read_grid("grid.toml")
    assert arrays is None
    assert [point.name for point in points] == NAMES
    assert [str(point.output) for point in points] == [f"here/{name}" for name in NAMES]
    assert [point.config.seed for point in points[:4]] == [0, 1, 0, 1]
    assert [point.config.ntk_cl.eta for point in points[:4]] == [0.03, 0.03, 0.2, 0.2]
    assert points[4].config.seeds == [0, 1]
    assert {point.config.epochs for point in points} == {3}


def test_the_folder_is_named_after_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_folder(tmp_path, monkeypatch, "[grid]\nseed = [3]\n")
    (point,) = sweeping.read_grid("grid.toml")[0]
    assert point.output == Path("runs/grid/seed=3")


def test_a_point_wins_over_the_base() -> None:
    base = {"seeds": [0, 1], "ntk_cl": {"eta": 0.5, "rank": 8}}
    one, two = points_of({"base": base, "points": [{"seed": 4, "ntk_cl.eta": 0.1}, {}]})
    assert (one.config.seeds, one.config.seed) == (None, 4)
    assert (one.config.ntk_cl.eta, one.config.ntk_cl.rank) == (0.1, 8)
    assert (two.name, two.config.seeds) == ("base", [0, 1])


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"preset": "ntk-cl/cifar100-in21k"}, "preset=ntk-cl-cifar100-in21k"),
        ({"dataset": "../my data/é"}, "dataset=..-my-data-"),
        ({"deterministic": False}, "deterministic=false"),
        ({"seeds": [0, 1]}, "seeds=0+1"),
        ({"normalize": {"mean": [0.5, 0.5, 0.5], "std": [1, 1, 1]}}, None),
    ],
)
def test_a_name_is_a_folders_name_everywhere(settings: dict[str, Any], name: str | None) -> None:
    (point,) = points_of({"points": [settings]})
    assert re.fullmatch(r"[\w.,=+-]+", point.name, re.ASCII)
    assert name in (None, point.name)


def test_long_names_are_cut_and_stay_apart() -> None:
    order = list(range(100))
    one, two = points_of({"grid": {"class_order": [order, [*order[:98], 99, 98]]}})
    assert one.name != two.name
    assert len(one.name) < 140


@pytest.mark.parametrize(
    ("grid", "error", "expected"),
    [
        ({}, ValueError, "[sweep] expected a [grid] or [[points]], got none"),
        ({"gird": {"seed": [1]}}, ValueError, "unknown key 'gird'; did you mean 'grid'?"),
        ({"grid": [1]}, TypeError, "[sweep] 'grid': expected a table of lists, got [1]"),
        ({"points": {"seed": 1}}, TypeError, "'points': expected a list of tables"),
        ({"points": [3]}, TypeError, "'points': expected a list of tables, got 3 in it"),
        ({"grid": {"seed": 1}}, TypeError, "[sweep] 'seed': expected a list of values, got 1"),
        ({"grid": {"seed": []}}, ValueError, "'seed': expected a list of values, got an empty one"),
        (
            {"grid": {"epcohs": [1]}},
            ValueError,
            "[sweep] in point 'epcohs=1': [config] unknown key 'epcohs'; did you mean 'epochs'?",
        ),
        (
            {"grid": {"epochs": [1, "two"]}},
            TypeError,
            "[sweep] in point 'epochs=two': [config] 'epochs': expected int >= 1, got 'two'",
        ),
        (
            {"grid": {"epochs": [5]}, "points": [{"ntk_cl": {"eta": -1.0}}]},
            ValueError,
            "in point 'ntk_cl.eta=-1.0': [config] 'ntk_cl.eta': expected float >= 0, got -1.0",
        ),
        ({"grid": {"epochs": [5, 5]}}, ValueError, "expected each point once, got 'epochs=5'"),
        ({"base": {"output": "x"}, "points": [{}]}, ValueError, "expected no 'output'"),
        ({"points": [{"resume": True}]}, ValueError, "expected no 'resume'"),
        ({"points": [{"seed": 1, "seeds": [1]}]}, ValueError, "expected either seeds or a seed"),
        ({"output": "", "points": [{}]}, ValueError, "'output': expected a folder, got ''"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    grid: dict[str, Any],
    error: type[Exception],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(expected)):
        ntkcl.sweep({"output": "here", **grid})
    assert names(tmp_path) == set()


def test_ways_that_do_not_go_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    points = {"points": [{"seed": 1}]}
    with pytest.raises(ValueError, match="'output': expected a folder, got None"):
        ntkcl.sweep(points)
    with pytest.raises(ValueError, match="'jobs': expected int >= 1, got 0"):
        ntkcl.sweep({"output": "here", **points}, jobs=0)
    with pytest.raises(ValueError, match="expected a name or a path for several jobs, got arrays"):
        ntkcl.sweep({"output": "here", "base": {"dataset": dataset()}, **points}, jobs=2)
    with pytest.raises(FileNotFoundError, match="no such file"):
        ntkcl.sweep("grid.toml")
    assert names(tmp_path) == set()


# ---- one after the other -------------------------------------------------------------------------


def test_every_point_leaves_its_run(trainer: type[fake_core.FakeTrainer]) -> None:
    results = ntkcl.sweep("grid.toml")
    assert list(results) == NAMES
    assert names(Path("here")) == set(NAMES)
    assert isinstance(results[NAMES[0]], Result)
    assert isinstance(results[NAMES[4]], Results)
    assert ntkcl.load_result(f"here/{NAMES[2]}").config.ntk_cl.eta == 0.2


def test_the_same_sweep_again_runs_what_is_new(trainer: type[fake_core.FakeTrainer]) -> None:
    ntkcl.sweep("grid.toml")
    log = Path("here", NAMES[0], "events.jsonl").read_bytes()
    Path("grid.toml").write_text(GRID.replace("[0.03, 0.2]", "[0.03, 0.2, 0.5]"))
    assert len(ntkcl.sweep("grid.toml")) == 7
    assert Path("here", NAMES[0], "events.jsonl").read_bytes() == log


def test_another_base_is_refused_before_anything_runs(
    trainer: type[fake_core.FakeTrainer],
) -> None:
    Path("grid.toml").write_text(GRID.replace("eta = [0.03, 0.2]", "eta = [0.2]"))
    ntkcl.sweep("grid.toml")
    Path("grid.toml").write_text(GRID.replace("epochs = 3", "epochs = 4"))
    with pytest.raises(ValueError, match=r"\[resume\] 'epochs': expected 3, .* got 4"):
        ntkcl.sweep("grid.toml")
    assert not Path("here", NAMES[0]).exists()


def test_a_point_that_fails_does_not_stop_the_others(
    trainer: type[fake_core.FakeTrainer],
) -> None:
    runs = itertools.count()

    class Fails(trainer):  # type: ignore[misc, valid-type]
        def run(self, *arguments: Any) -> dict[str, Any]:
            self.fail_at = 1 if next(runs) == 1 else None
            return super().run(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_C, "Trainer", Fails)
        with pytest.raises(ntkcl.SweepError) as error:
            ntkcl.sweep("grid.toml")
    assert str(error.value) == (
        f"[sweep] 1 of 5 points failed: '{NAMES[1]}': [train] loss is nan at step 3"
    )
    assert list(error.value.results) == [NAMES[0], *NAMES[2:]]
    assert isinstance(error.value.failures[NAMES[1]], FloatingPointError)


def test_stopped_and_gone_on_with_it_ends_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = TINY | {"dataset": dataset(train=4, test=2), "checkpoint_steps": 2}
    grid: dict[str, Any] = {"base": base, "grid": {"seed": [0, 1]}}
    with monkeypatch.context() as patch:
        stops = stop_after(patch)
        whole = ntkcl.sweep(grid | {"output": tmp_path / "whole"})
    stopped = grid | {"output": tmp_path / "stopped"}
    with monkeypatch.context() as patch:
        stop_after(patch, stops.asked * 3 // 4)
        with pytest.raises(KeyboardInterrupt) as stop:
            ntkcl.sweep(stopped)
    assert stop.value.__notes__[-1] == "the same sweep again does what is left"
    points, _ = sweeping.read_grid(stopped)
    assert [point.state for point in points] == ["finished", "begun"]
    for name, result in ntkcl.sweep(stopped).items():
        assert differences(whole[name].output, result.output) == []


# ---- the command ---------------------------------------------------------------------------------


def test_the_list_shows_how_far_each_point_is(
    trainer: type[fake_core.FakeTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.fail_at, trainer.error = 2, KeyboardInterrupt()
    assert run("sweep", "grid.toml", "--point", "1") == 130
    trainer.fail_at = None
    assert run("sweep", "grid.toml", "--point", "2") == 0
    ntkcl.train(method="simple-cil", epochs=3, output=f"here/{NAMES[4]}/seed-1", progress=False)
    capsys.readouterr()
    assert run("sweep", "grid.toml", "--list") == 0
    text = capsys.readouterr().out
    for number, state in enumerate(("-", "begun", "finished +87.50 %", "-", "1 of 2 seeds")):
        assert re.search(rf" {number} +{re.escape(NAMES[number])} +{state}", text), text


def test_the_command_ends_with_a_table(
    trainer: type[fake_core.FakeTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sweep", "grid.toml") == 0
    text = capsys.readouterr().out
    assert re.search(r"point +state +final accuracy +average accuracy +forgetting", text)
    assert re.search(r"seed=1 +finished +87\.50 % +88\.75 % +3\.75 %", text)
    assert re.search(r"seeds=0\+1 +finished +87\.50 ± 0\.00 % +88\.75 ± 0\.00 %", text)


def test_a_sweep_is_reported_with_its_seeds_and_without_what_failed(
    trainer: type[fake_core.FakeTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("sweep", "grid.toml") == 0
    Path(f"here/{NAMES[1]}/result.json").unlink()
    compared = compare("here")
    assert [group.seeds for group in compared[0].groups] == ["0, 1", "0", "0, 1"]
    assert compared.unfinished == (Path(f"here/{NAMES[1]}"),)


def test_failures_are_listed_with_exit_code_1(
    trainer: type[fake_core.FakeTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.fail_at = 0
    assert run("sweep", "grid.toml") == 1
    printed = capsys.readouterr()
    assert printed.out.count(" failed ") == 5
    assert printed.err.startswith(
        f"ntkcl: [sweep] 5 of 5 points failed: '{NAMES[0]}': [train] loss"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--point 5", "[sweep] 'point': expected 0 ... 4, got 5"),
        ("--point 0 --list", "[sweep] expected one way to run it, got --list and --point"),
        ("--jobs 0", "[sweep] 'jobs': expected int >= 1, got 0"),
        ("--job 2", "[ntkcl] unknown argument '--job'; see `ntkcl sweep --help`"),
        ("--ray", "(pip install 'ntkcl[ray]'), got none"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(
    trainer: type[fake_core.FakeTrainer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    expected: str,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run("sweep", "grid.toml", *words.split()) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert names(Path()) == {"grid.toml"}


# ---- Slurm, processes, Ray -----------------------------------------------------------------------


def test_the_slurm_script_runs_one_point_a_task(
    trainer: type[fake_core.FakeTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sweep", "grid.toml", "--slurm", "jobs.sh") == 0
    assert capsys.readouterr().out == "5 points: sbatch jobs.sh\n"
    here = Path.cwd()
    lines = Path("jobs.sh").read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    assert "#SBATCH --array=0-4" in lines
    assert f'#SBATCH --output="{here}/here/jobs/%a.log"' in lines
    assert lines[-2] == f"cd {here} || exit"
    assert lines[-1] == (
        f'exec {sys.executable} -m ntkcl sweep {here}/grid.toml --point "$SLURM_ARRAY_TASK_ID"'
    )
    assert Path("here/jobs").is_dir()  # Protects: Slurm opens the log before the script begins.
    assert subprocess.run(["bash", "-n", "jobs.sh"], check=False).returncode == 0


def test_processes_give_what_one_after_the_other_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_folder(tmp_path, monkeypatch, DIGITS + '[[points]]\nweights = "nowhere.safetensors"\n')
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run("sweep", "grid.toml", "--jobs", "2") == 1
    printed = capsys.readouterr()
    assert "1 of 3 points failed" in printed.err
    assert re.search(r"'weights=nowhere\.safetensors': .*nowhere\.safetensors", printed.err)
    assert "seed=1: finished\n" in printed.err
    assert "final accuracy" in Path("here/jobs/seed=1.log").read_text()
    assert "Traceback" not in Path("here/jobs/weights=nowhere.safetensors.log").read_text()

    results = ntkcl.sweep({**sweeping.read_toml("grid.toml"), "points": []}, jobs=2)
    assert list(results) == ["seed=0", "seed=1"]
    alone = ntkcl.train("here/jobs/seed=1.toml", output="alone", resume=False)
    np.testing.assert_array_equal(results["seed=1"].accuracy_matrix, alone.accuracy_matrix)
    assert differences(alone.output, results["seed=1"].output) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_processes_with_their_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    grid = DIGITS.replace('"simple-cil"', '"ntk-cl"\nepochs = 500\nthreads = 1')
    in_folder(tmp_path, monkeypatch, grid)
    words = [sys.executable, "-m", "ntkcl", "sweep", "grid.toml", "--jobs", "2"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    logs = [Path("here", f"seed={seed}", "events.jsonl") for seed in (0, 1)]
    while process.poll() is None and not all(
        log.exists() and b'"step"' in log.read_bytes() for log in logs
    ):
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.endswith("the same sweep again does what is left\n")
    for log in logs:
        assert list((log.parent / "checkpoint").glob("*.json"))
    for job in Path("here/jobs").glob("*.log"):
        assert "go on with `ntkcl resume " in job.read_text()


def test_ray_runs_every_point_as_a_task(
    trainer: type[fake_core.FakeTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The stand-in has what is used of Ray; a task runs when it is asked for.
    asked: list[Any] = []

    class Task:
        def __init__(self, function: Any) -> None:
            self.function = function

        def options(self, **options: Any) -> "Task":
            asked.append(options)
            return self

        def remote(self, *arguments: Any) -> Any:
            return lambda: self.function(*arguments)

    ray = types.SimpleNamespace(
        init=lambda **_: None,
        cluster_resources=lambda: {"CPU": 4.0, "GPU": 2.0},
        remote=Task,
        get=lambda reference: reference(),
        cancel=lambda reference: None,
    )
    monkeypatch.setitem(sys.modules, "ray", ray)

    def run_here(command: Any, stdout: Any, **_: Any) -> Any:
        failed = "seed=1" in command[5]
        stdout.write(b"ntkcl: [train] loss is nan\n" if failed else b"")
        if not failed:
            ntkcl.train(command[5])
        return types.SimpleNamespace(poll=lambda: int(failed), returncode=int(failed))

    started = types.SimpleNamespace(Popen=run_here, DEVNULL=None, STDOUT=None)
    monkeypatch.setattr(sweeping, "subprocess", started)
    with pytest.raises(ntkcl.SweepError) as error:
        ntkcl.sweep("grid.toml", ray=True)
    assert list(error.value.results) == [NAMES[0], NAMES[2], NAMES[4]]
    assert str(error.value.failures[NAMES[1]]) == (
        f"[train] loss is nan, see {Path.cwd()}/here/jobs/{NAMES[1]}.log"
    )
    assert asked == [{"num_gpus": 1, "max_retries": 0}]


def test_the_example_is_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    points, _ = sweeping.read_grid("examples/sweep.toml")
    assert [point.name for point in points][-2:] == [
        "learning_rate=0.05,ntk_cl.eta=0.2",
        "method=simple-cil",
    ]
    assert len(points) == 5


def test_threads_are_shared_out_unless_they_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])")
    job = sweeping._Job(command, tmp_path / "log", tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert sweeping._run_job(job, 3) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert sweeping._run_job(job, 3) is None
    assert (tmp_path / "log").read_text() == "3\n5\n"


def test_a_process_that_is_killed_is_a_failure(tmp_path: Path) -> None:
    kill = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    job = sweeping._Job((sys.executable, "-c", kill), tmp_path / "log", tmp_path)
    assert sweeping._run_job(job) == f"ended by signal 9, see {tmp_path / 'log'}"
    assert (tmp_path / "log").read_text() == ""
