"""Features of recordings of noise, in pieces, to be mixed into training speech."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from mvqkd import cli
from mvqkd.data.features import FeatureSettings
from mvqkd.data.noise import prepare_noise


@dataclass
class Settings:
    """The feature conf of the speech, and where things are."""

    # Holds WAV files, in any folders: MUSAN's, say.
    dl_dir: Path
    out_dir: Path
    # Of a piece.
    seconds: float = 10.0
    num_workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    features: FeatureSettings = field(default_factory=FeatureSettings)


def main(settings: Settings) -> None:
    prepare_noise(
        settings.dl_dir,
        settings.out_dir / "noise.jsonl.gz",
        settings.seconds,
        settings.features,
        settings.num_workers,
    )


if __name__ == "__main__":
    cli.run(main, Settings)
