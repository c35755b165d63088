"""Score tables as text, CSV and Markdown: one row per metric, one column per condition."""

import csv
import io
from collections.abc import Mapping, Sequence

Scores = Mapping[str, float]

METRICS = {
    "clip_score": "CLIP score ↑",
    "fd": "Fréchet distance ↓",
    "mmd": "MMD (CMMD) ↓",
    "fid": "FID ↓",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "coverage": "coverage ↑",
    "nearest": "nearest cosine",
    "copy_rate": "copy rate ↓",
    "authenticity": "authenticity ↑",
    "diversity": "diversity ↑",
}
"""Headings by metric name. The arrow shows the better direction; ``nearest`` is best near the value of real images."""
CONDITIONS = {"knn": "with neighbours", "no_knn": "without", "real": "real images"}
REAL = {"fd": "fd_real_split", "mmd": "mmd_real_split", "coverage": "coverage_real_split"}


def table(scores: Scores) -> str:
    """Format the scores as a text table for the terminal."""
    return aligned([["", *CONDITIONS.values()], *score_rows(scores)])


def table_line(scores: Scores) -> str:
    """Format the main scores on one line."""
    line = (
        f"CLIP score {scores['clip_score_knn']:.3f} with neighbours, {scores['clip_score_no_knn']:.3f} without; "
        f"Fréchet distance {scores['fd_knn']:.3f} and {scores['fd_no_knn']:.3f}"
    )
    return line + (f"; {scores['copy_rate_knn']:.1%} copies" if "copy_rate_knn" in scores else "")


def score_rows(scores: Scores) -> list[list[str]]:
    """Return one row per measured metric: its heading, and its value under each condition."""
    rows = []
    for metric, heading in METRICS.items():
        names = [REAL.get(metric, f"{metric}_real") if c == "real" else f"{metric}_{c}" for c in CONDITIONS]
        if any(name in scores for name in names):
            rows.append([heading, *(value_of(scores, name) for name in names)])
    return rows


def ablation_rows(ablations: Mapping[str, Scores]) -> list[list[str]]:
    """Return one row per ablation, with the columns of :func:`ablation_heads`."""
    metrics = [metric for metric in METRICS if any(metric in scores for scores in ablations.values())]
    return [
        [ablation_name(name), *(value_of(scores, metric) for metric in metrics)] for name, scores in ablations.items()
    ]


def ablation_heads(ablations: Mapping[str, Scores]) -> list[str]:
    """Return the column headings of :func:`ablation_rows`."""
    return ["", *(METRICS[metric] for metric in METRICS if any(metric in scores for scores in ablations.values()))]


def swap_rows(swap: Mapping[str, Scores]) -> list[list[str]]:
    """Return the swap matrix: one row per database, columns as in :func:`swap_heads`. A star marks the nearest."""
    rows = []
    for database, distances in swap.items():
        nearest = min(distances, key=lambda name: distances[name])
        cells = {name: f"{value:.3f}{' *' if name == nearest else ''}" for name, value in distances.items()}
        rows.append([database, *(cells.get(name, "") for name in swap_heads(swap)[1:])])
    return rows


def swap_heads(swap: Mapping[str, Scores]) -> list[str]:
    """Return the column headings of :func:`swap_rows`: the databases, then the domains that are only compared with."""
    compared = (name for distances in swap.values() for name in distances if name not in swap)
    return ["generated with / compared with", *swap, *dict.fromkeys(compared)]


def ablation_name(name: str) -> str:
    """Return the label of an ablation: "query: mean" for ``query_mean``, "k = 4" for ``k_4``."""
    kind, _, value = name.partition("_")
    labels = {"query": f"query: {'text and mean' if value == 'both' else value}", "k": f"k = {value}"}
    return labels.get(kind, name.replace("_", " "))


def value_of(scores: Scores, name: str) -> str:
    """Format a score with its interval; empty if it was not measured."""
    if name not in scores:
        return ""
    if f"{name}_low" not in scores:
        return f"{scores[name]:.3f}"
    return f"{scores[name]:.3f} ({scores[f'{name}_low']:.3f}–{scores[f'{name}_high']:.3f})"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align the columns of a text table: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "   ".join(
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table. ``|`` in a cell is escaped."""
    lines = [list(heads), ["---", *["---:"] * (len(heads) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def to_csv(evaluations: Mapping[str, tuple[Scores, Mapping[str, Scores], Scores]]) -> str:
    """Return all values as one CSV table: database, condition, metric, value, low, high (6 significant digits).

    ``evaluations`` maps a database to its scores, ablations and row of the swap matrix.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["database", "condition", "metric", "value", "low", "high"])
    for database, (scores, ablations, swap) in evaluations.items():
        for name in sorted(name for name in scores if not name.endswith(("_low", "_high"))):
            metric = next(m for m in sorted(METRICS, key=len, reverse=True) if name.startswith(f"{m}_"))
            condition = name.removeprefix(f"{metric}_").removesuffix("_split")
            writer.writerow([database, condition, metric, *_numbers(scores, name)])
        for condition, values in ablations.items():
            for metric in (metric for metric in METRICS if metric in values):
                writer.writerow([database, condition, metric, *_numbers(values, metric)])
        for domain in swap:
            writer.writerow([database, f"against {domain}", "fd", *_numbers(swap, domain)])
    return buffer.getvalue()


def _numbers(scores: Scores, name: str) -> list[str]:
    return [f"{scores[key]:.6g}" if key in scores else "" for key in (name, f"{name}_low", f"{name}_high")]
