"""What runs have measured, made ready to be drawn or copied: plain text and numbers, no screen."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune import comparison, report, runs, worker
from edgeprune.comparison import Compared, Comparison
from edgeprune.errors import BadInput
from edgeprune.locations import own_name
from edgeprune.report import Row

MODELS = ("dense", "pruned")
VERDICTS = {True: "▲ better", False: "▼ worse", None: "= same"}
ON_FRONT = {True: "on the front", False: "not on front"}
SIGNS = {True: "▲", False: "▼", None: ""}
DENSE_MARK = "D"
MARKS = "123456789abcefghijklmnopqrstuvwxyz"
NAME_WIDTH = 14
LABEL_WIDTH = 28
"""Of the table of one run: with all figures it fits into 80 columns."""
FULL, GONE = "█", "░"
SLOWEST = 0.01
"""Share of the tokens that may be slower than what the distribution shows; they are in its last bin."""


# ---- one run


@dataclass(frozen=True)
class Measured:
    """The results of a run.

    Both ``between`` (ms) and ``decode`` (tokens/s) are by model and of the first device; empty where nothing was timed.
    """

    summary: str
    rows: list[Row]
    conditions: str
    layers: dict[str, list[dict[str, int]]]
    device: str
    between: dict[str, list[float]]
    decode: dict[str, list[float]]
    markdown: str


def read(folder: Path) -> Measured:
    """Return what the run in ``folder`` measured. BadInput if its results are gone or damaged."""
    results = runs.read_results(folder)
    try:
        return measured(results)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise BadInput(
            f"{folder / worker.RESULTS}: damaged, figures are missing; to make it again, remove it and type:"
            f" {worker.resume_command(folder)}"
        ) from None


def measured(results: dict[str, Any]) -> Measured:
    """Make the parsed ``results.json`` ready."""
    device, document = next(iter(results["devices"].items()), ("", None))
    between, decode = report.samples(document) if document else ({}, {})
    return Measured(
        summary=report.summary(results),
        rows=report.results_table(results),
        conditions=report.conditions(results),
        layers={which: list(results[which]["layers"]) for which in MODELS},
        device=device if len(results["devices"]) > 1 else "",
        between=between,
        decode=decode,
        markdown=markdown(results),
    )


def markdown(results: dict[str, Any]) -> str:
    """Return the table and its conditions as Markdown, to be passed on."""
    table = [(r.label, r.dense, r.pruned, r.change) for r in report.results_table(results)]
    name = own_name(results["model"]["name"])
    head = f"**{name}, pruned.** {report.summary(results)}"
    lines = _markdown_table(("", "dense", "pruned", "change"), table)
    return "\n".join([head, "", *lines, "", report.conditions(results), ""])


def verdict(row: Row) -> str:
    """Tell in words whether the pruned model is better in this figure."""
    return VERDICTS[row.better] if row.dense and row.change else ""


def table(rows: Sequence[Row]) -> list[str]:
    """Return a text for each of ``rows``, under a heading: a line, or more where the label is long."""
    wrapper = textwrap.TextWrapper(LABEL_WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    labels = [wrapper.wrap(r.label) for r in rows]
    cells = [
        (label[-1], r.dense, r.pruned, r.change, verdict(r))
        for label, r in zip(labels, rows, strict=True)
    ]
    heading, *lines = aligned([("", *MODELS, "change", ""), *cells], left=(0, 4))
    texts = ["\n".join([*label[:-1], line]) for label, line in zip(labels, lines, strict=True)]
    return [heading, *texts]


# ---- layers


def layer_lines(
    dense: Sequence[Mapping[str, int]], pruned: Sequence[Mapping[str, int]], width: int
) -> list[str]:
    """Draw what each decoder layer kept of its MLP channels and query heads, ``width`` columns wide."""
    pairs = list(zip(dense, pruned, strict=True))
    texts = [
        [_kept(whole, left, key) for whole, left in pairs]
        for key in ("intermediate_size", "num_attention_heads")
    ]
    longest = [max(map(len, column), default=0) for column in texts]
    length = max(6, min(48, (width - 11 - sum(longest)) // 2))
    heading = f"     {'MLP channels kept':<{length + longest[0] + 3}}query heads kept"
    lines = [heading[:width]]
    for index, (whole, left) in enumerate(pairs):
        mlp = _bar(whole, left, "intermediate_size", length)
        heads = _bar(whole, left, "num_attention_heads", length)
        counts = [column[index].rjust(size) for column, size in zip(texts, longest, strict=True)]
        lines.append(f"{index:>4} {mlp} {counts[0]}  {heads} {counts[1]}")
    return lines


def _kept(whole: Mapping[str, int], left: Mapping[str, int], key: str) -> str:
    return f"{left[key]}/{whole[key]}" if left[key] else "removed"


def _bar(whole: Mapping[str, int], left: Mapping[str, int], key: str, length: int) -> str:
    share = left[key] / whole[key] if whole[key] else 0.0
    full = min(length, max(1 if share else 0, round(share * length)))
    return FULL * full + GONE * (length - full)


# ---- the time between tokens


def distribution(
    between: Mapping[str, Sequence[float]], bins: int = 40
) -> tuple[list[float], dict[str, list[int]]]:
    """Return the middles of ``bins`` bins, and how many of each model's values each has.

    The slowest hundredth of all values share the last bin: a rare stall would squeeze all else into one.
    """
    everything = sorted(value for values in between.values() for value in values)
    low, high = everything[0], everything[int((len(everything) - 1) * (1 - SLOWEST))]
    step = (high - low) / bins or 1.0
    counts = {name: [0] * bins for name in between}
    for name, values in between.items():
        for value in values:
            counts[name][min(bins - 1, int((value - low) / step))] += 1
    return [low + step * (index + 0.5) for index in range(bins)], counts


def latency_line(between: Mapping[str, Sequence[float]], device: str = "") -> str:
    """Return the median and the tail of the time between tokens of each model, on ``device`` where there are others."""
    texts = []
    for name, values in between.items():
        ordered = sorted(values)
        shares = ((0.5, "median"), (0.95, "p95"), (0.99, "p99"))
        said = (f"{label} {ordered[round((len(ordered) - 1) * s)]:.3g}" for s, label in shares)
        texts.append(f"{name} {', '.join(said)} ms")
    where = f" on {device}, as plotted" if device else ""
    return f"Time between tokens{where}: {'; '.join(texts)}."


# ---- several runs


def _marked(found: Comparison) -> list[tuple[str, Compared]]:
    """Return each run with the letter or digit that it is called in the plots."""
    marks = MARKS.ljust(len(found.runs), "*")
    return list(zip(marks, found.runs, strict=False))


def compared(found: Comparison) -> list[str]:
    """Return the lines of a table of the runs; under each figure its change against the dense model."""
    first, second = zip(*(f"{label} ".split(" ", 1) for label in comparison.LABELS), strict=True)
    rows: list[Sequence[str]] = [("", *first), ("", *(text.strip() for text in second))]
    for mark, run in _marked(found):
        cells = comparison.cells(run)
        rows += [
            (f"{mark} {_end(run.name, NAME_WIDTH)}", *(cell.value for cell in cells)),
            (
                f"  {_end(run.info.target, NAME_WIDTH)}",
                *(f"{cell.change}{SIGNS[cell.better]}" for cell in cells),
            ),
            (f"  {ON_FRONT[run.on_front]}", *[""] * len(cells)),
        ]
    return aligned(rows, left=(0,), gap=1)


def comparison_markdown(found: Comparison) -> str:
    """Return the comparison as Markdown."""
    heading = ("Run", "Target", "Pareto front", *comparison.LABELS)
    rows = [(r.name, r.info.target, "yes" if r.on_front else "no", *_cells(r)) for r in found.runs]
    lines = [*_markdown_table(heading, rows), "", *found.differences]
    return "\n".join(lines).rstrip() + "\n"


def _cells(run: Compared) -> list[str]:
    return [
        f"{cell.value} ({cell.change})" if cell.change else cell.value
        for cell in comparison.cells(run)
    ]


def points(found: Comparison) -> list[tuple[str, float, float, float]]:
    """Return (mark, file size in MB, decoded tokens/s, perplexity) of each model that has all three."""
    dense = {run.info.model: run.info.dense for run in found.runs}
    models = [(DENSE_MARK, figures) for figures in dense.values()]
    models += [(mark, run.info.pruned) for mark, run in _marked(found)]
    places = []
    for mark, figures in models:
        costs = comparison._costs(figures) if figures else None
        if costs:
            places.append((mark, costs[0] / 1e6, -costs[1], costs[2]))
    return places


# ---- text


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int], gap: int = 2) -> list[str]:
    """Return a line for each of ``rows``; the columns ``left`` begin, the others end below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append((" " * gap).join(cells).rstrip())
    return lines


def _end(text: str, width: int) -> str:
    return text if len(text) <= width else f"…{text[1 - width :]}"


def _markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return [f"| {' | '.join(_escaped(row))} |" for row in (heading, rule, *rows)]


def _escaped(row: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in row]
