"""What a person sees of a run: a live display on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ntkcl.result import HEADLINE, Result, Results, percent

Event = Mapping[str, Any]


class Silent:
    """Shows nothing. The displays below fill in the hooks: one per kind of event."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def __call__(self, event: Event) -> None:
        handler = getattr(self, f"on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def say(self, text: str) -> None:
        """Shows a line beside what the events tell."""


class Lines(Silent):
    """One line per epoch and per test: for log files and notebooks."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks = 0

    def on_run_begin(self, event: Event) -> None:
        self._tasks = event["tasks"]
        sizes = ", ".join(str(size) for size in event["task_sizes"])
        self.say(f"{self._tasks} tasks of {sizes} classes, {event['steps']} training steps")

    def on_resume(self, event: Event) -> None:
        self._tasks = event["tasks"]
        self.say(
            f"goes on in task {min(event['task'] + 1, self._tasks)} of {self._tasks}, after "
            f"{event['steps_done']} of {event['steps']} training steps"
        )

    def on_epoch(self, event: Event) -> None:
        self.say(
            f"{_task_text(event, self._tasks)}  epoch {event['epoch'] + 1}/{event['epochs']}  "
            f"{_loss_text(event['losses'])}  {event['images_per_second']:.0f} images/s"
        )

    def on_forward_transfer(self, event: Event) -> None:
        self.say(f"{_task_text(event, self._tasks)}  {_transfer_text(event)}")

    def on_evaluation(self, event: Event) -> None:
        self.say(f"{_task_text(event, self._tasks)}  {_accuracy_text(event)}")

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)


class Live(Silent):
    """Two bars: all training steps with the time left, and what is going on now."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._all = self._progress.add_task("training", total=None, detail="")
        self._now = self._progress.add_task("preparing", total=None, detail="")
        self._tasks = 0
        self._has_steps = True

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_run_begin(self, event: Event) -> None:
        self._tasks = event["tasks"]
        # A method without training has no steps: its tasks are counted.
        self._has_steps = event["steps"] > 0
        self._progress.update(self._all, total=event["steps"] or self._tasks)

    def on_resume(self, event: Event) -> None:
        self.on_run_begin(event)
        done = event["steps_done"] if self._has_steps else event["task"]
        self._progress.update(self._all, completed=done, description="going on")

    def on_task_begin(self, event: Event) -> None:
        self._progress.update(self._all, description=_task_text(event, self._tasks))

    def on_step(self, event: Event) -> None:
        self._progress.advance(self._all)
        self._progress.update(
            self._now,
            description=f"epoch {event['epoch'] + 1}",
            completed=event["step"] + 1,
            total=event["steps"],
            detail=_loss_text(event["losses"]),
        )

    def on_epoch(self, event: Event) -> None:
        self._progress.update(self._all, detail=f"{event['images_per_second']:.0f} images/s")

    def on_stage(self, event: Event) -> None:
        self._progress.update(
            self._now,
            description=event["name"],
            completed=event["done"],
            total=event["count"],
            detail="",
        )

    def on_forward_transfer(self, event: Event) -> None:
        self.say(f"{_task_text(event, self._tasks)}  {_transfer_text(event)}")

    def on_evaluation(self, event: Event) -> None:
        self.say(f"{_task_text(event, self._tasks)}  {_accuracy_text(event)}")

    def on_task_end(self, event: Event) -> None:
        if not self._has_steps:
            self._progress.advance(self._all)

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)


def make_progress(shown: bool) -> Silent:
    """The display that fits where the output goes."""
    if not shown:
        return Silent()
    console = Console(stderr=True)
    if console.is_jupyter:
        return Lines(Console(file=sys.stdout, force_jupyter=False))
    return Live(console) if console.is_terminal else Lines(console)


def announce(shown: bool, text: str) -> None:
    """A line before the display of a run."""
    make_progress(shown).say(text)


def result_table(result: Result) -> Group:
    """Accuracies after each task, and the headline numbers below."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("after task", "all seen", "new", "old", "task id", "within task"):
        table.add_column(name, justify="right")
    for e in result.evaluations:
        numbers = (e.top1, e.new_classes, e.old_classes, e.task_id, e.within_task)
        table.add_row(str(e.task + 1), *(percent(number) for number in numbers))
    return Group(table, _headline(result))


def results_table(results: Results) -> Group:
    """The headline numbers of each seed, and their mean and deviation below."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("seed", *HEADLINE):
        table.add_column(name.replace("_", " "), justify="right")
    for seed, result in zip(results.seeds, results, strict=True):
        table.add_row(str(seed), *(percent(getattr(result, name)) for name in HEADLINE))
    return Group(table, _headline(results))


def _headline(result: Result | Results) -> Table:
    headline = Table.grid(padding=(0, 2))
    headline.add_column()
    headline.add_column(justify="right", style="bold")
    for name, text in result.headline().items():
        headline.add_row(f"  {name}", text)
    return headline


def _task_text(event: Event, tasks: int) -> str:
    return f"task {event['task'] + 1}/{tasks}"


def _accuracy_text(event: Event) -> str:
    return f"accuracy {event['top1']:.2f} % on {event['count']} test images of all classes seen"


def _transfer_text(event: Event) -> str:
    return (
        f"before training, class means tell its classes apart in {event['learned']:.2f} % "
        f"(pretrained: {event['pretrained']:.2f} %)"
    )


def _loss_text(losses: Mapping[str, float]) -> str:
    """The total; its parts are in the event log."""
    return f"loss {losses['total']:.3f}" if "total" in losses else ""
