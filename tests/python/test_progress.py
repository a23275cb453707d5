"""What a person sees while a run goes on, in the three places where output goes."""

import io
import re

import pytest
from rich.console import Console

import fake_core
import ntkcl.progress as progress
from ntkcl.progress import Lines, Live, Silent, make_progress


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_lines_tell_each_epoch_and_each_test() -> None:
    console = Console(file=io.StringIO(), width=40)
    with Lines(console) as shown:
        fake_core.FakeTrainer("ntk-cl", {}).run(shown, None)
    assert text_of(console).splitlines() == [
        "3 tasks of 2, 2, 2 classes, 12 training steps",
        "task 1/3  epoch 1/1  loss 1.500  128 images/s",
        "task 1/3  accuracy 90.00 % on 20 test images of all classes seen",
        "task 2/3  epoch 1/1  loss 1.500  128 images/s",
        "task 2/3  accuracy 88.75 % on 40 test images of all classes seen",
        "task 3/3  epoch 1/1  loss 1.500  128 images/s",
        "task 3/3  accuracy 87.50 % on 60 test images of all classes seen",
    ]


def test_a_terminal_gets_bars_that_end_full() -> None:
    console = terminal()
    with Live(console) as shown:
        fake_core.FakeTrainer("ntk-cl", {}).run(shown, None)
        everything, now = shown._progress.tasks
        assert (everything.completed, everything.total) == (12, 12)
        assert everything.description == "task 3/3"
        assert everything.fields["detail"] == "128 images/s"
        assert (now.description, now.completed, now.total) == ("prototypes", 64, 64)
    assert "task 2/3  accuracy 88.75 % on 40 test images" in text_of(console)


def test_a_method_without_training_counts_tasks() -> None:
    with Live(terminal()) as shown:
        shown({"event": "run_begin", "tasks": 2, "task_sizes": [5, 5], "steps": 0})
        shown({"event": "task_end", "task": 0, "seconds": 1.0})
        assert (shown._progress.tasks[0].completed, shown._progress.tasks[0].total) == (1, 2)


def test_with_training_the_end_of_a_task_is_no_step() -> None:
    with Live(terminal()) as shown:
        shown({"event": "run_begin", "tasks": 2, "task_sizes": [5, 5], "steps": 2})
        shown({"event": "task_end", "task": 0, "seconds": 1.0})
        assert shown._progress.tasks[0].completed == 0


def test_the_display_fits_where_the_output_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(make_progress(False)) is Silent
    assert type(make_progress(True)) is Lines  # pytest's stderr is no terminal
    monkeypatch.setattr(progress, "Console", lambda **_: terminal())
    assert type(make_progress(True)) is Live


def test_events_that_a_display_does_not_know_are_passed_over() -> None:
    with Live(terminal()) as live, Lines(terminal()) as lines, Silent() as silent:
        for shown in (live, lines, silent):
            shown({"event": "of a later version"})
