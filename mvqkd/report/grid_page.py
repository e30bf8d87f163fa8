"""A grid as one HTML file that needs nothing beside it: its cells' error rates, costs and origin.

    write_grid_page("exp/mini-small/grids/kinds/index.html", grid, read_document("results.json"))

It is drawn as the page of a run is, `mvqkd.report.page`; a cell takes the place of a student.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mvqkd.experiments.grid import GridSettings
from mvqkd.files import written_aside
from mvqkd.report.page import Report, rendered, storage_panels, student_looks, wer_panels
from mvqkd.report.results_page import AGAINST_NOTE, grid_tables
from mvqkd.report.table import Origin, StudentResult, WerResult


def _row(entry: Mapping[str, Any], parts: list[str], origin: Origin) -> StudentResult:
    """A cell's means over its seeds."""
    test_sets = {}
    for part in parts:
        if part in entry["test_sets"]:
            result = entry["test_sets"][part]
            # Paired with the undistilled student of the same seeds, as the table below the bars is.
            paired = result.get("difference") or {}
            paired = [paired.get(key) for key in ("delta", "lo", "hi", "p")]
            test_sets[part] = WerResult(result["wer"], result["lo"], result["hi"], 0, 0, *paired)
    return StudentResult(
        entry["student"],
        entry["distillation"],
        entry["streaming"],
        test_sets,
        origin,
        label_bytes_per_hour=entry["label_bytes_per_hour"],
    )


def render_grid_page(grid: GridSettings, document: Mapping[str, Any]) -> str:
    """The page's text.

    Args:
      document: of the grid, as `mvqkd.report.grids.collect_grid` gives it.
    """
    section = document["grid"]
    tables = grid_tables(grid, section)
    # One for all: what is compared are cells, whatever their seeds.
    origin = Origin(**section["origin"])
    rows = [_row(entry, tables.parts, origin) for entry in tables.found.values()]
    report = Report(section["run"], list(tables.found), rows, decoded=[], curves={})
    of_seeds = {
        name: {part: entry["test_sets"][part]["of_seeds"] for part in entry["test_sets"]}
        for name, entry in tables.found.items()
    }
    looks = student_looks(report.names, rows)
    done = sum(len(entry["seeds_done"]) for entry in tables.found.values())
    total = len(grid.cells) * len(grid.seeds)
    return rendered(
        "grid.html",
        title=f"{grid.name}, {report.title}",
        kicker="grid",
        script=None,
        question=grid.question,
        state=f"{done} of {total} students are done.",
        wer_panels=wer_panels(report, looks, of_seeds),
        cells=tables.cells,
        note=tables.note,
        against=tables.against if len(tables.against) > 1 else [],
        against_note=AGAINST_NOTE,
        storage=storage_panels(report, looks),
        looks=looks,
        origins=tables.origins,
        origin=origin,
    )


def write_grid_page(
    path: str | os.PathLike, grid: GridSettings, document: Mapping[str, Any]
) -> None:
    text = render_grid_page(grid, document)
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
