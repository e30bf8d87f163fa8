"""From a corpus in LibriSpeech's layout to lhotse cuts, one file a part."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import logging
import re
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from lhotse import CutSet
from lhotse.recipes import prepare_librispeech

from mvqkd.data import SAMPLE_RATE
from mvqkd.data.bad_utterances import check_bad, list_bad
from mvqkd.errors import RecipeError, reason_of
from mvqkd.files import require, written_aside


@dataclass
class CheckSettings:
    """What of a corpus may be bad before it is refused."""

    # Share of a part's utterances that may be broken; they are left out and listed.
    max_bad_share: float = 0.01
    min_seconds: float = 0.1


def _look_at(path: Path, text: str, settings: CheckSettings) -> tuple[str | None, int | None]:
    """(what is wrong, or None; the sampling rate where it is known)."""
    if not text:
        return "empty transcript; write what is said, or remove the line", None
    if not path.exists():
        return "no such file; restore it, or remove its line from the transcripts", None
    try:
        audio_L, rate = soundfile.read(path, dtype="int16")
    except soundfile.LibsndfileError as error:
        return f"cannot be decoded ({error.error_string.strip()}); fetch or make it again", None
    wrong = None
    if audio_L.ndim != 1:
        wrong = f"has {audio_L.shape[1]} channels; mix it to one"
    elif len(audio_L) < settings.min_seconds * rate:
        wrong = f"only {len(audio_L) / rate:.3f} s long; remove it"
    elif not np.any(audio_L):
        wrong = "silent from start to end; record it again, or remove it"
    return wrong, rate


def check_part(folder: Path, settings: CheckSettings) -> tuple[dict[str, str], int]:
    """Look at every utterance of ``folder``, a part in LibriSpeech's layout.

    Returns what is wrong by utterance id, and the sampling rate (Hz) of the part. A file of another
    rate than most others is wrong: its header may well be.

    Raises:
      RecipeError: the part is missing or empty, or too much of it is bad.
    """
    require(folder, "make or download the corpus again")
    utterances: list[tuple[str, Path, str]] = []
    for transcripts in sorted(folder.rglob("*.trans.txt")):
        try:
            lines = transcripts.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise RecipeError(f"{transcripts}: is no UTF-8 text; convert it") from error
        for line in lines:
            if line.strip():
                name, _, text = line.strip().partition(" ")
                utterances.append((name, transcripts.parent / f"{name}.flac", text.strip()))
    if not utterances:
        raise RecipeError(f"{folder}: has no transcripts (*.trans.txt); make the corpus again")
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda u: _look_at(u[1], u[2], settings), utterances))
    rates = Counter(rate for wrong, rate in found if rate and not wrong)
    part_rate = rates.most_common(1)[0][0] if rates else SAMPLE_RATE
    bad = {}
    for (name, path, _), (wrong, rate) in zip(utterances, found):
        if not wrong and rate != part_rate:
            wrong = f"sampled at {rate} Hz, most of its part at {part_rate}; resample it"
        if wrong:
            bad[name] = f"{path}: {wrong}"
    check_bad(bad, len(utterances), settings.max_bad_share, "conf/check.yaml")
    return bad, part_rate


def prepare_part(corpus: Path, part: str, out: Path, settings: CheckSettings) -> CutSet:
    """Write ``out``, the cuts of ``part``; bad utterances are left out and listed beside it.

    Of a part at another rate the cuts are of 16 kHz: lhotse resamples what it reads.
    """
    bad, rate = check_part(corpus / part, settings)
    manifests = _lhotse_manifests(corpus, part, bad)
    cuts = CutSet.from_manifests(**manifests).trim_to_supervisions(keep_overlapping=False)
    cuts = CutSet.from_cuts(
        sorted((c for c in cuts if c.recording_id not in bad), key=lambda c: c.id)
    )
    if rate != SAMPLE_RATE:
        cuts = CutSet.from_cuts(cut.resample(SAMPLE_RATE) for cut in cuts)
        logging.info(f"{part}: sampled at {rate} Hz, resampled to {SAMPLE_RATE} when it is read")
    list_bad(bad, out.with_name(f"bad-utterances-{part}.txt"))
    with written_aside(out) as aside:
        cuts.to_file(aside)
    hours = sum(c.duration for c in cuts) / 3600
    logging.info(f"{part}: {len(cuts)} utterances, {hours:.2f} hours")
    return cuts


def _lhotse_manifests(corpus: Path, part: str, bad: dict[str, str]) -> dict:
    # A transcript without text or audio that does not open would stop lhotse's reader.
    with tempfile.TemporaryDirectory() as view, contextlib.redirect_stderr(io.StringIO()):
        if not bad:
            return prepare_librispeech(corpus, dataset_parts=part)[part]
        _link_good(corpus / part, Path(view) / part, bad)
        manifests = prepare_librispeech(view, dataset_parts=part)[part]
    for recording in manifests["recordings"]:
        for source in recording.sources:
            source.source = str(corpus / Path(source.source).relative_to(view))
    return manifests


def _link_good(folder: Path, view: Path, bad: dict[str, str]) -> None:
    """Make ``view``, ``folder`` without the utterances in ``bad``, of symbolic links."""
    for transcripts in folder.rglob("*.trans.txt"):
        chapter = view / transcripts.parent.relative_to(folder)
        chapter.mkdir(parents=True)
        with (chapter / transcripts.name).open("w") as file:
            for line in transcripts.read_text().splitlines():
                name = line.strip().partition(" ")[0]
                if name and name not in bad:
                    file.write(f"{line}\n")
                    audio = transcripts.parent.resolve() / f"{name}.flac"
                    (chapter / audio.name).symlink_to(audio)


def write_cuts(cuts: CutSet, path: Path) -> None:
    """Write ``path`` (``*.jsonl.gz``): what lhotse writes, but without the name and the time that
    gzip adds, so that the same cuts give the same bytes."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        for cut in cuts:
            file.write(f"{json.dumps(cut.to_dict(), ensure_ascii=False)}\n".encode())


