"""Gather what the stages have left into the rows of the report."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lhotse.array import TemporalArray

from mvqkd.data.labels import ORIGIN_FIELD, in_words
from mvqkd.data.manifests import read_cuts
from mvqkd.decoding.scoring import paired_difference, wer_interval
from mvqkd.errors import RecipeError
from mvqkd.files import read_json, read_json_lines, require
from mvqkd.losses.distillation import DistillationSettings, MoreSettings
from mvqkd.report.table import NO_DISTILLATION, Origin, StudentResult, WerResult, undistilled

# Of the bootstrap.
SEED = 0
# What else the report says of the codebooks; see `mvqkd.quantizer.diagnostics.diagnose`.
_OF_CODEBOOKS = (
    "quantizer_id",
    "codebook_size",
    "num_frames",
    "entropy_bits",
    "entropy_bits_max",
    "dead_entries",
    "correlation",
)


def read_log(exp_dir: Path) -> list[dict[str, Any]]:
    """The training log as `plot_training_curves` takes it; ``took``: the seconds before an entry in
    which no step was made, 0 in logs of a version that did not tell."""
    again = _again(exp_dir.parent, f"student-{exp_dir.name}", 6)
    records = []
    for entry in read_json_lines(exp_dir / "log.jsonl", again):
        kind = entry["kind"]
        losses = {
            f"{kind}/{name}": value
            for name, value in entry.items()
            if name not in ("kind", "step", "epoch", "seconds", "took", "lr")
        }
        records.append({"step": entry["step"], "seconds": entry["seconds"], "losses": losses})
        records[-1]["took"] = entry.get("took", 0.0)
    return records


def read_decoded(exp_dir: Path) -> dict[str, Any]:
    """What stage 7 left of a student: its setting, and the words of each test set."""
    return read_json(exp_dir / "decoded.json", "run stage 7")


def read_diagnostics(exp_dir: Path, labels: str) -> dict[str, Any]:
    """Of the quantizer of a set of labels."""
    return read_json(exp_dir / "quantizer" / labels / "diagnostics.json", "run stage 4")


def read_quantizer_facts(exp_dir: Path, labels: str) -> dict[str, Any]:
    """What `save_quantizer` left beside the quantizer of a set of labels; nothing where it is one
    that tells nothing."""
    path = exp_dir / "quantizer" / labels / "quantizer.pt.json"
    again = _again(exp_dir, f"quantizer-{labels}", 4)
    return read_json(path, again, again) if path.exists() else {}


def _again(exp_dir: Path, step: str, stage: int) -> str:
    """The remedy for a damaged file in a folder that is there: run.sh looks at no more."""
    return f"remove {exp_dir / 'stamps' / step}, then run stage {stage}"


def embedding_bytes_per_hour(exp_dir: Path, labels: str) -> float | None:
    """What the teacher's embeddings would take as float32, were they stored instead of indexes.

    None where the quantizer does not say what it was trained on.
    """
    meta = read_quantizer_facts(exp_dir, labels)
    if not meta.get("dim") or not meta.get("frame_shift"):
        return None
    return 4 * meta["dim"] * 3600 / meta["frame_shift"]


def label_bytes_per_hour(labels_dir: Path, wanted: Collection[str]) -> float:
    """Bytes on disk, for an hour of speech, of the label arrays of the fields ``wanted``.

    The arrays of all fields lie in the same files, whose other bytes count for each array alike.

    Raises:
      RecipeError: the cuts have no such field.
    """
    manifest = labels_dir / "train.jsonl.gz"
    written = manifest.stat().st_mtime_ns if manifest.exists() else 0
    seconds, num_arrays, num_values, firsts = _arrays_of(manifest, written)
    for name in wanted:
        if name not in firsts:
            raise RecipeError(
                f"{manifest}: its cuts have no {name}, which a student learned; run stages 5 to 7"
            )
    on_disk = 512.0 * sum(path.stat().st_blocks for path in labels_dir.rglob("*.h5"))
    if firsts.keys() - set(wanted):
        num_bytes = {name: num_values[name] * firsts[name].load().itemsize for name in firsts}
        total = sum(num_bytes.values())
        # Less than the arrays' on a file system that compresses.
        share = sum(num_bytes[name] for name in wanted) / total
        share_of_arrays = sum(num_arrays[name] for name in wanted) / num_arrays.total()
        on_disk = share * min(on_disk, total) + share_of_arrays * max(0.0, on_disk - total)
    return on_disk / (seconds / 3600)


@lru_cache
def _arrays_of(
    manifest: Path, written: int
) -> tuple[float, Counter, Counter, dict[str, TemporalArray]]:
    """Seconds of speech, and by field how many arrays, how many values, and one of the arrays; read
    once for all students, as LibriSpeech's takes a while."""
    seconds, num_arrays, num_values = 0.0, Counter(), Counter()
    firsts: dict[str, TemporalArray] = {}
    for cut in read_cuts(manifest):
        seconds += cut.duration
        for name, label in (cut.custom or {}).items():
            if isinstance(label, TemporalArray):
                firsts.setdefault(name, label)
                num_arrays[name] += 1
                num_values[name] += math.prod(label.shape)
    return seconds, num_arrays, num_values, firsts


