"""RESULTS.md of a corpus, from results.json files that are kept beside it.

    python3 local/results_page.py --corpus mini --take '[exp/mini-small/results.json]'

``take`` copies results of run.sh and of local/experiment.py to egs/<corpus>/results/. The page is
made from what is there, from the grids of egs/<corpus>/conf/grids/, and from notes.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mvqkd import cli
from mvqkd.errors import RecipeError
from mvqkd.experiments.grid import GridSettings
from mvqkd.files import written_aside
from mvqkd.report.results_page import results_page
from mvqkd.report.table import read_document, write_results_json


@dataclass
class Settings:
    """Whose page, and what is new on it."""

    corpus: str
    # results.json files; each takes the place of an older one of the same run or grid.
    take: list[Path] = field(default_factory=list)


def main(settings: Settings) -> None:
    folder = Path("egs") / settings.corpus
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder; call from the recipe's, with a known corpus")
    kept = folder / "results"
    for path in settings.take:
        document = read_document(path)
        name = path.resolve().parent.name
        if "grid" in document:
            name = f"grid-{document['grid']['name']}"
        kept.mkdir(exist_ok=True)
        write_results_json(kept / f"{name}.json", document)
    grids = [
        cli.parse(GridSettings, ["--config", str(path)])[0]
        for path in sorted((folder / "conf/grids").glob("*.yaml"))
    ]
    notes = folder / "notes.md"
    page = results_page(
        settings.corpus,
        sorted(kept.glob("*.json")),
        grids,
        notes.read_text() if notes.exists() else "",
        f"python3 local/results_page.py --corpus {settings.corpus}",
    )
    with written_aside(folder / "RESULTS.md") as aside:
        aside.write_text(page)


if __name__ == "__main__":
    cli.run(main, Settings)
