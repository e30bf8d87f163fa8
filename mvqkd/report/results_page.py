"""RESULTS.md of a corpus: what its results.json files say, and what of its grids is missing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mvqkd.errors import RecipeError
from mvqkd.experiments.grid import GridSettings, RunOptions, Student
from mvqkd.report.confs import conf_digests, grid_digests
from mvqkd.report.grids import conf_hash
from mvqkd.report.table import (
    NOT_MEASURED,
    STREAMING_NOTE,
    PaperResult,
    StudentResult,
    aligned,
    format_bytes,
    format_seconds,
    read_document,
    read_results,
    streaming_cells,
    wer_table,
)


def _markdown(lines: list[list[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(aligned(escaped, "| ", " | ", " |")) + "\n"


def _wer(result: Mapping[str, Any]) -> str:
    return f"{result['wer']:.2f} [{result['lo']:.2f}, {result['hi']:.2f}]"


def _spread(result: Mapping[str, Any]) -> str:
    of_seeds = result["of_seeds"]
    return f"{min(of_seeds):.2f} to {max(of_seeds):.2f}" if len(of_seeds) > 1 else "-"


def _difference(difference: Mapping[str, Any] | None) -> list[str]:
    if difference is None:
        return ["-", "-"]
    low, high = difference["lo"], difference["hi"]
    return [f"{difference['delta']:+.2f} [{low:+.2f}, {high:+.2f}]", f"{difference['p']:.2g}"]


def _found(grid: GridSettings, cells: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """By name, those of ``cells`` that have been run."""
    found = {}
    for entry in cells:
        cell = grid.cells.get(entry["cell"])
        # Of another cell that had this name, nothing is known here.
        if entry["seeds_done"] and cell:
            meaning = ("confs", "labels", "values", "untranscribed_parts")
            if {key: entry[key] for key in meaning if key in entry} == cell.meaning():
                found[entry["cell"]] = entry
    return found


@dataclass
class GridTables:
    """What a grid has found, as lines of cells under a header, and in words."""

    # One line a cell, also of those that have not been run.
    cells: list[list[str]]
    # One cell against another; the header alone where none is.
    against: list[list[str]]
    # Confs and dates of the cells that have been run.
    origins: list[list[str]]
    # What the numbers are.
    note: str
    # By name, the entries of results.json of the cells that have been run.
    found: dict[str, Mapping[str, Any]]
    # The test sets.
    parts: list[str]


AGAINST_NOTE = "One cell against another, paired with the same seeds; negative: better than it."


def grid_tables(grid: GridSettings, section: Mapping[str, Any]) -> GridTables:
    """Of section ``grid`` of a results.json; ``{"cells": []}`` where it has none."""
    found = _found(grid, section["cells"])
    parts = list(dict.fromkeys(part for entry in found.values() for part in entry["test_sets"]))
    header = ["cell", "student", "distillation", "streaming", "labels", "seeds"]
    # Of a dev set the error rate alone: it is for choosing a cell.
    on_dev = section.get("dev_parts", [])
    parts = [part for part in parts if part not in on_dev]
    for part in parts:
        header += [f"{part} WER % [95%]", f"{part} of a seed"]
        header += [f"{part} difference [95%]", f"{part} p"]
    header += [f"{part} WER %" for part in on_dev]
    if not parts:
        header += ["WER % [95%]"]
    header += ["labels / hour", "s / step", "training"]
    origins = [["cell", "seeds", "conf of each seed", "device", "dates"]]
    lines = [header]
    for name, cell in grid.cells.items():
        entry = found.get(name)
        if entry is None:
            labels = cell.labels if "distillation/none" not in cell.confs.split() else "-"
            about = [name, cell.student, cell.confs, "-", labels, f"0 of {len(grid.seeds)}"]
            lines.append([*about, NOT_MEASURED, *["-"] * (len(header) - len(about) - 1)])
            continue
        line = [name, cell.student, entry["distillation"], "yes" if entry["streaming"] else "no"]
        line += [cell.labels if entry["label_bytes_per_hour"] else "-"]
        line += [f"{len(entry['seeds_done'])} of {len(grid.seeds)}"]
        for part in parts:
            result = entry["test_sets"].get(part)
            if result is None:
                line += ["-"] * 4
            else:
                line += [_wer(result), _spread(result), *_difference(result.get("difference"))]
        for part in on_dev:
            result = entry["test_sets"].get(part)
            line.append(f"{result['wer']:.2f}" if result else "-")
        line += [format_bytes(entry["label_bytes_per_hour"])]
        line += [f"{entry['seconds_per_step']:.3f}", format_seconds(entry["training_seconds"])]
        lines.append(line)
        done, hashes, dates = (
            ", ".join(map(str, entry[key])) for key in ("seeds_done", "conf_hashes", "dates")
        )
        # Of a version that did not tell cells apart: all of them.
        devices = entry.get("devices", [section["origin"]["device"]])
        origins.append([name, done, hashes, "; ".join(devices), dates])
    seeds = ", ".join(map(str, grid.seeds))
    note = (
        f"Means over those of the seeds {seeds} that are done, and of a seed the lowest and "
        "highest; intervals are 95% bootstrap over utterances and seeds, differences paired with "
        "the undistilled student of the same seeds, p twice the share of draws beyond zero. "
        # Drawn with replacement, n of them vary (n - 1) / n as much: `interval_over_seeds`.
        "Over few seeds the intervals are too narrow: three drawn again have two thirds of the "
        "variance that seeds have, two have half of it, one has none. "
    )
    if "dev_parts" in section:
        note += "A step's time is without decoding of the dev sets, that of training with it"
        note += ", by whose error rates a cell is to be chosen." if on_dev else "."
    else:  # of a version that did not tell them apart
        note += "A step's time, as that of training, is with decoding of the dev sets."
    return GridTables(lines, _against(grid, found, parts), origins, note, found, parts)


def grid_section(
    grid: GridSettings, run: str, document: Mapping[str, Any] | None, told: set[str]
) -> str:
    """One row a cell, also of those that have not been run, and where the numbers came from.

    Args:
      run: the folder under exp/ that it has run in, or would.
      document: results.json of the grid; None: it has none.
      told: what the page has said already of all its grids; what this section says is added.
    """
    section = document["grid"] if document else {"cells": []}
    asked = {name: section[name] for name in ("size", "split") if name in section}
    # A run may have more seeds than the conf, or fewer.
    seeds = list(dict.fromkeys([*grid.seeds, *section.get("seeds", [])]))
    grid = replace(grid, **asked, seeds=seeds)
    tables = grid_tables(grid, section)
    text = f"## Grid {grid.name}, {run}\n\n{grid.question}\n\n{_markdown(tables.cells)}"
    if not tables.found:
        path = f"egs/{grid.corpus}/conf/grids/{grid.name}.yaml"
        return f"{text}\n`python3 local/experiment.py --config {path}`\n"
    origin = section["origin"]
    if tables.note not in told:
        told.add(tables.note)
        text += f"\n{tables.note}\n"
    if len(tables.against) > 1:
        text += "\n" if AGAINST_NOTE in told else f"\n{AGAINST_NOTE}\n\n"
        told.add(AGAINST_NOTE)
        text += _markdown(tables.against)
    text += f"\n`{origin['command']}`; conf of the grid {origin['conf_hash']}; "
    text += f"{origin['device']}.\n"
    # A run of some of the seeds is no run of another conf.
    now = conf_hash(replace(grid, seeds=section.get("seeds", grid.seeds)))
    if origin["conf_hash"] != now:
        text += f"The conf of the grid has changed since, and is now {now}.\n"
    changed = _cells_changed_since(grid, section, tables.found)
    if changed:
        text += f"Confs have changed since, those of: {', '.join(changed)}.\n"
    for entry in section["cells"]:
        if entry.get("seeds_out_of_date"):
            seeds = ", ".join(map(str, entry["seeds_out_of_date"]))
            text += (
                f"Left out of {entry['cell']}, since its confs have changed after it was trained: "
                f"seed {seeds}.\n"
            )
    return f"{text}\n{_markdown(tables.origins)}"


def _cells_changed_since(
    grid: GridSettings, section: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """The cells of which a student's confs are others now, of those of which that was kept."""
    kept = {
        name: entry["conf_digests"]
        for name, entry in found.items()
        if any(entry.get("conf_digests", []))
    }
    now = grid_digests(grid, RunOptions(**section["options"])) if kept else {}
    changed = []
    for name, digests in kept.items():
        seeds = found[name]["seeds_done"]
        students = [Student(name, grid.cells[name], seed).name for seed in seeds]
        if digests != [now.get(student) for student in students]:
            changed.append(name)
    return changed


