"""LibriSpeech: download the parts by lhotse, or take the copy in --dl_dir."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lhotse.recipes import download_librispeech

from mvqkd import cli
from mvqkd.data.download import lhotse_download
from mvqkd.files import require, written_aside


@dataclass
class Settings:
    """Which parts, and where they are."""

    out_dir: Path
    parts: list[str]
    # Holds LibriSpeech/<part>, or the parts themselves; none: download.
    dl_dir: Path | None = None
    download_dir: Path = Path("data/download")
    # Taken by every corpus; lhotse downloads one part after the other.
    num_workers: int = 1


def download(parts: list[str], folder: Path) -> Path:
    """Fetch and unpack ``parts``; what a call before has left is kept or gone on with.

    Raises:
      RecipeError: see :func:`lhotse_download`.
    """

    def archive() -> Path:
        unpacked = folder / "LibriSpeech"
        left = (part for part in parts if not (unpacked / part / ".completed").exists())
        return folder / f"{next(left)}.tar.gz"

    with lhotse_download("LibriSpeech", archive, "pass --dl-dir FOLDER with a copy"):
        return download_librispeech(folder, dataset_parts=parts)


def main(settings: Settings) -> None:
    if settings.dl_dir is None:
        corpus = download(settings.parts, settings.download_dir)
    else:
        nested = settings.dl_dir / "LibriSpeech"
        corpus = nested if nested.is_dir() else settings.dl_dir
    for part in settings.parts:
        require(
            corpus / part,
            f"{settings.dl_dir} must hold {', '.join(settings.parts)}, itself or in a folder "
            "LibriSpeech; name such a folder with --dl-dir, or leave it out to download",
        )
    with written_aside(settings.out_dir) as aside:
        os.symlink(corpus.resolve(), aside, target_is_directory=True)


if __name__ == "__main__":
    cli.run(main, Settings)
