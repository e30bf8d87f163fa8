"""What a grid has found so far: ``results.json`` of its students, and of its cells over seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from mvqkd.decoding.scoring import difference_over_seeds, interval_over_seeds
from mvqkd.experiments.grid import GridSettings, Places, Student, run_command, students_of
from mvqkd.experiments.runner import is_done
from mvqkd.report.collect import SEED, compared, read_decoded, student_row
from mvqkd.report.table import (
    StudentResult,
    all_test_sets,
    results_document,
    undistilled,
)


def conf_hash(grid: GridSettings) -> str:
    """Of the grid's conf; times that were measured elsewhere are no part of it."""
    document = {**asdict(grid), "rates": None}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]


def collect_grid(grid: GridSettings, places: Places, command: str) -> dict[str, Any]:
    """The document for `write_results_json`: rows of the students that are done, and section
    ``grid``, where ``cells`` says of each the seeds that are done and what they gave together.

    Args:
      command: that runs the grid.
    """
    students = [student for student in students_of(grid) if is_done(places, student)]
    decoded = [read_decoded(places.exp / student.name) for student in students]
    rows = []
    for student in students:
        # As one would train this student alone.
        call = " ".join(
            f'"{word}"' if " " in word else word
            for word in run_command(grid, places, [student], device="")
        )
        rows.append(
            student_row(
                places.exp,
                places.data,
                student.cell.labels,
                student.name,
                call,
                student.cell.student,
            )
        )
    rows = compared(rows, decoded)
    cells = [_cell(grid, name, students, rows, decoded) for name in grid.cells]
    section = {
        "name": grid.name,
        "question": grid.question,
        "seeds": grid.seeds,
        "cells": cells,
        "origin": {
            "command": command,
            "conf_hash": conf_hash(grid),
            "device": ", ".join(dict.fromkeys(row.origin.device for row in rows)),
            "seed": None,  # each student has its own
        },
    }
    return results_document(rows, {"grid": section})


def _cell(
    grid: GridSettings,
    name: str,
    students: Sequence[Student],
    rows: Sequence[StudentResult],
    decoded: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    mine = [place for place, student in enumerate(students) if student.cell_name == name]
    cell = grid.cells[name]
    about = {
        "cell": name,
        "student": cell.student,
        "confs": cell.confs,
        "labels": cell.labels,
        "values": cell.values,
        "seeds_done": [students[place].seed for place in mine],
    }
    if not mine:
        return about
    own = [rows[place] for place in mine]
    pairs = []
    for place in mine:
        base = undistilled(rows, rows[place])
        if base is not None and base is not rows[place]:
            there = next(other for other, row in enumerate(rows) if row is base)
            pairs.append((decoded[there]["test_sets"], decoded[place]["test_sets"]))
    test_sets = {}
    for part in all_test_sets(own):
        wer, lo, hi = interval_over_seeds(
            [decoded[place]["test_sets"][part]["results"] for place in mine], seed=SEED
        )
        test_sets[part] = {"wer": wer, "lo": lo, "hi": hi}
        test_sets[part]["of_seeds"] = [row.test_sets[part].wer for row in own]
        if pairs:
            paired = [(base[part]["results"], this[part]["results"]) for base, this in pairs]
            test_sets[part]["difference"] = difference_over_seeds(paired, seed=SEED)
    return {
        **about,
        "distillation": own[0].distillation,
        "streaming": own[0].streaming,
        "test_sets": test_sets,
        "label_bytes_per_hour": own[0].label_bytes_per_hour,
        "training_seconds": mean(row.training_seconds for row in own),
        "seconds_per_step": mean(row.training_seconds / max(1, row.steps) for row in own),
        "conf_hashes": [row.origin.conf_hash for row in own],
        "dates": sorted({row.origin.date for row in own}),
    }
