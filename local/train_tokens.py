"""Word pieces from the training transcripts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mvqkd import cli
from mvqkd.data.manifests import read_cuts
from mvqkd.data.tokens import TokenSettings, train_tokens


@dataclass
class Settings:
    """The token conf, and where things are."""

    train_manifest: Path
    out_dir: Path
    tokens: TokenSettings = field(default_factory=TokenSettings)


def main(settings: Settings) -> None:
    train_tokens(read_cuts(settings.train_manifest), settings.out_dir, settings.tokens)


if __name__ == "__main__":
    cli.run(main, Settings)
