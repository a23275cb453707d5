"""What a run gives back: numbers as the core counted them, readable in a shell and a notebook."""

import dataclasses
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import fake_core
import ntkcl
from ntkcl import _C, Result
from ntkcl.config import resolve
from ntkcl.figures import accuracy_figure, png
from ntkcl.progress import result_table
from ntkcl.result import percent, result_of


@pytest.fixture
def result() -> Result:
    raw = fake_core.FakeTrainer("ntk-cl", {})._result()
    return result_of(raw, Path("runs/x"), resolve({"dataset": "<digits>"}))


def test_the_numbers_are_the_cores(result: Result) -> None:
    assert (result.final_accuracy, result.average_accuracy) == (87.5, 88.75)
    assert (result.forgetting, result.backward_transfer) == (3.75, -3.75)
    assert result.accuracy == (90.0, 88.75, 87.5)
    expected = [[90, math.nan, math.nan], [87.5, 90, math.nan], [85, 87.5, 90]]
    np.testing.assert_array_equal(result.accuracy_matrix, expected)
    last = result.evaluations[-1]
    assert (last.task, last.count, last.per_task) == (2, 60, (85.0, 87.5, 90.0))
    assert (last.task_id, last.within_task, last.top5) == (95.0, 97.0, 99.0)
    assert math.isnan(result.evaluations[0].old_classes)


def test_it_cannot_be_changed(result: Result) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.final_accuracy = 100.0  # type: ignore[misc]


def test_it_reads_well_in_a_shell(result: Result) -> None:
    text = repr(result)
    assert "\n" not in text
    assert "ntk-cl on <digits>, 3 tasks: final accuracy 87.50 %" in text
    assert "runs/x" in text


def test_it_reads_well_in_a_notebook(result: Result) -> None:
    html = result._repr_html_()
    assert "&lt;digits&gt;" in html
    assert "<digits>" not in html
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    assert [row.count("<td>") for row in rows] == [0, 4, 4, 4]
    assert "<td>85.00</td><td>87.50</td><td>90.00</td>" in rows[-1]


def test_the_table_has_a_row_per_task_and_the_headline(result: Result) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(result_table(result))
    text = console.export_text()
    assert re.search(r"3 +87\.50 % +90\.00 % +85\.00 % +95\.00 % +97\.00 %", text)
    assert re.search(r"1 +90\.00 % +90\.00 % +- ", text)
    assert re.search(r"average accuracy +88\.75 %", text)
    assert re.search(r"backward transfer +-3\.75 %", text)


def test_the_figure_shows_the_accuracies(result: Result) -> None:
    curve, matrix, *_ = accuracy_figure(result).axes
    np.testing.assert_array_equal(curve.lines[0].get_xydata(), [[1, 90], [2, 88.75], [3, 87.5]])
    low, high = curve.get_ylim()
    assert low < 87.5 and high > 100
    shown = np.ma.filled(matrix.images[0].get_array().astype(float), np.nan)
    np.testing.assert_array_equal(shown, result.accuracy_matrix)
    assert [text.get_text() for text in matrix.texts] == ["90", "88", "90", "85", "88", "90"]


def test_plots_leave_matplotlibs_global_state_alone(result: Result) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums(), dict(plt.rcParams)
    assert png(result).startswith(b"\x89PNG")
    assert (plt.get_fignums(), dict(plt.rcParams)) == before


def test_one_task_has_no_forgetting(result: Result) -> None:
    raw = fake_core.FakeTrainer("ntk-cl", {})._result()
    raw |= {
        "accuracy_matrix": raw["accuracy_matrix"][:1, :1],
        "evaluations": raw["evaluations"][:1],
        "forgetting": math.nan,
        "backward_transfer": math.nan,
    }
    single = result_of(raw, Path("x"), result.config)
    assert "forgetting -," in repr(single)
    assert png(single).startswith(b"\x89PNG")


def test_it_can_be_read_back_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_C, "Trainer", fake_core.FakeTrainer)
    result = ntkcl.train(output=tmp_path / "run", progress=False, epochs=7)
    again = ntkcl.load_result(tmp_path / "run")
    assert (again.config, again.output) == (result.config, result.output)
    assert repr(again.to_dict()) == repr(result.to_dict())
    assert repr(again.evaluations) == repr(result.evaluations)
    np.testing.assert_array_equal(again.accuracy_matrix, result.accuracy_matrix)
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected a finished run"):
        ntkcl.load_result(tmp_path / "run")


def test_percent() -> None:
    assert percent(93.756) == "93.76 %"
    assert percent(math.nan) == "-"
