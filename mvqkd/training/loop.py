"""The training loop of teachers and students.

A `Task` says what is trained and on what; the loop does the rest: optimizer and
schedule, running average of the weights, validation, logs, checkpoints, resume.

Every random draw of step n comes from a generator seeded by (seed, n), and the
batches of an epoch from (seed, epoch). A run that was killed therefore goes on
exactly as if it had not been, from the last checkpoint, without any generator's
state in it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from mvqkd.device import has_bf16
from mvqkd.errors import RecipeError
from mvqkd.files import written_aside
from mvqkd.training.checkpoint import load_checkpoint, save_checkpoint
from mvqkd.training.optim import Eden, Eve


@dataclass
class TrainingSettings:
    """How long and how fast; the data's settings are elsewhere."""

    num_epochs: int = 30
    seed: int = 42
    # "auto" is bf16 (mixed: the weights stay float32) where the device has it in hardware.
    precision: Literal["float32", "bf16", "auto"] = "float32"
    # "eve" with Eden's schedule, as published for the students; "adamw" with a
    # linear warm-up over warm_share of the run and a cosine down to 0.
    optimizer: Literal["eve", "adamw"] = "eve"
    lr: float = 0.003
    lr_batches: float = 5000
    lr_epochs: float = 6
    weight_decay: float = 0.01
    warm_share: float = 0.1
    grad_clip: float = 0.0
    # Steps over which the value `warmup` given to the task goes from 0 to 1.
    warmup_steps: int = 3000
    # The running average takes the weights every so many steps.
    average_period: int = 100
    # Epochs whose weights are kept (for averaging when decoding); the last ones.
    keep_epochs: int = 30
    # A checkpoint to resume from: after every epoch, and every so many seconds.
    checkpoint_seconds: float = 300
    valid_every_epochs: int = 1
    log_every_steps: int = 50
    # Batches with a loss that is not finite: saved, named, and one more stops the run.
    max_bad_batches: int = 0


class Task(Protocol):
    """What the loop trains."""

    model: nn.Module
    # Seconds of speech in an epoch.
    epoch_seconds: float

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Any, float]]:
        """(batch, its seconds of speech) of an epoch (from 1) in order, from batch ``start`` on."""
        ...

    def loss(self, batch: Any, step: int, warmup: float) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss to minimize and figures to log: sums, with "weight" what they are divided by."""
        ...

    def validate(self) -> dict[str, float]:
        """Figures of the dev set."""
        ...

    def describe(self, batch: Any) -> str:
        """Names what is in a batch, for error messages."""
        ...


@dataclass
class Progress:
    """Where the run is."""

    epoch: int = 1
    batch: int = 0
    step: int = 0
    bad_batches: int = 0
    speech_seconds: float = 0.0
    train_seconds: float = 0.0


def seed_everything(seed: int, step: int) -> None:
    """All draws of one step come from here, whichever library makes them."""
    mixed = int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


class _Schedule:
    """Sets the learning rate of each step."""

    def __init__(self, optimizer, settings: TrainingSettings, total_seconds: float) -> None:
        self._optimizer, self._settings, self._total = optimizer, settings, total_seconds
        self._eden = None
        if settings.optimizer == "eve":
            self._eden = Eden(optimizer, settings.lr_batches, settings.lr_epochs)

    def set(self, progress: Progress) -> float:
        if self._eden is not None:
            self._eden.step_epoch(progress.epoch - 1)
            self._eden.step_batch(progress.step)
        else:
            share = min(progress.speech_seconds / self._total, 1.0)
            warm = self._settings.warm_share
            if share < warm:
                factor = share / warm
            else:
                factor = 0.5 * (1 + math.cos(math.pi * (share - warm) / (1 - warm)))
            for group in self._optimizer.param_groups:
                group["lr"] = self._settings.lr * max(factor, 1e-3)
        return self._optimizer.param_groups[0]["lr"]


def _optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if settings.optimizer == "eve":
        return Eve(parameters, lr=settings.lr)
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98))


@torch.no_grad()
def _update_average(average: dict, model: nn.Module, step: int, period: int) -> None:
    """The mean of the weights at steps period, 2 * period, ..."""
    weight = period / step
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, weight)
        else:
            average[name].copy_(value)


def _whole_entries(path: Path) -> Iterator[dict]:
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # the last line of a killed run may be cut short
            yield json.loads(line)


def _comes_after(entry: dict, progress: Progress) -> bool:
    # A checkpoint may be from the last step of an epoch that is not validated yet.
    not_validated = entry["kind"] == "dev" and entry["epoch"] >= progress.epoch
    return entry["step"] > progress.step or not_validated


class _Log:
    """One JSON line an entry, TensorBoard beside it."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "log.jsonl"
        if self.path.exists():  # entries past the checkpoint will be written again
            kept = [e for e in _whole_entries(self.path) if not _comes_after(e, progress)]
            with written_aside(self.path) as aside:
                aside.write_text("".join(json.dumps(e) + "\n" for e in kept))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=progress.step + 1)

    def write(self, kind: str, progress: Progress, figures: dict[str, float]) -> None:
        where = {"step": progress.step, "epoch": progress.epoch}
        where["seconds"] = round(progress.train_seconds, 2)
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, **where, **figures}) + "\n")
        for name, value in figures.items():
            self._board.add_scalar(f"{kind}/{name}", value, progress.step)


