"""Where things lie in the report page's charts: scales, ticks, lines and points.

A chart is drawn as SVG whose horizontal and vertical places are percentages of its area, so that
it fits any width while its text keeps its size. ``x`` runs from 0 (left) to 100 (right), ``y``
from 0 (top) to 100 (bottom).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# A loss is drawn on a logarithmic scale where its largest value is this many times its least.
_LOG_FROM_RATIO = 20


@dataclass(frozen=True)
class Scale:
    """Values to percentages: ``low`` lies at 0, ``high`` at 100."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(100 * (value - low) / (high - low), 3)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """About ``count`` round values as (percentage, label)."""
        values = _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high, count)
        return [(self(value), f"{value:g}") for value in values]


def _ticks(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= 0.7 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them where they are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for leading in ((1,), (1, 3), (1, 2, 5)):
        found = [m * 10.0**d for d in decades for m in leading if low <= m * 10.0**d <= high]
        if len(found) >= 3:
            break
    return found


def linear_from_zero(values: Sequence[float]) -> Scale:
    """From 0 to a little more than the largest value."""
    return Scale(0.0, 1.04 * max([*values, 1e-9]))


@dataclass
class Look:
    """How a student is drawn in every chart."""

    color: int  # of the palette in the style sheet; 0 is grey, for no distillation
    dashed: bool  # a streaming student
    label: str


@dataclass
class Line:
    look: Look
    # Pieces without a gap, each as the ``points`` of a polyline.
    pieces: list[str]
    dots: list[tuple[float, float, str]]  # x, y, what it says
    last: float | None = None  # the last value


@dataclass
class LinePanel:
    """Lines over training steps."""

    title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    # What is above the top and not shown; None where all is.
    cut_off: float | None = None
    log: bool = False


def line_panel(
    name: str,
    title: str,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    looks: Mapping[str, Look],
    top: float | None = None,
) -> LinePanel | None:
    """One loss or error rate of all students.

    Args:
      name: of the loss, as ``losses`` of the records has it; title: for readers.
      curves: records of each student, as `mvqkd.report.collect.read_log` gives them.
      top: where the axis ends, should values go further.
    Returns:
      None where there is nothing finite to draw. Values that are not finite leave a gap.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    for student, records in curves.items():
        points = [(r["step"], float(r["losses"][name])) for r in records if name in r["losses"]]
        if any(math.isfinite(value) for _, value in points):
            series[student] = sorted(points, key=lambda point: point[0])
    finite = [v for points in series.values() for _, v in points if math.isfinite(v)]
    if not finite:
        return None
    highest = max(finite)
    cut_off = top if top is not None and highest > top else None
    low = min(finite)
    log = cut_off is None and low > 0 and highest / low > _LOG_FROM_RATIO
    if log:
        y_scale = Scale(low / 1.1, highest * 1.1, log=True)
    elif low < 0:
        y_scale = Scale(low, max(highest, low + 1e-9))
    else:
        y_scale = linear_from_zero([highest if cut_off is None else cut_off])
    x_scale = Scale(0, max([step for points in series.values() for step, _ in points] + [1]))
    lines = []
    for student, points in series.items():
        pieces: list[list[str]] = [[]]
        dots = []
        for step, value in points:
            if not math.isfinite(value):
                pieces.append([])
                continue
            x, y = x_scale(step), round(100 - y_scale(value), 3)
            pieces[-1].append(f"{x:g},{y:g}")
            if y >= 0:
                dots.append((x, y, f"{looks[student].label}, step {step}: {value:.4g}"))
        last = next((v for _, v in reversed(points) if math.isfinite(v)), None)
        lines.append(Line(looks[student], [" ".join(p) for p in pieces if p], dots, last))
    y_ticks = [(100 - y, label) for y, label in y_scale.ticks()]
    return LinePanel(title, x_scale.ticks(4), y_ticks, lines, cut_off, log)


@dataclass
class Point:
    look: Look
    x: float
    y: float
    y_low: float
    y_high: float
    text: str
    shift: int = 0  # pixels to the right, see `spread_points`


@dataclass
class ScatterPanel:
    """WER against bytes of labels."""

    title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    points: list[Point] = field(default_factory=list)
    # Students without labels: a line across.
    levels: list[tuple[Look, float, str]] = field(default_factory=list)
    # Of float32 embeddings, where that is known: x and what it says.
    mark: tuple[float, str] | None = None


def spread_points(points: Sequence[Point]) -> None:
    """Set those of the same place across side by side."""
    for x in {point.x for point in points}:
        same = [point for point in points if point.x == x]
        for place, point in enumerate(same):
            point.shift = 14 * place - 7 * (len(same) - 1)


# Shades of the picture of codebook use, by how often an entry is chosen relative to all alike.
_SHADES = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
SHADE_LABELS = ("never", "< ¼", "¼-½", "½-0.8", "0.8-1.25", "1.25-2", "2-4", "> 4")


def use_map(counts: Sequence[Sequence[int]]) -> list[tuple[int, str]]:
    """Codebook use as SVG paths in units of one cell: (shade, path), shades as `SHADE_LABELS`.

    Row n is codebook n; its entries go from the most to the least used, since their numbers mean
    nothing.

    Args:
      counts: (N, K), how often each entry was chosen.
    """
    paths: dict[int, list[str]] = {}
    for row, row_counts in enumerate(counts):
        even = sum(row_counts) / len(row_counts)
        shades = [
            0 if c == 0 else 1 + sum(c >= s * even for s in _SHADES)
            for c in sorted(row_counts, reverse=True)
        ]
        start = 0
        for column in range(1, len(shades) + 1):
            if column == len(shades) or shades[column] != shades[start]:
                piece = f"M{start} {row}h{column - start}v1h-{column - start}z"
                paths.setdefault(shades[start], []).append(piece)
                start = column
    return [(shade, "".join(pieces)) for shade, pieces in sorted(paths.items())]
