"""The report as one HTML file that needs nothing beside it: figures, errors, every utterance.

    write_page("exp/mini/report/index.html", Report(...), PageSettings())

The markup is in ``templates/``; text that comes from data is escaped there, and the page's
content security policy lets a browser load and run nothing but what is written in the page.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from lhotse.cut import Cut
from markupsafe import Markup

from mvqkd.data import SAMPLE_RATE
from mvqkd.data.audio import load_audio
from mvqkd.decoding.scoring import align_words
from mvqkd.errors import RecipeError
from mvqkd.files import written_aside
from mvqkd.report import charts
from mvqkd.report.media import data_uri, mp3, spectrogram_webp
from mvqkd.report.table import (
    NO_DISTILLATION,
    STREAMING_NOTE,
    StudentResult,
    all_test_sets,
    format_bytes,
    format_seconds,
    streaming_cells,
    table_cells,
    undistilled,
)

TEMPLATES = Path(__file__).parent / "templates"
# Colours of the palette in the style sheet, beside the grey of no distillation.
_COLORS = 8
# Rows of the table of what is confused most.
_CONFUSIONS = 15
# What a letter, and the space around a word, take of the timeline, which has 20rem for a second.
_LETTER_SECONDS, _MARGIN_SECONDS = 0.032, 0.05
# An early error rate may be several hundred percent.
_TOP_WER = 110.0


@dataclass
class PageSettings:
    """How much of the test sets the page carries, those utterances first on which the two
    compared students differ most. A second of speech takes about 2 kB for its spectrogram and
    6 kB for its sound."""

    utterances: int = 1000
    spectrograms: int = 500
    audio: int = 50
    # Shown with their errors on the first page.
    examples: int = 8


@dataclass
class Report:
    """What the page is made from.

    ``names``, ``rows`` and ``decoded`` are of the same students in the same order; ``decoded``
    holds each one's decoded.json. There, a test set may have ``times``: for a cut id the start and
    end in seconds of each recognised word, ``[[0.1, 0.4], ...]``.
    """

    title: str
    names: Sequence[str]
    rows: Sequence[StudentResult]
    decoded: Sequence[Mapping[str, Any]]
    # By student, as `mvqkd.report.collect.read_log` gives them.
    curves: Mapping[str, Sequence[Mapping[str, Any]]]
    # Of the teacher by test set; empty where it has no CTC head.
    teacher_wer: Mapping[str, float] = field(default_factory=dict)
    # Of the quantizer, as `mvqkd.quantizer.diagnostics.diagnose` gives them.
    diagnostics: Mapping[str, Any] | None = None
    # What float32 embeddings would take for an hour of speech.
    embedding_bytes_per_hour: float | None = None
    # The cuts of each test set by id, to show and play them.
    cuts: Mapping[str, Mapping[str, Cut]] = field(default_factory=dict)


@dataclass
class Piece:
    """Of an alignment: a correct word, or an error."""

    kind: Literal["correct", "substitution", "deletion", "insertion"]
    ref: str | None
    hyp: str | None


@dataclass
class TimedWord:
    kind: str
    text: str
    start: float  # seconds
    line: int  # from 0: the first in which it lies on no other word


@dataclass
class Heard:
    """What one student made of an utterance."""

    student: str
    pieces: list[Piece]
    errors: int
    timed: list[TimedWord] | None


@dataclass
class Utterance:
    id: str
    test_set: str
    ref: Sequence[str]
    heard: dict[str, Heard]
    anchor: str
    seconds: float | None = None
    picture: str | None = None
    sound: str | None = None

    @property
    def ticks(self) -> list[tuple[float, str]]:
        return charts.Scale(0.0, self.seconds).ticks(8) if self.seconds else []


def align(ref: Sequence[str], hyp: Sequence[str]) -> list[Piece]:
    pieces = []
    for r, h in align_words(ref, hyp):
        if r == h:
            pieces.append(Piece("correct", r, h))
        elif h is None:
            pieces.append(Piece("deletion", r, None))
        elif r is None:
            pieces.append(Piece("insertion", None, h))
        else:
            pieces.append(Piece("substitution", r, h))
    return pieces


def _timed(
    pieces: Sequence[Piece], times: Sequence[Sequence[float]] | None, seconds: float | None
) -> list[TimedWord] | None:
    recognised = [piece for piece in pieces if piece.hyp is not None]
    if not times or not seconds or len(times) != len(recognised):
        return None
    words: list[TimedWord] = []
    ends: list[float] = []  # of the lines
    for piece, (start, _) in zip(recognised, times):
        start = min(max(0.0, start), seconds)
        end = start + _MARGIN_SECONDS + _LETTER_SECONDS * len(piece.hyp)
        line = next((n for n, taken in enumerate(ends) if taken <= start), len(ends))
        ends[line : line + 1] = [end]
        words.append(TimedWord(piece.kind, piece.hyp, round(start, 2), line))
    return words


def compared_pair(names: Sequence[str], rows: Sequence[StudentResult]) -> tuple[str, str] | None:
    """The first undistilled student and, of those compared with it, the one with least errors.

    None where there is no such pair.
    """
    for name, base in zip(names, rows):
        others = [
            (sum(result.errors for result in row.test_sets.values()), place)
            for place, row in enumerate(rows)
            if row is not base
            and undistilled(rows, row) is base
            and row.test_sets
            and row.distillation != NO_DISTILLATION
        ]
        if base.distillation == NO_DISTILLATION and others:
            return name, names[min(others)[1]]
    return None


def student_looks(names: Sequence[str], rows: Sequence[StudentResult]) -> dict[str, charts.Look]:
    """A colour for each kind of distillation, grey for none; streaming students are dashed."""
    kinds = dict.fromkeys(row.distillation for row in rows if row.distillation != NO_DISTILLATION)
    colors = {kind: 1 + i % _COLORS for i, kind in enumerate(kinds)}
    return {
        name: charts.Look(colors.get(row.distillation, 0), row.streaming, name)
        for name, row in zip(names, rows)
    }


def utterances_of(report: Report, pair: tuple[str, str] | None) -> list[Utterance]:
    """All utterances, those first on which the pair differs most, then those with most errors."""
    found: dict[tuple[str, str], Utterance] = {}
    for name, decoded in zip(report.names, report.decoded):
        for test_set, entry in decoded["test_sets"].items():
            times = entry.get("times", {})
            for cut_id, ref, hyp in entry["results"]:
                cut = report.cuts.get(test_set, {}).get(cut_id)
                seconds = None if cut is None else float(cut.duration)
                key = (test_set, cut_id)
                if key not in found:
                    # Quoted, so that it can be both an id and a part of an address.
                    anchor = "u/" + quote(f"{test_set}/{cut_id}")
                    found[key] = Utterance(cut_id, test_set, ref, {}, anchor, seconds)
                pieces = align(ref, hyp)
                errors = sum(piece.kind != "correct" for piece in pieces)
                timed = _timed(pieces, times.get(cut_id), seconds)
                found[key].heard[name] = Heard(name, pieces, errors, timed)

    def order(utterance: Utterance):
        heard = utterance.heard
        difference = 0
        if pair is not None and all(name in heard for name in pair):
            difference = abs(heard[pair[0]].errors - heard[pair[1]].errors)
        errors = sum(one.errors for one in heard.values())
        return (-difference, -errors, utterance.test_set, utterance.id)

    return sorted(found.values(), key=order)


def _add_media(
    utterances: Sequence[Utterance], report: Report, settings: PageSettings
) -> str | None:
    """Spectrograms and sound; returns why there are none, where the audio cannot be read."""
    for place, utterance in enumerate(utterances[: max(settings.spectrograms, settings.audio)]):
        cut = report.cuts.get(utterance.test_set, {}).get(utterance.id)
        if cut is None:
            continue
        try:
            samples_L = load_audio(cut)
        except RecipeError as error:
            # Audio may be gone once its features are there; the rest is worth having.
            logging.warning(f"report: no spectrograms and no sound: {error}")
            return str(error)
        if place < settings.spectrograms:
            picture = spectrogram_webp(samples_L, SAMPLE_RATE)
            utterance.picture = data_uri("image/webp", picture)
        if place < settings.audio:
            utterance.sound = data_uri("audio/mpeg", mp3(samples_L, SAMPLE_RATE))
    return None


def wer_panels(
    report: Report,
    looks: Mapping[str, charts.Look],
    of_seeds: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> list[dict[str, Any]]:
    """Bars of each test set; non-streaming students and streaming ones apart.

    Args:
      of_seeds: by name and test set, the error rates of which a row has the mean.
    """
    panels = []
    for test_set in all_test_sets(report.rows):
        shown = [
            (name, row) for name, row in zip(report.names, report.rows) if test_set in row.test_sets
        ]
        teacher = report.teacher_wer.get(test_set)
        reach = [r.test_sets[test_set].hi for _, r in shown]
        reach += [r.paper[test_set] for _, r in shown if test_set in r.paper]
        reach += [] if teacher is None else [teacher]
        seeds = {name: (of_seeds or {}).get(name, {}).get(test_set, ()) for name, _ in shown}
        reach += [wer for wers in seeds.values() for wer in wers]
        scale = charts.linear_from_zero(reach)
        groups = []
        for streaming in (False, True):
            bars = []
            for name, row in shown:
                if row.streaming != streaming:
                    continue
                result = row.test_sets[test_set]
                paper = row.paper.get(test_set)
                bars.append(
                    {
                        "look": looks[name],
                        "result": result,
                        "reduction": result.reduction,
                        "width": scale(result.wer),
                        "low": scale(result.lo),
                        "high": scale(result.hi),
                        "seeds": [scale(wer) for wer in seeds[name]],
                        "paper": paper,
                        "paper_x": None if paper is None else scale(paper),
                    }
                )
            if bars:
                groups.append({"streaming": streaming, "bars": bars})
        panels.append(
            {
                "test_set": test_set,
                "groups": groups,
                "ticks": scale.ticks(5),
                "teacher": teacher,
                "teacher_x": None if teacher is None else scale(teacher),
                "has_paper": any(bar["paper"] is not None for g in groups for bar in g["bars"]),
            }
        )
    return panels


def storage_panels(report: Report, looks: Mapping[str, charts.Look]) -> list[charts.ScatterPanel]:
    sizes = [row.label_bytes_per_hour for row in report.rows if row.label_bytes_per_hour]
    if not sizes:
        return []
    embeddings = report.embedding_bytes_per_hour
    all_sizes = [*sizes, *([embeddings] if embeddings else [])]
    x_scale = charts.Scale(min(all_sizes) / 3, max(all_sizes) * 3, log=True)
    panels = []
    for test_set in all_test_sets(report.rows):
        results = [
            (n, r, r.test_sets[test_set])
            for n, r in zip(report.names, report.rows)
            if test_set in r.test_sets
        ]
        y_scale = charts.linear_from_zero([result.hi for _, _, result in results])

        def y(value: float, scale: charts.Scale = y_scale) -> float:
            return round(100 - scale(value), 3)

        x_ticks = [
            (x_scale(10.0**d), format_bytes(10.0**d).replace(".0", ""))
            for d in range(0, 16)
            if x_scale.low <= 10.0**d <= x_scale.high
        ]
        panel = charts.ScatterPanel(
            test_set, x_ticks, [(100 - place, label) for place, label in y_scale.ticks(4)]
        )
        for name, row, result in results:
            text = f"{name}: {result.wer:.2f}% [{result.lo:.2f}, {result.hi:.2f}]"
            if row.label_bytes_per_hour:
                size = format_bytes(row.label_bytes_per_hour)
                panel.points.append(
                    charts.Point(
                        looks[name],
                        x_scale(row.label_bytes_per_hour),
                        y(result.wer),
                        y(result.lo),
                        y(result.hi),
                        f"{text}, {size} an hour",
                    )
                )
            else:
                panel.levels.append((looks[name], y(result.wer), f"{text}, no labels"))
        charts.spread_points(panel.points)
        if embeddings:
            panel.mark = (x_scale(embeddings), format_bytes(embeddings))
        panels.append(panel)
    return panels


def _described(name: str) -> str:
    """The name of a loss as the log has it, for readers."""
    where, _, what = name.partition("/")
    kind, part = what, ""
    if where == "dev":
        kind, _, part = what.partition("-")
    kind = {"wer": "WER %", "pruned": "transducer loss"}.get(kind, kind)
    return f"{kind} on {part}" if where == "dev" and part else f"{kind} in training"


def _training_panels(
    report: Report, looks: Mapping[str, charts.Look]
) -> tuple[list[charts.LinePanel], list[charts.LinePanel]]:
    """Error rates and the transducer's losses, and what else was recorded."""
    found = dict.fromkeys(
        name for records in report.curves.values() for r in records for name in r["losses"]
    )
    first = [name for name in found if "/wer" in name]
    first += [name for name in found if name.startswith("dev/pruned")]
    first += [name for name in found if name == "train/pruned"]
    rest = [name for name in found if name not in first]

    def panels(names: Sequence[str]) -> list[charts.LinePanel]:
        made = []
        for name in names:
            top = _TOP_WER if "/wer" in name else None
            made.append(charts.line_panel(name, _described(name), report.curves, looks, top))
        return [panel for panel in made if panel is not None]

    return panels(first), panels(rest)