def _against(
    grid: GridSettings, found: Mapping[str, Mapping[str, Any]], parts: list[str]
) -> list[list[str]]:
    """Of the cells that are compared with others than the undistilled one."""
    header = ["cell", "against", "labels / hour", "against's", "seeds"]
    for part in parts:
        header += [f"{part} difference [95%]", f"{part} p"]
    lines = [header]
    for name, cell in grid.cells.items():
        for other in cell.against:
            line = [name, other]
            for one in (name, other):
                line.append(format_bytes(found.get(one, {}).get("label_bytes_per_hour")))
            test_sets = found.get(name, {}).get("test_sets", {})
            # Of another cell that had this other's name, nothing is known here either.
            of_parts = [
                test_sets.get(part, {}).get("against", {}).get(other) if other in found else None
                for part in parts
            ]
            num_seeds = max((one["num_seeds"] for one in of_parts if one), default=0)
            line.append(f"{num_seeds} of {len(grid.seeds)}")
            if num_seeds:
                for one in of_parts:
                    line += _difference(one)
            else:
                line += [NOT_MEASURED, *["-"] * (len(header) - len(line) - 1)]
            lines.append(line)
    return lines


def run_section(
    name: str, rows: Sequence[StudentResult], other: Mapping[str, Mapping[str, Any]]
) -> str:
    """The table of one run of run.sh, and where its numbers came from.

    Args:
      other: the sections of its results.json beside the students.
    """
    text = f"## {name}\n\n{wer_table(rows)}\n"
    if streaming := streaming_cells(rows):
        text += f"{STREAMING_NOTE}\n\n{_markdown(streaming)}\n"
    made = [
        [_kind(row), "-" if row.epochs is None else str(row.epochs), row.origin.conf_hash,
         str(row.origin.seed), row.origin.device, row.origin.date or "-"]
        for row in rows
    ]  # fmt: skip
    for what, section in other.items():
        origin = section["origin"]
        seed = "-" if origin["seed"] is None else str(origin["seed"])
        device, date = origin["device"] or "-", origin.get("date") or "-"
        made.append([what, "-", origin["conf_hash"], seed, device, date])
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
    changed = _changed_since(rows)
    if changed:
        text += f"Confs have changed since, those of: {', '.join(changed)}.\n"
    return f"{text}\n{_markdown([['', 'epochs', 'conf', 'seed', 'device', 'date'], *made])}"


