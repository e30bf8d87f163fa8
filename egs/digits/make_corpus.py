"""Make the corpus of spoken digits: get the recordings, string them into utterances."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mvqkd import cli
from mvqkd.data.download import download, extract_files
from mvqkd.data.stringing import (
    BAD_LIST,
    PartNames,
    StringingSettings,
    WordRecording,
    check_complete,
    list_recordings,
    make_strung_corpus,
    split_by_speaker,
    split_by_take,
)

PATTERN = r"(?P<word>\d)_(?P<speaker>[A-Za-z]\w*)_(?P<take>\d+)\.wav"
DIGITS = ("ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE")
WORDS = {str(digit): word for digit, word in enumerate(DIGITS)}
# LibriSpeech's.
PARTS = PartNames("train-clean-100", "dev-clean", "test-clean")
REMEDY = "pass --dl-dir FOLDER with a copy of the Free Spoken Digit Dataset"


@dataclass
class Settings:
    """The corpus conf."""

    out_dir: Path
    url: str
    split: Literal["take", "speaker"]
    test_takes: list[int]
    dev_takes: list[int]
    test_speakers: list[str]
    dev_speakers: list[str]
    # Of each digit by each speaker, in a whole download.
    takes_per_digit: int
    sha256: str | None = None
    # A folder with the recordings, or with recordings/ in it; none: download.
    dl_dir: Path | None = None
    download_dir: Path = Path("data/download")
    stringing: StringingSettings = field(default_factory=StringingSettings)
    num_workers: int = field(default_factory=lambda: os.cpu_count() or 1)


def fetch(settings: Settings) -> list[WordRecording]:
    """The data set's recordings, downloaded unless an earlier run has left them."""
    archive = settings.download_dir / f"digits-{settings.url.rsplit('/', 1)[-1]}"
    folder = archive.with_name(archive.name.removesuffix(".tar.gz"))
    if not folder.is_dir():
        logging.info(f"downloading {settings.url}")
        download(settings.url, archive, settings.sha256, remedy=REMEDY)
        extract_files(archive, folder, PATTERN)
    recordings = list_recordings(folder, PATTERN, WORDS, REMEDY)
    check_complete(
        recordings, settings.takes_per_digit, f"remove {folder} and {archive}, run again"
    )
    return recordings


def main(settings: Settings) -> None:
    if settings.dl_dir is None:
        recordings = fetch(settings)
    else:
        recordings = list_recordings(settings.dl_dir, PATTERN, WORDS, REMEDY)
    if settings.split == "take":
        parts = split_by_take(recordings, PARTS, settings.test_takes, settings.dev_takes)
    else:
        parts = split_by_speaker(
            recordings,
            PARTS,
            settings.test_speakers,
            settings.dev_speakers,
            settings.dev_takes,
            settings.stringing.seed,
        )
    summary = make_strung_corpus(parts, settings.out_dir, settings.stringing, settings.num_workers)
    for part in PARTS:
        names = ", ".join(sorted({r.speaker for r in parts[part]}))
        s = summary[part]
        logging.info(
            f"{part}: {s.seconds / 60:.1f} minutes, {s.utterances} utterances, {s.words} words "
            f"from {s.recordings} recordings by {names}"
        )
    used = sum(s.recordings for s in summary.values())
    if used < len(recordings):
        logging.warning(
            f"{len(recordings) - used} bad recordings left out, see {settings.out_dir / BAD_LIST}"
        )
    logging.info(f"the corpus is in {settings.out_dir}")


if __name__ == "__main__":
    cli.run(main, Settings)
