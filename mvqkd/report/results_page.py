"""RESULTS.md of a corpus: what its results.json files say, and what of its grids is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mvqkd.errors import RecipeError
from mvqkd.experiments.grid import GridSettings
from mvqkd.report.grids import conf_hash
from mvqkd.report.table import (
    NOT_MEASURED,
    StudentResult,
    aligned,
    format_bytes,
    format_seconds,
    read_document,
    read_results,
    wer_table,
)


def _markdown(lines: list[list[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(aligned(escaped, "| ", " | ", " |")) + "\n"


def _wer(result: Mapping[str, Any]) -> str:
    return f"{result['wer']:.2f} [{result['lo']:.2f}, {result['hi']:.2f}]"


def _difference(result: Mapping[str, Any]) -> list[str]:
    difference = result.get("difference")
    if difference is None:
        return ["-", "-"]
    low, high = difference["lo"], difference["hi"]
    return [f"{difference['delta']:+.2f} [{low:+.2f}, {high:+.2f}]", f"{difference['p']:.2g}"]


def grid_section(grid: GridSettings, document: Mapping[str, Any] | None) -> str:
    """One row a cell, also of those that have not been run, and where the numbers came from.

    Args:
      document: results.json of the grid; None: it has none.
    """
    section = document["grid"] if document else {"cells": []}
    found = {}
    for entry in section["cells"]:
        cell = grid.cells.get(entry["cell"])
        meaning = (entry["confs"], entry["labels"], entry["values"])
        # Of another cell that had this name, nothing is known here.
        if entry["seeds_done"] and cell and meaning == (cell.confs, cell.labels, cell.values):
            found[entry["cell"]] = entry
    parts = list(dict.fromkeys(part for entry in found.values() for part in entry["test_sets"]))
    header = ["cell", "student", "distillation", "streaming", "labels", "seeds"]
    for part in parts:
        header += [f"{part} WER % [95%]", f"{part} difference [95%]", f"{part} p"]
    if not parts:
        header += ["WER % [95%]"]
    header += ["labels / hour", "s / step", "training"]
    origin_lines = [["cell", "conf of each seed", "dates"]]
    lines = [header]
    for name, cell in grid.cells.items():
        entry = found.get(name)
        if entry is None:
            about = [name, cell.student, cell.confs, "-", cell.labels, f"0 of {len(grid.seeds)}"]
            lines.append([*about, NOT_MEASURED, *["-"] * (len(header) - len(about) - 1)])
            continue
        line = [name, cell.student, entry["distillation"], "yes" if entry["streaming"] else "no"]
        line += [cell.labels if entry["label_bytes_per_hour"] else "-"]
        line += [f"{len(entry['seeds_done'])} of {len(grid.seeds)}"]
        for part in parts:
            result = entry["test_sets"].get(part)
            line += ["-", "-", "-"] if result is None else [_wer(result), *_difference(result)]
        line += [format_bytes(entry["label_bytes_per_hour"])]
        line += [f"{entry['seconds_per_step']:.3f}", format_seconds(entry["training_seconds"])]
        lines.append(line)
        origin_lines.append([name, ", ".join(entry["conf_hashes"]), ", ".join(entry["dates"])])
    text = f"## Grid {grid.name}\n\n{grid.question}\n\n{_markdown(lines)}"
    if not found:
        path = f"egs/{grid.corpus}/conf/grids/{grid.name}.yaml"
        return text + f"\n`python3 local/experiment.py --config {path}`\n"
    origin = section["origin"]
    seeds = ", ".join(map(str, grid.seeds))
    text += (
        f"\nMeans over the seeds ({seeds}); intervals are 95% bootstrap over utterances, "
        "differences paired with the undistilled student of the same seeds.\n"
        f"`{origin['command']}`; conf of the grid {origin['conf_hash']}; {origin['device']}.\n"
    )
    if origin["conf_hash"] != conf_hash(grid):
        text += f"The conf of the grid has changed since, and is now {conf_hash(grid)}.\n"
    return f"{text}\n{_markdown(origin_lines)}"


def run_section(
    name: str, rows: Sequence[StudentResult], other: Mapping[str, Mapping[str, Any]]
) -> str:
    """The table of one run of run.sh, and where its numbers came from.

    Args:
      other: the sections of its results.json beside the students.
    """
    text = f"## {name}\n\n{wer_table(rows)}\n"
    made = [
        [row.distillation + (", streaming" if row.streaming else ""), row.origin.conf_hash,
         str(row.origin.seed), row.origin.device, row.origin.date or "-"]
        for row in rows
    ]  # fmt: skip
    for what, section in other.items():
        origin = section["origin"]
        seed = "-" if origin["seed"] is None else str(origin["seed"])
        made.append([what, origin["conf_hash"], seed, origin["device"] or "-", "-"])
    if "teacher" in other:
        wers = ", ".join(f"{part} {wer:.2f}" for part, wer in other["teacher"]["wer"].items())
        text += f"Teacher, WER by greedy CTC: {wers or 'has no CTC head'}.\n\n"
    if "quantizer" in other:
        quantizer = other["quantizer"]
        rounds, loss = max(quantizer["rrl"].items(), key=lambda item: int(item[0]))
        text += (
            f"Codebooks: {quantizer['num_codebooks']}, RRL {loss:.3f} after {rounds} rounds of "
            "refinement.\n\n"
        )
    for command in dict.fromkeys(row.origin.command for row in rows):
        text += f"`{command}`\n"
    return f"{text}\n{_markdown([['', 'conf', 'seed', 'device', 'date'], *made])}"


def results_page(
    corpus: str, results: Sequence[Path], grids: Sequence[GridSettings], notes: str, command: str
) -> str:
    """All of the page.

    Args:
      results: results.json files of runs and of grids.
      notes: what a person has written about them.
      command: that makes the page.

    Raises:
      RecipeError: a file cannot be read, or is of a grid that is not there.
    """
    of_grids, sections, written = {}, [], [f"{notes.strip()}\n"] if notes else []
    for path in results:
        document = read_document(path)
        if "grid" in document:
            of_grids[document["grid"]["name"]] = document
        else:
            other = {name: section for name, section in document.items() if name != "students"}
            sections.append(run_section(path.stem, read_results(path), other))
    unknown = set(of_grids) - {grid.name for grid in grids}
    if unknown:
        raise RecipeError(
            f"results of grid {min(unknown)}: egs/{corpus}/conf/grids has none of this name; "
            "put it back, or remove the results"
        )
    sections += [grid_section(grid, of_grids[grid.name]) for grid in grids if grid.name in of_grids]
    missing = [grid_section(grid, None) for grid in grids if grid.name not in of_grids]
    head = f"<!-- Made by `{command}` from results/, conf/grids/ and notes.md: edit these. -->\n"
    body = "\n".join([*sections, *written, *missing])
    return f"{head}\n# {corpus}: results\n\n{body}"
