"""Charts as numbers: where lines, ticks and bars lie in an SVG. The page's template draws them, and its script reads
the values under the pointer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pipelines.report.pictures import heat

WIDTH, HEIGHT = 400, 230  # of a chart, in its own units, which are pixels where there is room
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 10, 24  # around the plot
LARGEST = 1e100  # values beyond are drawn as those that are no numbers
MOST_POINTS = 400  # of a line: of more, each stretch keeps its lowest and its highest
TABLE_ROWS = 12
SPREAD = 20.0  # times the median that the largest value is, from which on an axis of positive values is logarithmic


class Series(NamedTuple):
    """Values over steps, which may be nan or infinite."""

    name: str
    colour: int  # number of the subject
    dots: bool  # few values, such as those of validations
    steps: Sequence[float]
    values: Sequence[float]


class Line(NamedTuple):
    name: str
    colour: int
    dots: list[tuple[float, float]]  # places, where the values are few
    path: str  # d of an SVG path; broken where a value is no number
    lost: list[float]  # places along the x axis of values that are no numbers


class Tick(NamedTuple):
    place: float
    label: str


class Chart(NamedTuple):
    title: str
    unit: str
    x_name: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    logarithmic: bool
    said: str  # the chart in words, for who does not see it
    table: tuple[list[str], list[list[str]]]  # names of columns, and rows
    data: dict[str, Any]  # for the page's script: no nan, JSON has none
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(title: str, series: Sequence[Series], unit: str = "", x_name: str = "step") -> Chart | None:
    """A chart of lines over one axis; None where no value is a finite number."""
    thin = [thinned(one) for one in series if len(one.steps)]
    finite = [value for one in thin for value in one.values if is_drawn(value)]
    if not finite:
        return None
    logarithmic = min(finite) > 0 and max(finite) > SPREAD * sorted(finite)[len(finite) // 2]
    low, high, y_ticks = axis(min(finite), max(finite), logarithmic=logarithmic)
    steps = [step for one in thin for step in one.steps]
    first, last = min(0, *steps), max(steps)
    last = last if last > first else first + 1

    def x(step: float) -> float:
        return round(LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        value = math.log10(value) if logarithmic else value
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for one in thin:
        places = [(x(s), y(v)) if is_drawn(v) else None for s, v in zip(one.steps, one.values, strict=True)]
        lost = [x(s) for s, v in zip(one.steps, one.values, strict=True) if not is_drawn(v)]
        dots = [place for place in places if place is not None] if one.dots else []
        lines.append(Line(one.name, one.colour, dots, path_through(places), lost))
    return Chart(
        title,
        unit,
        x_name,
        [Tick(x(step), number(step)) for step in nice_ticks(first, last, 5) if first <= step <= last],
        [Tick(y(value), number(value)) for value in y_ticks],
        lines,
        logarithmic,
        said=f"{title} over the {x_name}. " + " ".join(in_words(one, x_name) for one in series if len(one.steps)),
        table=table_of(series, x_name),
        data={
            "x": [x(first), x(last), first, last],
            "series": [
                {
                    "name": one.name,
                    "colour": one.colour,
                    "steps": list(one.steps),
                    "values": [value if is_drawn(value) else None for value in one.values],
                    "y": [y(value) if is_drawn(value) else None for value in one.values],
                }
                for one in thin
            ],
        },
    )


def thinned(series: Series) -> Series:
    """A series of at most `MOST_POINTS` points: of each stretch its lowest and its highest value, in their order, so
    that no spike is lost; and each first value that is no number."""
    count = len(series.steps)
    if count <= MOST_POINTS:
        return series
    stretches = MOST_POINTS // 2
    kept = {0, count - 1}
    for stretch in range(stretches):
        places = range(stretch * count // stretches, (stretch + 1) * count // stretches)
        finite = [place for place in places if is_drawn(series.values[place])]
        if finite:
            kept |= {min(finite, key=series.values.__getitem__), max(finite, key=series.values.__getitem__)}
        if len(finite) < len(places):
            kept.add(next(place for place in places if place not in finite))
    chosen = sorted(kept)
    return series._replace(steps=[series.steps[i] for i in chosen], values=[series.values[i] for i in chosen])


def path_through(places: Sequence[tuple[float, float] | None]) -> str:
    """`M1 2L3 4`, begun anew behind each gap."""
    parts, pen = [], "M"
    for place in places:
        if place is None:
            pen = "M"
            continue
        parts.append(f"{pen}{place[0]:g} {place[1]:g}")
        pen = "L"
    return "".join(parts)


def axis(low: float, high: float, *, logarithmic: bool) -> tuple[float, float, list[float]]:
    """The ends of an axis for values from `low` to `high`, in log10 where it is logarithmic, and the values at its
    ticks."""
    if logarithmic:
        ends = math.log10(low), math.log10(high)
        pad = 0.04 * (ends[1] - ends[0])
        powers = range(math.floor(ends[0]), math.ceil(ends[1]) + 1)
        steps = (1.0, 3.0) if ends[1] - ends[0] < 2.5 else (1.0,)
        ticks = [digit * 10.0**power for power in powers for digit in steps]
        return ends[0] - pad, ends[1] + pad, [tick for tick in ticks if low <= tick <= high]
    pad = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    bottom = 0.0 if 0 <= low < 0.3 * high else low - pad
    return bottom, high + pad, [tick for tick in nice_ticks(bottom, high + pad, 5) if bottom <= tick <= high + pad]


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About so many round numbers from `low` to `high`."""
    rough = (high - low) / max(1, count)
    if not rough > 0 or not math.isfinite(rough):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def is_drawn(value: float) -> bool:
    """Whether a value has a place on a chart: neither nan nor so large that differences overflow."""
    return abs(value) < LARGEST


