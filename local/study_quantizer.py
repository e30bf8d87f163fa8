"""RRL against the number of codebooks, and the variance kept of each layer of the teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mvqkd import cli
from mvqkd.data.manifests import read_cuts
from mvqkd.device import pick_device
from mvqkd.quantizer import QuantizerSettings
from mvqkd.quantizer.study import StudySettings, plot_study, study
from mvqkd.teachers import load_teacher
from mvqkd.teachers.embeddings import SampleSettings, sample_embeddings


@dataclass
class Settings:
    """The teacher, the recipe's layer, the sample, and what is compared."""

    teacher: str
    layer: int
    train_manifest: Path
    out_dir: Path
    # Of a teacher by name: a commit. None: the newest.
    revision: str | None = None
    device: str = "auto"
    sample: SampleSettings = field(default_factory=SampleSettings)
    quantizer: QuantizerSettings = field(default_factory=QuantizerSettings)
    study: StudySettings = field(default_factory=StudySettings)


def main(settings: Settings) -> None:
    device = pick_device(settings.device)
    teacher = load_teacher(settings.teacher, settings.revision).to(device)
    cuts = read_cuts(settings.train_manifest)

    def sample(layer: int, out: Path) -> None:
        sample_embeddings(cuts, teacher, layer, out, settings.sample, device)

    found = study(
        sample,
        settings.layer,
        teacher.num_layers,
        settings.out_dir,
        settings.study,
        settings.quantizer,
        device,
    )
    plot_study(found, settings.out_dir / "study.png")


if __name__ == "__main__":
    cli.run(main, Settings)