def train(task: Task, settings: TrainingSettings, folder: Path, device: torch.device) -> None:
    """Train ``task.model`` for ``settings.num_epochs``, or what is left of them.

    Leaves in ``folder``: ``epoch-N.pt`` (keys ``model``, ``model_avg``, ``averaged_steps``),
    ``log.jsonl``, TensorBoard's files, and ``checkpoint.pt`` to resume from.

    Raises:
      RecipeError: more batches than ``max_bad_batches`` gave a loss that is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = task.model.to(device)
    optimizer = _optimizer(model, settings)
    total_seconds = task.epoch_seconds * settings.num_epochs
    schedule = _Schedule(optimizer, settings, total_seconds)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    progress = Progress()
    # Figures since the last log entry.
    sums: dict[str, float] = defaultdict(float)
    checkpoint_path = folder / "checkpoint.pt"
    if checkpoint_path.exists():
        saved = load_checkpoint(checkpoint_path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average = {name: value.to(device) for name, value in saved["model_avg"].items()}
        progress = Progress(**saved["progress"])
        sums.update(saved["sums"])
        logging.info(f"resumed at epoch {progress.epoch}, step {progress.step}")
    log = _Log(folder, progress)
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and has_bf16(device))
    num_parameters = sum(p.numel() for p in model.parameters())
    logging.info(
        f"{num_parameters / 1e6:.2f} M parameters, {settings.num_epochs} epochs, "
        f"{'bf16' if bf16 else 'float32'}"
    )

    def save() -> None:
        save_checkpoint(
            checkpoint_path,
            model=model.state_dict(),
            model_avg=average,
            optimizer=optimizer.state_dict(),
            progress=asdict(progress),
            sums=dict(sums),
        )

    started = last_saved = time.monotonic()
    speech_at_start, seconds_at_start = progress.speech_seconds, progress.train_seconds
    while progress.epoch <= settings.num_epochs:
        model.train()
        for batch, batch_seconds in task.batches(progress.epoch, progress.batch):
            progress.batch += 1
            progress.step += 1
            progress.speech_seconds += batch_seconds
            lr = schedule.set(progress)
            seed_everything(settings.seed, progress.step)
            warmup = progress.step / settings.warmup_steps
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, figures = task.loss(batch, progress.step, warmup)
            if not torch.isfinite(loss):
                progress.bad_batches += 1
                _report_bad_batch(task, batch, folder, progress, settings)
                continue
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if settings.grad_clip > 0:
                nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
            optimizer.step()
            if progress.step % settings.average_period == 0:
                _update_average(average, model, progress.step, settings.average_period)
            for name, value in figures.items():
                sums[name] += value
            now = time.monotonic()
            progress.train_seconds = seconds_at_start + now - started
            if progress.step % settings.log_every_steps == 0:
                weight = sums.pop("weight", 0.0) or 1.0
                means = {name: value / weight for name, value in sums.items()}
                sums.clear()
                log.write("train", progress, {**means, "lr": lr})
                rate = (progress.speech_seconds - speech_at_start) / (now - started)
                left = (total_seconds - progress.speech_seconds) / rate
                shown = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
                logging.info(
                    f"epoch {progress.epoch}/{settings.num_epochs}, step {progress.step}: {shown}, "
                    f"lr {lr:.2e}, {rate:.0f} x real time, {max(left, 0) / 60:.1f} min left"
                )
            if now - last_saved > settings.checkpoint_seconds:
                save()
                last_saved = now
        epoch = progress.epoch
        if epoch % settings.valid_every_epochs == 0 or epoch == settings.num_epochs:
            model.eval()
            with torch.no_grad():
                figures = task.validate()
            progress.train_seconds = seconds_at_start + time.monotonic() - started
            log.write("dev", progress, figures)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            logging.info(f"epoch {epoch}/{settings.num_epochs}, dev: {shown}")
        save_checkpoint(
            folder / f"epoch-{epoch}.pt",
            model=model.state_dict(),
            model_avg=average,
            averaged_steps=progress.step // settings.average_period * settings.average_period,
        )
        (folder / f"epoch-{epoch - settings.keep_epochs}.pt").unlink(missing_ok=True)
        progress.epoch, progress.batch = epoch + 1, 0
        save()
        last_saved = time.monotonic()


def _report_bad_batch(
    task: Task, batch: Any, folder: Path, progress: Progress, settings: TrainingSettings
) -> None:
    path = folder / f"bad-batch-{progress.step}.pt"
    with written_aside(path) as aside:
        # Plain tensors, lists and strings load with weights_only=True.
        torch.save(vars(batch) if is_dataclass(batch) else batch, aside)
    message = (
        f"{path}: the loss of step {progress.step} is not finite; batch saved there, "
        f"it holds {task.describe(batch)}"
    )
    if progress.bad_batches > settings.max_bad_batches:
        raise RecipeError(f"{message}; look at these utterances, or lower lr")
    logging.warning(message)
