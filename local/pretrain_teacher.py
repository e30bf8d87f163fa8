"""Pre-train a HuBERT on speech without transcripts: one round of units and masked prediction.

    local/pretrain_teacher.py ... --units mfcc --out_dir exp/first
    local/pretrain_teacher.py ... --units exp/first --unit_labels.layer 6 --out_dir exp/second
    local/train_teacher.py ... --init exp/second

Under torchrun the processes share all of it but k-means, which the first one does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from lhotse import CutSet

from mvqkd import cli
from mvqkd.data.manifests import read_cuts
from mvqkd.device import pick_device
from mvqkd.processes import connected
from mvqkd.teachers import load_teacher, read_origin
from mvqkd.teachers.ctc import HubertSettings, new_hubert
from mvqkd.teachers.mfcc import Mfcc
from mvqkd.teachers.pretraining import PredictionSettings, PretrainingTask
from mvqkd.teachers.trained import save_trained
from mvqkd.teachers.units import UnitSettings, label_units
from mvqkd.training.loop import TrainingSettings, train


@dataclass
class Settings:
    """The model, its units, and where things are."""

    train_manifests: list[Path]
    dev_manifests: list[Path]
    # Units, checkpoints and logs of the run.
    work_dir: Path
    # The finished model, in transformers' layout, without a head.
    out_dir: Path
    # mfcc, or the folder or name of a teacher, of whose layer unit_labels.layer they are.
    units: str = "mfcc"
    device: str = "auto"
    max_duration: float = 100
    # Keep all speech in memory once it has been read (115 MB an hour).
    cache_audio: bool = False
    hubert: HubertSettings = field(default_factory=HubertSettings)
    unit_labels: UnitSettings = field(default_factory=UnitSettings)
    prediction: PredictionSettings = field(default_factory=PredictionSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)


def main(settings: Settings) -> None:
    device = pick_device(settings.device)
    with connected(device):
        pretrain(settings, device)


def pretrain(settings: Settings, device: torch.device) -> None:
    seed = settings.training.seed
    of_mfcc = settings.units == "mfcc"
    units_teacher = Mfcc() if of_mfcc else load_teacher(settings.units)
    train_cuts = CutSet.from_cuts(c for path in settings.train_manifests for c in read_cuts(path))
    dev = {path.name.split(".")[0]: list(read_cuts(path)) for path in settings.dev_manifests}
    labelled, unit_figures = label_units(
        train_cuts,
        CutSet.from_cuts(cut for part in dev.values() for cut in part),
        units_teacher,
        settings.unit_labels,
        settings.work_dir / "units",
        device,
    )
    by_id = {cut.id: cut for cut in labelled}

    def with_units(cuts: CutSet) -> CutSet:
        return CutSet.from_cuts(by_id[cut.id] for cut in cuts if cut.id in by_id)

    units_teacher.cpu()  # its weights need no room beside the model's
    teacher = new_hubert(settings.hubert, seed)
    teacher.vocabulary = None
    task = PretrainingTask(
        teacher,
        settings.unit_labels.kmeans.num_units,
        units_teacher,
        with_units(train_cuts),
        {name: with_units(part) for name, part in dev.items()},
        settings.prediction,
        settings.max_duration,
        seed,
        device,
        settings.cache_audio,
    )
    train(task, settings.training, settings.work_dir, device)
    units = {
        "of": settings.units,
        "layer": settings.unit_labels.layer,
        "number": settings.unit_labels.kmeans.num_units,
        **{key: round(value, 3) for key, value in unit_figures.items()},
    }
    if not of_mfcc and (origin := read_origin(settings.units)):
        units["origin"] = origin
    save_trained(
        teacher,
        task,
        settings.training,
        settings.work_dir,
        settings.out_dir,
        device,
        torch.float32,
        digits=3,
        units=units,
    )


if __name__ == "__main__":
    cli.run(main, Settings)
