"""Runs beside each other on paper: one HTML file, a CSV file and rows for LaTeX."""

from __future__ import annotations

import base64
import csv
import html
import io
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ntkcl.comparison import Comparison, Group, Runs, Table, compare
from ntkcl.files import write_atomically

_SOURCES = (
    "Backward and forward transfer: Lopez-Paz and Ranzato 2017; ECE: Guo et al. 2017. Forward "
    "transfer is measured where the option forward_transfer asks for it. A class-incremental head "
    "has no scores of classes to come, so class means take its place."
)


@dataclass(frozen=True)
class Column:
    """A number of a run as the tables show it."""

    key: str
    title: str
    doc: str
    show: Callable[[float], str] = "{:.2f}".format
    has_spread: bool = True


def _millions(count: float) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e4 else f"{count:.0f}"


def _gibibytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


COLUMNS = (
    Column("final_accuracy", "final", "accuracy on all test images after the last task, A_T (%)"),
    Column("average_accuracy", "average", "mean of A_1 ... A_T (%)"),
    Column("forgetting", "forgetting", "best minus final accuracy, mean over earlier tasks (%)"),
    Column(
        "backward_transfer",
        "backward transfer",
        "final accuracy minus that right after the task, mean over earlier tasks (%)",
    ),
    Column(
        "forward_transfer",
        "forward transfer",
        "accuracy on a task's classes by class means of the features learned before it, minus "
        "that of the pretrained backbone's, mean over later tasks (%)",
    ),
    Column("new_classes", "new classes", "accuracy right after learning them, mean over tasks (%)"),
    Column("task_id", "task id", "test images predicted as a class of their own task (%)"),
    Column(
        "ece",
        "ECE",
        "expected calibration error, 15 bins, after the last task (%): of the softmax of the "
        "scores as the method compares them. Cosines, distances and ridge outputs are no logits, "
        "so it says nothing there of how well a method knows when it is wrong",
    ),
    Column(
        "images_per_second",
        "images per second",
        "images trained on per second of training",
        "{:.0f}".format,
    ),
    Column("minutes", "minutes", "wall time of the whole run"),
    Column("trainable_parameters", "trainable", "trained parameters", _millions, False),
    Column(
        "stored_parameters",
        "stored",
        "parameters stored beside the frozen backbone",
        _millions,
        False,
    ),
    Column("peak_memory", "memory", "peak memory", _gibibytes, False),
)
_QUOTED = ("final_accuracy", "average_accuracy", "forgetting")  # in terminals and in LaTeX


def report(
    runs: Runs | Iterable[Runs],
    output: str | os.PathLike[str] = "report.html",
    together: bool = False,
) -> Path:
    """Writes finished runs beside each other: `output`, and next to it a CSV file (one row per
    run, every metric) and a .tex file (one row per method: final, average, forgetting).

    Runs that differ in their seed only are shown as mean and sample standard deviation. Runs of
    different protocols (images, split, class order, weights, preprocessing) get tables of their
    own, which say how they differ.

    Args:
      runs: run folders, folders that hold some (of seeds, of a sweep, of those), or results; one
        or several. Of a folder's runs those that have not finished are left out and named.
      output: name of the HTML file. Existing files are replaced.
      together: one table for all protocols; it says how they differ.

    Returns:
      The path of the HTML file.

    Raises:
      FileNotFoundError: no finished run in a folder, or it is one that did not finish; nothing
        was written.
      ValueError: no run was given, a run is damaged, or `output` does not end in .html.
    """
    path = checked_output(output)
    write(compare(runs, together), path)
    return path


def checked_output(output: str | os.PathLike[str]) -> Path:
    """The path that a report goes to."""
    path = Path(output).expanduser()
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"[report] 'output': expected a name that ends in .html, got '{output}'")
    return path


