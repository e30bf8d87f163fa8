"""Table, plots and results.json of what has been decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mvqkd import cli
from mvqkd.files import written_aside
from mvqkd.report.collect import collect_results, read_log
from mvqkd.report.plots import plot_training_curves, plot_wer_bars
from mvqkd.report.table import results_document, wer_table, write_results_json


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


def main(settings: Settings) -> None:
    rows, other = collect_results(
        settings.exp_dir,
        settings.data_dir,
        settings.labels,
        settings.students,
        settings.command,
        settings.published,
    )
    out = settings.exp_dir / "report"
    with written_aside(out) as aside:
        aside.mkdir()
        text = wer_table(rows, style="text")
        if settings.published:
            text += f"\n\nlabels: published, {other['labels']['made_by']}\n"
        else:
            teacher = ", ".join(f"{k} {v:.2f}" for k, v in other["teacher"]["wer"].items())
            text += f"\n\nteacher, WER by greedy CTC: {teacher or 'has no CTC head'}\n"
        (aside / "table.txt").write_text(text)
        (aside / "table.md").write_text(wer_table(rows, style="markdown") + "\n")
        plot_wer_bars(rows, aside / "wer.png")
        curves = {name: read_log(settings.exp_dir / name) for name in settings.students}
        plot_training_curves(curves, aside / "training.png")
    write_results_json(settings.exp_dir / "results.json", results_document(rows, other))


if __name__ == "__main__":
    cli.run(main, Settings)
