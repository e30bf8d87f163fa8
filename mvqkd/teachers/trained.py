"""The end of a teacher's training: the finished model, and how it was made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from mvqkd.device import describe_device
from mvqkd.files import written_aside
from mvqkd.processes import is_main, num_processes
from mvqkd.teachers import ORIGIN
from mvqkd.teachers.hubert import HubertTeacher
from mvqkd.training.checkpoint import load_checkpoint
from mvqkd.training.loop import Task, TrainingSettings


def save_trained(
    teacher: HubertTeacher,
    task: Task,
    settings: TrainingSettings,
    work_dir: Path,
    out_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
    digits: int,
    **facts: Any,
) -> None:
    """Write ``out_dir``: ``teacher`` as the last epoch left it, and ``origin.json``.

    Of several processes the first one does.

    Args:
      teacher: the model of ``task``, or a part of it.
      work_dir: where ``task`` was trained.
      device: on which it was.
      dtype: of the stored weights.
      digits: after the point, of the dev set's figures.
      facts: more for ``origin.json``; those that are None are left out.
    """
    if not is_main():
        return
    last = load_checkpoint(work_dir / f"epoch-{settings.num_epochs}.pt")
    task.model.load_state_dict(last["model"])
    *_, line = (work_dir / "log.jsonl").open()
    figures = json.loads(line)
    for name in ("kind", "step", "epoch", "took"):
        figures.pop(name, None)
    origin = {
        "command": " ".join(sys.argv),
        "seed": settings.seed,
        "device": describe_device(device),
        "num_processes": num_processes(),
        "training_minutes": round(figures.pop("seconds") / 60, 1),
        "speech_hours": round(task.epoch_seconds / 3600, 2),
        "epochs": settings.num_epochs,
        **{name: fact for name, fact in facts.items() if fact is not None},
        "dev": {name: round(value, digits) for name, value in figures.items()},
    }
    with written_aside(out_dir) as aside:
        teacher.cpu().to(dtype).save(aside)
        (aside / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
