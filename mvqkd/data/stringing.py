"""Utterances strung from recordings of single words, in LibriSpeech's folder layout.

    pattern = r"(?P<word>\\d)_(?P<speaker>\\w+)_(?P<take>\\d+)\\.wav"
    recordings = list_recordings("wavs", pattern, {"0": "ZERO", "1": "ONE"})
    names = PartNames("train", "dev", "test")
    parts = split_by_take(recordings, names, test_takes=[0, 1], dev_takes=[2])
    make_strung_corpus(parts, "corpus", StringingSettings(), num_workers=2)

Shapes: L samples at 16 kHz.
"""

from __future__ import annotations

import math
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from scipy.signal import resample_poly

from mvqkd.data import SAMPLE_RATE
from mvqkd.data.synthesis import write_speakers_table
from mvqkd.errors import RecipeError
from mvqkd.files import require, written_aside

MIN_SAMPLE_RATE = 8000
BAD_LIST = "bad_recordings.txt"


class PartNames(NamedTuple):
    """What the parts of a corpus are called."""

    train: str
    dev: str
    test: str


@dataclass(frozen=True)
class WordRecording:
    """One word said once."""

    path: Path
    word: str
    speaker: str
    take: int


@dataclass
class StringingSettings:
    """How single words become utterances. A pair is a range to draw from uniformly."""

    # Words of an utterance, both ends included.
    num_words: tuple[int, int] = (3, 7)
    # Seconds of pause between two words.
    pause_seconds: tuple[float, float] = (0.05, 0.3)
    # Seconds before the first and after the last word.
    edge_seconds: tuple[float, float] = (0.1, 0.3)
    # Level of an utterance against the recordings' own.
    utterance_gain_db: tuple[float, float] = (-6.0, 6.0)
    # Level of a word against its utterance.
    word_gain_db: tuple[float, float] = (-3.0, 3.0)
    # Level of white noise under the whole utterance, against the RMS of its words: pauses of
    # exact zeros would tell where the words are.
    noise_db: tuple[float, float] = (-50.0, -35.0)
    # Seconds over which a word rises and falls, so that its edges do not click.
    fade_seconds: float = 0.005
    # Minutes of the training part, the same for each of its speakers.
    train_minutes: float = 45.0
    # How often each recording of the other parts is used.
    dev_uses: int = 2
    test_uses: int = 2
    # Share of recordings that may be broken. They are left out and listed.
    max_bad_share: float = 0.01
    # A recording whose largest sample lies below this (against full scale) is silent.
    silence_db: float = -60.0
    # A recording outside this range holds no single word.
    word_seconds: tuple[float, float] = (0.05, 5.0)
    seed: int = 1

    def check(self) -> None:
        """Raises RecipeError for values that make no sense."""
        for name, value in vars(self).items():
            if isinstance(value, (tuple, list)) and value[0] > value[1]:
                raise _conf_error(name, value, "its first value is the larger one")
        for name in ("num_words", "dev_uses", "test_uses"):
            if np.min(getattr(self, name)) < 1:
                raise _conf_error(name, getattr(self, name), "must be at least 1")
        for name in ("pause_seconds", "edge_seconds", "fade_seconds", "max_bad_share"):
            if np.min(getattr(self, name)) < 0:
                raise _conf_error(name, getattr(self, name), "must not be negative")
        if not 0 < self.train_minutes < math.inf:
            raise _conf_error("train_minutes", self.train_minutes, "must be positive")


@dataclass(frozen=True)
class Utterance:
    """What one utterance is made of; its audio follows from this alone."""

    id: str
    part: str
    recordings: tuple[WordRecording, ...]
    # Seconds before each word and after the last: one more than words.
    gaps: tuple[float, ...]
    # One a word, its utterance's included.
    gains_db: tuple[float, ...]
    noise_db: float
    noise_seed: int

    @property
    def text(self) -> str:
        return " ".join(r.word for r in self.recordings)


@dataclass
class PartSummary:
    """What a part of the finished corpus holds."""

    speakers: int
    recordings: int
    utterances: int
    words: int
    seconds: float


