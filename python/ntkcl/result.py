"""What a finished run gives back."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, overload

import numpy as np
import pydantic
from numpy.typing import NDArray

from ntkcl.config import Config, cautions, resolve
from ntkcl.files import read_object

if TYPE_CHECKING:
    from matplotlib.figure import Figure


METRICS = (
    "final_accuracy",
    "average_accuracy",
    "final_task_mean",
    "average_task_mean",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
)
HEADLINE = ("final_accuracy", "average_accuracy", "forgetting", "backward_transfer")


@dataclass(frozen=True)
class Evaluation:
    """The test after one task, over all classes seen so far. Percentages; NaN where undefined.

    Attributes:
      task: number of the task, from 0.
      count: test images.
      top1: A_t.
      top5: NaN up to five classes seen.
      per_task: accuracy on each seen task.
      old_classes: accuracy on classes of earlier tasks; NaN after the first.
      new_classes: accuracy on classes of this task.
      task_id: how often the predicted class is in the right task.
      within_task: accuracy where the prediction is restricted to the true task.
      inferred_task: how often the task that the method inferred is right; NaN where it infers none.
    """

    task: int
    count: int
    top1: float
    top5: float
    per_task: tuple[float, ...]
    old_classes: float
    new_classes: float
    task_id: float
    within_task: float
    inferred_task: float

    @classmethod
    def of(cls, numbers: Mapping[str, Any]) -> Evaluation:
        """Of what the core or result.json has."""
        return cls(**{**numbers, "per_task": tuple(numbers["per_task"])})


@dataclass(frozen=True, eq=False)
class Result:
    """What a run gives back. Accuracies in percent (0 to 100), T tasks.

    Attributes:
      final_accuracy: A_T, over all test images.
      average_accuracy: the mean of A_1 ... A_T.
      final_task_mean: the mean of the tasks' accuracies after the last; tasks weigh equally.
      average_task_mean: the mean of such means after each task.
      forgetting: the mean over earlier tasks of best minus final accuracy; 0 with one task.
      backward_transfer: the mean over earlier tasks of final accuracy minus that right after the
        task; 0 with one task.
      forward_transfer: with the option of this name, what the features learned so far are worth for
        a task before it is learned: accuracy of the nearest class mean among its classes by them
        minus that by the pretrained backbone's, the mean over all tasks but the first; else NaN.
      accuracy_matrix: (T, T), [i, j]: the accuracy on task j after task i; NaN for j > i.
      evaluations: the test after each task.
      seconds: wall time of the run.
      training_seconds: of it, in training steps.
      images_per_second: images trained on per training second.
      trainable_parameters: the most that a task trains.
      stored_parameters: numbers that the method keeps beside the backbone.
      peak_memory: the most bytes during the run: with CUDA those that torch reserved on the device,
        else the resident ones of the process (since the process began, where the system does not
        count anew). Of a run that was gone on with, those of its last process.
      skipped_images: corrupt images left out, with on_corrupt="skip".
      output: the run folder.
      config: the configuration that it was run with.
    """

    final_accuracy: float
    average_accuracy: float
    final_task_mean: float
    average_task_mean: float
    forgetting: float
    backward_transfer: float
    forward_transfer: float
    accuracy_matrix: NDArray[np.float64]
    evaluations: tuple[Evaluation, ...]
    seconds: float
    training_seconds: float
    images_per_second: float
    trainable_parameters: int
    stored_parameters: int
    peak_memory: int
    skipped_images: int
    output: Path
    config: Config

    @property
    def accuracy(self) -> tuple[float, ...]:
        """A_t after each task: top-1 over all test images of the classes seen."""
        return tuple(evaluation.top1 for evaluation in self.evaluations)

    def to_dict(self) -> dict[str, Any]:
        """What result.json holds: numbers, lists and dicts; NaN stays NaN."""
        numbers = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("accuracy_matrix", "evaluations", "output", "config")
        }
        about = ("method", "variant", "preset", "dataset", "backbone", "seed")
        return {
            **{name: getattr(self.config, name) for name in about},
            **numbers,
            "accuracy": list(self.accuracy),
            "accuracy_matrix": self.accuracy_matrix.tolist(),
            "evaluations": [
                {**vars(evaluation), "per_task": list(evaluation.per_task)}
                for evaluation in self.evaluations
            ],
        }

    def plot(self) -> Figure:
        """Accuracy over the tasks beside the accuracy matrix, as a matplotlib figure."""
        from ntkcl.figures import accuracy_figure

        return accuracy_figure(self)

    def headline(self) -> dict[str, str]:
        """The numbers that are quoted first, as text by name."""
        return _headline({name: percent(getattr(self, name)) for name in HEADLINE}, self.config)

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name} {text}" for name, text in self.headline().items())
        return (
            f"<ntkcl.Result {self.config.method} on {self.config.dataset_name}, "
            f"{len(self.evaluations)} tasks: {numbers}; {self.seconds:.1f} s, '{self.output}'>"
        )

    def _repr_html_(self) -> str:
        head = "".join(f"<th>task {task + 1}</th>" for task in range(len(self.evaluations)))
        rows = "".join(
            f"<tr><th>{e.task + 1}</th><td><b>{e.top1:.2f}</b></td>"
            + "".join(f"<td>{value:.2f}</td>" for value in e.per_task)
            + "<td></td>" * (len(self.evaluations) - len(e.per_task))
            + "</tr>"
            for e in self.evaluations
        )
        numbers = " · ".join(f"{name} <b>{text}</b>" for name, text in self.headline().items())
        title = html.escape(f"{self.config.method} on {self.config.dataset_name}")
        return (
            f"<p><b>{title}</b> · {numbers} · {self.seconds:.1f} s</p>"
            f"<table><tr><th>after task</th><th>all seen</th>{head}</tr>{rows}</table>"
        )


@dataclass(frozen=True, eq=False)
class Results(Sequence[Result]):
    """Results of runs that differ in their seed alone: S of them in the order of the seeds.

    Their scalar metrics (METRICS) have a `mean` and a sample standard deviation `std`, by name.
    """

    runs: tuple[Result, ...]
    output: Path  # the folder of all seeds

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(result.config.seed for result in self.runs)

    @property
    def mean(self) -> dict[str, float]:
        """Mean of each metric over the seeds."""
        return {name: float(np.mean(self._values(name))) for name in METRICS}

    @property
    def std(self) -> dict[str, float]:
        """Sample standard deviation of each metric over the seeds; NaN for one seed."""
        several = len(self.runs) > 1
        return {
            name: float(np.std(self._values(name), ddof=1)) if several else math.nan
            for name in METRICS
        }

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """(S, T): A_t after each task."""
        return np.array([result.accuracy for result in self.runs], dtype=np.float64)

    def headline(self) -> dict[str, str]:
        """The numbers that are quoted first, mean and standard deviation, as text by name."""
        mean, std = self.mean, self.std
        texts = {name: percent(mean[name], std[name]) for name in HEADLINE}
        return _headline(texts, self.runs[0].config)

    @overload
    def __getitem__(self, index: int) -> Result: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Result, ...]: ...

    def __getitem__(self, index: int | slice) -> Result | tuple[Result, ...]:
        return self.runs[index]

    def __len__(self) -> int:
        return len(self.runs)

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name} {text}" for name, text in self.headline().items())
        config = self.runs[0].config
        return (
            f"<ntkcl.Results {config.method} on {config.dataset_name}, "
            f"seeds {', '.join(map(str, self.seeds))}: {numbers}; '{self.output}'>"
        )

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in HEADLINE)
        rows = "".join(
            f"<tr><th>{result.config.seed}</th>"
            + "".join(f"<td>{percent(getattr(result, name))}</td>" for name in HEADLINE)
            + "</tr>"
            for result in self.runs
        )
        config = self.runs[0].config
        numbers = " · ".join(f"{name} <b>{text}</b>" for name, text in self.headline().items())
        title = html.escape(f"{config.method} on {config.dataset_name}, {len(self)} seeds")
        return f"<p><b>{title}</b> · {numbers}</p><table><tr><th>seed</th>{head}</tr>{rows}</table>"

    def _values(self, name: str) -> list[float]:
        return [getattr(result, name) for result in self.runs]


def result_of(raw: Mapping[str, Any], output: Path, config: Config) -> Result:
    """A `Result` from what the C++ task loop returns."""
    evaluations = tuple(Evaluation.of(entry) for entry in raw["evaluations"])
    own = {"accuracy_matrix", "evaluations", "output", "config"}
    numbers = {name: raw[name] for name in Result.__dataclass_fields__ if name not in own}
    matrix = np.asarray(raw["accuracy_matrix"], dtype=np.float64)
    return Result(
        **numbers, accuracy_matrix=matrix, evaluations=evaluations, output=output, config=config
    )


def read_result(path: Path) -> Result:
    """The result of a finished run from its folder; ValueError where result.json is damaged."""
    file = path / "result.json"
    try:
        raw = _ResultFile.model_validate(read_object(file)).model_dump()
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"[load_result] '{file}' is damaged: '{key}': {first['msg']}") from None
    except ValueError as damage:
        raise ValueError(f"[load_result] {damage}") from None
    rows = [evaluation["per_task"] for evaluation in raw["evaluations"]]
    tasks = len(rows)
    triangle = all(len(row) == task + 1 for task, row in enumerate(rows))
    if not tasks or not triangle or [len(row) for row in raw["accuracy_matrix"]] != [tasks] * tasks:
        raise ValueError(
            f"[load_result] '{file}' is damaged: expected an evaluation and a row after each of "
            f"{tasks} tasks"
        )
    return result_of(raw, path, resolve(file=path / "config.toml", any_method=True))


def _numbers_of(kind: type) -> dict[str, Any]:
    """The fields of a result that are one number, for pydantic."""
    kinds = {"int": int, "float": _Number}
    return {
        field.name: (kinds[field.type], ...)
        for field in dataclasses.fields(kind)
        if field.type in kinds
    }


# result.json, which has null where a number is undefined.
_Number = Annotated[
    float, pydantic.BeforeValidator(lambda value: math.nan if value is None else value)
]
_STRICT = pydantic.ConfigDict(strict=True)
_EvaluationFile = pydantic.create_model(
    "_EvaluationFile",
    __config__=_STRICT,
    per_task=(list[_Number], ...),
    **_numbers_of(Evaluation),
)
_ResultFile = pydantic.create_model(
    "_ResultFile",
    __config__=_STRICT,
    accuracy_matrix=(list[list[_Number]], ...),
    evaluations=(list[_EvaluationFile], ...),  # type: ignore[valid-type]
    **_numbers_of(Result),
)


def percent(value: float, deviation: float = math.nan) -> str:
    """ "93.76 %", "93.76 ± 0.12 %", and "-" where undefined."""
    if math.isnan(value):
        return "-"
    return f"{value:.2f} %" if math.isnan(deviation) else f"{value:.2f} ± {deviation:.2f} %"


def _headline(numbers: Mapping[str, str], config: Config) -> dict[str, str]:
    """Under the names that are read, with what a reader must know."""
    cautions_of = cautions(config)
    return {
        **{name.replace("_", " "): text for name, text in numbers.items()},
        **({"caution": "; ".join(cautions_of)} if cautions_of else {}),
    }