def _kind(row: StudentResult) -> str:
    return row.distillation + (", streaming" if row.streaming else "")


def _changed_since(rows: Sequence[StudentResult]) -> list[str]:
    """The students whose confs are others now, of those of which that was kept."""
    now: dict[str, set[str]] = {}
    changed = []
    for row in rows:
        if row.origin.confs:
            if row.origin.command not in now:
                now[row.origin.command] = set(conf_digests(row.origin.command).values())
            if row.origin.confs not in now[row.origin.command]:
                changed.append(f"{_kind(row)} ({row.epochs} epochs)")
    return changed


def published_section(
    corpus: str,
    students: Mapping[str, str],
    published: Sequence[PaperResult],
    rows: Sequence[StudentResult],
) -> str:
    """What others have published of a corpus's students and was not measured here, one row for each
    of their results; a student of which nothing is published has one too. Nothing where all has
    been measured, or nothing is published.

    Args:
      students: their conf files by name, as students.txt has them.
      rows: of the runs that there are.
    """
    if not published:
        return ""
    parts = list(dict.fromkeys(part for one in published for part in one.wer))
    header = ["student", "distillation", "streaming", "decoding"]
    lines = [[*header, *(f"{part} WER %, published" for part in parts), "here"]]
    sources: dict[str, None] = {}
    options: dict[str, None] = {}
    for name, confs in students.items():
        words = confs.split()
        kinds = [word.partition("/")[2] for word in words if word.startswith("distillation/")]
        like = (kinds[0] if kinds else "-", "streaming" in words)
        about = [name, like[0], "yes" if like[1] else "no"]
        of_like = [one for one in published if (one.distillation, one.streaming) == like]
        for one in of_like:
            if not any(one.is_like(row) for row in rows):
                wers = [f"{one.wer[part]:.2f}" if part in one.wer else "-" for part in parts]
                lines.append([*about, one.decoding.strip("-") or "-", *wers, NOT_MEASURED])
                sources[one.source] = None
                options |= {one.options: None} if one.options else {}
        if not of_like and not any((row.distillation, row.streaming) == like for row in rows):
            lines.append([*about, "-", *["-"] * len(parts), NOT_MEASURED])
    if len(lines) == 1:
        return ""
    source = f"Published: {'; '.join(sources)}.\n\n" if sources else ""
    return (
        f"## Published, {NOT_MEASURED} here\n\n{_markdown(lines)}\n"
        f"{source}`{' '.join([f'./run.sh --corpus {corpus} --device cuda', *options])}`\n"
    )


