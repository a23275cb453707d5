"""Plots of a result. Figures are made without pyplot: no window, no global state."""

from __future__ import annotations

import io
import math

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ntkcl.config import cautions
from ntkcl.result import Result

_INK = "#1f2933"
_LINE = "#1f5fa8"
_GRID = "#d9dee5"


def accuracy_figure(result: Result) -> Figure:
    """Left: A_t over the tasks with the average. Right: the accuracy matrix."""
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    curve, matrix = figure.subplots(1, 2)
    _draw_curve(curve, result)
    _draw_matrix(matrix, result)
    config = result.config
    title = [f"{config.method} on {config.dataset}, {config.backbone}", *cautions(config)]
    figure.suptitle("\n".join(title), color=_INK)
    return figure


def png(result: Result, dpi: int = 150) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    accuracy_figure(result).savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


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
    low = min(result.accuracy)
    axes.set_ylim(max(0.0, 10 * math.floor(low / 10 - 0.5)), 101)
    axes.set_xlim(0.7, len(tasks) + 0.3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="after task", ylabel="accuracy on all classes seen (%)")
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_matrix(axes: Axes, result: Result) -> None:
    values = result.accuracy_matrix
    tasks = len(values)
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="equal")
    if tasks <= 12:
        for i in range(tasks):
            for j in range(i + 1):
                value = values[i, j]
                axes.text(
                    j,
                    i,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if value > 60 else _INK,
                )
    ticks = range(0, tasks, max(1, math.ceil(tasks / 12)))
    axes.set_xticks(list(ticks), [str(tick + 1) for tick in ticks])
    axes.set_yticks(list(ticks), [str(tick + 1) for tick in ticks])
    axes.set(xlabel="accuracy on task", ylabel="after task")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.figure.colorbar(image, ax=axes, shrink=0.85, label="%")
