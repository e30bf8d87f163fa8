"""LibriSpeech: download the parts by lhotse, or take the copy in --dl_dir."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lhotse.recipes import download_librispeech

from mvqkd import cli
from mvqkd.errors import RecipeError
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


def main(settings: Settings) -> None:
    if settings.dl_dir is None:
        try:
            corpus = download_librispeech(settings.download_dir, dataset_parts=settings.parts)
        except OSError as error:
            raise RecipeError(
                f"LibriSpeech cannot be downloaded ({error}); run again to resume, or pass "
                "--dl-dir FOLDER with a copy"
            ) from error
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
