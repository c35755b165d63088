"""Tabulate: scores as text, as CSV and as Markdown; a row a metric, a column a condition."""

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
    "nearest": "nearest cosine",
    "copy_rate": "copy rate ↓",
    "diversity": "diversity ↑",
}
"""Score names and how they are headed; the arrow points to better. ``nearest`` is best where real pictures are."""
CONDITIONS = {"knn": "with neighbours", "no_knn": "without", "real": "real pictures"}
REAL = {"fd": "fd_real_split", "mmd": "mmd_real_split"}


def table(scores: Scores) -> str:
    """The scores as the one table, for a terminal."""
    return aligned([["", *CONDITIONS.values()], *score_rows(scores)])


def table_line(scores: Scores) -> str:
    """The same in one clause."""
    line = (
        f"CLIP score {scores['clip_score_knn']:.3f} with neighbours, {scores['clip_score_no_knn']:.3f} without; "
        f"Fréchet distance {scores['fd_knn']:.3f} and {scores['fd_no_knn']:.3f}"
    )
    return line + (f"; {scores['copy_rate_knn']:.1%} copies" if "copy_rate_knn" in scores else "")


def score_rows(scores: Scores) -> list[list[str]]:
    """A row for each metric that was measured: its heading, and the value under each condition."""
    rows = []
    for metric, heading in METRICS.items():
        names = [REAL.get(metric, f"{metric}_real") if c == "real" else f"{metric}_{c}" for c in CONDITIONS]
        if any(name in scores for name in names):
            rows.append([heading, *(value_of(scores, name) for name in names)])
    return rows


def ablation_rows(ablations: Mapping[str, Scores]) -> list[list[str]]:
    """A row for each ablation; the columns are those of :func:`ablation_heads`."""
    metrics = [metric for metric in METRICS if any(metric in scores for scores in ablations.values())]
    return [
        [ablation_name(name), *(value_of(scores, metric) for metric in metrics)] for name, scores in ablations.items()
    ]


def ablation_heads(ablations: Mapping[str, Scores]) -> list[str]:
    """The headings of :func:`ablation_rows`."""
    return ["", *(METRICS[metric] for metric in METRICS if any(metric in scores for scores in ablations.values()))]


def swap_rows(swap: Mapping[str, Scores]) -> list[list[str]]:
    """The swap matrix: rows are databases drawn from, columns those of :func:`swap_heads`; the nearest is starred."""
    rows = []
    for drawn_from, distances in swap.items():
        nearest = min(distances, key=lambda name: distances[name])
        told = {name: f"{value:.3f}{' *' if name == nearest else ''}" for name, value in distances.items()}
        rows.append([drawn_from, *(told.get(name, "") for name in swap_heads(swap)[1:])])
    return rows


def swap_heads(swap: Mapping[str, Scores]) -> list[str]:
    """The headings of :func:`swap_rows`: the databases drawn from, then the domains only compared with."""
    compared = (name for distances in swap.values() for name in distances if name not in swap)
    return ["drawn from / compared with", *swap, *dict.fromkeys(compared)]


def ablation_name(name: str) -> str:
    """``query_mean`` as "query: mean", ``k_4`` as "k = 4"."""
    kind, _, value = name.partition("_")
    known = {"query": f"query: {'text and mean' if value == 'both' else value}", "k": f"k = {value}"}
    return known.get(kind, name.replace("_", " "))


def value_of(scores: Scores, name: str) -> str:
    """A score with its interval, or nothing."""
    if name not in scores:
        return ""
    if f"{name}_low" not in scores:
        return f"{scores[name]:.3f}"
    return f"{scores[name]:.3f} ({scores[f'{name}_low']:.3f}–{scores[f'{name}_high']:.3f})"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to one width: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "   ".join(
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars in a cell are escaped."""
    lines = [list(heads), ["---", *["---:"] * (len(heads) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def to_csv(evaluations: Mapping[str, tuple[Scores, Mapping[str, Scores], Scores]]) -> str:
    """Everything as one table: database, condition, metric, value, low, high; nothing is rounded away.

    ``evaluations`` holds, by database, the scores, the ablations and the row of the swap matrix.
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
