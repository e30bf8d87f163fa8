"""Teacher embeddings of a sample of training utterances."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mvqkd import cli
from mvqkd.data.manifests import read_cuts
from mvqkd.device import pick_device
from mvqkd.teachers import load_teacher
from mvqkd.teachers.embeddings import SampleSettings, sample_embeddings


@dataclass
class Settings:
    """The teacher, its layer, and what to embed."""

    teacher: str
    layer: int
    train_manifest: Path
    out: Path
    # Of a teacher by name: a commit. None: the newest.
    revision: str | None = None
    device: str = "auto"
    sample: SampleSettings = field(default_factory=SampleSettings)


def main(settings: Settings) -> None:
    device = pick_device(settings.device)
    teacher = load_teacher(settings.teacher, settings.revision).to(device)
    cuts = read_cuts(settings.train_manifest)
    sample_embeddings(cuts, teacher, settings.layer, settings.out, settings.sample, device)


if __name__ == "__main__":
    cli.run(main, Settings)
