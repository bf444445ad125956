"""Charts as SVG in addresses, which follow the reader's light or dark scheme by themselves."""

import base64
import io
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from d2ext.evaluation.calibration import Calibration

# One colour per model, readable on white and on black; lines differ in their dashes, too.
COLORS = (
    "#3b82f6", "#d97706", "#059669", "#db2777", "#8b5cf6",
    "#dc2626", "#0891b2", "#4d8c0f", "#a16207", "#737b88",
)  # fmt: skip
_DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
_INK = "#010203"  # stands for the colour of text, which the page's scheme decides
_STYLE = "<style>svg{color:#4b5563}@media(prefers-color-scheme:dark){svg{color:#b4bdc9}}</style>"
_SIZE = (4.6, 3.5)


def model_color(number: int) -> str:
    """The colour of the model of this number, from 0, in all charts and tables."""
    return COLORS[number % len(COLORS)]


def _line_style(number: int) -> dict[str, Any]:
    return {"color": model_color(number), "linestyle": _DASHES[number % len(_DASHES)]}


def _chart(draw: Callable[[Axes], None], x: str, y: str) -> str:
    """What `draw` puts into axes with these labels, as an address."""
    settings: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11,
                "svg.hashsalt": "d2ext", "path.simplify_threshold": 0.3}  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=_SIZE)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel(x, color=_INK)
        axes.set_ylabel(y, color=_INK)
        axes.grid(color=_INK, alpha=0.15, linewidth=0.7)
        axes.tick_params(colors=_INK, length=0)
        axes.spines[:].set_visible(False)
        figure.tight_layout(pad=0.6)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<\?xml.*?<svg", "<svg", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(_INK, "currentColor").replace("<defs>", f"{_STYLE}<defs>", 1)
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}"


def _unit_square(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)


def precision_recall_chart(curves: Sequence[np.ndarray]) -> str:
    """Precision over recall.

    Args:
        curves: (101,) of each model, at recall 0, 0.01, ..., 1.
    """

    def draw(axes: Axes) -> None:
        for number, curve in enumerate(curves):
            axes.plot(np.linspace(0, 1, len(curve)), curve, linewidth=1.8, **_line_style(number))
        _unit_square(axes)

    return _chart(draw, "recall", "precision")


def reliability_chart(found: Sequence[Calibration]) -> str:
    """The part of hits over the score; a model on the diagonal is calibrated. The size of a dot
    tells the number of detections."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=_INK, alpha=0.45, linewidth=1)
        for number, own in enumerate(found):
            kept = own.counts > 0
            axes.plot(own.score[kept], own.precision[kept], linewidth=1.4, **_line_style(number))
            sizes = 12 + 90 * own.counts[kept] / max(own.counts.sum(), 1)
            color = model_color(number)
            axes.scatter(own.score[kept], own.precision[kept], sizes, color=color, zorder=3)
        _unit_square(axes)

    return _chart(draw, "score", "part that are hits")


def learning_charts(curves: Sequence[Sequence[dict]], kind: str) -> list[tuple[str, str]]:
    """(title, chart) of what the runs wrote down: total loss, and AP where a run was evaluated
    more than once.

    Args:
        curves: lines of `metrics.json` of each model; empty for those without a run.
        kind: "segm" or "bbox", whose AP.
    """
    charts = []
    for key, title, label in (
        ("total_loss", "Total loss, and its running mean", "total loss"),
        (f"{kind}/AP", "AP during the training", "AP"),
    ):
        series = [[(x["iteration"] + 1, x[key]) for x in curve if key in x] for curve in curves]
        if max(map(len, series), default=0) > 1:
            draw = _drawn_series(series, key == "total_loss")
            charts.append((title, _chart(draw, "iteration", label)))
    return charts


def _drawn_series(series: Sequence[Sequence[tuple[float, float]]], smooth: bool):
    def draw(axes: Axes) -> None:
        for number, points in enumerate(series):
            if not points:
                continue
            x, y = np.array(points, dtype=np.float64).T
            if smooth:
                axes.plot(x, y, color=model_color(number), alpha=0.28, linewidth=1)
                y = _trend(y)
            axes.plot(x, y, linewidth=2, marker=None if smooth else "o", **_line_style(number))
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)

    return draw


def _trend(values: np.ndarray, reach: int = 3) -> np.ndarray:
    """Mean over each value and up to `reach` neighbours on either side."""
    windows = [values[max(i - reach, 0) : i + reach + 1] for i in range(len(values))]
    return np.array([np.nanmean(window) for window in windows])


def error_chart(gains: Sequence[dict[str, float]]) -> str:
    """What each type of mistake costs, a group of bars for each type.

    Args:
        gains: type -> AP50 that mending it would gain, of each model.
    """
    names = list(gains[0])

    def draw(axes: Axes) -> None:
        width = 0.8 / len(gains)
        for number, own in enumerate(gains):
            place = np.arange(len(names)) + (number - (len(gains) - 1) / 2) * width
            axes.bar(place, [own[n] for n in names], width * 0.9, color=model_color(number))
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=10)

    return _chart(draw, "", "AP50 to be gained")


def legend(names: Sequence[str]) -> list[tuple[str, str]]:
    """(name, colour) of every model, for a legend beside the charts."""
    return list(zip(names, itertools.cycle(COLORS)))
