"""The command `ntkcl`: help, exit codes, one line per error, and the lists."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fake_core
import ntkcl
from ntkcl import _C
from ntkcl.cli import main, parse_train
from ntkcl.config import options


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[fake_core.FakeTrainer]:
    """The stand-in for the task loop, in an empty folder."""
    fake = type("Fake", (fake_core.FakeTrainer,), {})
    monkeypatch.setattr(_C, "Trainer", fake)
    monkeypatch.chdir(tmp_path)
    return fake


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(words)
    return int(stop.value.code or 0)


# ---- ntkcl train ---------------------------------------------------------------------------------


def test_train_prints_the_table_and_the_folder(
    trainer: type[fake_core.FakeTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "--output", "here") == 0
    printed = capsys.readouterr()
    assert re.search(r"final accuracy +87\.50 %", printed.out)
    assert "in here" in printed.out
    assert "task 2/3  accuracy 88.75 %" in printed.err
    assert "training images/s, in here" in printed.out


def test_a_method_without_training_has_no_speed_of_it(
    trainer: type[fake_core.FakeTrainer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = trainer("", {})._result() | {"images_per_second": 0.0}
    monkeypatch.setattr(trainer, "_result", lambda self: result)
    assert run("train", "--output", "here") == 0
    assert re.search(r"digits: [\d.]+ s, in here", capsys.readouterr().out)


def test_without_progress_nothing_is_shown_while_it_runs(
    trainer: type[fake_core.FakeTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "--progress", "false") == 0
    assert capsys.readouterr().err == ""


def test_help_shows_every_key_with_its_default_and_what_is_allowed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("train", "--help") == 0
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    for option in options():
        assert "--" + option.key.replace("_", "-") in text, option.key
    assert "--epochs INT epochs of a task (>= 1; default: 20)" in text
    assert "--device {auto,cpu,cuda}" in text
    assert "--ntk-cl.eta FLOAT weight of the dissimilarity loss L_dis (>= 0; default: 0.2)" in text


def test_only_what_is_given_is_set() -> None:
    assert parse_train(["--epochs", "3", "--config", "c.toml"]) == ("c.toml", {"epochs": 3}, ())
    assert parse_train([]) == (None, {}, ())
    assert parse_train(["--milestones"]) == (None, {"milestones": []}, ())
    assert parse_train(["--output", ""]) == (None, {"output": ""}, ())
    assert parse_train(["--import", "a.b", "--import=c"]) == (None, {}, ("a.b", "c"))


def test_a_file_and_the_command_line_go_together(
    trainer: type[fake_core.FakeTrainer], tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text("epochs = 7\nbatch_size = 5\n[ntk_cl]\neta = 0.5\n")
    assert run("train", "--config", "c.toml", "--batch-size", "6", "--output", "here") == 0
    text = (tmp_path / "here" / "config.toml").read_text()
    for line in ("epochs = 7", "batch_size = 6", "eta = 0.5"):
        assert f"\n{line}\n" in text


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --epcohs 3", "unknown key 'epcohs'; did you mean 'epochs'?"),
        ("train --ntk-cl.etta=3", "unknown key 'ntk_cl.etta'; did you mean 'ntk_cl.eta'?"),
        ("train --lr 3", "did you mean 'learning_rate'?"),
        ("train stray", "unknown key 'stray'"),
        ("train --epochs three", "'epochs': expected int >= 1, got 'three'"),
        ("train --epochs 0", "'epochs': expected int >= 1, got 0"),
        ("train --epochs", "'epochs': expected a value after '--epochs', got none"),
        ("train --output --seed 1", "'output': expected a value after '--output', got none"),
        ("train --milestones 1 x", "'milestones': expected list[int] >= 1, got ['1', 'x']"),
        ("train --normalize {mean", "'normalize': expected none, weights or {mean, std}"),
        ("train --config none.toml", "no such file"),
        ("train --dataset nowhere", "nowhere"),
        ("trian", "did you mean 'train'?"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(
    trainer: type[fake_core.FakeTrainer],
    capsys: pytest.CaptureFixture[str],
    words: str,
    expected: str,
) -> None:
    assert run(*words.split()) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert printed.err.startswith("ntkcl: [")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_folder_that_cannot_be_written_to_is_exit_code_2(
    trainer: type[fake_core.FakeTrainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run("train", "--output", "file/run") == 2
    assert "cannot write to 'file/run': Not a directory" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_exit_code_1(
    trainer: type[fake_core.FakeTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.fail_at = 1
    assert run("train", "--progress", "false", "--output", "here") == 1
    assert capsys.readouterr().err == (
        "ntkcl: [train] loss is nan at step 3; what was finished is in 'here'\n"
    )


def test_ctrl_c_stops_after_the_step_with_exit_code_130_and_keeps_the_log(tmp_path: Path) -> None:
    # The real command: the signal arrives while the core trains.
    command = [sys.executable, "-m", "ntkcl", "train", "--epochs", "500", "--output", "run"]
    environment = os.environ | {"PYTHONPATH": str(Path(ntkcl.__path__[0]).parent)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "run" / "events.jsonl"
    while process.poll() is None and not (log.exists() and '"step"' in log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert re.search(
        r"ntkcl: \[train\] stopped in task 1 of 5, after \d+ steps of it; "
        r"what was finished is in 'run'",
        errors,
    )
    assert log.read_text().endswith("}\n")


@pytest.fixture
def sigterm() -> Iterator[Callable[[], None]]:
    """Sends SIGTERM to this process, which fails the test where the command does not listen."""
    handler = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM came through"))
    yield lambda: os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, handler)


def test_sigterm_before_the_training_is_told_and_leaves_nothing(
    trainer: type[fake_core.FakeTrainer],
    sigterm: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(ntkcl.api, "load_dataset", lambda *_, **__: sigterm())
    assert run("train", "--output", "here") == 130
    assert capsys.readouterr().err == "ntkcl: [ntkcl] stopped by SIGTERM\n"
    assert list(tmp_path.iterdir()) == []


def test_sigterm_waits_for_the_message_of_an_error(
    trainer: type[fake_core.FakeTrainer],
    sigterm: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Protects: torchrun sends it as soon as another rank is gone, which this one is about to say.
    def close(folder: ntkcl.runfolder.RunFolder) -> None:
        sigterm()
        close_folder(folder)

    close_folder = ntkcl.runfolder.RunFolder._close
    monkeypatch.setattr(ntkcl.runfolder.RunFolder, "_close", close)
    trainer.fail_at, trainer.error = 1, ConnectionError("[ranks] rank 0 of 2 has lost the others")
    assert run("train", "--progress", "false", "--output", "here") == 2
    assert capsys.readouterr().err == (
        "ntkcl: [ranks] rank 0 of 2 has lost the others; what was finished is in 'here'; "
        "go on with `ntkcl resume here`\n"
    )


# ---- what there is -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("methods", ntkcl.list_methods()),
        ("datasets", ntkcl.list_datasets()),
        ("presets", ntkcl.list_presets()),
        ("backbones", ntkcl.list_backbones()),
        ("info", ["torch", "python", "built with cuda"]),
    ],
)
def test_a_list_names_everything(
    capsys: pytest.CaptureFixture[str], command: str, names: list[str]
) -> None:
    assert run(command) == 0
    text = capsys.readouterr().out
    assert not [name for name in names if name not in text]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == run("--help") == 0
    text = capsys.readouterr().out
    for command in ("train", "report", "info", "methods", "datasets", "presets", "backbones"):
        assert re.search(rf"^  {command} +[A-Z]", text, re.MULTILINE)
    assert run("--version") == 0
    assert capsys.readouterr().out == f"{ntkcl.__version__}\n"
