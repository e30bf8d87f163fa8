"""A grid: which students answer one question, as the confs that make them differ.

::

    name: codebooks
    corpus: mini
    size: small
    seeds: [1, 2, 3]
    cells:
      none: {confs: distillation/none}
      mvq-n4: {confs: distillation/mvq, labels: n4, like: mvq}

Each cell is one line of a students file for each seed, and what it changes in the confs is one more
conf file; run.sh does the rest.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mvqkd.errors import RecipeError
from mvqkd.files import locked, written_aside

# run.sh takes a name of a student as one word and as a folder.
_ALLOWED = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_+.")


@dataclass
class Cell:
    """One student, for every seed of the grid."""

    # Conf files on top of student.yaml and training.yaml, as in students.txt.
    confs: str
    # The set of labels that it learns from: --labels of run.sh.
    labels: str = "mvq"
    # Values on top of these files, as a conf file has them.
    values: dict[str, Any] = field(default_factory=dict)
    # Parts of the corpus that it learns from as well, without their transcripts.
    untranscribed_parts: str = ""
    # How tables call it. It is compared with the undistilled student of the same name.
    student: str = "conformer"
    # Another cell, or several, that it is compared with beside that.
    against: str | list[str] = field(default_factory=list)
    # Whose training takes as long: what measured times are shared by, and a step of costs.yaml or
    # how it goes on, `student-<like>`. Empty: the cell itself.
    like: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.against, str):
            self.against = [self.against]

    def meaning(self) -> dict[str, Any]:
        """What makes its students what they are."""
        meaning = {"confs": self.confs, "labels": self.labels, "values": self.values}
        if self.untranscribed_parts:
            meaning["untranscribed_parts"] = self.untranscribed_parts
        return meaning


@dataclass
class GridSettings:
    """The question, and the students that answer it."""

    name: str
    # In words, for the page of results.
    question: str
    corpus: str
    cells: dict[str, Cell]
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    size: str = ""
    split: str = ""
    # A file of conf/decoding/, by which all of them are decoded.
    decoding: str = ""


@dataclass
class RunOptions:
    """Options of run.sh for all students of a grid; empty: the recipe's own."""

    device: str = "auto"
    dl_dir: str = ""
    noise_dir: str = ""
    teacher: str = ""
    teacher_dir: str = ""
    # That train one student together.
    num_gpus: int = 1


@dataclass(frozen=True)
class Student:
    """A cell with one seed."""

    cell_name: str
    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        return f"{self.cell_name}-seed{self.seed}"

    @property
    def like(self) -> str:
        return self.cell.like or self.cell_name

    @property
    def steps(self) -> tuple[str, str]:
        """Of run.sh, that are its own."""
        return f"student-{self.name}", f"decode-{self.name}"


def students_of(grid: GridSettings) -> list[Student]:
    """All of them, the first seed of every cell first, so that a table fills evenly.

    Raises:
      RecipeError: nothing to run, a name that cannot be a folder's, or a cell that is compared with
        one that the grid has not.
    """
    if not grid.cells or not grid.seeds:
        raise RecipeError(f"grid {grid.name}: has no cell or no seed; give at least one of each")
    for name in (grid.name, *grid.cells):
        if not name or set(name) - _ALLOWED:
            raise RecipeError(f"grid {grid.name}: name '{name}': use letters, digits and -_+.")
    for name, cell in grid.cells.items():
        for other in cell.against:
            if other == name or other not in grid.cells:
                raise RecipeError(
                    f"grid {grid.name}: cell {name} is against '{other}'; name another cell of it"
                )
    return [Student(name, cell, seed) for seed in grid.seeds for name, cell in grid.cells.items()]


@dataclass(frozen=True)
class Places:
    """Where a recipe keeps its runs, relative to the recipe."""

    exp: Path
    data: Path

    @property
    def overlay(self) -> Path:
        """Confs of the cells of all grids."""
        return self.exp / "grids" / "conf"

    @property
    def students_file(self) -> Path:
        """Names all of them: run.sh refuses a conf that no student asks for."""
        return self.exp / "grids" / "students.txt"

    def results(self, grid: GridSettings) -> Path:
        return self.exp / "grids" / grid.name / "results.json"


_RECIPE = (
    "set -e; corpus=$1 size=$2 split=$3 dl_dir= overlay= labels= debug=false caller=$PWD; "
    ". local/recipe.sh; . local/steps.sh; "
)


