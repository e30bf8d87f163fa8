"""Make the embedded corpus: synthetic speakers say sentences of a small grammar."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from mvqkd import cli
from mvqkd.data.synthesis import Grammar, GrammarSettings, Speaker, synthesize_speakers
from mvqkd.errors import RecipeError
from mvqkd.files import written_aside


@dataclass
class PartSettings:
    """One part of the corpus, in LibriSpeech's names."""

    # Which sentences it may say.
    split: Literal["train", "dev", "test"]
    # eSpeak variants, one a speaker; the first num_voices are used.
    variants: list[str]
    num_voices: int
    # Of all its speakers together.
    minutes: float
    # Noise and echo.
    adverse: bool = False


@dataclass
class Settings:
    """The corpus conf."""

    out_dir: Path
    grammar: GrammarSettings
    accents: list[str]
    parts: dict[str, PartSettings]
    seed: int = 1
    num_workers: int = field(default_factory=lambda: os.cpu_count() or 1)


def speakers_of(settings: Settings) -> list[Speaker]:
    """The speakers of all parts. A speaker's voice depends on its variant and the seed alone."""
    speakers = []
    seen: dict[str, str] = {}
    first_id = 100
    for name, part in settings.parts.items():
        if not 1 <= part.num_voices <= len(part.variants):
            raise RecipeError(
                f"parts.{name}: num_voices is {part.num_voices}, but there are "
                f"{len(part.variants)} variants; mend the corpus conf"
            )
        for index, variant in enumerate(part.variants):
            if variant in seen:
                raise RecipeError(
                    f"parts.{name}: variant {variant} is also in {seen[variant]}; "
                    "speakers of two parts must differ"
                )
            seen[variant] = name
            if index >= part.num_voices:
                continue
            rng = np.random.default_rng([settings.seed, *variant.encode()])
            speakers.append(
                Speaker(
                    id=first_id + index,
                    voice=f"{settings.accents[rng.integers(len(settings.accents))]}+{variant}",
                    pitch=int(rng.integers(30, 70)),
                    rate=int(rng.integers(150, 200)),
                    pitch_range=int(rng.integers(30, 70)),
                    part=name,
                    split=part.split,
                    seconds=part.minutes * 60 / part.num_voices,
                    adverse=part.adverse,
                    seed=settings.seed,
                )
            )
        # Room for every variant, so that a part's voices keep their ids when another part grows.
        first_id += max(100, len(part.variants))
    return speakers


def main(settings: Settings) -> None:
    grammar = Grammar(settings.grammar)
    speakers = speakers_of(settings)
    with written_aside(settings.out_dir) as root:
        seconds = dict.fromkeys(settings.parts, 0.0)
        done = synthesize_speakers(speakers, grammar, root, settings.num_workers)
        for speaker, (_, spoken) in zip(speakers, done):
            seconds[speaker.part] += spoken
    for name, part in settings.parts.items():
        logging.info(
            f"{name}: {seconds[name] / 60:.1f} minutes by {part.num_voices} speakers"
            + (", with noise and echo" if part.adverse else "")
        )
    logging.info(f"{len(grammar.vocabulary())} words; the corpus is in {settings.out_dir}")


if __name__ == "__main__":
    cli.run(main, Settings)