def list_recordings(
    folder: str | Path, pattern: str, words: dict[str, str], remedy: str = "give another folder"
) -> list[WordRecording]:
    """The recordings in ``folder`` (or in its sub-folder ``recordings``), ordered by file name.

    Args:
        pattern: regular expression of the whole file name with the groups ``word``, ``speaker``
            and ``take`` (a number). Other files are passed over.
        words: from what ``word`` matches to the word as it is written in transcripts.

    Raises:
        RecipeError: no such folder, or nothing of that name in it.
    """
    folder = require(folder, remedy)
    if not folder.is_dir():
        raise RecipeError(f"{folder}: not a folder; {remedy}")
    inner = folder / "recordings"
    folder = inner if inner.is_dir() else folder
    found = []
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(pattern, path.name)
        if match and match["word"] in words:
            found.append(
                WordRecording(
                    path, words[match["word"]].upper(), match["speaker"], int(match["take"])
                )
            )
    if not found:
        raise RecipeError(f"{folder}: no file named like {pattern}; {remedy}")
    return found


def check_complete(recordings: Sequence[WordRecording], takes: int, remedy: str) -> None:
    """See that every speaker says every word ``takes`` times, takes 0 to ``takes - 1``.

    Raises:
        RecipeError: names a take that is missing.
    """
    have = {(r.speaker, r.word, r.take) for r in recordings}
    speakers, words = sorted({r.speaker for r in recordings}), sorted({r.word for r in recordings})
    missing = [
        (speaker, word, take)
        for speaker in speakers
        for word in words
        for take in range(takes)
        if (speaker, word, take) not in have
    ]
    if missing:
        speaker, word, take = missing[0]
        raise RecipeError(
            f"{recordings[0].path.parent}: {len(missing)} recordings are missing, the first is "
            f"take {take} of {word} by {speaker}; {remedy}"
        )


def split_by_take(
    recordings: Sequence[WordRecording],
    names: PartNames,
    test_takes: Sequence[int],
    dev_takes: Sequence[int],
) -> dict[str, list[WordRecording]]:
    """Parts by the number of the take: every speaker is in every part.

    Raises:
        RecipeError: a take in both lists, or a part without recordings.
    """
    both = set(test_takes) & set(dev_takes)
    if both:
        raise _conf_error("dev_takes", list(dev_takes), f"{min(both)} is also in test_takes")
    parts = {part: [] for part in names}
    for recording in recordings:
        in_test, in_dev = recording.take in test_takes, recording.take in dev_takes
        parts[names.test if in_test else names.dev if in_dev else names.train].append(recording)
    return _no_empty(parts, "choose other test_takes and dev_takes")


def split_by_speaker(
    recordings: Sequence[WordRecording],
    names: PartNames,
    test_speakers: Sequence[str],
    dev_speakers: Sequence[str],
    dev_takes: Sequence[int],
    seed: int = 1,
) -> dict[str, list[WordRecording]]:
    """Parts by speaker: those of the test part are in no other.

    Args:
        test_speakers: held out for testing; with none given, one is drawn with ``seed``.
        dev_speakers: held out for the dev part; with none given, the dev part is the
            ``dev_takes`` of the training speakers.

    Raises:
        RecipeError: a single speaker, one who is not there or is in both lists, or a part without
            recordings.
    """
    speakers = sorted({r.speaker for r in recordings})
    if len(speakers) < 2:
        raise _conf_error("split", "speaker", f"all recordings are by {speakers[0]}")
    test_speakers = list(test_speakers)
    if not test_speakers:
        others = [s for s in speakers if s not in dev_speakers]
        test_speakers = [random.Random(f"{seed}/test speaker").choice(others or speakers)]
    for key, held_out in (("test_speakers", test_speakers), ("dev_speakers", dev_speakers)):
        for name in held_out:
            if name not in speakers:
                raise _conf_error(key, name, f"the recordings are by {', '.join(speakers)}")
    both = set(test_speakers) & set(dev_speakers)
    if both:
        raise _conf_error("dev_speakers", min(both), "is also in test_speakers")
    parts = {part: [] for part in names}
    for recording in recordings:
        if recording.speaker in test_speakers:
            part = names.test
        elif dev_speakers:
            part = names.dev if recording.speaker in dev_speakers else names.train
        else:
            part = names.dev if recording.take in dev_takes else names.train
        parts[part].append(recording)
    return _no_empty(parts, f"of {len(speakers)} speakers, hold out fewer")