def read_cuts(path: Path) -> CutSet:
    """The cuts of a manifest, in memory.

    Raises:
      RecipeError: the file is missing, empty or damaged.
    """
    require(path, "run the stage that makes it")
    try:
        cuts = CutSet.from_file(path)
        cuts = CutSet() if cuts is None else cuts.to_eager()
    except Exception as error:  # gzip, JSON and lhotse each raise their own
        raise RecipeError(
            f"{path}: cannot be read as a lhotse manifest ({reason_of(error)}); make it again"
        ) from error
    if len(cuts) == 0:
        raise RecipeError(f"{path}: holds no cuts; make it again")
    return cuts


def of_duration(cuts: CutSet, shortest: float, longest: float | None) -> CutSet:
    """The utterances of ``shortest`` to ``longest`` seconds; None: however long.

    Raises:
      RecipeError: there is none.
    """
    kept = [
        c for c in cuts if shortest <= c.duration and (longest is None or c.duration <= longest)
    ]
    if not kept:
        raise RecipeError(
            f"training utterances: none of {len(cuts)} lasts {shortest} to {longest} seconds; "
            "change data.min_seconds or data.max_seconds"
        )
    if len(kept) < len(cuts):
        logging.info(f"{len(cuts) - len(kept)} utterances are not of {shortest} to {longest} s")
    return CutSet.from_cuts(kept)


def split_by_share(cuts: CutSet, share: float) -> tuple[CutSet, CutSet]:
    """``share`` of the utterances, and the others.

    Which ones follows from their ids alone, so that a smaller share is part of a larger; all speeds
    of an utterance stay together.

    Raises:
      RecipeError: a share that is no number between 0 and 1, or that leaves no utterance.
    """
    if not 0 < share <= 1:
        raise RecipeError(f"transcribed_share {share}: give a number above 0, at most 1")
    originals = {cut.id: re.sub(r"_sp[0-9.]+$", "", cut.id) for cut in cuts}
    drawn = sorted(set(originals.values()), key=lambda id: hashlib.sha256(id.encode()).digest())
    taken = set(drawn[: round(share * len(drawn))])
    if not taken:
        raise RecipeError(f"transcribed_share {share}: of {len(drawn)} utterances none is left")
    parts = [
        [cut for cut in cuts if (originals[cut.id] in taken) == read] for read in (True, False)
    ]
    return CutSet.from_cuts(parts[0]), CutSet.from_cuts(parts[1])