def _ask_recipe(grid: GridSettings, question: str) -> list[str]:
    """The words that a script says which knows what run.sh does of the grid's corpus and size.

    Raises:
      RecipeError: there is no such corpus or size.
    """
    done = subprocess.run(
        ["bash", "-c", _RECIPE + question, f"grid {grid.name}", grid.corpus, grid.size, grid.split],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RecipeError(done.stderr.strip())
    return done.stdout.split()


def places_of(grid: GridSettings) -> Places:
    """As run.sh finds them, which knows the recipe's name.

    Raises:
      RecipeError: there is no such corpus or size.
    """
    exp, data = _ask_recipe(grid, "echo $exp $data")
    return Places(Path(exp), Path(data))


def dev_parts(grid: GridSettings) -> list[str]:
    """Parts of its corpus that are decoded beside the test sets.

    Raises:
      RecipeError: there is no such corpus or size.
    """
    return _ask_recipe(grid, "echo $dev_parts")


def conf_files(grid: GridSettings, *names: str) -> list[Path]:
    """Those that run.sh would read of these names, the later the more particular.

    Raises:
      RecipeError: there is no such corpus or size.
    """
    words = _ask_recipe(grid, f"conf {shlex.join(names)}")
    return [path for path in map(Path, words[1::2]) if path.exists()]


def _kept_checkpoints(grid: GridSettings) -> dict[str, int]:
    """What of a training's conf keeps as many epochs as decoding averages over reads; nothing where
    it may be of any epoch."""
    names = ["decoding", *([f"decoding/{grid.decoding}"] if grid.decoding else [])]
    settings: dict[str, Any] = {}
    for path in conf_files(grid, *names):
        settings |= (yaml.safe_load(path.read_text()) or {}).get("decoding") or {}
    if settings.get("epoch") or "avg" not in settings:
        return {}
    # The weights over epochs (e - avg, e] are a difference of what epochs e and e - avg hold.
    return {"keep_epochs": settings["avg"] + 1, "keep_every_epochs": 0}


def _leave(path: Path, text: str) -> None:
    # One that is right already may be in use by another process.
    if not path.exists() or path.read_text() != text:
        with written_aside(path) as aside:
            aside.write_text(text)


def write_confs(grid: GridSettings, places: Places) -> None:
    """The students of all grids, and the conf files that their lines name.

    Cells of other grids with the same name and the same meaning are the same students.

    Raises:
      RecipeError: another grid has a cell of this name that means something else.
    """
    # Others may write theirs at the same time.
    with locked(places.exp / "grids" / "cells.lock"):
        _write_confs(grid, places)


def _write_confs(grid: GridSettings, places: Places) -> None:
    keep = _kept_checkpoints(grid)
    # Of each student one row.
    _leave(places.overlay / "decoding.yaml", yaml.safe_dump({"more": []}))
    cells_file = places.exp / "grids" / "cells.yaml"
    known = yaml.safe_load(cells_file.read_text()) if cells_file.exists() else {}
    for student in students_of(grid):
        meaning = student.cell.meaning()
        other = known.setdefault(student.cell_name, {"grid": grid.name, **meaning})
        if other["grid"] == grid.name:
            known[student.cell_name] = {"grid": grid.name, **meaning}
        elif {**other, "grid": ""} != {**meaning, "grid": ""}:
            raise RecipeError(
                f"grid {grid.name}: cell {student.cell_name} means something else in grid "
                f"{other['grid']}; give it another name"
            )
    there = (places.overlay / "seeds").glob("[!.]*.yaml")
    seeds = {*grid.seeds, *(int(path.stem) for path in there)}
    confs = {f"seeds/{seed}": {"training": {**keep, "seed": seed}} for seed in grid.seeds}
    lines = []
    for name, meaning in known.items():
        words = meaning["confs"]
        if meaning["values"]:
            words += f" cells/{name}"
            confs[f"cells/{name}"] = meaning["values"]
        else:
            (places.overlay / f"cells/{name}.yaml").unlink(missing_ok=True)
        lines += [f"{name}-seed{seed} {words} seeds/{seed}\n" for seed in sorted(seeds)]
    # First, for calls of run.sh that begin meanwhile.
    _leave(places.students_file, "".join(lines))
    for name, values in confs.items():
        _leave(places.overlay / f"{name}.yaml", yaml.safe_dump(values, sort_keys=False))
    # In the order of its own conf: stamps are of what a file says word by word.
    _leave(cells_file, yaml.safe_dump(known, sort_keys=False))


def run_command(
    grid: GridSettings, places: Places, students: Sequence[Student], options: RunOptions
) -> list[str]:
    """The call of run.sh that trains and decodes ``students``, who learn from the same speech and
    labels."""
    cell = students[0].cell
    words = {
        "--corpus": grid.corpus,
        "--size": grid.size,
        "--split": grid.split,
        "--decoding": grid.decoding,
        "--device": options.device,
        "--dl-dir": options.dl_dir,
        "--noise-dir": options.noise_dir,
        "--teacher": options.teacher,
        "--teacher-dir": options.teacher_dir,
        "--num-gpus": str(options.num_gpus) if options.num_gpus > 1 else "",
        "--labels": cell.labels,
        "--untranscribed-parts": cell.untranscribed_parts,
        "--students-file": str(places.students_file),
        "--overlay": str(places.overlay),
        "--students": " ".join(student.name for student in students),
    }
    given = [word for option, value in words.items() if value for word in (option, value)]
    # Of the dev sets it is that one cell is chosen, of the test sets what it then gives.
    return ["./run.sh", *given, "--decode-dev", "true", "--num-jobs", "1", "--stop-stage", "7"]
