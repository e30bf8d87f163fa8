"""lhotse cuts of each part of a corpus in LibriSpeech's layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mvqkd import cli
from mvqkd.data.manifests import CheckSettings, prepare_part


@dataclass
class Settings:
    """What to read and how strictly."""

    corpus_dir: Path
    out_dir: Path
    parts: list[str]
    check: CheckSettings = field(default_factory=CheckSettings)


def main(settings: Settings) -> None:
    for part in settings.parts:
        out = settings.out_dir / f"{part}.jsonl.gz"
        prepare_part(settings.corpus_dir, part, out, settings.check)


if __name__ == "__main__":
    cli.run(main, Settings)
