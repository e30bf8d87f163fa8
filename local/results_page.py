"""RESULTS.md of a corpus, from results.json files that are kept beside it.

    python3 local/results_page.py --corpus mini --take '[exp/mini-small/results.json]'

``take`` copies results of run.sh and of local/experiment.py to egs/<corpus>/results/. The page is
made from what is there, from the grids of egs/<corpus>/conf/grids/, from notes.md, and from what
conf/report.yaml and its like say that others have published.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from mvqkd import cli
from mvqkd.errors import RecipeError
from mvqkd.experiments.grid import GridSettings, places_of
from mvqkd.files import written_aside
from mvqkd.report.results_page import identity, results_page
from mvqkd.report.table import PaperResult, read_document, write_results_json


@dataclass
class Settings:
    """Whose page, and what is new on it."""

    corpus: str
    # results.json files; each takes the place of an older one of the same run, or of the same grid
    # in the same run's folder.
    take: list[Path] = field(default_factory=list)


# What run.sh would read: the list of students, and options --config FILE.
_RECIPE = (
    "set -e; corpus=$1 size= split= dl_dir= overlay= labels= debug=false caller=$PWD; "
    ". local/recipe.sh; . local/steps.sh; recipe_file students.txt; conf report"
)


def recipe_of(corpus: str) -> tuple[dict[str, str], list[PaperResult]]:
    """The students of a corpus's recipe with their conf files, and what is published of them."""
    found = subprocess.run(
        ["bash", "-c", _RECIPE, "results_page.py", corpus],
        capture_output=True,
        text=True,
    )
    if found.returncode != 0:
        raise RecipeError(found.stderr.strip())
    students_file, confs = found.stdout.split("\n", 1)
    lines = [line.partition(" ") for line in Path(students_file).read_text().splitlines()]
    students = {name: files for name, _, files in lines if name and not name.startswith("#")}
    published = []
    for path in confs.split()[1::2]:
        settings = yaml.safe_load(Path(path).read_text()) or {}
        published = settings.get("paper", published)
    return students, [PaperResult(**one) for one in published]


def main(settings: Settings) -> None:
    folder = Path("egs") / settings.corpus
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder; call from the recipe's, with a known corpus")
    grids = [
        cli.parse(GridSettings, ["--config", str(path)])[0]
        for path in sorted((folder / "conf/grids").glob("*.yaml"))
    ]
    runs = {grid.name: places_of(grid).exp.name for grid in grids}
    kept = folder / "results"
    for path in settings.take:
        document = read_document(path)
        name = path.resolve().parent.name
        if "grid" in document:
            found = identity(document, runs)
            name = "-".join(["grid", *found])
            for other in kept.glob("grid-*.json"):
                if identity(read_document(other), runs) == found:
                    other.unlink()
        kept.mkdir(exist_ok=True)
        write_results_json(kept / f"{name}.json", document)
    notes = folder / "notes.md"
    page = results_page(
        settings.corpus,
        sorted(kept.glob("*.json")),
        grids,
        notes.read_text() if notes.exists() else "",
        f"python3 local/results_page.py --corpus {settings.corpus}",
        *recipe_of(settings.corpus),
        runs,
    )
    with written_aside(folder / "RESULTS.md") as aside:
        aside.write_text(page)


if __name__ == "__main__":
    cli.run(main, Settings)
