"""Speech from text with eSpeak NG, and sentences from a grammar.

eSpeak NG is used through its C interface (``speak_lib.h``), from the shared
library of the package ``espeakng-loader``. Its synthesizer keeps state from one
utterance to the next, so the same bytes come out only when a process says the
same things in the same order: `synthesize_speakers` gives each speaker a fresh
process.

Shapes: L samples.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import fftconvolve, lfilter, resample_poly

from mvqkd.data import SAMPLE_RATE
from mvqkd.data.workers import map_in_processes
from mvqkd.errors import RecipeError

# From speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_RATE, _PITCH, _PITCH_RANGE = 1, 3, 4
_CHARS_UTF8 = 1

# Draws without a new sentence after which a grammar counts as used up.
_MAX_DRAWS = 10000


class Espeak:
    """One eSpeak NG synthesizer; a process can have one."""

    def __init__(self) -> None:
        import espeakng_loader

        self._lib = ctypes.CDLL(espeakng_loader.get_library_path())
        data = Path(espeakng_loader.get_data_path())
        self._variants = {path.name for path in (data / "voices" / "!v").iterdir()}
        self._native_rate = self._lib.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, str(data).encode(), 0
        )
        if self._native_rate <= 0:
            raise RecipeError("espeakng-loader: eSpeak NG does not start; remove .venv and retry")
        # The breath of some voices is noise, from a generator that starts with the time of day.
        self._lib.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._chunks: list[np.ndarray] = []
        callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self._callback = callback(self._collect)  # kept: C holds a pointer to it
        self._lib.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, num_samples: int, events) -> int:
        if samples and num_samples > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, shape=(num_samples,)).copy())
        return 0

    def say(self, text: str, voice: str, pitch: int, rate: int, pitch_range: int) -> np.ndarray:
        """``text`` as float32 samples (L,) at 16 kHz, silence at both ends cut off.

        Args:
          voice: eSpeak's name, ``accent+variant``.
          pitch, pitch_range: 0 to 100.
          rate: words per minute.

        Raises:
          RecipeError: eSpeak NG has no such voice.
        """
        self._chunks.clear()
        # For a variant that it does not have, eSpeak NG takes another one without a word.
        _, plus, variant = voice.partition("+")
        known = not plus or variant in self._variants
        if not known or self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RecipeError(f"voice {voice}: unknown to eSpeak NG; mend the corpus conf")
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_PITCH_RANGE, pitch_range)):
            self._lib.espeak_SetParameter(parameter, value, 0)
        encoded = text.encode()
        self._lib.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, _CHARS_UTF8, None, None)
        self._lib.espeak_Synchronize()
        samples_L = np.concatenate(self._chunks).astype(np.float64) / 32768
        samples_L = resample_poly(samples_L, SAMPLE_RATE, self._native_rate)
        loud = np.flatnonzero(np.abs(samples_L) > 1e-3)
        return samples_L[loud[0] : loud[-1] + 1].astype(np.float32)


@dataclass
class GrammarSettings:
    """Sentences: a template is a line of words, class names in capitals, ``?`` for optional."""

    classes: dict[str, list[str]]
    templates: list[str]
    # Of each class, the first so many words; all where a class is not named.
    num_words: dict[str, int] = field(default_factory=dict)


class Grammar:
    """Draws sentences whose share of the language depends on the sentence alone.

    A sentence belongs to "test", "dev" or "train" by a hash of its text, so no
    sentence is in two of them, whatever the seed and the size of the corpus.
    """

    def __init__(self, settings: GrammarSettings) -> None:
        self._classes = {
            name: words[: settings.num_words.get(name, len(words))]
            for name, words in settings.classes.items()
        }
        self._templates = [template.split() for template in settings.templates]
        for template in self._templates:
            for word in template:
                name = word.rstrip("?")
                if name.isupper() and name not in self._classes:
                    raise RecipeError(f"grammar: template names {name}, which is no class")

    def vocabulary(self) -> set[str]:
        """All words that a sentence can have."""
        slots = {word.rstrip("?") for template in self._templates for word in template}
        return {word for slot in slots for word in self._classes.get(slot, [slot])}

    def sentence(self, rng: np.random.Generator, split: str) -> str:
        """
        Raises:
          RecipeError: the grammar has none of that split.
        """
        for _ in range(_MAX_DRAWS):
            words = []
            for word in self._templates[rng.integers(len(self._templates))]:
                if word.endswith("?") and rng.random() < 0.5:
                    continue
                choices = self._classes.get(word.rstrip("?"))
                words.append(choices[rng.integers(len(choices))] if choices else word.rstrip("?"))
            text = " ".join(words)
            if self.split_of(text) == split:
                return text
        raise RecipeError(f"grammar: has no sentences for {split}; add words or templates")

    @staticmethod
    def split_of(text: str) -> str:
        bucket = hashlib.sha256(text.encode()).digest()[0] % 8
        return {0: "test", 1: "dev"}.get(bucket, "train")


@dataclass
class Speaker:
    """A synthetic speaker and what it has to say."""

    id: int
    voice: str
    pitch: int
    rate: int
    pitch_range: int
    part: str
    split: str
    seconds: float
    # Background noise and echo, as in LibriSpeech's "other" parts.
    adverse: bool
    seed: int


def _noise(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """White, pink-like, brown-like or humming noise of unit power, (num_samples,)."""
    kind = rng.integers(4)
    white_L = rng.standard_normal(num_samples)
    if kind == 0:
        noise_L = white_L
    elif kind == 1:
        # Paul Kellet's three-pole approximation of 1/f.
        noise_L = sum(
            lfilter([b], [1, -a], white_L)
            for a, b in ((0.99765, 0.0990460), (0.963, 0.2965164), (0.57, 1.0526913))
        )
    elif kind == 2:
        noise_L = lfilter([1], [1, -0.98], white_L)
    else:
        time_L = np.arange(num_samples) / SAMPLE_RATE
        base = rng.uniform(50, 200)
        harmonics = np.arange(1, 6)[:, None]
        phases = rng.uniform(0, 2 * np.pi, (5, 1))
        hum_L = (np.sin(2 * np.pi * base * harmonics * time_L + phases) / harmonics).sum(0)
        noise_L = hum_L + 0.3 * white_L
    return noise_L / np.sqrt(np.mean(noise_L**2))


def _echo(rng: np.random.Generator, samples_L: np.ndarray) -> np.ndarray:
    """A room: direct path, then noise that decays by 60 dB in 0.1 to 0.4 seconds."""
    decay = rng.uniform(0.1, 0.4)
    time_L = np.arange(int(decay * SAMPLE_RATE)) / SAMPLE_RATE
    tail_L = rng.standard_normal(len(time_L)) * np.exp(-6.9 * time_L / decay)
    tail_L *= rng.uniform(0.2, 0.6) / np.sqrt((tail_L**2).sum())
    tail_L[0] = 1.0
    return fftconvolve(samples_L, tail_L)[: len(samples_L)]


def _place(rng: np.random.Generator, samples_L: np.ndarray, adverse: bool) -> np.ndarray:
    """The utterance in its room at its level, as int16."""
    pad = rng.uniform(0.05, 0.2, 2) * SAMPLE_RATE
    samples_L = np.pad(samples_L, (int(pad[0]), int(pad[1])))
    if adverse:
        if rng.random() < 0.5:
            samples_L = _echo(rng, samples_L)
        snr_db = rng.uniform(8, 20)
        power = np.mean(samples_L**2)
        noise_L = _noise(rng, len(samples_L)) * np.sqrt(power / 10 ** (snr_db / 10))
        samples_L = samples_L + noise_L
    level = 10 ** (rng.uniform(-30, -20) / 20)
    samples_L = samples_L * (level / np.sqrt(np.mean(samples_L**2)))
    return np.round(np.clip(samples_L, -0.999, 0.999) * 32767).astype(np.int16)


def _synthesize_speaker(job: tuple[Speaker, Grammar, Path]) -> tuple[int, float]:
    speaker, grammar, root = job
    rng = np.random.default_rng([speaker.seed, speaker.id])
    espeak = Espeak()
    chapter = speaker.id * 10 + 1
    folder = root / speaker.part / str(speaker.id) / str(chapter)
    folder.mkdir(parents=True)
    total, lines, said, repeated = 0.0, [], set(), 0
    while total < speaker.seconds:
        text = grammar.sentence(rng, speaker.split)
        if text in said:
            repeated += 1
            if repeated == _MAX_DRAWS:
                raise RecipeError(
                    f"parts.{speaker.part}: the grammar has too few sentences for "
                    f"{speaker.seconds:.0f} s by each speaker; add words, or cut minutes"
                )
            continue
        repeated = 0
        said.add(text)
        rate = int(speaker.rate * rng.uniform(0.92, 1.08))
        pitch = int(np.clip(speaker.pitch + rng.normal(0, 3), 0, 99))
        samples_L = espeak.say(text, speaker.voice, pitch, rate, speaker.pitch_range)
        audio_L = _place(rng, samples_L, speaker.adverse)
        name = f"{speaker.id}-{chapter}-{len(lines):04d}"
        soundfile.write(folder / f"{name}.flac", audio_L, SAMPLE_RATE, subtype="PCM_16")
        lines.append(f"{name} {text.upper()}\n")
        total += len(audio_L) / SAMPLE_RATE
    (folder / f"{speaker.id}-{chapter}.trans.txt").write_text("".join(lines))
    return speaker.id, total


def synthesize_speakers(
    speakers: list[Speaker], grammar: Grammar, root: Path, num_workers: int
) -> Iterator[tuple[int, float]]:
    """Write LibriSpeech's tree ``root/part/speaker/chapter/*.flac, *.trans.txt``.

    The bytes do not depend on ``num_workers``. Yields (speaker id, seconds of
    speech) as speakers are done, in the order given.
    """
    jobs = [(speaker, grammar, root) for speaker in speakers]
    yield from map_in_processes(_synthesize_speaker, jobs, num_workers)
    write_speakers_table(root, [(s.id, s.part, s.seconds, s.voice) for s in speakers])


def write_speakers_table(root: Path, rows: list[tuple[int, str, float, str]]) -> None:
    """LibriSpeech's SPEAKERS.TXT; ``rows`` of (id, part, seconds, name)."""
    lines = [";ID |SEX| SUBSET | MINUTES | NAME\n"]
    lines += [f"{i} | U | {part} | {sec / 60:.2f} | {name}\n" for i, part, sec, name in rows]
    (root / "SPEAKERS.TXT").write_text("".join(lines))
