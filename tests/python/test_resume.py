"""A run that was stopped or killed goes on and ends as if nothing had happened, to the bit; what is
not whole is seen and never used."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import ntkcl
from ntkcl import checkpoints, runfolder
from ntkcl.checkpoints import Checkpoints
from ntkcl.files import safetensors_bytes
from run_comparison import differences
from test_training import dataset, train

CASES: dict[str, dict[str, Any]] = {
    "simple-cil": {"method": "simple-cil"},
    "ntk-cl": {"method": "ntk-cl", "ntk_cl": {"mode": "both", "frozen_lists": 2}},
    "ntk-cl adamw": {"method": "ntk-cl", "optimizer": "adamw", "precision": "float64"},
    "ntk-cl release": {"method": "ntk-cl", "variant": "release"},
    "ntk-cl drift alignment": {
        "method": "ntk-cl",
        "ntk_cl": {"drift": "paired", "alignment": True},
    },
    "lorac-ipc": {"method": "lorac-ipc"},
    "lorac-ipc entries": {
        "method": "lorac-ipc",
        "lorac_ipc": {
            "importance_of": "entry",
            "importance_average": "epoch",
            "alignment_covariance": "full",
            "drift": "paired",
        },
    },
    "lorac-ipc release": {
        "method": "lorac-ipc",
        "variant": "release",
        "lorac_ipc": {"small_clusters": "shrink"},
    },
    "lorac-ipc two norms": {
        "method": "lorac-ipc",
        "lorac_ipc": {"moco_norm": "new", "train_aligned_head": False},
    },
    "raa": {"method": "raa", "initial_epochs": 2},
    "raa release": {"method": "raa", "variant": "release", "initial_epochs": 2},
    "ranpac": {"method": "ranpac", "initial_epochs": 8, "ranpac": {"projection": 64}},
    "ease": {"method": "ease"},
    "fine-tune": {"method": "fine-tune", "epochs": 6, "optimizer": "adam"},
    "fine-tune lora": {
        "method": "fine-tune",
        "epochs": 6,
        "fine_tune": {"peft": "lora", "loss": "task"},
    },
    "joint": {"method": "joint", "joint": {"head": "linear"}},
    "held out, few read": {"method": "raa", "validation_fraction": 0.25, "initial_epochs": 1},
}
KEYS = {
    "epochs": 2,
    "transform": "inception",
    "initial_learning_rate": 0.01,
    "forward_transfer": True,
}


class Stops:
    """Asks a run to stop when it has asked for the n-th time."""

    def __init__(self, after: float) -> None:
        self.after = after
        self.asked = 0

    def __call__(self, _: object) -> bool:
        self.asked += 1
        return self.asked > self.after


def stop_after(monkeypatch: pytest.MonkeyPatch, questions: float = math.inf) -> Stops:
    stops = Stops(questions)
    monkeypatch.setattr(ntkcl.api._StopSignal, "__call__", lambda self: stops(self))
    return stops


def resume(output: Path, **keywords: Any) -> ntkcl.Result:
    return ntkcl.resume(output, dataset=dataset(), **keywords)


def stopped(output: Path, monkeypatch: pytest.MonkeyPatch, after: int = 2, **keywords: Any) -> Path:
    """A run that was stopped in the second epoch of its first task."""
    with monkeypatch.context() as patch:
        stop_after(patch, after)
        with pytest.raises(KeyboardInterrupt):
            train(output, **(KEYS | {"method": "ntk-cl", "checkpoint_steps": 1} | keywords))
    return output


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_stopped_everywhere_ends_like_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    # Protects: everything that a step or a stage reads is in the checkpoint.
    keywords = KEYS | CASES[case]
    whole = train(tmp_path / "whole", **keywords)
    output, stops = tmp_path / "stopped", 0
    for questions in itertools.cycle((3, 11, 19, 5, 31)):
        with monkeypatch.context() as patch:
            stop_after(patch, questions + stops)
            try:
                train(output, resume=True, **keywords)
                break
            except KeyboardInterrupt:
                stops += 1
    assert stops >= 2 or case == "simple-cil"
    assert differences(whole.output, output) == []


def test_a_finished_run_gives_its_result_again(tmp_path: Path) -> None:
    first = train(tmp_path / "run", **KEYS)
    log = (tmp_path / "run" / "events.jsonl").read_bytes()
    again = resume(tmp_path / "run")
    np.testing.assert_array_equal(again.accuracy_matrix, first.accuracy_matrix)
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == log
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_the_last_two_checkpoints_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stopped(tmp_path / "run", monkeypatch)
    names = sorted(path.name for path in (run / "checkpoint").iterdir())
    assert len(names) == 4
    assert {name[:6] for name in names} == {names[0][:6], names[-1][:6]}
    assert int(names[-1][:6]) - int(names[0][:6]) == 1


def test_without_checkpoints_in_a_task_there_is_one_after_its_training_and_one_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[dict[str, Any]] = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, c, n: saved.append(c["progress"]))
    train(tmp_path / "run", **KEYS, checkpoint_minutes=0)
    assert [(p["task"], p["begun"]) for p in saved] == [
        (task + after, not after) for task in range(3) for after in (0, 1)
    ]


# ---- what is not whole ---------------------------------------------------------------------------


def latest(run: Path, kind: str) -> Path:
    return max((run / "checkpoint").glob(f"*.{kind}"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def change_the_step(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["progress"]["step"] += 1
    path.write_text(json.dumps(manifest))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("safetensors", truncate),
        ("safetensors", change_a_byte),
        ("safetensors", Path.unlink),
        ("json", truncate),
        ("json", change_the_step),
        ("json", empty),
    ],
)
def test_a_damaged_checkpoint_is_seen_and_the_one_before_is_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    damage: Any,
) -> None:
    whole = train(tmp_path / "whole", **KEYS, method="ntk-cl", checkpoint_steps=1)
    run = stopped(tmp_path / "run", monkeypatch)
    path = latest(run, kind)
    damage(path)
    with caplog.at_level(logging.WARNING):
        resume(run)
    assert "the one before is used" in caplog.text
    assert path.name in caplog.text
    assert differences(whole.output, run) == []


def test_where_no_checkpoint_is_whole_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = stopped(tmp_path / "run", monkeypatch)
    for path in (run / "checkpoint").glob("*.safetensors"):
        truncate(path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    way_out = re.escape(f"; remove '{run / 'checkpoint'}' to begin anew")
    with pytest.raises(ValueError, match=rf"none is whole: .*checksum.*checksum.*{way_out}"):
        resume(run)
    assert caplog.text.count("the one before is used") == 1  # the oldest has none before it
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_another_versions_checkpoint_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(tmp_path / "run", monkeypatch)
    path = latest(run, "json")
    manifest = checkpoints._Manifest.model_validate(json.loads(path.read_text()))
    path.write_bytes(manifest.model_copy(update={"format": 99, "ntkcl": "7.0.0"}).sealed())
    with pytest.raises(ValueError, match=r"got 99, written by ntkcl 7\.0\.0: finish the run with"):
        resume(run)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"step": 1000}, r"expected a place among the 4 steps of task 0, got step 1000"),
        ({"epoch": -1}, r"expected a place among"),
        ({"task": 9}, r"'task': expected 0 \.\. 3, got 9"),
        ({"task": 1}, r"missing|unknown"),
        ({"step": "one"}, r"'step': expected another kind of value"),
        ({"begun": False}, r"expected a place among"),
        (
            {"begun": False, "step": 0, "position": 0, "epoch": 0, "epoch_images": 0},
            r"no state of an optimiser",
        ),
        ({"task": 3, "step": 0, "position": 0}, r"expected a place among"),
        ({"position": 2**63 - 1}, r"expected a place among"),
        ({"position": True}, r"'position': expected another kind of value"),
        ({"epoch_images": 2**62}, r"expected a place among"),
        ({"epoch": 2}, r"expected a place among"),
        ({"seconds": -1.0}, r"expected counts and times from 0 on"),
        ({"training_images": 2**70}, r"'training_images': expected another kind of value"),
    ],
)
def test_a_checkpoint_that_lies_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: dict[str, Any], message: str
) -> None:
    # Protects: checksums that fit do not make a checkpoint one of this run.
    run = stopped(tmp_path / "run", monkeypatch)
    path = latest(run, "json")
    manifest = checkpoints._Manifest.model_validate(json.loads(path.read_text()))
    manifest.progress.update(edit)
    path.write_bytes(manifest.sealed())
    with pytest.raises(ValueError, match=message):
        resume(run)


def test_what_a_killed_process_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole", **KEYS, method="ntk-cl", checkpoint_steps=1)
    run = stopped(tmp_path / "run", monkeypatch)
    for name in (".result.json.77.tmp", "checkpoint/.000009.json.77.tmp"):
        (run / name).write_bytes(b"half")
    (run / "checkpoint" / "000009.safetensors").write_bytes(b"tensors without a JSON file")
    with (run / "events.jsonl").open("ab") as log:
        log.write(b'{"event": "step", "task"')
    resume(run)
    assert differences(whole.output, run) == []


def test_a_run_that_was_killed_before_its_first_checkpoint_says_that_it_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(tmp_path / "whole", **KEYS, method="ntk-cl", checkpoint_steps=1)
    run = stopped(tmp_path / "run", monkeypatch)
    for path in (run / "checkpoint").iterdir():
        path.unlink()
    resume(run)
    assert f"[resume] '{run}' has no checkpoint yet: the run begins anew" in caplog.text
    assert differences(whole.output, run) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    # Protects: a full disk or a folder that became read-only costs no more than what was not saved.
    keywords = {**KEYS, "method": "ntk-cl", "checkpoint_steps": 1}
    whole = train(tmp_path / "whole", **keywords)
    written = 0

    def write(path: Path, content: bytes) -> None:
        nonlocal written
        written += 1
        if written > 5:
            raise OSError(code, os.strerror(code), str(path))
        runfolder.write_atomically(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_atomically", write)
        with pytest.raises(OSError, match=os.strerror(code)) as error:
            train(tmp_path / "run", **keywords)
    assert "`ntkcl resume " in " ".join(error.value.__notes__)
    resume(tmp_path / "run")
    assert differences(whole.output, tmp_path / "run") == []


# ---- what does not fit ---------------------------------------------------------------------------


def test_other_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stopped(tmp_path / "run", monkeypatch)
    with pytest.raises(ValueError, match=r"\[resume\] expected the images that the run was begun"):
        ntkcl.resume(run, dataset=dataset(train=9))


def test_other_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stopped(tmp_path / "run", monkeypatch)
    with pytest.raises(
        ValueError, match=r"\[resume\] 'epochs': expected 2, as the run in .* got 3"
    ):
        train(run, **(KEYS | {"epochs": 3}), method="ntk-cl", resume=True)


def test_a_run_that_another_process_writes_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(tmp_path / "run", monkeypatch)
    lock = os.open(run, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="is in use: another process runs there"):
        resume(run)
    os.close(lock)
    resume(run)


def test_a_folder_without_a_run_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"got no config\.toml of one in"):
        ntkcl.resume(tmp_path)
    with pytest.raises(ValueError, match="expected an 'output' to go on with, got none"):
        ntkcl.train(resume=True)


# ---- signals and the command line ----------------------------------------------------------------


def command(*words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ntkcl", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_with_a_checkpoint_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "run"
    process = command("train", "--output", output, "--epochs", "50", "--threads", "1")
    log = output / "events.jsonl"
    while process.poll() is None and not (log.exists() and b'"step"' in log.read_bytes()):
        signal.sigtimedwait([], 0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.rstrip().endswith(f"go on with `ntkcl resume {output}`")
    progress = json.loads(latest(output, "json").read_text())["progress"]
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert progress["step"] == 1 + max(event.get("step", -1) for event in steps)


def test_the_command_goes_on(tmp_path: Path) -> None:
    words = ["--train-per-class", "8", "--test-per-class", "4", "--epochs", "1"]
    first = command("train", "--output", tmp_path / "run", "--resume", *words)
    assert first.wait(60) == 0
    again = command("resume", tmp_path / "run")
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert "final accuracy" in output
    wrong = command("resume", tmp_path / "nothing")
    _, errors = wrong.communicate(timeout=60)
    assert wrong.returncode == 2
    assert "got no config.toml" in errors


def test_killed_runs_end_as_if_nothing_had_been() -> None:
    runs = os.environ.get("NTKCL_KILLED_RUNS", "2")
    harness = Path(__file__).with_name("kill_harness.py")
    done = subprocess.run(
        [sys.executable, harness, "--runs", runs], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{runs} of {runs} results equal to the bit, 0 stray files" in done.stdout


# ---- who listens ---------------------------------------------------------------------------------


def test_a_callback_hears_every_event_and_can_stop_the_run(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", **KEYS)
    seen: list[dict[str, Any]] = []

    def stop_in_the_second_task(event: dict[str, Any]) -> bool:
        seen.append(event)
        return event["event"] == "step" and event["task"] == 1

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", **KEYS, callbacks=[stop_in_the_second_task])
    assert [event["step"] for event in seen if event["event"] == "step"][-1] == 0
    resume(tmp_path / "run", callbacks=[seen.append])
    assert differences(whole.output, tmp_path / "run") == []
    assert {"run_begin", "task_begin", "step", "epoch", "evaluation", "resume", "task_end"} <= {
        event["event"] for event in seen
    }


def test_a_failing_callback_stops_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", **KEYS)

    def fail(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            raise RuntimeError("of the callback")

    with pytest.raises(RuntimeError, match="of the callback") as error:
        train(tmp_path / "run", **KEYS, callbacks=fail)
    assert "`ntkcl resume " in " ".join(error.value.__notes__)
    progress = json.loads(latest(tmp_path / "run", "json").read_text())["progress"]
    assert (progress["task"], progress["step"]) == (0, 3)
    resume(tmp_path / "run")
    assert differences(whole.output, tmp_path / "run") == []


def test_a_callback_that_fails_at_the_last_event_is_heard(tmp_path: Path) -> None:
    def fail(event: dict[str, Any]) -> None:
        if event["event"] == "task_end" and event["task"] == 2:
            raise RuntimeError("of the callback")

    with pytest.raises(RuntimeError, match="of the callback"):
        train(tmp_path / "run", callbacks=fail)
    assert resume(tmp_path / "run").final_accuracy >= 0


@pytest.mark.parametrize("callbacks", [3, [3], [print, None], None, "print"])
def test_callbacks_that_are_no_functions_are_refused_before_anything_is_written(
    tmp_path: Path, callbacks: Any
) -> None:
    with pytest.raises(
        TypeError, match=r"\[callbacks\] expected a function or a list of functions"
    ):
        train(tmp_path / "run", callbacks=callbacks)
    assert list(tmp_path.iterdir()) == []


def test_without_tensorboard_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install ntkcl\[tensorboard\]"):
        train(tmp_path / "run", tensorboard=True)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_shows_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = stopped(tmp_path / "run", monkeypatch, after=13, tensorboard=True)
    resume(run)
    found = reading.EventAccumulator(str(run / "tensorboard")).Reload()
    steps = [scalar.step for scalar in found.Scalars("loss/total")]
    assert steps == sorted(set(steps))
    log = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert len(steps) == sum(event["event"] == "step" for event in log)
    assert len(found.Scalars("accuracy/top1")) == 3


# ---- what a review found -------------------------------------------------------------------------


def test_a_refused_or_failed_resume_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Protects: a notebook, whose process lives on.
    run = stopped(tmp_path / "run", monkeypatch)
    log = (run / "events.jsonl").read_bytes()
    (run / "events.jsonl").unlink()
    (run / "events.jsonl").mkdir()
    with pytest.raises(OSError, match="events"):
        resume(run)
    (run / "events.jsonl").rmdir()
    (run / "events.jsonl").write_bytes(log)
    resume(run)


def test_a_strangers_file_among_the_checkpoints_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(tmp_path / "run", monkeypatch)
    (run / "checkpoint" / "notes.txt").write_text("mine")
    resume(run)
    resume(run)
    assert [path.name for path in (run / "checkpoint").iterdir()] == ["notes.txt"]


def test_after_a_damaged_checkpoint_the_whole_one_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(tmp_path / "run", monkeypatch)
    bad = latest(run, "json")
    truncate(bad)
    whole = min((run / "checkpoint").glob("*.json"))
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        with pytest.raises(KeyboardInterrupt):
            resume(run)
    assert whole.exists()
    assert not bad.exists()


def test_a_log_that_was_cut_goes_on_in_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(tmp_path / "run", monkeypatch)
    truncate(run / "events.jsonl")
    resume(run)
    assert all(json.loads(line) for line in (run / "events.jsonl").read_text().splitlines())


@pytest.mark.parametrize("content", [b"{", b"[]", b""])
def test_a_damaged_environment_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    run = stopped(tmp_path / "run", monkeypatch)
    (run / "environment.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"environment\.json' is damaged"):
        resume(run)


def test_arrays_must_be_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stopped(tmp_path / "run", monkeypatch)
    with pytest.raises(ValueError, match="expected the arrays"):
        ntkcl.resume(run)
    resume(run)


def replace_tensor(run: Path, name: str, change_tensor: Any) -> None:
    """In the last checkpoint, under checksums that fit."""
    path = latest(run, "safetensors")
    tensors = load_file(path)
    content = safetensors_bytes(tensors | {name: change_tensor(tensors[name])}, {})
    path.write_bytes(content)
    path = path.with_suffix(".json")
    manifest = checkpoints._Manifest.model_validate(json.loads(path.read_text()))
    sealed = manifest.model_copy(update={"tensors_sha256": hashlib.sha256(content).hexdigest()})
    path.write_bytes(sealed.sealed())


@pytest.mark.parametrize("count", [2**62, -1, 0])
def test_counts_that_do_not_fit_are_refused(tmp_path: Path, count: int) -> None:
    # Protects: sums of counts from a file, which could wrap.
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(run, **KEYS, method="lorac-ipc", callbacks=[lambda event: event.get("task") == 1])
    replace_tensor(run, "method.inference.clusters", lambda t: t.fill_(count))
    with pytest.raises(ValueError, match=r"\[state\] the tensors inference\.\* do not fit"):
        resume(run)


@pytest.mark.parametrize(
    ("name", "change_tensor"),
    [
        ("method.prototypes", lambda t: t[:, :5]),
        ("method.tasks_in_list", lambda t: t.reshape(1, -1)),
        ("method.head.weight", lambda t: t.double()),
        ("method.previous.channel.down.weight", lambda t: t.sum()),
        ("optimizer.peft.0.momentum", lambda t: t[:1]),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change_tensor: Any
) -> None:
    run = stopped(tmp_path / "run", monkeypatch, ntk_cl={"mode": "both"})
    replace_tensor(run, name, change_tensor)
    with pytest.raises(ValueError, match=rf"\[state\] (method\.)?{name.partition('.')[2]}"):
        resume(run)
