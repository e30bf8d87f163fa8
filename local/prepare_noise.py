"""Features of recordings of noise, in pieces, to be mixed into training speech.

Without a folder of noise MUSAN (Snyder et al. 2015, arXiv 1510.08484) is downloaded by lhotse.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from lhotse.recipes import download_musan

from mvqkd import cli
from mvqkd.data.download import lhotse_download
from mvqkd.data.features import FeatureSettings
from mvqkd.data.noise import prepare_noise


@dataclass
class Settings:
    """The feature conf of the speech, and where things are."""

    out_dir: Path
    # Holds WAV files, in any folders; none: MUSAN is downloaded.
    dl_dir: Path | None = None
    download_dir: Path = Path("data/download")
    # Of a piece.
    seconds: float = 10.0
    num_workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    features: FeatureSettings = field(default_factory=FeatureSettings)


def download(folder: Path) -> Path:
    """Fetch and unpack MUSAN; what a call before has left is kept or gone on with.

    Raises:
      RecipeError: see :func:`lhotse_download`.
    """
    remedy = "pass --noise-dir FOLDER with a copy, or --noise-dir none"
    with lhotse_download("MUSAN", lambda: folder / "musan.tar.gz", remedy):
        return download_musan(folder)


def main(settings: Settings) -> None:
    prepare_noise(
        settings.dl_dir or download(settings.download_dir),
        settings.out_dir / "noise.jsonl.gz",
        settings.seconds,
        settings.features,
        settings.num_workers,
    )


if __name__ == "__main__":
    cli.run(main, Settings)
