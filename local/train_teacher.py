"""Train the embedded teacher: a small HuBERT, CTC on a transcribed pool.

It begins from random weights, or from those of another teacher, pre-trained or fine-tuned.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from lhotse import CutSet

from mvqkd import cli
from mvqkd.data.manifests import read_cuts
from mvqkd.device import describe_device, pick_device
from mvqkd.files import written_aside
from mvqkd.processes import is_main, num_processes
from mvqkd.teachers import load_teacher
from mvqkd.teachers.ctc import CtcTask, HubertSettings, add_ctc_head, new_hubert
from mvqkd.training.checkpoint import load_checkpoint
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
    device: str = "auto"
    mask_inputs: bool = True
    # Each epoch has each utterance at one of these, at random.
    speed_factors: list[float] = field(default_factory=lambda: [1.0])
    max_duration: float = 100
    hubert: HubertSettings = field(default_factory=HubertSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)


def main(settings: Settings) -> None:
    device = pick_device(settings.device)
    seed = settings.training.seed
    teacher = load_teacher(settings.init) if settings.init else new_hubert(settings.hubert, seed)
    if teacher.vocabulary is None:
        add_ctc_head(teacher, seed)
    train_cuts = CutSet.from_cuts(c for path in settings.train_manifests for c in read_cuts(path))
    task = CtcTask(
        teacher,
        train_cuts,
        {path.name.split(".")[0]: read_cuts(path) for path in settings.dev_manifests},
        settings.max_duration,
        seed,
        device,
        settings.mask_inputs,
        settings.speed_factors,
    )
    train(task, settings.training, settings.work_dir, device)
    if not is_main():
        return
    last = load_checkpoint(settings.work_dir / f"epoch-{settings.training.num_epochs}.pt")
    teacher.load_state_dict(last["model"])
    log = [json.loads(line) for line in (settings.work_dir / "log.jsonl").open()]
    origin = {
        "command": " ".join(sys.argv),
        "seed": seed,
        "device": describe_device(device),
        "num_processes": num_processes(),
        "training_minutes": round(log[-1]["seconds"] / 60, 1),
        "speech_hours": round(task.epoch_seconds / 3600, 2),
        "epochs": settings.training.num_epochs,
        "dev": {key: round(log[-1][key], 2) for key in log[-1] if key.startswith("wer")},
    }
    if settings.init and (made_from := Path(settings.init) / "origin.json").exists():
        origin["init"] = json.loads(made_from.read_text())
    with written_aside(settings.out_dir) as aside:
        # Half precision halves the files; the indexes are made from what is stored.
        teacher.cpu().half().save(aside)
        (aside / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main, Settings)
