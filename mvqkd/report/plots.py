"""Plots of a recipe's report, as PNG files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mvqkd.errors import RecipeError
from mvqkd.files import written_aside
from mvqkd.report.table import StudentResult, all_test_sets, undistilled

Record = Mapping[str, Any]


def _save(figure: Figure, path: str | os.PathLike) -> None:
    # A canvas of its own needs no display and leaves pyplot's global state alone.
    with written_aside(path) as aside:
        FigureCanvasAgg(figure).print_png(aside)


def plot_training_curves(curves: Mapping[str, Sequence[Record]], path: str | os.PathLike) -> None:
    """Losses over training steps, one panel a loss, one line a student.

    Args:
      curves: records of each student by its name. A record has ``step`` and ``losses``, a mapping
        of loss name (``"train/pruned"``, ``"dev/pruned"`` ...) to value; a record may hold
        some of the losses only, as dev losses are computed less often. Values that are not finite
        leave a gap.
      path: the PNG file.
    Raises:
      RecipeError: there is nothing to draw.
    """
    panels = list(
        dict.fromkeys(n for records in curves.values() for r in records for n in r["losses"])
    )
    if not panels:
        raise RecipeError(f"{path}: no loss was recorded; train for at least one logged step")

    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.4 * columns, 3.6 * rows), dpi=100, layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        for k, (name, records) in enumerate(curves.items()):
            points = [(r["step"], r["losses"][panel]) for r in records if panel in r["losses"]]
            if points:
                steps, values = zip(*sorted(points, key=lambda point: point[0]))
                # The colour belongs to the student, whichever panels it appears in.
                marker = "o" if len(points) < 30 else None
                axes.plot(steps, values, label=name, color=f"C{k}", marker=marker, markersize=3)
        axes.set(title=panel, xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    _save(figure, path)


def plot_wer_bars(rows: Sequence[StudentResult], path: str | os.PathLike) -> None:
    """WER of every student on every test set as bars, with its 95% interval.

    Raises:
      RecipeError: no row has a test set.
    """
    test_sets = all_test_sets(rows)
    if not test_sets:
        raise RecipeError(f"{path}: no student has been decoded; run the decoding stage")
    figure = Figure(figsize=(1.6 + 1.2 * len(rows), 4.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(test_sets)
    for k, test_set in enumerate(test_sets):
        decoded = [
            (i, r.test_sets[test_set]) for i, r in enumerate(rows) if test_set in r.test_sets
        ]
        wers = [result.wer for _, result in decoded]
        bars = axes.bar(
            [i + (k - (len(test_sets) - 1) / 2) * width for i, _ in decoded],
            wers,
            width,
            label=test_set,
            yerr=[
                [max(0.0, result.wer - result.lo) for _, result in decoded],
                [max(0.0, result.hi - result.wer) for _, result in decoded],
            ],
            capsize=3,
        )
        axes.bar_label(bars, fmt="%.1f", fontsize="small")
    names = []
    for row in rows:
        base = undistilled(rows, row)
        differs = base is not None and base.epochs != row.epochs
        names.append(
            f"{row.name}\n{row.distillation}"
            + ("\nstreaming" if row.streaming else "")
            + (f"\n{row.epochs} epochs" if differs else "")
        )
    axes.set_xticks(range(len(rows)), names)
    axes.set(ylabel="WER [%]", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=len(test_sets))
    _save(figure, path)
