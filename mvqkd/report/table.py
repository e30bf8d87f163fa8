"""The results of a recipe: one typed row a student, as a table and as ``results.json``.

::

    rows = [StudentResult(name="conformer", distillation="none", ...), ...]
    print(wer_table(rows, style="text"))
    write_results_json("exp/mini/results.json", results_document(rows))
    rows = read_results("exp/mini/results.json")

Error rates and their differences are in percent and percent points, times in seconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mvqkd.errors import RecipeError
from mvqkd.files import written_aside

NO_DISTILLATION = "none"
NOT_MEASURED = "not measured"
# Of `streaming_cells`.
STREAMING_NOTE = (
    "Streaming students. RTF: seconds of computing for a second of speech, in batches, from "
    "features to tokens. Delay: how much later a token is emitted than where the same student "
    "sees the whole utterance, the mean and what nine of ten tokens stay below; shown: the mean "
    "with the wait for the end of its chunk."
)


@dataclass(frozen=True)
class Origin:
    """Where numbers came from: enough to make them again."""

    command: str  # as typed
    conf_hash: str  # of the settings, after all overrides
    device: str  # e.g. "cpu, 2 threads" or "NVIDIA H100"
    seed: int
    date: str = ""  # when it was made, e.g. 2024-05-31; empty where that was not kept
    # `mvqkd.report.confs.conf_digests`; empty where that was not kept.
    confs: str = ""


@dataclass(frozen=True)
class WerResult:
    """What one student reached on one test set."""

    wer: float
    lo: float  # 95% interval of wer
    hi: float
    errors: int
    words: int
    # WER minus that of the undistilled student on the same utterances, its 95% interval and
    # p-value; None for the undistilled student itself.
    delta: float | None = None
    delta_lo: float | None = None
    delta_hi: float | None = None
    p: float | None = None
    # Of a streaming student: how late tokens come, as `mvqkd.decoding.times.EmissionDelay` has it.
    emission_delay: dict[str, float] | None = None

    @property
    def reduction(self) -> float | None:
        """How much lower the WER is than the undistilled student's, in percent of the latter; None
        where there is nothing to compare with, or that has made no errors."""
        if self.delta is None or self.wer - self.delta < 1e-9:
            return None
        return 100.0 * (1.0 - self.wer / (self.wer - self.delta))


@dataclass(frozen=True)
class StudentResult:
    """A row of the table: one trained student, decoded in one way."""

    name: str  # the student's kind, e.g. "conformer"; with seed and streaming, what pairs rows
    distillation: str  # NO_DISTILLATION, "mvq", "mvq-l2" ...
    streaming: bool
    test_sets: dict[str, WerResult]
    origin: Origin
    label_bytes_per_hour: float | None = None  # stored for one hour of speech; None without labels
    training_seconds: float | None = None
    num_params: int | None = None  # of the deployed student, without the distillation head
    rtf: float | None = None  # seconds of decoding per second of speech
    decoding: str = ""  # e.g. "modified beam search, beam 4"
    # Where a student has several rows, of which of its weights the further ones are.
    weights: str = ""
    epochs: int | None = None
    steps: int | None = None  # updates of the weights
    step_seconds: float | None = None  # of each, decoding of the dev sets left out
    # Published WER by test set, and what published them.
    paper: dict[str, float] = field(default_factory=dict)
    paper_source: str = ""


@dataclass
class PaperResult:
    """What others have published of a student, to stand beside the rows that are like it."""

    # As the rows have them.
    distillation: str
    # WER in percent by test set.
    wer: dict[str, float]
    # What published it, and how the student was made.
    source: str
    streaming: bool = False
    # A part of the rows' decoding setting, e.g. "epoch-30-": other epochs, chunks or searches give
    # other numbers.
    decoding: str = ""
    # Options of run.sh that it takes to decode so.
    options: str = ""

    def is_like(self, row: StudentResult) -> bool:
        return (
            self.distillation == row.distillation
            and self.streaming == row.streaming
            and self.decoding in row.decoding
        )


def with_paper(
    rows: Sequence[StudentResult], published: Sequence[PaperResult]
) -> list[StudentResult]:
    """``rows``, each with the first published result that is like it."""
    beside = []
    for row in rows:
        paper = next((one for one in published if one.is_like(row)), None)
        if paper is not None:
            row = dataclasses.replace(row, paper=dict(paper.wer), paper_source=paper.source)
        beside.append(row)
    return beside


def undistilled(rows: Sequence[StudentResult], row: StudentResult) -> StudentResult | None:
    """The row that ``row`` is compared with: the first undistilled one of the same kind,
    streaming, seed and weights."""
    for other in rows:
        if (
            other.distillation == NO_DISTILLATION
            and (other.name, other.streaming) == (row.name, row.streaming)
            and other.weights == row.weights
            and other.origin.seed == row.origin.seed
        ):
            return other
    return None


def all_test_sets(rows: Sequence[StudentResult]) -> list[str]:
    """The test sets of all rows, each once, in the order of their first row."""
    return list(dict.fromkeys(name for row in rows for name in row.test_sets))


def format_bytes(count: float | None) -> str:
    """``1.4 MB``; decimal units, as storage is sold; ``-`` for None."""
    if count is None:
        return "-"
    units = ["B", "kB", "MB", "GB", "TB"]
    # 999.95 would be rounded to 1000.0 of the smaller unit.
    while count >= 999.95 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.1f} {units[0]}"


def format_seconds(seconds: float | None) -> str:
    """``45s``, ``3m10s``, ``2h05m``; ``-`` for None."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def table_cells(
    rows: Sequence[StudentResult], test_sets: Sequence[str], named: bool
) -> list[list[str]]:
    """The header and one line a row; ``named`` puts the test set into its columns' names."""
    published = [s for s in test_sets if any(s in row.paper for row in rows)]
    header = ["student", "distillation", "streaming", "epochs"]
    for test_set in test_sets:
        prefix = f"{test_set} " if named else ""
        header += [f"{prefix}WER % [95%]"]
        header += [f"{prefix}published"] if test_set in published else []
        header += [f"{prefix}reduction", f"{prefix}difference [95%]"]
    header += ["labels / hour", "training"]

    body = []
    for row in rows:
        cells = [row.name, row.distillation, "yes" if row.streaming else "no"]
        cells.append("-" if row.epochs is None else str(row.epochs))
        for test_set in test_sets:
            result = row.test_sets.get(test_set)
            cells.append(f"{result.wer:.2f} [{result.lo:.2f}, {result.hi:.2f}]" if result else "-")
            if test_set in published:
                cells.append(f"{row.paper[test_set]:.2f}" if test_set in row.paper else "-")
            reduction = result.reduction if result else None
            cells.append("-" if reduction is None else f"{reduction:.1f}%")
            if result is None or result.delta is None:
                cells.append("-")
            else:
                cells.append(
                    f"{result.delta:+.2f} [{result.delta_lo:+.2f}, {result.delta_hi:+.2f}]"
                )
        cells += [format_bytes(row.label_bytes_per_hour), format_seconds(row.training_seconds)]
        body.append(cells)
    return [header, *body]