def read_word(path: Path, settings: StringingSettings) -> np.ndarray:
    """One recording as mono float32 at 16 kHz, shape (L,).

    Raises:
        RecipeError: unreadable, empty, silent, not finite, of a rate below 8 kHz, or of a length
            that is no single word's.
    """
    remedy = "replace or remove the file"
    try:
        samples_LC, rate = soundfile.read(path, dtype="float64", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        cause = str(getattr(error, "error_string", error)).strip() or type(error).__name__
        raise RecipeError(f"{path}: cannot be read as audio ({cause}); {remedy}") from error
    if len(samples_LC) == 0:
        raise RecipeError(f"{path}: holds no samples; {remedy}")
    if rate < MIN_SAMPLE_RATE:
        raise RecipeError(
            f"{path}: its sampling rate is {rate} Hz, below {MIN_SAMPLE_RATE}; {remedy}"
        )
    samples_L = samples_LC.mean(axis=1)
    if not np.isfinite(samples_L).all():
        raise RecipeError(f"{path}: holds samples that are not finite; {remedy}")
    if np.abs(samples_L).max() < 10 ** (settings.silence_db / 20):
        raise RecipeError(f"{path}: is silent; {remedy}")
    seconds, (low, high) = len(samples_L) / rate, settings.word_seconds
    if not low <= seconds <= high:
        raise RecipeError(
            f"{path}: lasts {seconds:.3g} s, a word {low} to {high}; {remedy} or set word_seconds"
        )
    if rate != SAMPLE_RATE:
        divisor = math.gcd(rate, SAMPLE_RATE)
        samples_L = resample_poly(samples_L, SAMPLE_RATE // divisor, rate // divisor)
    return samples_L.astype(np.float32)


def plan_part(
    part: str,
    names: PartNames,
    recordings: Sequence[WordRecording],
    seconds: dict[Path, float],
    speaker_ids: dict[str, int],
    settings: StringingSettings,
) -> list[Utterance]:
    """Decide everything that is random about a part; rendering draws nothing.

    A speaker's recordings are gone through in passes, each in its own order, so that all are used
    equally often. What is drawn depends on the seed, the part and the speaker's name alone.

    Args:
        seconds: length of each recording.
        speaker_ids: LibriSpeech names speakers by numbers.

    Raises:
        RecipeError: a speaker with too few recordings for one utterance.
    """
    by_speaker = defaultdict(list)
    for recording in recordings:
        by_speaker[recording.speaker].append(recording)
    utterances = []
    for speaker, own in sorted(by_speaker.items()):
        rng = random.Random(f"{settings.seed}/{part}/{speaker}")
        if part == names.train:
            word_lists = _strings_without_end(own, settings.num_words, rng)
            needed = settings.train_minutes * 60 / len(by_speaker)
        else:
            uses = settings.dev_uses if part == names.dev else settings.test_uses
            word_lists = _strings_of_uses(own, uses, settings.num_words, rng)
            needed = math.inf
        # A number of the part's own: ids stay apart where a speaker is in several parts.
        chapter = f"{speaker_ids[speaker]}-{names.index(part) + 1}"
        count, total = 0, 0.0
        while total < needed and (words := next(word_lists, None)):
            level = rng.uniform(*settings.utterance_gain_db)
            edges = [rng.uniform(*settings.edge_seconds) for _ in range(2)]
            pauses = [rng.uniform(*settings.pause_seconds) for _ in words[1:]]
            utterance = Utterance(
                id=f"{chapter}-{count:04d}",
                part=part,
                recordings=tuple(words),
                gaps=(edges[0], *pauses, edges[1]),
                gains_db=tuple(level + rng.uniform(*settings.word_gain_db) for _ in words),
                noise_db=rng.uniform(*settings.noise_db),
                noise_seed=rng.getrandbits(64),
            )
            utterances.append(utterance)
            count += 1
            total += sum(utterance.gaps) + sum(seconds[r.path] for r in words)
        if count == 0:
            raise RecipeError(
                f"{own[0].path.parent}: {part} has {len(own)} recordings of {speaker}, too few for "
                f"an utterance of {settings.num_words[0]} words; change the split or num_words"
            )
    return utterances


def render(
    utterance: Utterance, audio: dict[Path, np.ndarray], settings: StringingSettings
) -> np.ndarray:
    """The samples of an utterance at 16 kHz, int16, shape (L,)."""
    words, speech = [], []
    for recording, gain_db in zip(utterance.recordings, utterance.gains_db):
        word_L = audio[recording.path] * np.float32(10 ** (gain_db / 20))
        fade = min(round(settings.fade_seconds * SAMPLE_RATE), len(word_L) // 2)
        ramp = np.arange(1, fade + 1, dtype=np.float32) / (fade + 1)
        word_L[:fade] *= ramp
        word_L[len(word_L) - fade :] *= ramp[::-1]
        speech.append(word_L)
        words += [
            np.zeros(round(utterance.gaps[len(speech) - 1] * SAMPLE_RATE), np.float32),
            word_L,
        ]
    words.append(np.zeros(round(utterance.gaps[-1] * SAMPLE_RATE), np.float32))
    samples_L = np.concatenate(words)
    rms = float(np.sqrt(np.mean(np.concatenate(speech) ** 2, dtype=np.float64)))
    noise = np.random.default_rng(utterance.noise_seed)
    deviation = np.float32(rms * 10 ** (utterance.noise_db / 20))
    samples_L += deviation * noise.standard_normal(len(samples_L), np.float32)
    # A loud recording with gain is turned down as a whole rather than clipped.
    samples_L *= np.float32(min(1.0, 0.99 / np.abs(samples_L).max()))
    return np.rint(samples_L * 32767).astype(np.int16)


def make_strung_corpus(
    parts: dict[str, list[WordRecording]],
    out_dir: str | Path,
    settings: StringingSettings,
    num_workers: int = 1,
) -> dict[str, PartSummary]:
    """Write ``out_dir/<part>/<speaker>/<chapter>/*.flac`` and ``*.trans.txt``; summary per part.

    The bytes depend on the recordings and the settings, not on ``num_workers``. Speakers have
    numbers, in the order of their names; SPEAKERS.TXT tells which. Recordings that cannot be used
    are left out, up to ``max_bad_share``, and listed in ``bad_recordings.txt``. ``out_dir`` is
    replaced as a whole at the end.

    Args:
        parts: what `split_by_take` or `split_by_speaker` gave.

    Raises:
        RecipeError: parts that share a recording, too many bad recordings, too few of a speaker,
            or settings that make no sense.
    """
    settings.check()
    _check_disjoint(parts)
    names = PartNames(*parts)
    recordings = [r for own in parts.values() for r in own]
    speaker_ids = {s: i for i, s in enumerate(sorted({r.speaker for r in recordings}), 1)}
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        audio, bad = _read_all(recordings, settings, pool)
        seconds = {path: len(audio_L) / SAMPLE_RATE for path, audio_L in audio.items()}
        usable = {part: [r for r in own if r.path in audio] for part, own in parts.items()}
        _no_empty(usable, "add recordings that can be read")
        plans = {
            part: plan_part(part, names, own, seconds, speaker_ids, settings)
            for part, own in usable.items()
        }
        summary, rows = {}, []
        with written_aside(out_dir) as root:
            for part, utterances in plans.items():
                folders = {u.id: root / _folder(u) for u in utterances}
                for folder in sorted(set(folders.values())):
                    folder.mkdir(parents=True)

                def write(utterance: Utterance, folders: dict[str, Path] = folders) -> float:
                    samples_L = render(utterance, audio, settings)
                    path = folders[utterance.id] / f"{utterance.id}.flac"
                    soundfile.write(path, samples_L, SAMPLE_RATE, subtype="PCM_16")
                    return len(samples_L) / SAMPLE_RATE

                lengths = list(pool.map(write, utterances))
                lines, spoken = defaultdict(list), defaultdict(float)
                for utterance, length in zip(utterances, lengths):
                    lines[folders[utterance.id]].append(f"{utterance.id} {utterance.text}\n")
                    spoken[utterance.recordings[0].speaker] += length
                for folder, own in lines.items():
                    name = f"{folder.parent.name}-{folder.name}.trans.txt"
                    (folder / name).write_text("".join(own), encoding="utf-8")
                rows += [(speaker_ids[s], part, spoken[s], s) for s in sorted(spoken)]
                summary[part] = PartSummary(
                    speakers=len(spoken),
                    recordings=len(usable[part]),
                    utterances=len(utterances),
                    words=sum(len(u.recordings) for u in utterances),
                    seconds=sum(lengths),
                )
            write_speakers_table(root, rows)
            if bad:
                (root / BAD_LIST).write_text("".join(f"{line}\n" for line in bad), encoding="utf-8")
    return summary


def _read_all(
    recordings: Sequence[WordRecording], settings: StringingSettings, pool: ThreadPoolExecutor
) -> tuple[dict[Path, np.ndarray], list[str]]:
    """Audio of the usable recordings, and one line for each of the others."""

    def read(path: Path) -> np.ndarray | RecipeError:
        try:
            return read_word(path, settings)
        except RecipeError as error:
            return error

    paths = [r.path for r in recordings]
    results = dict(zip(paths, pool.map(read, paths)))
    bad = [str(result) for result in results.values() if isinstance(result, RecipeError)]
    if len(bad) > settings.max_bad_share * len(results):
        raise RecipeError(
            f"{bad[0]} (bad recordings: {len(bad)} of {len(results)}, more than the max_bad_share "
            f"{settings.max_bad_share})"
        )
    return {p: r for p, r in results.items() if not isinstance(r, RecipeError)}, bad


def _strings_without_end(
    own: Sequence[WordRecording], num_words: tuple[int, int], rng: random.Random
) -> Iterator[list[WordRecording]]:
    """Utterances of ``num_words`` from pass after pass over ``own``, each pass in a new order."""
    deck: list[WordRecording] = []
    while True:
        count = rng.randint(*num_words)
        while len(deck) < count:
            deck += rng.sample(own, len(own))
        yield deck[:count]
        del deck[:count]


def _strings_of_uses(
    own: Sequence[WordRecording], uses: int, num_words: tuple[int, int], rng: random.Random
) -> Iterator[list[WordRecording]]:
    """Utterances of ``num_words`` that use each of ``own`` ``uses`` times.

    The last ones are drawn so that they come out even; where ``num_words`` is too narrow for that,
    fewer words than its lower end are left unused.
    """
    deck = [r for _ in range(uses) for r in rng.sample(own, len(own))]
    low, high = num_words
    while len(deck) >= low:
        counts = range(low, min(high, len(deck)) + 1)
        even = [n for n in counts if len(deck) == n or len(deck) - n >= low]
        count = rng.choice(even or counts)
        yield deck[:count]
        del deck[:count]


def _folder(utterance: Utterance) -> Path:
    speaker, chapter, _ = utterance.id.split("-")
    return Path(utterance.part, speaker, chapter)


def _check_disjoint(parts: dict[str, list[WordRecording]]) -> None:
    seen: dict[Path, str] = {}
    for part, recordings in parts.items():
        for path in {r.path for r in recordings}:
            if path in seen:
                raise RecipeError(
                    f"{path}: is in {seen[path]} and in {part}; keep the parts' recordings apart"
                )
            seen[path] = part


def _no_empty(parts: dict[str, list[WordRecording]], remedy: str) -> dict[str, list[WordRecording]]:
    for part, recordings in parts.items():
        if not recordings:
            raise RecipeError(f"{part}: no recording is left for it; {remedy}")
    return parts


def _conf_error(key: str, value: object, cause: str) -> RecipeError:
    return RecipeError(f"{key} {value}: {cause}; change it in the corpus conf")
