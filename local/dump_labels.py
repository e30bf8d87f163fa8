"""Dump the codebook indexes of the training set into its manifest, and verify them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mvqkd import cli
from mvqkd.data.labels import Dumper, LabelSettings, Origin, dump_labels, verify_labels
from mvqkd.data.manifests import read_cuts
from mvqkd.device import pick_device
from mvqkd.quantizer import load_quantizer
from mvqkd.teachers import load_teacher


@dataclass
class Settings:
    """The teacher and quantizer, and what to label."""

    teacher: str
    quantizer: Path
    # Cuts with features, speed-perturbed already.
    train_manifest: Path
    out: Path
    device: str = "auto"
    labels: LabelSettings = field(default_factory=LabelSettings)


def main(settings: Settings) -> None:
    device = pick_device(settings.device)
    teacher = load_teacher(settings.teacher)
    quantizer, meta = load_quantizer(settings.quantizer)
    origin = Origin.of(meta)
    cuts = read_cuts(settings.train_manifest)
    dumper = Dumper(teacher, quantizer, origin, settings.labels, device)
    labelled = dump_labels(cuts, settings.out, dumper, settings.labels.shard_size)
    verify_labels(labelled, teacher, quantizer.num_codebooks, origin, quantizer.codebook_size)


if __name__ == "__main__":
    cli.run(main, Settings)
