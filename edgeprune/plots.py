"""The report's plots, as SVG that takes its colours and fonts from the page around it.

So one file reads well in light and in dark, prints, and needs no script.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# matplotlib draws in stand-in colours; each becomes a variable of the page's style sheet.
INK, MUTED, GRID, DENSE, PRUNED = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", DENSE: "dense", PRUNED: "pruned"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edgeprune",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlecolor": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def widths(dense: Sequence[dict[str, int]], pruned: Sequence[dict[str, int]]) -> str:
    """Draw what each decoder layer keeps of its query heads and of its intermediate size.

    ``dense`` and ``pruned`` have one mapping a layer: num_attention_heads, num_key_value_heads and
    intermediate_size.
    """
    with _figure(5.6) as figure:
        axes = figure.subplots(2, 1, sharex=True)
        _bars(axes[0], dense, pruned, "intermediate_size")
        axes[0].set(title="MLP", ylabel="channels")
        _bars(axes[1], dense, pruned, "num_attention_heads")
        axes[1].set(title="Attention", ylabel="query heads", xlabel="decoder layer")
        axes[1].yaxis.get_major_locator().set_params(integer=True)
        _whole_numbers(axes[1].xaxis)
        axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)
        return _svg(figure)


def _bars(
    axes: Any, dense: Sequence[dict[str, int]], pruned: Sequence[dict[str, int]], key: str
) -> None:
    layers = range(len(dense))
    axes.bar(layers, [x[key] for x in dense], 0.84, color=DENSE, alpha=0.3, label="dense")
    axes.bar(layers, [x[key] for x in pruned], 0.84, color=PRUNED, label="pruned")
    axes.grid(axis="y")
    axes.margins(x=0.01)


def iterations(
    importance: Sequence[Sequence[float]],
    sparsity: Sequence[Sequence[float]],
    loss: Sequence[float],
) -> str:
    """Draw how pruning went: the calibration loss, and importance and sparsity of each layer.

    ``importance`` (relative, -1 to 1) and ``sparsity`` (0 to 1) have one row an iteration and one
    column a decoder layer; ``loss`` is in nats a token, one an iteration.
    """
    with _figure(7.4) as figure:
        axes = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1.5, 1.5))
        axes[0].plot(range(1, len(loss) + 1), loss, color=PRUNED, marker="o", markersize=3)
        axes[0].set(title="Loss on the calibration text", ylabel="nats per token")
        axes[0].grid(axis="y")
        limit = max((abs(x) for row in importance for x in row), default=1.0)
        _heat_map(figure, axes[1], importance, "PuOr_r", -limit, limit, None)
        axes[1].set(title="Importance of each layer, against the mean of all")
        highest = max((x for row in sparsity for x in row), default=1.0)
        _heat_map(figure, axes[2], sparsity, "cividis", 0, highest, "{x:.0%}")
        axes[2].set(title="Share of each layer's parameters removed so far")
        axes[2].set_xlabel("iteration")
        _whole_numbers(axes[2].xaxis)
        return _svg(figure)


def training(
    losses: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]], cuts: Sequence[int]
) -> str:
    """Draw how training went: losses of (update, nats a token), and after which updates the model was cut."""
    with _figure(3.4) as figure:
        axes = figure.subplots()
        axes.plot(
            *zip(*losses, strict=True), color=PRUNED, alpha=0.6, linewidth=1, label="trained on"
        )
        if held_out:
            updates, values = zip(*held_out, strict=True)
            axes.plot(updates, values, color=INK, marker="o", markersize=3, label="held out")
        for update in cuts:
            axes.axvline(update + 0.5, color=MUTED, linewidth=0.8, linestyle=":")
        axes.set(ylabel="nats per token", xlabel="update")
        axes.grid(axis="y")
        axes.legend(loc="upper right", ncols=2)
        _whole_numbers(axes.xaxis)
        return _svg(figure)


def _heat_map(
    figure: Figure,
    axes: Any,
    rows: Sequence[Sequence[float]],
    colours: str,
    low: float,
    high: float,
    unit: str | None,
) -> None:
    count, layers = len(rows), len(rows[0])
    image = axes.imshow(
        [list(column) for column in zip(*rows, strict=True)],
        cmap=colours,
        vmin=low,
        vmax=max(high, low + 1e-9),
        aspect="auto",
        interpolation="none",
        extent=(0.5, count + 0.5, layers - 0.5, -0.5),
    )
    axes.set_ylabel("decoder layer")
    _whole_numbers(axes.yaxis)
    bar = figure.colorbar(image, ax=axes, format=unit, pad=0.015, fraction=0.035)
    bar.outline.set_visible(False)


def latencies(
    between_tokens: Mapping[str, Sequence[float]], decode: Mapping[str, Sequence[float]]
) -> str:
    """Draw the times between tokens (milliseconds) and the speed of each repetition (tokens/s).

    Both have the keys ``dense`` and ``pruned``.
    """
    with _figure(3.6) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        _histograms(left, between_tokens)
        left.set(title="Time between tokens", xlabel="milliseconds", ylabel="tokens")
        _repetitions(right, decode)
        right.set(title="Decoding", xlabel="repetition", ylabel="tokens per second")
        left.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0)
        return _svg(figure)


def over_time(samples: Sequence[Mapping[str, Any]]) -> str:
    """Draw the speed of a device that generates on end, and its temperature where that is known.

    Each sample has ``seconds`` since the start, ``decode_tokens_per_second``, perhaps ``temperature`` (°C) and
    ``throttled``.
    """
    with _figure(3.4) as figure:
        axes = figure.subplots()
        minutes = [each["seconds"] / 60 for each in samples]
        speeds = [each["decode_tokens_per_second"] for each in samples]
        axes.plot(minutes, speeds, color=PRUNED, label="tokens per second")
        slowed = [index for index, each in enumerate(samples) if each.get("throttled")]
        if slowed:
            places = [minutes[i] for i in slowed], [speeds[i] for i in slowed]
            axes.plot(*places, "x", color=INK, label="throttled")
        axes.set(xlabel="minutes", ylabel="tokens per second")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        handles = [*axes.lines, *_temperature(axes, minutes, samples)]
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderpad=0)
        return _svg(figure)


def _temperature(
    axes: Any, minutes: Sequence[float], samples: Sequence[Mapping[str, Any]]
) -> Sequence[Any]:
    known = [
        (minute, each["temperature"])
        for minute, each in zip(minutes, samples, strict=True)
        if each.get("temperature") is not None
    ]
    if not known:
        return ()
    right = axes.twinx()
    right.set_ylabel("°C")
    lines: Sequence[Any] = right.plot(
        *zip(*known, strict=True), color=MUTED, linestyle=":", label="temperature, °C"
    )
    return lines


@dataclass(frozen=True)
class Point:
    """A model in ``pareto``: its name, file size in MB, decoded tokens/s and perplexity per token."""

    name: str
    megabytes: float
    speed: float
    perplexity: float
    on_front: bool = False
    dense: bool = False


def pareto(points: Sequence[Point]) -> str:
    """Draw models by file size, decode speed and perplexity; those on the Pareto front are filled."""
    with _figure(4.2) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        _scatter(left, points, [point.megabytes for point in points])
        left.set(title="Smaller is better", xlabel="file size, MB", ylabel="perplexity per token")
        _scatter(right, points, [point.speed for point in points])
        right.set(title="Faster is better", xlabel="decoded tokens per second")
        return _svg(figure)


def _scatter(axes: Any, points: Sequence[Point], places: Sequence[float]) -> None:
    middle = (min(places) + max(places)) / 2
    for point, x in zip(points, places, strict=True):
        colour = DENSE if point.dense else PRUNED
        face = colour if point.on_front or point.dense else "none"
        axes.scatter([x], [point.perplexity], 40, facecolors=face, edgecolors=colour)
        axes.annotate(
            point.name,
            (x, point.perplexity),
            (7 if x <= middle else -7, 5),
            textcoords="offset points",
            ha="left" if x <= middle else "right",
            color=MUTED if point.dense else INK,
            fontsize=9,
        )
    axes.margins(0.12)
    axes.grid()


def _histograms(axes: Any, samples: Mapping[str, Sequence[float]]) -> None:
    import numpy as np

    # A rare stall would squeeze all else into one bar: the slowest hundredth shares the last one.
    longest = np.percentile(np.concatenate(list(samples.values())), 99)
    values = {name: np.clip(samples[name], None, longest) for name in ("dense", "pruned")}
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=60)
    medians = {name: float(np.median(values[name])) for name in values}
    for name, colour in (("dense", DENSE), ("pruned", PRUNED)):
        axes.hist(values[name], edges, color=colour, alpha=0.55, label=name)
        axes.axvline(medians[name], color=colour, linewidth=1.2)
        side = "right" if medians[name] == min(medians.values()) else "left"
        axes.annotate(
            f"median {medians[name]:.1f}",
            (medians[name], 1),
            (-5 if side == "right" else 5, -4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha=side,
            va="top",
            color=colour,
        )
    axes.margins(y=0.12)  # for the medians' labels
    axes.grid(axis="y")


def _repetitions(axes: Any, samples: Mapping[str, Sequence[float]]) -> None:
    for name, colour in (("dense", DENSE), ("pruned", PRUNED)):
        counted = range(1, len(samples[name]) + 1)
        axes.plot(counted, samples[name], color=colour, marker="o", markersize=4, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.1)
    axes.grid(axis="y")
    _whole_numbers(axes.xaxis)


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=12, integer=True))


@contextmanager
def _figure(height: float) -> Iterator[Figure]:
    """Give a figure of the page's width, ``height`` in inches."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of fonts, which the page chooses anyway
        yield Figure(figsize=(9.2, height), layout="constrained")


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # the ids of several figures would collide
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