def write(tables: Comparison, path: Path) -> None:
    """Writes the HTML file and those beside it. All are made before the first is written."""
    files = {
        path.with_suffix(".csv"): to_csv(tables),
        path.with_suffix(".tex"): to_latex(tables),
        path: to_html(tables),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            write_atomically(file, text.encode(errors="replace"))
    except OSError as error:
        raise OSError(f"[report] cannot write to '{path}': {error.strerror}") from None


def spread_text(group: Group, column: Column) -> str:
    """ "96.89 ± 0.31"; the mean alone for one run, "-" where undefined."""
    mean, std = group.statistics(column.key)
    if math.isnan(mean):
        return "-"
    if math.isnan(std) or not column.has_spread:
        return column.show(mean)
    return f"{column.show(mean)} ± {column.show(std)}"


def quoted_columns() -> list[Column]:
    """Those that are quoted first."""
    return [column for column in COLUMNS if column.key in _QUOTED]


def table_title(number: int, tables: Sequence[Table]) -> str:
    """ "Protocol 2: cifar100, 10 tasks of 10 classes": what a table holds, on one line."""
    what = dict.fromkeys(map(_sequence_text, tables[number - 1].groups))
    return (f"Protocol {number}: " if len(tables) > 1 else "") + "; ".join(what)


def _sequence_text(group: Group) -> str:
    run = group.runs[0]
    tasks = len(run.result.evaluations)
    text = f"{_line(group.config.dataset_name)}, {tasks} task{'s' if tasks > 1 else ''}"
    # The first, those of the increment, and the last, which may have what is left.
    sizes = ", then ".join(str(size) for size, _ in itertools.groupby(run.task_sizes))
    return f"{text} of {sizes} classes" if sizes else text


def notes(tables: Sequence[Table], number: int) -> list[str]:
    """What a reader of a table must know: how its protocol differs, what is wrong with its runs."""
    table = tables[number - 1]
    what = "Differs from protocol 1" if len(tables) > 1 else "Not one protocol"
    differs = [f"{what}: {'; '.join(table.differences)}"] if table.differences else []
    cautions = [
        f"Caution, {group.name}: {text}" for group in table.groups for text in group.cautions
    ]
    return [_line(text) for text in differs + cautions]


def left_out(tables: Comparison) -> list[str]:
    """Which runs are in no table."""
    return [_line(f"Left out: '{folder}' has not finished") for folder in tables.unfinished]


# ---- CSV and LaTeX -------------------------------------------------------------------------------


def to_csv(tables: Sequence[Table]) -> str:
    """One row per run with every scalar metric; empty where undefined."""
    rows = []
    for number, table in enumerate(tables, start=1):
        for group in table.groups:
            for run in group.runs:
                about = {
                    "run": str(run.folder),
                    "protocol": number,
                    "group": group.name,
                    **{
                        key: getattr(run.config, key)
                        for key in ("method", "variant", "dataset", "backbone", "seed")
                    },
                    "class_order_seed": run.config.class_order_seed,
                    "tasks": len(run.result.evaluations),
                }
                numbers = {k: "" if math.isnan(v) else repr(v) for k, v in run.numbers.items()}
                rows.append(about | numbers)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_latex(tables: Comparison) -> str:
    """One row per group for a table of four columns: name, final, average, forgetting."""
    lines = ["% method & final accuracy & average accuracy & forgetting (%; mean and std)"]
    lines += [f"% {text}" for text in left_out(tables)]
    for number, table in enumerate(tables, start=1):
        lines.append(f"% {table_title(number, tables)}")
        lines += [f"% {note}" for note in notes(tables, number)]
        for group in table.groups:
            cells = [_latex_numbers(group, column) for column in quoted_columns()]
            lines.append(" & ".join([_latex_text(group.name), *cells]) + r" \\")
    return "\n".join(lines) + "\n"


def _latex_numbers(group: Group, column: Column) -> str:
    text = spread_text(group, column)
    return "--" if text == "-" else f"${text.replace('±', chr(92) + 'pm')}$"


def _latex_text(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: "\\" + character for character in "#$%&_{}"}
    return "".join(special.get(character, character) for character in _line(text))


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


# ---- HTML ----------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 88rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.83rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.5rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid var(--line); white-space: normal; vertical-align: bottom; }
td { border-bottom: 1px solid var(--line); }
.name { text-align: left; white-space: normal; } td.name:first-child { min-width: 9rem; }
.note { background: var(--soft); border-left: 4px solid #d55e00; padding: 0.4rem 0.8rem; }
.about { font-size: 0.87rem; opacity: 0.85; overflow-wrap: anywhere; }
img { max-width: 100%; background: #fff; border-radius: 6px; margin: 0.3rem 0; }
dt { font-weight: 600; float: left; clear: left; margin-right: 0.5rem; } dd { margin: 0; }
"""


def to_html(tables: Comparison) -> str:
    """One page without scripts and without anything from elsewhere."""
    count = sum(len(group.runs) for table in tables for group in table.groups)
    title = f"ntkcl report: {count} run{'s' if count > 1 else ''}"
    missing = "".join(map(_note, left_out(tables)))
    sections = "".join(_section(tables, number) for number in range(1, len(tables) + 1))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        f"{missing}{sections}{_LEGEND}</body></html>\n"
    )


def _section(tables: Sequence[Table], number: int) -> str:
    from ntkcl import figures  # matplotlib takes a second

    table = tables[number - 1]
    groups = table.groups
    common = " · ".join(f"{name} {text}" for name, text in table.protocol.items() if text != "none")
    parts = [f"<h2>{_safe(table_title(number, tables))}</h2>\n"]
    parts += map(_note, notes(tables, number))
    parts += [
        _overview(groups),
        f'<p class="about">{_safe(common)}</p>\n',
        _image(figures.svg(figures.curves_figure(groups)), "accuracy after each task"),
        _image(figures.svg(figures.forgetting_figure(groups)), "forgetting"),
    ]
    for group in groups:
        about = f"{group.name}: accuracy matrix, and confusion between tasks"
        parts.append(f"<h3>{_safe(group.name)}</h3>\n")
        parts.append(_image(figures.svg(figures.matrices_figure(group)), about))
    return "".join(parts) + _single_runs(groups)


def _overview(groups: Sequence[Group]) -> str:
    columns = [
        column
        for column in COLUMNS
        if not all(math.isnan(group.statistics(column.key)[0]) for group in groups)
    ]
    head = ["method", "variant", "seeds", *(column.title for column in columns)]
    rows = []
    for group in groups:
        settings = f"<br><small>{_safe(group.settings)}</small>" if group.settings else ""
        about = [_safe(group.config.method) + settings, *map(_safe, (group.config.variant,))]
        numbers = [_safe(spread_text(group, column)) for column in columns]
        rows.append([*about, _safe(group.seeds), *numbers])
    return _html_table(head, rows, named=3)


def _single_runs(groups: Sequence[Group]) -> str:
    """Every number of every run, folded away."""
    runs = [run for group in groups for run in group.runs]
    names = list(dict.fromkeys(name for run in runs for name in run.numbers))
    rows = [
        [_safe(str(run.folder)), *(_plain(run.numbers.get(name, math.nan)) for name in names)]
        for run in runs
    ]
    head = ["run", *(name.replace("_", " ") for name in names)]
    return f"<details><summary>Each run</summary>{_html_table(head, rows, 1)}</details>\n"


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]], named: int) -> str:
    """A table of HTML texts; the first `named` columns are words."""
    kinds = [' class="name"'] * named + [""] * (len(head) - named)
    titles = "".join(f"<th{kind}>{_safe(t)}</th>" for kind, t in zip(kinds, head, strict=True))
    lines = [
        "<tr>"
        + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>\n"
        for row in rows
    ]
    return f'<div class="wide"><table>\n<tr>{titles}</tr>\n{"".join(lines)}</table></div>\n'


def _note(text: str) -> str:
    return f'<p class="note">{_safe(text)}</p>\n'


def _image(content: bytes, about: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<p><img alt="{_safe(about)}" src="data:image/svg+xml;base64,{data}"></p>\n'


def _plain(value: float) -> str:
    if math.isnan(value):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _safe(text: str) -> str:
    return html.escape(text)


_LEGEND = (
    "<h2>What the columns mean</h2>\n<p>Mean ± sample standard deviation over the seeds.</p><dl>"
    + "".join(f"<dt>{_safe(c.title)}</dt><dd>{_safe(c.doc)}</dd>\n" for c in COLUMNS)
    + f'</dl>\n<p class="about">{_safe(_SOURCES)}</p>\n'
)
