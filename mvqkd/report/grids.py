"""What a grid has found so far: ``results.json`` of its students, and of its cells over seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from statistics import mean
from typing import Any

from mvqkd.decoding.scoring import difference_over_seeds, interval_over_seeds
from mvqkd.experiments.grid import (
    GridSettings,
    Places,
    RunOptions,
    Student,
    dev_parts,
    run_command,
    students_of,
)
from mvqkd.experiments.runner import state_of
from mvqkd.report.collect import SEED, compared, read_decoded, student_row
from mvqkd.report.table import (
    StudentResult,
    all_test_sets,
    results_document,
    undistilled,
)


def conf_hash(grid: GridSettings) -> str:
    """Of the grid's conf; how it is run is no part of it."""
    names = {f.name for f in fields(GridSettings)}
    document = {name: value for name, value in asdict(grid).items() if name in names}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]


def collect_grid(
    grid: GridSettings,
    places: Places,
    command: str,
    options: RunOptions | None = None,
    out_of_date: Mapping[str, str] | None = None,
    confs: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The document for `write_results_json`: rows of the students that are done, and section
    ``grid``, where ``cells`` says of each the seeds that are done and what they gave together.

    Args:
      command: that runs the grid.
      options: of that.
      out_of_date: students that were made with other confs, and what their `state_of` was then; a
        student that is still the same is left out, and its seed named.
      confs: by student, as `mvqkd.report.confs.grid_digests` gives them.
    """
    options, out_of_date = options or RunOptions(), out_of_date or {}
    confs = confs or {}
    states = {student.name: state_of(places, student) for student in students_of(grid)}
    old = [s for s in students_of(grid) if s.name in out_of_date]
    old = [s for s in old if states[s.name] == out_of_date[s.name]]
    students = [s for s in students_of(grid) if states[s.name] is not None and s not in old]
    decoded = [read_decoded(places.exp / student.name) for student in students]
    rows = []
    for student in students:
        # As one would train this student alone.
        call = " ".join(
            f'"{word}"' if " " in word else word
            for word in run_command(grid, places, [student], replace(options, device=""))
        )
        row = student_row(
            places.exp,
            places.data,
            student.cell.labels,
            student.name,
            call,
            student.cell.student,
        )
        origin = replace(row.origin, confs=confs.get(student.name, ""))
        rows.append(replace(row, origin=origin))
    rows = compared(rows, decoded)
    cells = []
    for name in grid.cells:
        cells.append(_cell(grid, name, students, rows, decoded))
        cells[-1]["seeds_out_of_date"] = [s.seed for s in old if s.cell_name == name]
    section = {
        "name": grid.name,
        # Of the same grid there may be runs of several sizes.
        "run": places.exp.name,
        "size": grid.size,
        "split": grid.split,
        "options": {f.name: getattr(options, f.name) for f in fields(RunOptions)},
        "question": grid.question,
        "seeds": grid.seeds,
        "dev_parts": dev_parts(grid),
        "cells": cells,
        "origin": {
            "command": command,
            "conf_hash": conf_hash(grid),
            "device": ", ".join(dict.fromkeys(row.origin.device for row in rows)),
            "seed": None,  # each student has its own
        },
    }
    return results_document(rows, {"grid": section})


def _difference(
    pairs: Sequence[tuple[int, int]], decoded: Sequence[dict[str, Any]], part: str
) -> dict[str, Any]:
    """Of the second of each pair of places in ``decoded`` to the first."""
    results = [[decoded[place]["test_sets"][part]["results"] for place in pair] for pair in pairs]
    return {**difference_over_seeds(results, seed=SEED), "num_seeds": len(pairs)}


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
        **cell.meaning(),
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
            pairs.append((there, place))
    by_name = {student.name: place for place, student in enumerate(students)}
    against = {}
    for other in cell.against:
        of_seeds = [(Student(other, cell, students[place].seed).name, place) for place in mine]
        against[other] = [(by_name[there], place) for there, place in of_seeds if there in by_name]
    test_sets = {}
    for part in all_test_sets(own):
        wer, lo, hi = interval_over_seeds(
            [decoded[place]["test_sets"][part]["results"] for place in mine], seed=SEED
        )
        test_sets[part] = {"wer": wer, "lo": lo, "hi": hi}
        test_sets[part]["of_seeds"] = [row.test_sets[part].wer for row in own]
        if pairs:
            test_sets[part]["difference"] = _difference(pairs, decoded, part)
        test_sets[part]["against"] = {
            other: _difference(their, decoded, part) for other, their in against.items() if their
        }
    return {
        **about,
        "distillation": own[0].distillation,
        "streaming": own[0].streaming,
        "test_sets": test_sets,
        "label_bytes_per_hour": own[0].label_bytes_per_hour,
        "training_seconds": mean(row.training_seconds for row in own),
        "seconds_per_step": mean(row.step_seconds for row in own),
        "conf_hashes": [row.origin.conf_hash for row in own],
        "conf_digests": [row.origin.confs for row in own],
        "devices": sorted({row.origin.device for row in own}),
        "dates": sorted({row.origin.date for row in own}),
    }