def streaming_cells(rows: Sequence[StudentResult]) -> list[list[str]]:
    """The header and one line a streaming student: what decoding takes, and how late tokens come.

    Nothing where the delay of none is known. ``STREAMING_NOTE`` says what the columns are.
    """
    streaming = [row for row in rows if row.streaming]
    test_sets = all_test_sets(streaming)
    if not any(result.emission_delay for row in streaming for result in row.test_sets.values()):
        return []
    header = ["student", "distillation", "epochs", "RTF"]
    for test_set in test_sets:
        header += [f"{test_set} delay", f"{test_set} 90%", f"{test_set} shown"]
    body = []
    for row in streaming:
        cells = [row.name, row.distillation, "-" if row.epochs is None else str(row.epochs)]
        cells.append("-" if row.rtf is None else f"{row.rtf:.4f}")
        for test_set in test_sets:
            result = row.test_sets.get(test_set)
            delay = result.emission_delay if result else None
            for value in ("mean", "p90", "shown"):
                cells.append(f"{delay[value]:.2f} s" if delay else "-")
        body.append(cells)
    return [header, *body]


def wer_table(
    rows: Sequence[StudentResult], style: Literal["markdown", "text"] = "markdown"
) -> str:
    """One line a student: WER with its 95% interval on each test set, and what it cost.

    The relative reduction is against the undistilled student of the same name, streaming and
    seed; the difference is the paired one, negative where distillation helps. Published numbers
    get a column where any row has them, and their sources a line below the table.

    Args:
      style: ``markdown`` puts all test sets side by side; ``text``, for a terminal, gives each
        test set a table of its own, which keeps lines near 100 characters.
    """
    test_sets = all_test_sets(rows)
    if style == "markdown":
        lines = aligned(table_cells(rows, test_sets, named=True), "| ", " | ", " |")
    else:
        lines = []
        for test_set in test_sets:
            decoded = [row for row in rows if test_set in row.test_sets]
            lines += [
                test_set,
                *aligned(table_cells(decoded, [test_set], named=False), "", "  ", ""),
            ]
            lines += [""]
        lines = lines[:-1]
    sources = list(dict.fromkeys(r.paper_source for r in rows if r.paper and r.paper_source))
    if sources:
        lines += ["", "Published: " + "; ".join(sources)]
    return "\n".join(lines) + "\n"


