"""Charts of a page: lines, histograms and scatter plots, drawn in the browser by uPlot.

Each function returns the HTML of one chart. Values that are None, NaN or infinite leave a gap.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from onevoice.report.page import render

Number = int | float
Points = tuple[Sequence[Number], Sequence[Number | None]]
"""The x and the y values of one series."""

MAX_POINTS = 2000
"""A line with more points is thinned, so that a page of a long run stays small."""
BINS = 30


def line_chart(title: str, series: Mapping[str, Points], *, x_label: str = "step", unit: str = "") -> Markup:
    """Return a chart of lines over a common x axis."""
    thinned = {name: _thin(points) for name, points in series.items()}
    x = sorted({value for xs, _ in thinned.values() for value in xs})
    columns = [[dict(zip(*points, strict=True)).get(value) for value in x] for points in thinned.values()]
    return _chart("lines", title, list(series), [x, *columns], x_label=x_label, y_label=unit)


def histogram(title: str, series: Mapping[str, Sequence[Number | None]], *, unit: str = "", bins: int = BINS) -> Markup:
    """Return a chart that counts values in `bins` bins of equal width, the same for every series."""
    known = [np.array([value for value in values if _is_number(value)], float) for values in series.values()]
    if not any(map(len, known)):
        return _chart("bars", title, list(series), [[], *([] for _ in series)], x_label=unit, y_label="count")
    edges = np.histogram_bin_edges(np.concatenate(known), bins)
    counts = [np.histogram(values, edges)[0].tolist() for values in known]
    span = [float(edges[0]), float(edges[-1])]
    return _chart("bars", title, list(series), [edges[:-1].tolist(), *counts], x_label=unit, y_label="count", span=span)


def scatter(title: str, series: Mapping[str, Points], *, x_label: str, y_label: str) -> Markup:
    """Return a chart of points."""
    points = sorted(
        (x, number, y)
        for number, (xs, ys) in enumerate(series.values())
        for x, y in zip(xs, ys, strict=True)
        if _is_number(x) and _is_number(y)
    )
    columns = [[y if number == own else None for _, number, y in points] for own in range(len(series))]
    return _chart(
        "points", title, list(series), [[x for x, _, _ in points], *columns], x_label=x_label, y_label=y_label
    )


def spans(title: str, stretches: Sequence[tuple[float, float]], seconds: float) -> Markup:
    """Return a bar over the time of a recording, on which stretches, from second to second, are filled."""
    total = sum(end - begin for begin, end in stretches)
    return render(
        "spans",
        title=title,
        boxes=[(1000 * begin / seconds, 1000 * (end - begin) / seconds) for begin, end in stretches],
        summary=f"{len(stretches)} stretches, {total:.1f} of {seconds:.1f} s",
    )


def _chart(kind: str, title: str, names: Sequence[str], data: Sequence[Sequence[Any]], **labels: Any) -> Markup:
    rounded = [[_rounded(value) for value in column] for column in data]
    spec = {"kind": kind, "names": list(names), "data": rounded, **labels}
    return render("chart", title=title, spec=spec, summary=_summary(kind, names, rounded))


def _summary(kind: str, names: Sequence[str], data: Sequence[Sequence[Any]]) -> str:
    """Describe a chart in words, for those who cannot see it."""
    if not data[0]:
        return "no values"
    parts = []
    for name, column in zip(names, data[1:], strict=True):
        known = [value for value in column if value is not None]
        if known and kind == "lines":
            parts.append(f"{name} from {known[0]:g} to {known[-1]:g}, lowest {min(known):g}, highest {max(known):g}")
        elif known:
            parts.append(f"{name}: {sum(known) if kind == 'bars' else len(known):g} values")
    return "; ".join(parts) or "no values"


def _thin(points: Points) -> Points:
    """Return at most about `MAX_POINTS` points, each the mean of its neighbors."""
    pairs = [(x, y) for x, y in zip(*points, strict=True) if _is_number(y)]
    if len(pairs) <= MAX_POINTS:
        return [x for x, _ in pairs], [y for _, y in pairs]
    starts = np.arange(MAX_POINTS) * len(pairs) // MAX_POINTS
    x, y = np.array(pairs, float).T
    means = np.add.reduceat(y, starts) / np.diff([*starts, len(pairs)])
    last = [*starts[1:] - 1, len(pairs) - 1]
    return x[last].tolist(), means.tolist()


def _is_number(value: Number | None) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _rounded(value: Number | None) -> float | None:
    """Return six significant digits, which no chart can show."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
