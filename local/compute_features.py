"""Filterbanks of each part; training parts also at other speeds."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from lhotse import CutSet

from mvqkd import cli
from mvqkd.data.features import FeatureSettings, compute_features
from mvqkd.data.manifests import read_cuts
from mvqkd.files import written_aside


@dataclass
class Settings:
    """The feature conf, and where things are."""

    manifests_dir: Path
    out_dir: Path
    train_parts: list[str]
    test_parts: list[str]
    num_workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    features: FeatureSettings = field(default_factory=FeatureSettings)


def main(settings: Settings) -> None:
    done = {}
    for part in settings.train_parts + settings.test_parts:
        name = f"{part}.jsonl.gz"
        done[part] = compute_features(
            read_cuts(settings.manifests_dir / name),
            settings.out_dir / name,
            perturb=part in settings.train_parts,
            settings=settings.features,
            num_workers=settings.num_workers,
        )
    if not settings.train_parts:
        return
    # What students, codebooks and word pieces are trained on.
    with written_aside(settings.out_dir / "train.jsonl.gz") as aside:
        CutSet.from_cuts(c for part in settings.train_parts for c in done[part]).to_file(aside)


if __name__ == "__main__":
    cli.run(main, Settings)
