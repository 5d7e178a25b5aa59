"""Plots of what was measured. Each model has a letter or figure of its own: they read without colours.

Imports plotext: screens import this module when they have something to plot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from textual_plotext import PlotextPlot

from edgeprune.tui import figures


class Chart(PlotextPlot):
    """A plot that scrolls with its page and takes no keys."""


def decode(samples: Mapping[str, Sequence[float]]) -> Chart:
    """Plot the decoded tokens/s of each repetition."""
    chart = Chart()
    chart.plt.title(f"Decode, tokens/s of each repetition: {_legend(samples)}")
    for name, values in samples.items():
        chart.plt.scatter(range(1, len(values) + 1), values, marker=name[0])
    longest = max(map(len, samples.values()))
    chart.plt.xticks(_spread(range(1, longest + 1)))
    chart.plt.xlim(0.5, longest + 0.5)
    chart.plt.ylim(0, 1.15 * max(value for values in samples.values() for value in values))
    chart.plt.xlabel("repetition")
    return chart


def latency(between: Mapping[str, Sequence[float]]) -> Chart:
    """Plot how the times between tokens are distributed."""
    middles, counts = figures.distribution(between)
    chart = Chart()
    chart.plt.title(f"Time between tokens: {_legend(between)}")
    for name, numbers in counts.items():
        chart.plt.plot(middles, numbers, marker=name[0])
    chart.plt.xlabel("ms (the slowest 1 % at the right end)")
    chart.plt.ylabel("tokens")
    return chart


def scatter(
    title: str, xlabel: str, places: Sequence[tuple[str, float, float]], ylabel: str
) -> Chart:
    """Plot models at (mark, x, y); the mark is what is drawn."""
    chart = Chart()
    chart.plt.title(title)
    for mark, x, y in places:
        chart.plt.scatter([x], [y], marker=mark)
    for limit, values in (
        (chart.plt.xlim, [p[1] for p in places]),
        (chart.plt.ylim, [p[2] for p in places]),
    ):
        margin = 0.08 * (max(values) - min(values)) or 0.05 * max(values) or 1.0
        limit(min(values) - margin, max(values) + margin)
    chart.plt.xlabel(xlabel)
    chart.plt.ylabel(ylabel)
    return chart


def _legend(names: Iterable[str]) -> str:
    """Return what the letters are, for the title: a legend in the plot would cover what is drawn."""
    return ", ".join(f"{name[0]} {name}" for name in names)


def _spread(numbers: range) -> list[float]:
    """Return at most ten of ``numbers``, evenly spread."""
    return [float(number) for number in numbers[:: -(-len(numbers) // 10)]]