def identity(document: Mapping[str, Any], usual: Mapping[str, str]) -> tuple[str, str]:
    """The name of the grid whose results these are, and the folder under exp/ that it ran in.

    Args:
      usual: that of a grid by name, for results of a version that did not tell.
    """
    section = document["grid"]
    return section["name"], section.get("run") or usual.get(section["name"], "")


def results_page(
    corpus: str,
    results: Sequence[Path],
    grids: Sequence[GridSettings],
    notes: str,
    command: str,
    students: Mapping[str, str] | None = None,
    published: Sequence[PaperResult] = (),
    runs: Mapping[str, str] | None = None,
) -> str:
    """All of the page.

    Args:
      results: results.json files of runs and of grids.
      notes: what a person has written about them.
      command: that makes the page.
      students: of the corpus's recipe, see `published_section`.
      published: what others have published of them.
      runs: the folder under exp/ of each grid as its conf is, by name.

    Raises:
      RecipeError: a file cannot be read, or is of a grid that is not there.
    """
    of_grids: dict[str, dict[str, Any]] = defaultdict(dict)
    sections, written = [], [f"{notes.strip()}\n"] if notes else []
    usual = {grid.name: (runs or {}).get(grid.name, corpus) for grid in grids}
    rows: list[StudentResult] = []
    for path in results:
        document = read_document(path)
        if "grid" in document:
            name, run = identity(document, usual)
            of_grids[name][run] = document
        else:
            other = {name: section for name, section in document.items() if name != "students"}
            of_run = read_results(path)
            rows += of_run
            sections.append(run_section(path.stem, of_run, other))
    not_here = published_section(corpus, students or {}, published, rows)
    sections += [not_here] if not_here else []
    unknown = set(of_grids) - {grid.name for grid in grids}
    if unknown:
        raise RecipeError(
            f"results of grid {min(unknown)}: egs/{corpus}/conf/grids has none of this name; "
            "put it back, or remove the results"
        )
    # Before the many tables that it is about.
    sections += written
    missing, told = [], set()
    for grid in grids:
        of_runs = of_grids.get(grid.name, {})
        sections += [grid_section(grid, run, document, told) for run, document in of_runs.items()]
        missing += [] if of_runs else [grid_section(grid, usual[grid.name], None, told)]
    head = f"<!-- Made by `{command}` from results/, conf/grids/ and notes.md: edit these. -->\n"
    body = "\n".join([*sections, *missing])
    return f"{head}\n# {corpus}: results\n\n{body}"