def _stamp(exp_dir: Path, step: str) -> str:
    return require(exp_dir / "stamps" / step, "run the stages before").read_text().strip()


def _date(stamp: Path) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(stamp.stat().st_mtime))


def collect_results(
    exp_dir: Path,
    data_dir: Path,
    labels: str,
    students: list[str],
    command: str,
    published: bool = False,
) -> tuple[list[StudentResult], dict[str, dict[str, Any]]]:
    """Rows of the table, and the other sections of results.json; a student of which several weights
    were decoded has as many rows, one after the other.

    Args:
      published: the labels are others', and have no teacher or quantizer here.

    Raises:
      RecipeError: a student has not been trained or decoded.
    """
    rows, decoded = [], []
    for student in students:
        row = student_row(exp_dir, data_dir, labels, student, command)
        document = read_decoded(exp_dir / student)
        of_others = document.get("more", [])
        rows += [row, *(of_other_weights(row, other) for other in of_others)]
        decoded += [document, *of_others]
    rows = compared(rows, decoded)
    if published:
        return rows, {"labels": _published_section(exp_dir, data_dir, labels, command)}
    return rows, _teacher_sections(exp_dir, labels, command)


def student_row(
    exp_dir: Path, data_dir: Path, labels: str, student: str, command: str, name: str = "conformer"
) -> StudentResult:
    """The row of one student, not yet compared with others.

    Args:
      name: of its kind, as the table calls it.

    Raises:
      RecipeError: it has not been trained or decoded.
    """
    folder = exp_dir / student
    again = _again(exp_dir, f"student-{student}", 6)
    settings = read_json(folder / "settings.json", "run stage 6", again)
    decoded = read_decoded(folder)
    kind, label_fields = kind_of(settings["distillation"])
    log = read_log(folder)
    last = log[-1]
    return StudentResult(
        name=name,
        distillation=kind,
        streaming=decoded["streaming"],
        test_sets=_results(decoded),
        origin=Origin(
            command,
            # Which is of the training too.
            _stamp(exp_dir, f"decode-{student}")[:12],
            settings["device"],
            settings["training"]["seed"],
            _date(exp_dir / "stamps" / f"decode-{student}"),
        ),
        label_bytes_per_hour=(
            label_bytes_per_hour(data_dir / "labels" / labels, label_fields)
            if label_fields
            else None
        ),
        training_seconds=last["seconds"],
        num_params=decoded["num_params"],
        rtf=_mean_rtf(decoded),
        decoding=decoded["setting"],
        epochs=settings["training"]["num_epochs"],
        steps=last["step"],
        step_seconds=(last["seconds"] - sum(entry["took"] for entry in log)) / max(1, last["step"]),
    )


def of_other_weights(row: StudentResult, decoded: Mapping[str, Any]) -> StudentResult:
    """The row of the same student for other weights, which ``decoded`` is of; what training took is
    not known of a part of it."""
    decoding = decoded["decoding"]
    return replace(
        row,
        test_sets=_results(decoded),
        rtf=_mean_rtf(decoded),
        decoding=decoded["setting"],
        weights=f"epoch-{decoding['epoch']}-avg-{decoding['avg']}",
        epochs=decoding["epoch"],
        training_seconds=None,
        steps=None,
        step_seconds=None,
    )


def _mean_rtf(decoded: Mapping[str, Any]) -> float:
    entries = decoded["test_sets"].values()
    return sum(entry["rtf"] for entry in entries) / len(entries)


