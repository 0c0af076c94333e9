"""The report's figures: matplotlib, as SVG that takes its colors from the page."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

_INK = "#010203"  # replaced by the page's text color, light or dark
_POINTS = 200  # of a curve, at most: the file stays small
_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "telltale",  # the same figure, the same bytes
    "font.size": 11,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # The page decides on its size; a screen reader reads the title only.
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*" ', r"\1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    return figure, axes


def _thin(*arrays: NDArray[Any]) -> list[NDArray[Any]]:
    places = np.unique(np.linspace(0, len(arrays[0]) - 1, _POINTS).round().astype(int))
    return [array[places] for array in arrays]


def roc_figure(
    fake: NDArray[np.bool_], p_fake: NDArray[np.float64], generator: NDArray[np.int64], names: Sequence[str]
) -> str:
    """ROC of all fakes and of each generator's against all photographs.

    Args:
        fake, p_fake, generator: [N]; generator is an index into `names`, 0 is nature.
    """
    with mpl.rc_context(_RC):
        figure, axes = _axes(5.4, 4.6)
        colors = mpl.colormaps["tab10"]
        for index, name in enumerate(names[1:], start=1):
            rows = (generator == index) | ~fake
            if (generator == index).any():
                x, y, _ = roc_curve(fake[rows], p_fake[rows])
                axes.plot(*_thin(x, y), lw=1.2, color=colors((index - 1) % 10), label=name)
        x, y, _ = roc_curve(fake, p_fake)
        axes.plot(*_thin(x, y), lw=2.4, color=_INK, label="all")
        axes.plot([0, 1], [0, 1], lw=0.8, ls=":", color=_INK)
        axes.set(xlabel="false alarms (share of photographs)", ylabel="detected (share of fakes)")
        axes.legend(frameon=False, fontsize=8, loc="lower right")
        return _svg(figure, "ROC curves: detected fakes against false alarms")


def reliability_figure(fake: NDArray[np.bool_], curves: Mapping[str, NDArray[np.float64]]) -> str:
    """Observed share of fakes against P(fake), in 15 bins.

    Args:
        fake: [N]. curves: P(fake) [N] by name, such as "as trained" and "calibrated".
    """
    with mpl.rc_context(_RC):
        figure, axes = _axes(5.4, 4.6)
        axes.plot([0, 1], [0, 1], lw=0.8, ls=":", color=_INK)
        for number, (name, p) in enumerate(curves.items()):
            observed, predicted = calibration_curve(fake, p, n_bins=15)
            # Bins of few images are noisy: the size of a point shows their number.
            counts = np.histogram(p, bins=15, range=(0, 1))[0]
            size = 6 + 150 * np.sqrt(counts[counts > 0] / counts.max())
            axes.plot(predicted, observed, lw=0.7, alpha=0.5, color=f"C{number}")
            axes.scatter(predicted, observed, s=size, color=f"C{number}", alpha=0.8, lw=0, label=name)
        limits = (-0.03, 1.03)  # the whole of the largest point at 0 or 1
        axes.set(xlabel="predicted P(fake)", ylabel="share of fakes among them", xlim=limits, ylim=limits)
        axes.legend(frameon=False, fontsize=9)
        return _svg(figure, "reliability: share of fakes against predicted probability")


def matrix_figure(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    x: str,
    y: str,
    title: str,
    low: float = 0.0,
    high: float = 1.0,
    form: str = "{:.0%}",
) -> str:
    """A heat map with numbers; values [len(rows)][len(columns)], None for an empty cell."""
    matrix = np.array([[np.nan if v is None else v for v in row] for row in values], float)
    with mpl.rc_context(_RC):
        figure, axes = _axes(2.2 + 0.62 * len(columns), 1.6 + 0.42 * len(rows))
        axes.imshow(matrix, cmap="Blues", vmin=low, vmax=high, aspect="auto")
        middle = (low + high) / 2
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                if not np.isnan(value):
                    shade = "#ffffff" if value > middle else "#102040"
                    axes.text(j, i, form.format(value), ha="center", va="center", fontsize=8, color=shade)
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set(xlabel=x, ylabel=y)
        return _svg(figure, title)


def curves_figure(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x: str, y: str) -> str:
    """Lines of (severity, metric) by name."""
    with mpl.rc_context(_RC):
        figure, axes = _axes(5.4, 3.8)
        for number, (name, (places, values)) in enumerate(curves.items()):
            axes.plot(places, values, marker="o", ms=4, lw=1.4, color=f"C{number % 10}", label=name)
        axes.set(xlabel=x, ylabel=y)
        axes.legend(frameon=False, fontsize=8)
        return _svg(figure, f"{y} by {x}")