def aligned(lines: list[list[str]], left: str, between: str, right: str) -> list[str]:
    """Lines of cells, the first of them the header, in columns of one width."""
    widths = [max(len(cells[c]) for cells in lines) for c in range(len(lines[0]))]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return [
        (left + between.join(c.ljust(w) for c, w in zip(cells, widths)) + right).rstrip()
        for cells in lines
    ]


def results_document(
    rows: Sequence[StudentResult], other: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """What `write_results_json` takes: ``{"students": [...], <name>: {...}, ...}``.

    Args:
      other: further sections, e.g. ``{"teacher": {"wer": 3.1, "origin": {...}}}``; each holds
        its own ``origin``.
    """
    return {"students": [dataclasses.asdict(row) for row in rows], **(other or {})}


def _check_origin(path: str | os.PathLike, where: str, section: Any) -> None:
    wanted = {f.name for f in dataclasses.fields(Origin) if f.default is dataclasses.MISSING}
    origin = section.get("origin") if isinstance(section, Mapping) else None
    missing = wanted - set(origin) if isinstance(origin, Mapping) else wanted
    if missing:
        raise RecipeError(
            f"{path}: {where} has no origin.{sorted(missing)[0]}; give every section an origin "
            f"with {', '.join(f.name for f in dataclasses.fields(Origin))}"
        )


def write_results_json(path: str | os.PathLike, document: Mapping[str, Any]) -> None:
    """Write ``results.json``.

    Raises:
      RecipeError: a student or a section has no origin, or a number is not finite.
    """
    for name, section in document.items():
        for i, entry in enumerate(section if isinstance(section, list) else [section]):
            _check_origin(path, f"{name}[{i}]" if isinstance(section, list) else name, entry)
    try:
        text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise RecipeError(
            f"{path}: a number of the report is not finite ({error}); decode again"
        ) from error
    with written_aside(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


def read_document(path: str | os.PathLike) -> dict[str, Any]:
    """A whole ``results.json``.

    Raises:
      RecipeError: the file is missing, or not JSON of this form.
    """
    read_results(path)
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_results(path: str | os.PathLike) -> list[StudentResult]:
    """The students of a ``results.json``.

    Raises:
      RecipeError: the file is missing, not JSON, or not of this form.
    """
    try:
        students = json.loads(Path(path).read_text(encoding="utf-8"))["students"]
        return [
            StudentResult(
                **{
                    **student,
                    "origin": Origin(**student["origin"]),
                    "test_sets": {
                        name: WerResult(**result) for name, result in student["test_sets"].items()
                    },
                }
            )
            for student in students
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"{path}: cannot be read as results ({error}); make it again with the decoding stage"
        ) from error