def _codebooks(diagnostics: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if diagnostics is None:
        return None
    counts = diagnostics.get("index_counts")  # not in files of before it was kept
    rounds = max(diagnostics["rrl"], key=int)
    return {
        **diagnostics,
        "rounds": rounds,
        "final_rrl": diagnostics["rrl"][rounds],
        "use": charts.use_map(counts) if counts else None,
    }


def _error_counts(
    utterances: Sequence[Utterance], names: Sequence[str], test_sets: Sequence[str]
) -> list[dict[str, Any]]:
    """Of each test set and student: how many errors of each kind."""
    tables = []
    for test_set in test_sets:
        lines = []
        for name in names:
            heard = [
                u.heard[name] for u in utterances if u.test_set == test_set and name in u.heard
            ]
            if heard:
                kinds = Counter(piece.kind for one in heard for piece in one.pieces)
                lines.append({"student": name, "kinds": kinds})
        most = max(line["kinds"].total() - line["kinds"]["correct"] for line in lines)
        tables.append({"test_set": test_set, "lines": lines, "most": max(1, most)})
    return tables


def _confusions(utterances: Sequence[Utterance], names: Sequence[str]) -> dict[str, Any]:
    """The most frequent errors of all students together, and how often each makes them."""
    by_student = {name: Counter() for name in names}
    for utterance in utterances:
        for name, heard in utterance.heard.items():
            for piece in heard.pieces:
                if piece.kind != "correct":
                    by_student[name][piece.kind, piece.ref, piece.hyp] += 1
    total: Counter = sum(by_student.values(), Counter())
    order = sorted(total, key=lambda error: (-total[error], error[0], str(error[1:])))
    lines = [
        {"piece": Piece(*error), "counts": [by_student[name][error] for name in names]}
        for error in order[:_CONFUSIONS]
    ]
    most = max((count for line in lines for count in line["counts"]), default=1)
    return {"lines": lines, "most": most}


def _headline(report: Report) -> list[dict[str, Any]]:
    """Of each test set: the best student, and the same one without distillation."""
    lines = []
    for test_set in all_test_sets(report.rows):
        decoded = [
            (r.test_sets[test_set].wer, i)
            for i, r in enumerate(report.rows)
            if test_set in r.test_sets
        ]
        _, place = min(decoded)
        best = report.rows[place]
        base = undistilled(report.rows, best)
        lines.append(
            {
                "test_set": test_set,
                "name": report.names[place],
                "result": best.test_sets[test_set],
                "base": base.test_sets.get(test_set) if base and base is not best else None,
                "base_name": report.names[report.rows.index(base)] if base else None,
                "reduction": best.test_sets[test_set].reduction,
            }
        )
    return lines


def _without_name(cells: list[list[str]], names: Sequence[str]) -> list[list[str]]:
    """The rows of a table with the students' own names, which tell them apart."""
    return [*cells[:1], *([name, *line[1:]] for name, line in zip(names, cells[1:]))]


def rendered(template: str, **values: Any) -> str:
    """The text of a page by a file of ``templates/`` that extends ``base.html``.

    Args:
      values: what it shows; ``title``, ``kicker`` and ``script`` (or None) among them.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": format_bytes, "duration": format_seconds}
    # Our own file, not data.
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, **values)


def render_page(report: Report, settings: PageSettings) -> str:
    """The page's text.

    Raises:
      RecipeError: there is no student, or no decoded utterance.
    """
    if not report.rows or not all_test_sets(report.rows):
        raise RecipeError(f"{report.title}: no student has been decoded; run the decoding stage")
    pair = compared_pair(report.names, report.rows)
    looks = student_looks(report.names, report.rows)
    utterances = utterances_of(report, pair)
    shown = utterances[: settings.utterances]
    no_audio = _add_media(shown, report, settings)
    training, other_losses = _training_panels(report, looks)
    script = (TEMPLATES / "script.js").read_text(encoding="utf-8")
    return rendered(
        "index.html",
        title=report.title,
        kicker="report",
        # Our own file, not data.
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        report=report,
        headline=_headline(report),
        looks=looks,
        pair=pair,
        wer_panels=wer_panels(report, looks),
        table=_without_name(
            table_cells(report.rows, all_test_sets(report.rows), named=True), report.names
        ),
        streaming=_without_name(
            streaming_cells(report.rows),
            [name for name, row in zip(report.names, report.rows) if row.streaming],
        ),
        streaming_note=STREAMING_NOTE,
        sources=list(dict.fromkeys(r.paper_source for r in report.rows if r.paper_source)),
        storage=storage_panels(report, looks),
        training=training,
        other_losses=other_losses,
        codebooks=_codebooks(report.diagnostics),
        shade_labels=charts.SHADE_LABELS,
        error_counts=_error_counts(utterances, report.names, all_test_sets(report.rows)),
        confusions=_confusions(utterances, report.names),
        examples=shown[: settings.examples],
        utterances=shown,
        num_utterances=len(utterances),
        no_audio=no_audio,
    )


def write_page(path: str | os.PathLike, report: Report, settings: PageSettings) -> None:
    """Write the page.

    Raises:
      RecipeError: as `render_page`.
    """
    text = render_page(report, settings)
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
