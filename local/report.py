"""Table, plots, page and results.json of what has been decoded."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path

from mvqkd import cli
from mvqkd.data.manifests import read_cuts
from mvqkd.files import written_aside
from mvqkd.report.collect import (
    collect_results,
    embedding_bytes_per_hour,
    read_decoded,
    read_diagnostics,
    read_log,
)
from mvqkd.report.confs import conf_digests
from mvqkd.report.page import PageSettings, Report, write_page
from mvqkd.report.plots import plot_training_curves, plot_wer_bars
from mvqkd.report.table import (
    PaperResult,
    results_document,
    wer_table,
    with_paper,
    write_results_json,
)


@dataclass
class Settings:
    """Which students, and where things are."""

    exp_dir: Path
    data_dir: Path
    # Name of the set of labels.
    labels: str
    students: list[str]
    # As the user typed it.
    command: str
    # The labels are others', and nothing is known here of the teacher and the codebooks.
    published: bool = False
    # Whose audio the page shows and plays.
    test_manifests: list[Path] = field(default_factory=list)
    page: PageSettings = field(default_factory=PageSettings)
    # What others have published, to stand beside the students that are like it.
    paper: list[PaperResult] = field(default_factory=list)


def main(settings: Settings) -> None:
    exp_dir, students = settings.exp_dir, settings.students
    labels, published = settings.labels, settings.published
    rows, other = collect_results(
        exp_dir, settings.data_dir, labels, students, settings.command, published
    )
    confs = conf_digests(settings.command)
    # A student's further rows, of other weights, come after its own.
    number = itertools.accumulate(int(not row.weights) for row in rows)
    rows = [
        replace(row, origin=replace(row.origin, confs=confs.get(students[n - 1], "")))
        for row, n in zip(with_paper(rows, settings.paper), number)
    ]
    # Figures and pages are of one row each.
    shown = [row for row in rows if not row.weights]
    out = exp_dir / "report"
    with written_aside(out) as aside:
        aside.mkdir()
        text = wer_table(rows, style="text")
        if published:
            text += f"\n\nlabels: published, {other['labels']['made_by']}\n"
        else:
            teacher = ", ".join(f"{k} {v:.2f}" for k, v in other["teacher"]["wer"].items())
            text += f"\n\nteacher, WER by greedy CTC: {teacher or 'has no CTC head'}\n"
        (aside / "table.txt").write_text(text)
        (aside / "table.md").write_text(wer_table(rows, style="markdown") + "\n")
        plot_wer_bars(shown, aside / "wer.png")
        curves = {name: read_log(exp_dir / name) for name in students}
        plot_training_curves(curves, aside / "training.png")
        report = Report(
            title=exp_dir.resolve().name,
            names=students,
            rows=shown,
            decoded=[read_decoded(exp_dir / name) for name in students],
            curves=curves,
            teacher_wer={} if published else other["teacher"]["wer"],
            diagnostics=None if published else read_diagnostics(exp_dir, labels),
            embedding_bytes_per_hour=None
            if published
            else embedding_bytes_per_hour(exp_dir, labels),
            cuts={
                path.name.split(".")[0]: {cut.id: cut for cut in read_cuts(path)}
                for path in settings.test_manifests
            },
        )
        write_page(aside / "index.html", report, settings.page)
    write_results_json(exp_dir / "results.json", results_document(rows, other))


if __name__ == "__main__":
    cli.run(main, Settings)
