"""Train the embedded teacher: a small HuBERT, CTC on a transcribed pool.

It begins from random weights, or from those of another teacher, pre-trained or fine-tuned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from lhotse import CutSet

from mvqkd import cli
from mvqkd.data.manifests import read_cuts
from mvqkd.device import pick_device
from mvqkd.teachers import load_teacher, read_origin
from mvqkd.teachers.ctc import (
    CtcTask,
    HubertSettings,
    add_ctc_head,
    claim_for_symbols,
    new_hubert,
    symbols_from,
    symbols_of,
)
from mvqkd.teachers.trained import save_trained
from mvqkd.training.loop import TrainingSettings, train


@dataclass
class Settings:
    """The teacher conf, and where things are."""

    train_manifests: list[Path]
    dev_manifests: list[Path]
    # Checkpoints and logs of the run.
    work_dir: Path
    # The finished teacher, in transformers' layout.
    out_dir: Path
    # A teacher to go on from; none: random weights.
    init: str | None = None
    # Characters of a new CTC head; none: those of the training transcripts.
    symbols: str | None = None
    # Give `init` a new head though it has one.
    new_head: bool = False
    device: str = "auto"
    mask_inputs: bool = True
    # Each epoch has each utterance at one of these, at random.
    speed_factors: list[float] = field(default_factory=lambda: [1.0])
    max_duration: float = 100
    # Keep all speech in memory once it has been read (115 MB an hour, and again at each speed).
    cache_audio: bool = True
    hubert: HubertSettings = field(default_factory=HubertSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)


def main(settings: Settings) -> None:
    device = pick_device(settings.device)
    seed = settings.training.seed
    train_cuts = CutSet.from_cuts(c for path in settings.train_manifests for c in read_cuts(path))
    teacher = load_teacher(settings.init) if settings.init else None
    if teacher is None or teacher.vocabulary is None or settings.new_head:
        given = settings.symbols
        symbols = symbols_of(train_cuts) if given is None else symbols_from(given)
        if teacher is None:
            teacher = new_hubert(settings.hubert, seed, symbols)
        else:
            add_ctc_head(teacher, seed, symbols)
    task = CtcTask(
        teacher,
        train_cuts,
        {path.name.split(".")[0]: read_cuts(path) for path in settings.dev_manifests},
        settings.max_duration,
        seed,
        device,
        settings.mask_inputs,
        settings.speed_factors,
        settings.cache_audio,
    )
    claim_for_symbols(settings.work_dir, teacher.vocabulary)
    train(task, settings.training, settings.work_dir, device)
    save_trained(
        teacher,
        task,
        settings.training,
        settings.work_dir,
        settings.out_dir,
        device,
        torch.float16,  # halves the files; the indexes are made from what is stored
        digits=2,
        init=(read_origin(settings.init) or None) if settings.init else None,
    )


if __name__ == "__main__":
    cli.run(main, Settings)
