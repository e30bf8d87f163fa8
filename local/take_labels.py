"""Take published codebook indexes into the manifest of the training set, and verify them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mvqkd import cli
from mvqkd.data.manifests import read_cuts
from mvqkd.data.published import PublishedSettings, take_labels
from mvqkd.files import require


@dataclass
class Settings:
    """Which indexes, and what to label."""

    published: PublishedSettings
    # Names of the training parts that the manifest is of.
    parts: list[str]
    # Cuts with features, speed-perturbed already.
    train_manifest: Path
    out: Path
    # A copy of what would be downloaded.
    dl_dir: Path | None = None


def main(settings: Settings) -> None:
    if settings.dl_dir is not None:
        require(settings.dl_dir, "give the folder that the indexes were copied to")
    cuts = read_cuts(settings.train_manifest)
    take_labels(cuts, settings.parts, settings.out, settings.published, settings.dl_dir)


if __name__ == "__main__":
    cli.run(main, Settings)