def number(value: float) -> str:
    """`12,000`, `0.0031`, `1.2e-09`"""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def in_words(series: Series, x_name: str) -> str:
    finite = [(value, step) for value, step in zip(series.values, series.steps, strict=True) if is_drawn(value)]
    lost = len(series.values) - len(finite)
    if not finite:
        return f"{series.name}: no value is a number."
    low, high = min(finite), max(finite)
    said = (
        f"{series.name}: from {number(finite[0][0])} to {number(finite[-1][0])} at {x_name} {number(finite[-1][1])}, "
        f"lowest {number(low[0])} at {number(low[1])}, highest {number(high[0])} at {number(high[1])}"
    )
    return said + (f"; {lost} values are not numbers." if lost else ".")


def table_of(series: Sequence[Series], x_name: str) -> tuple[list[str], list[list[str]]]:
    """Values at up to `TABLE_ROWS` steps of those that the series with the fewest has, and at the last of all."""
    filled = [one for one in series if len(one.steps)]
    steps = sorted({step for one in filled for step in one.steps})
    of_fewest = sorted(min(filled, key=lambda one: len(one.steps)).steps)
    chosen = of_fewest if len(of_fewest) > 2 else steps
    rows = min(TABLE_ROWS, len(chosen))
    kept = sorted({chosen[(i * (len(chosen) - 1)) // max(1, rows - 1)] for i in range(rows)} | {steps[-1]})
    values = [dict(zip(one.steps, one.values, strict=True)) for one in filled]
    body = [[number(step), *(number(of[step]) if step in of else "–" for of in values)] for step in kept]
    return [x_name, *(one.name for one in filled)], body


class Bars(NamedTuple):
    """Columns that stand for numbers from 0 on."""

    title: str
    x_name: str
    y_name: str
    outline: str  # points of an SVG polygon over all columns
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    said: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def bars(title: str, values: Sequence[float], x_name: str, y_name: str, said: str) -> Bars:
    """Columns for values from 0 on, the first named 1; of more than there are pixels the highest of each."""
    columns = min(len(values), WIDTH)
    heights = [max(values[c * len(values) // columns : (c + 1) * len(values) // columns]) for c in range(columns)]
    top = max(heights) or 1.0
    wide = (WIDTH - LEFT - RIGHT) / columns

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)

    gap = 0.15 * wide if columns <= 80 else 0.0
    points = [f"{LEFT:g},{y(0):g}"]
    for c, value in enumerate(heights):
        for x, h in (
            (c * wide + gap, 0.0),
            (c * wide + gap, value),
            ((c + 1) * wide - gap, value),
            ((c + 1) * wide - gap, 0.0),
        ):
            points.append(f"{LEFT + x:.1f},{y(h):.1f}")
    ranks = [rank for rank in nice_ticks(1, len(values), 5) if 1 <= rank <= len(values) and rank == int(rank)]
    ranks = sorted({1.0, *ranks}) if len(values) > 1 else [1.0]
    if len(ranks) > 1 and ranks[1] - 1 < 0.08 * len(values):
        del ranks[1]
    x_ticks = [
        Tick(round(LEFT + (rank - 0.5) * (WIDTH - LEFT - RIGHT) / len(values), 1), number(rank)) for rank in ranks
    ]
    y_ticks = [Tick(round(y(value), 1), number(value)) for value in nice_ticks(0, top, 4) if value <= top]
    return Bars(title, x_name, y_name, " ".join(points), x_ticks, y_ticks, said)


class HeatMap(NamedTuple):
    """Numbers of a grid as coloured cells."""

    title: str
    said: str
    unit: str
    rows: list[list[tuple[str, str, bool]]]  # of each cell its colour, its value in words, and whether it is dark
    low: str
    high: str
    numbers: bool  # whether the values stand in the cells
    cell: int  # side, in units of the SVG


def heat_map(title: str, values: Sequence[Sequence[float]], top: float, unit: str) -> HeatMap:
    """Of h rows of w numbers, from 0, which is dark, to `top`."""
    array = np.asarray(values, dtype=np.float64)
    colours = np.asarray(heat(array / (top or 1.0)))
    flat = array.ravel()
    wide = array.shape[1]
    rows = [
        [
            (f"#{r:02x}{g:02x}{b:02x}", f"{array[i, j]:.2f}", bool(0.299 * r + 0.587 * g + 0.114 * b < 140))
            for j, (r, g, b) in enumerate(row.tolist())
        ]
        for i, row in enumerate(colours)
    ]
    said = f"{title}: {array.shape[0]} by {wide} places, from {flat.min():.2f} to {flat.max():.2f} {unit}, "
    said += f"mean {flat.mean():.2f}."
    return HeatMap(title, said, unit, rows, "0", number(round(top, 2)), wide <= 10, 36 if wide <= 10 else 18)