def _results(decoded: Mapping[str, Any]) -> dict[str, WerResult]:
    test_sets = {}
    for part, entry in decoded["test_sets"].items():
        wer, lo, hi = wer_interval(entry["results"], seed=SEED)
        words = sum(len(ref) for _, ref, _ in entry["results"])
        errors = round(wer * words / 100)
        test_sets[part] = WerResult(
            wer=wer,
            lo=lo,
            hi=hi,
            errors=errors,
            words=words,
            emission_delay=entry.get("emission_delay"),
        )
    return test_sets


def _published_section(exp_dir: Path, data_dir: Path, labels: str, command: str) -> dict[str, Any]:
    first = next(iter(read_cuts(data_dir / "labels" / labels / "train.jsonl.gz")))
    return {
        "made_by": in_words(first.custom[ORIGIN_FIELD]),
        "origin": {
            "command": command,
            "conf_hash": _stamp(exp_dir, f"labels-{labels}")[:12],
            "device": None,  # nothing is computed
            "seed": None,
            "date": _date(exp_dir / "stamps" / f"labels-{labels}"),
        },
    }


def _teacher_sections(exp_dir: Path, labels: str, command: str) -> dict[str, dict[str, Any]]:
    again = _again(exp_dir, "verify-teacher", 2)
    teacher = read_json(exp_dir / "teacher-wer" / "wer.json", "run stage 2", again)
    diagnostics = read_diagnostics(exp_dir, labels)
    facts = read_quantizer_facts(exp_dir, labels)
    return {
        "teacher": {
            "name": facts.get("teacher"),
            "layer": facts.get("layer"),
            "embedding_bytes_per_hour": embedding_bytes_per_hour(exp_dir, labels),
            "wer": teacher["wer"],
            "origin": {
                "command": command,
                "conf_hash": _stamp(exp_dir, "verify-teacher")[:12],
                "device": teacher["device"],
                "seed": None,  # nothing is drawn
                "date": _date(exp_dir / "stamps" / "verify-teacher"),
            },
        },
        "quantizer": {
            "rrl": diagnostics["rrl"],
            "num_codebooks": diagnostics["num_codebooks"],
            **{key: diagnostics[key] for key in _OF_CODEBOOKS if key in diagnostics},
            "origin": {
                "command": command,
                "conf_hash": _stamp(exp_dir, f"quantizer-{labels}")[:12],
                "device": diagnostics["device"],
                "seed": diagnostics["seed"],
                "date": _date(exp_dir / "stamps" / f"quantizer-{labels}"),
            },
        },
    }


def kind_of(distillation: dict[str, Any]) -> tuple[str, set[str]]:
    """The kinds of all terms, as the table names them, and the fields of the stored labels that
    they learn from.

    Args:
      distillation: the settings that a student was trained with, perhaps by another version.
    """

    def known(settings_class, values):
        names = {f.name for f in fields(settings_class)}
        return settings_class(**{name: v for name, v in values.items() if name in names})

    settings = known(DistillationSettings, distillation)
    settings.more = [known(MoreSettings, more) for more in settings.more]
    terms = settings.terms()
    names = [term.kind + (" in loop" if term.in_loop else "") for term in terms]
    stored = {term.field for term in terms if not term.in_loop}
    return " + ".join(names) or NO_DISTILLATION, stored


def compared(rows: list[StudentResult], decoded: Sequence[dict[str, Any]]) -> list[StudentResult]:
    """``rows`` with the paired difference of each to the undistilled student of its kind.

    Args:
      decoded: of each row, as `read_decoded` gives it.
    """
    return [_compared(rows, row, decoded) for row in rows]


def _compared(
    rows: list[StudentResult], row: StudentResult, decoded: Sequence[dict[str, Any]]
) -> StudentResult:
    base = undistilled(rows, row)
    if base is None or base is row:
        return row
    here, there = (decoded[_place(rows, one)]["test_sets"] for one in (row, base))
    test_sets = {}
    for name, result in row.test_sets.items():
        paired = paired_difference(there[name]["results"], here[name]["results"], seed=SEED)
        test_sets[name] = replace(
            result,
            delta=paired["delta"],
            delta_lo=paired["lo"],
            delta_hi=paired["hi"],
            p=paired["p"],
        )
    return replace(row, test_sets=test_sets)


def _place(rows: list[StudentResult], row: StudentResult) -> int:
    # Of the same object: rows of students with equal numbers are equal.
    return next(place for place, other in enumerate(rows) if other is row)
