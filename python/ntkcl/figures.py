"""Plots of results. Figures are made without pyplot: no window, no global state."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ntkcl.comparison import Group
from ntkcl.config import cautions
from ntkcl.result import Result

_INK = "#1f2933"
_LINE = "#1f5fa8"
_GRID = "#d9dee5"
# Okabe and Ito's colours, which the colour-blind tell apart; then the same in other strokes.
_COLORS = (_LINE, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4b4b4b")
_STROKES = ("-", "--", ":", "-.")
_NUMBERED = 12  # tasks up to which a matrix shows its numbers
_NAME = 100  # characters of a name in a figure


def accuracy_figure(result: Result) -> Figure:
    """Left: A_t over the tasks with the average. Right: the accuracy matrix."""
    figure = _figure(10.0, 4.2)
    curve, matrix = figure.subplots(1, 2)
    _draw_curve(curve, result)
    _draw_accuracies(matrix, result.accuracy_matrix)
    config = result.config
    title = [f"{config.method} on {config.dataset_name}, {config.backbone}", *cautions(config)]
    figure.suptitle("\n".join(title), color=_INK, parse_math=False)
    return figure


def curves_figure(groups: Sequence[Group]) -> Figure:
    """A_t over the tasks of each group: the mean, in a band of one standard deviation."""
    names = [_short(group.name) for group in groups]
    columns = 1 if max(map(len, names)) > _NAME / 2 else 2
    figure = _figure(8.6, 4.2 + 0.2 * math.ceil(len(groups) / columns))
    axes = figure.subplots()
    lows, handles = [], []
    for index, group in enumerate(groups):
        color, stroke = _color(index), _STROKES[index // len(_COLORS) % len(_STROKES)]
        mean, std = group.curve
        spread = np.nan_to_num(std)
        tasks = np.arange(1, len(mean) + 1)
        marker = "o" if len(tasks) <= 25 else ""
        handles += axes.plot(
            tasks, mean, color=color, linestyle=stroke, marker=marker, markersize=4, linewidth=1.8
        )
        if len(tasks) == 1:
            axes.errorbar(tasks, mean, spread, color=color, capsize=4)
        axes.fill_between(tasks, mean - spread, mean + spread, color=color, alpha=0.18, lw=0)
        lows.append(float(np.min(mean - spread)))
    _style_curve(axes, max(len(group.curve[0]) for group in groups), min(lows))
    legend = figure.legend(
        handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def forgetting_figure(groups: Sequence[Group]) -> Figure:
    """Forgetting of each group: the mean, with one standard deviation."""
    names = [textwrap.fill(_short(group.name), 36) for group in groups]
    figure = _figure(8.6, 1.0 + sum(0.3 + 0.14 * name.count("\n") for name in names))
    axes = figure.subplots()
    ends = [0.0]
    for index, group in enumerate(groups):
        mean, std = group.statistics("forgetting")
        if math.isnan(mean):
            _beside(axes, 0.0, index, "undefined")
            continue
        spread = 0.0 if math.isnan(std) else std
        axes.barh(index, mean, height=0.62, color=_color(index))
        if spread:
            axes.errorbar(mean, index, xerr=spread, color=_INK, capsize=3, linewidth=1)
        ends += [mean - spread, mean + spread]
        text = f"{mean:.2f}" if math.isnan(std) else f"{mean:.2f} ± {std:.2f}"
        _beside(axes, max(mean + spread, 0.0), index, text)
    axes.set_yticks(range(len(groups)), names, fontsize=8)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(1.1 * min(ends), 1.25 * max(ends) or 1.0)
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set(xlabel="forgetting (%)")
    _quieten(axes, "x")
    return figure


def matrices_figure(group: Group) -> Figure:
    """Left: the accuracy matrix. Right: which task the test images of a task were taken for. Both
    are means over the runs."""
    figure = _figure(10.4, 4.4)
    accuracies, confusion = figure.subplots(1, 2, gridspec_kw={"wspace": 0.06})
    _draw_accuracies(accuracies, group.accuracy_matrix)
    if np.isnan(group.task_confusion).all():
        confusion.axis("off")
        confusion.text(0.5, 0.5, "no predictions kept", ha="center", va="center", color=_INK)
        return figure
    # Confusion is rare: the root lets a percent be seen.
    _draw_matrix(confusion, group.task_confusion, PowerNorm(0.5, 0, 100), _share)
    confusion.set(xlabel="predicted as a class of task", ylabel="test images of task")
    return figure


def png(result: Result, dpi: int = 150) -> bytes:
    """The figure of a result as a PNG file."""
    return _saved(accuracy_figure(result), format="png", dpi=dpi)


def svg(figure: Figure) -> bytes:
    """A figure as an SVG file, the same for the same figure."""
    with matplotlib.rc_context({"svg.hashsalt": "ntkcl"}):
        return _saved(figure, format="svg", metadata={"Date": None})


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: Figure, **keywords: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, **keywords)
    return buffer.getvalue()


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def _short(name: str) -> str:
    return name if len(name) <= _NAME else name[: _NAME - 3] + "..."


def _beside(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=_INK,
    )


def _draw_curve(axes: Axes, result: Result) -> None:
    tasks = range(1, len(result.accuracy) + 1)
    axes.plot(tasks, result.accuracy, color=_LINE, marker="o", markersize=4, linewidth=1.8)
    axes.axhline(result.average_accuracy, color=_LINE, linewidth=1, linestyle=":")
    axes.annotate(
        f"{result.final_accuracy:.1f}",
        (tasks[-1], result.final_accuracy),
        xytext=(0, -14),
        textcoords="offset points",
        ha="center",
        color=_LINE,
    )
    axes.annotate(
        f"average {result.average_accuracy:.1f}",
        (1, result.average_accuracy),
        xytext=(0, 4),
        textcoords="offset points",
        color=_LINE,
        fontsize=8,
    )
    _style_curve(axes, len(tasks), min(result.accuracy))


def _style_curve(axes: Axes, tasks: int, low: float) -> None:
    known = 0.0 if math.isnan(low) else low  # of a task without a readable test image
    axes.set_ylim(max(0.0, 10 * math.floor(known / 10 - 0.5)), 101)
    axes.set_xlim(0.7, tasks + 0.3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="after task", ylabel="accuracy on all classes seen (%)")
    _quieten(axes, "both")


def _quieten(axes: Axes, grid: Literal["x", "both"]) -> None:
    axes.grid(axis=grid, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_accuracies(axes: Axes, values: NDArray[np.float64]) -> None:
    _draw_matrix(axes, values, Normalize(0, 100), lambda value: f"{value:.0f}")
    axes.set(xlabel="accuracy on task", ylabel="after task")


def _draw_matrix(
    axes: Axes, values: NDArray[np.float64], norm: Normalize, text: Callable[[float], str]
) -> None:
    """A heat map of percentages, (T, T), with numbers where they fit; NaN stays empty."""
    tasks = len(values)
    image = axes.imshow(values, cmap="Blues", norm=norm, aspect="equal", interpolation="nearest")
    for i, j in np.argwhere(~np.isnan(values)) if tasks <= _NUMBERED else ():
        ink = "white" if norm(values[i, j]) > 0.6 else _INK
        words = text(float(values[i, j]))
        axes.text(j, i, words, ha="center", va="center", fontsize=8, color=ink)
    ticks = range(0, tasks, max(1, math.ceil(tasks / 12)))
    axes.set_xticks(list(ticks), [str(tick + 1) for tick in ticks])
    axes.set_yticks(list(ticks), [str(tick + 1) for tick in ticks])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.figure.colorbar(image, ax=axes, shrink=0.85, label="%")


def _share(value: float) -> str:
    """A share in percent, short: nothing for none."""
    if value == 0:
        return ""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
