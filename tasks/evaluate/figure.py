"""Figure of an evaluation on one page, from top to bottom.

Scores with intervals, one panel per metric.
Ablations, and the swap matrix on their right.
Per database: samples with and without neighbours, then the worst copies above their sources.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from tasks.evaluate.tables import METRICS, REAL, ablation_name

_INK, _FAINT, _RULE = "#191c21", "#6e747d", "#e3e6ea"
_COLOURS = {"knn": "#1b6ca8", "no_knn": "#e08e45", "real": "#4a8f5b"}
_LABELS = {"knn": "with neighbours", "no_knn": "without", "real": "real images"}
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _FAINT,
    "ytick.color": _INK,
}
SHEET_COLUMNS, SHEET_ROWS = 8, 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationView:
    """Evaluation on one database, with its images loaded. ``copies`` holds (sample, source, metadata)."""

    name: str
    samples: int
    compared: int  # images on each side of a distance
    threshold: float  # cosine above which a sample is a copy
    scores: Mapping[str, float]
    ablations: Mapping[str, Mapping[str, float]]
    swap: Mapping[str, float]
    sheets: Mapping[str, Image.Image]
    shown: Sequence[str]  # the prompts of the images on the sheets, row by row
    copies: Sequence[tuple[Image.Image, Image.Image, Mapping[str, Any]]]


def plot_page(views: Sequence[EvaluationView], title: str) -> Figure:
    """Plot the page: 11 inches wide, its height depends on the number of databases."""
    with matplotlib.rc_context(_STYLE):
        middle = any(view.ablations or view.swap for view in views)
        heights = [2.7, *([3.5] if middle else []), *[4.4] * len(views)]
        figure = Figure(figsize=(11, sum(heights) + 0.5), facecolor="white")
        bands = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        figure.suptitle(title, x=0.03, y=1 - 0.12 / figure.get_figheight(), ha="left", fontsize=13, weight="bold")
        _plot_scores(bands[0], views)
        if middle:
            _plot_ablations_and_swap(bands[1], views)
        for band, view in zip(bands[-len(views) :], views, strict=True):
            _plot_images(band, view)
    return figure


def _plot_scores(band: Any, views: Sequence[EvaluationView]) -> None:
    """Plot one panel per metric: the value and interval of each database under each condition."""
    names = [m for m in METRICS if any(f"{m}_knn" in view.scores for view in views)]
    panels = band.subplots(1, len(names), squeeze=False)[0]
    band.subplots_adjust(left=0.05, right=0.985, top=0.72, bottom=0.24, wspace=0.55)
    for axes, metric in zip(panels, names, strict=True):
        for offset, condition in zip((-0.22, 0.0, 0.22), _COLOURS, strict=True):
            key = REAL.get(metric, f"{metric}_real") if condition == "real" else f"{metric}_{condition}"
            for position, view in enumerate(views):
                if key in view.scores:
                    _plot_point(axes, position + offset, view.scores, key, _COLOURS[condition])
        _style_axes(axes)
        axes.set_title(METRICS[metric], fontsize=8.5, loc="left")
        axes.set_xticks(range(len(views)), [view.name for view in views], rotation=28, ha="right", fontsize=7.5)
        axes.set_xlim(-0.6, len(views) - 0.4)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.0), high + 0.06 * (high - min(low, 0.0)))
    marks = [axes.plot([], [], "o", color=colour, ms=5, label=_LABELS[c])[0] for c, colour in _COLOURS.items()]
    band.legend(handles=marks, loc="upper right", ncols=3, frameon=False, fontsize=8.5, bbox_to_anchor=(0.99, 0.93))


def _plot_point(axes: Axes, x: float, scores: Mapping[str, float], key: str, colour: str) -> None:
    value = scores[key]
    if f"{key}_low" in scores:
        axes.plot([x, x], [scores[f"{key}_low"], scores[f"{key}_high"]], color=colour, lw=2.2, alpha=0.45)
    axes.plot([x], [value], "o", color=colour, ms=5)


def _plot_ablations_and_swap(band: Any, views: Sequence[EvaluationView]) -> None:
    """Plot the ablations, one panel per metric, and the swap matrix on their right, or alone on the left."""
    ablated = [view for view in views if view.ablations]
    swapped = [view for view in views if view.swap]
    panels = band.subplots(1, 3, width_ratios=[1, 1, 1.15])
    band.subplots_adjust(left=0.14, right=0.985, top=0.86, bottom=0.17, wspace=0.32)
    for axes, metric in zip(panels[:2], ("clip_score", "fd"), strict=True):
        if ablated:
            _plot_ablations(axes, ablated, metric)
        else:
            axes.set_axis_off()
    if ablated:
        panels[1].set_yticklabels([])
    if len(ablated) > 1:
        panels[1].legend(frameon=False, fontsize=8)
    matrix = panels[2] if ablated else panels[0]
    panels[2].set_axis_off()
    if swapped:
        matrix.set_axis_on()
        _plot_swap_matrix(matrix, swapped)


def _plot_ablations(axes: Axes, views: Sequence[EvaluationView], metric: str) -> None:
    names = list(views[0].ablations)
    positions = np.arange(len(names))[::-1]
    for number, view in enumerate(views):
        shift = 0.5 * ((number + 0.5) / len(views) - 0.5)
        colour = _series_colour(number)
        for position, name in zip(positions, names, strict=True):
            scores = view.ablations[name]
            if f"{metric}_low" in scores:
                ends = [scores[f"{metric}_low"], scores[f"{metric}_high"]]
                axes.plot(ends, [position - shift] * 2, color=colour, lw=2.2, alpha=0.45)
            axes.plot(
                [scores[metric]], [position - shift], "o", color=colour, ms=5, label=view.name if not position else None
            )
    _style_axes(axes, along="x")
    axes.set_yticks(positions, [ablation_name(name) for name in names])
    axes.set_title(f"Ablations: {METRICS[metric]}", fontsize=9.5, loc="left")
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))


def _plot_swap_matrix(axes: Axes, views: Sequence[EvaluationView]) -> None:
    """Plot the Fréchet distance of the samples of each database (row) to each domain (column)."""
    rows = [view.name for view in views]
    columns = [*rows, *dict.fromkeys(name for view in views for name in view.swap if name not in rows)]
    values = np.array([[view.swap.get(name, np.nan) for name in columns] for view in views])
    axes.imshow(values, cmap="Blues_r", vmin=0, vmax=np.nanmax(values) * 1.25, aspect="auto")
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        nearest = value == np.nanmin(values[row])
        colour = "white" if value < 0.55 * np.nanmax(values) else _INK
        axes.text(
            column, row, f"{value:.3f}", ha="center", va="center", color=colour, weight="bold" if nearest else "normal"
        )
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(views)), [view.name for view in views], fontsize=8, rotation=90, va="center")
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_title("Swap: Fréchet distance ↓", fontsize=9.5, loc="left")
    axes.set_xlabel("compared with (nearest in bold)", color=_FAINT)
    axes.set_ylabel("generated with", color=_FAINT, labelpad=8)


def _plot_images(band: Any, view: EvaluationView) -> None:
    """Plot samples of the same prompts with and without neighbours, and the worst copies above their sources."""
    band.text(0.03, 0.97, f"Database {view.name}", fontsize=11, weight="bold", va="top")
    top, bottom = band.subfigures(2, 1, height_ratios=[1.18, 1])
    for axes, condition in zip(top.subplots(1, 2), ("knn", "no_knn"), strict=True):
        sheet = view.sheets[condition]
        axes.imshow(
            np.asarray(sheet.crop((0, 0, sheet.width, min(sheet.height, SHEET_ROWS * sheet.width // SHEET_COLUMNS))))
        )
        axes.set_axis_off()
        axes.set_title(
            f"{_LABELS[condition]}, same prompts and noise", fontsize=9, color=_COLOURS[condition], loc="left"
        )
    top.subplots_adjust(left=0.03, right=0.985, top=0.8, bottom=0.02, wspace=0.05)
    panels = bottom.subplots(2, max(len(view.copies), 1), squeeze=False)
    bottom.subplots_adjust(left=0.1, right=0.985, top=0.78, bottom=0.03, wspace=0.12, hspace=0.06)
    heading = f"Samples closest to a stored image, by cosine; above {view.threshold:.3f} a sample counts as a copy"
    bottom.text(0.03, 0.97, heading, fontsize=9, va="top")
    for label, height in (("sample", 0.6), ("stored", 0.21)):
        bottom.text(0.03, height, label, fontsize=8.5, color=_FAINT, va="center")
    for (upper, lower), (sample, source, details) in zip(panels.T, view.copies, strict=False):
        upper.imshow(np.asarray(sample))
        lower.imshow(np.asarray(source))
        label = f"{details['cosine']:.3f}" + (" copy" if details["copy"] else "")
        upper.set_title(label, fontsize=8, color="#b3261e" if details["copy"] else _FAINT, pad=3)
    for axes in panels.flat:
        axes.set_axis_off()


def _series_colour(number: int) -> str:
    return ("#1b6ca8", "#8a4f9e", "#4a8f5b", "#c0504d", "#7f7f7f")[number % 5]


def _style_axes(axes: Axes, along: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_RULE)
    axes.grid(axis="x" if along == "x" else "y", color=_RULE, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8)
