"""LibriSpeech: download the parts by lhotse, or take the copy in --dl_dir."""

from __future__ import annotations

import os
import socket
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from lhotse.recipes import download_librispeech

from mvqkd import cli
from mvqkd.errors import RecipeError, reason_of
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
      RecipeError: no connection, one that broke off, or a full disk.
    """
    # lhotse sets none: a server that falls silent would hold the stage for ever.
    socket.setdefaulttimeout(60)
    try:
        return download_librispeech(folder, dataset_parts=parts)
    # A connection that breaks off shows only when the archive is unpacked.
    except (tarfile.TarError, EOFError, zlib.error) as error:
        done = [part for part in parts if (folder / "LibriSpeech" / part / ".completed").exists()]
        archive = folder / f"{next(part for part in parts if part not in done)}.tar.gz"
        raise RecipeError(
            f"{archive}: cut short or damaged ({reason_of(error)}); run again to fetch the rest, "
            "and remove it if that does not help"
        ) from error
    except OSError as error:
        raise RecipeError(
            f"LibriSpeech cannot be downloaded ({reason_of(error)}); run again to resume, or pass "
            "--dl-dir FOLDER with a copy"
        ) from error


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
