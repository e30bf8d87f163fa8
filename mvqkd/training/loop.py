"""The training loop of teachers and students, for one process or those that torchrun started.

A `Task` says what is trained and on what; the loop does the rest: optimizer and
schedule, running average of the weights, validation, logs, checkpoints, resume.

A step takes ``accumulate`` batches in each process. Its gradient is that of one batch
with the utterances of all of them.

Every random draw of step n comes from a generator seeded by (seed, n, process, batch
of the step), and the batches of an epoch from (seed, epoch). A run that was killed
therefore goes on exactly as if it had not been, from any checkpoint, without any
generator's state in it. All processes hold the same weights, averages and figures;
process 0 writes them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import random
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mvqkd.device import has_bf16
from mvqkd.errors import RecipeError
from mvqkd.files import written_aside
from mvqkd.processes import connected, gathered, is_main, num_processes, rank
from mvqkd.training.checkpoint import load_checkpoint, save_checkpoint
from mvqkd.training.log import Log
from mvqkd.training.memory import keep_freed_memory, named_if_too_large, scan
from mvqkd.training.optim import Eden, Eve, ScaledAdam
from mvqkd.training.progress import KEEP_EPOCHS, Progress


@dataclass
class TrainingSettings:
    """How long and how fast; the data's settings are elsewhere."""

    num_epochs: int = 30
    seed: int = 42
    # "auto" is bf16 (mixed: the weights stay float32) where the device has it in hardware.
    precision: Literal["float32", "bf16", "auto"] = "float32"
    # Batches of each process that make a step.
    accumulate: int = 1
    # "eve" with Eden's schedule, as published for the students; "scaled-adam" with Eden, as
    # published for Zipformer (lr 0.045, lr_batches 7500, lr_epochs 3.5, lr_warmup_steps 500);
    # "adamw" with a linear warm-up over warm_share of the run and a cosine down to 0.
    optimizer: Literal["eve", "scaled-adam", "adamw"] = "eve"
    lr: float = 0.003
    lr_batches: float = 5000
    lr_epochs: float = 6
    # Steps over which Eden's rate rises from half of itself.
    lr_warmup_steps: int = 0
    weight_decay: float = 0.01
    warm_share: float = 0.1
    grad_clip: float = 0.0
    # Steps over which the value `warmup` given to the task goes from 0 to 1.
    warmup_steps: int = 3000
    # The running average takes the weights every so many steps.
    average_period: int = 100
    # Epochs whose checkpoints are kept (for averaging when decoding); the last ones.
    keep_epochs: int = KEEP_EPOCHS
    # Beside these the checkpoint of every n-th epoch is kept (0: none).
    keep_every_epochs: int = 0
    # A checkpoint to resume from: after every epoch, and every so many seconds.
    checkpoint_seconds: float = 300
    # Checkpoints beside it, named by step, every so many steps (0: none); the last ones are kept.
    save_every_steps: int = 0
    keep_steps: int = 3
    valid_every_epochs: int = 1
    log_every_steps: int = 50
    # Batches with a loss that is not finite: saved, named, and one more stops the run.
    max_bad_batches: int = 0
    # Try the largest batches before the first step; "auto" does where the device is a GPU.
    scan_batches: Literal["auto", "always", "never"] = "auto"

    def __post_init__(self) -> None:
        for name in ("accumulate", "average_period", "keep_epochs", "keep_steps"):
            if getattr(self, name) < 1:
                raise RecipeError(f"training.{name}: {getattr(self, name)}; give at least 1")


class Task(Protocol):
    """What the loop trains. All its draws are from torch's, numpy's or Python's own generator."""

    model: nn.Module
    # Seconds of speech in an epoch, of all processes together.
    epoch_seconds: float

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Any, float]]:
        """(batch, its seconds of speech) of an epoch (from 1) in order, from batch ``start`` on.

        Of several processes each has its share, see `mvqkd.processes`.
        """
        ...

    def largest_batches(self) -> list[Any]:
        """Those that are likely to need most memory."""
        ...

    def loss(self, batch: Any, step: int, warmup: float) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss, summed over the batch, and figures to log: sums, "weight" divides them."""
        ...

    def divisor(self, batch: Any) -> float:
        """What this batch adds to the divisor of the step's loss; 0: sums are not divided."""
        ...

    def validate(self) -> dict[str, float]:
        """Figures of the dev set, the same in all processes."""
        ...

    def describe(self, batch: Any) -> str:
        """Names what is in a batch, for error messages."""
        ...


def seed_everything(seed: int, step: int, process: int = 0, batch: int = 0) -> None:
    """All draws of a step's batch come from here, whichever library makes them."""
    mixed = int(np.random.SeedSequence([seed, step, process, batch]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


class _Schedule:
    """Sets the learning rate of each step."""

    def __init__(self, optimizer, settings: TrainingSettings, total_seconds: float) -> None:
        self._optimizer, self._settings, self._total = optimizer, settings, total_seconds
        self._eden = None
        if settings.optimizer != "adamw":
            self._eden = Eden(
                optimizer, settings.lr_batches, settings.lr_epochs, settings.lr_warmup_steps
            )

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
    if settings.optimizer == "scaled-adam":
        return ScaledAdam(parameters, lr=settings.lr)
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98))


class _ReachAll(torch.autograd.Function):
    """``loss`` as it is; parameters that it does not depend on get a gradient of 0."""

    @staticmethod
    def forward(ctx, loss: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grad, *(p.new_zeros(()).expand_as(p) for p in ctx.saved_tensors)


class _Loss(nn.Module):
    """A task's loss as the forward of a module, which DistributedDataParallel asks for."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._task = task

    def forward(self, batch: Any, step: int, warmup: float) -> tuple[torch.Tensor, dict]:
        parameters = [p for p in self.parameters() if p.requires_grad]
        if batch is None:
            # Gradients of 0, from the last parameter to the first.
            loss = torch.zeros(())
            for p in parameters:
                loss = _ReachAll.apply(loss, p)
            return loss, {}
        loss, figures = self._task.loss(batch, step, warmup)
        if num_processes() > 1:
            # What a step leaves out (the pruned loss while its weight is 0, a dropped layer) would
            # otherwise keep the others waiting, or take a search for it in every step.
            loss = _ReachAll.apply(loss, *parameters)
        return loss, figures


def _exchanging_gradients(module: _Loss, device: torch.device) -> DistributedDataParallel:
    # Of the smallest convolution, whose gradient comes in another order of memory.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        # torch 2.13 has another name for it, which older ones do not know. No buffer changes.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        exchanging = DistributedDataParallel(module, broadcast_buffers=False)
    if device.type == "cpu":
        # After its first backward a process lays the gradients out anew, in the order in which
        # they came; and where one lies says in which order gloo adds those of three or more
        # processes. Done before the first step, the layout is that of a run that resumes as well.
        exchanging(None, 0, 0.0)[0].backward()
    return exchanging


def _fill_gradients(model: nn.Module) -> None:
    """Give a gradient of 0 to parameters that a step left out, as `_ReachAll` does with several
    processes and ``0.0 * loss`` in the published recipe: the optimizer counts the step for them."""
    for p in model.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)


@torch.no_grad()
def _update_average(average: dict, model: nn.Module, step: int, period: int) -> None:
    """The mean of the weights at steps period, 2 * period, ..."""
    weight = period / step
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, weight)
        else:
            average[name].copy_(value)


def _steps(
    task: Task, batches: Iterable[tuple[Any, float]], size: int
) -> Iterator[tuple[list[Any], list[float], float]]:
    """(batches of this process, seconds of speech and divisor of all processes) of each step."""
    batches = iter(batches)
    while True:
        own = list(itertools.islice(batches, size))
        everyone = gathered([(seconds, task.divisor(batch)) for batch, seconds in own])
        # One that has no batch left ends the epoch for all.
        number = min(map(len, everyone))
        if number == 0:
            return
        taken = [pair for pairs in everyone for pair in pairs[:number]]
        seconds, divisors = zip(*taken)
        yield [batch for batch, _ in own[:number]], list(seconds), sum(divisors)


def train(task: Task, settings: TrainingSettings, folder: Path, device: torch.device) -> None:
    """Train ``task.model`` for ``settings.num_epochs``, or what is left of them.

    Leaves in ``folder``: ``epoch-N.pt`` and ``checkpoint-STEP.pt`` (keys ``model``, ``model_avg``,
    ``averaged_steps``, and all that it takes to go on), ``log.jsonl``, TensorBoard's files, and
    ``checkpoint.pt`` to resume from. To go on from another one, copy it to ``checkpoint.pt``.

    Raises:
      RecipeError: more batches than ``max_bad_batches`` gave a loss that is not finite, or one
        does not fit into memory.
    """
    with connected(device):
        _train(task, settings, folder, device)


def _train(task: Task, settings: TrainingSettings, folder: Path, device: torch.device) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if device.type == "cpu":
        keep_freed_memory()
    model = task.model.to(device)
    optimizer = _optimizer(model, settings)
    total_seconds = task.epoch_seconds * settings.num_epochs
    schedule = _Schedule(optimizer, settings, total_seconds)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    progress = Progress(num_processes=num_processes())
    # Figures since the last log entry.
    sums: dict[str, float] = defaultdict(float)
    checkpoint_path = folder / "checkpoint.pt"
    if checkpoint_path.exists():
        saved = load_checkpoint(checkpoint_path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average = {name: value.to(device) for name, value in saved["model_avg"].items()}
        progress = _shared_out(Progress(**saved["progress"]))
        sums.update(saved["sums"])
    if len(set(gathered(progress.step))) > 1:
        raise RecipeError(
            f"{folder}: not all hosts find the same checkpoint there; put it where all see it"
        )
    log = None
    if is_main():
        log = Log(folder, progress)
        if progress.step > 0:
            logging.info(f"resumed at epoch {progress.epoch}, step {progress.step}")
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and has_bf16(device))
    num_parameters = sum(p.numel() for p in model.parameters())
    _say(
        f"{num_parameters / 1e6:.2f} M parameters, {settings.num_epochs} epochs, "
        f"{'bf16' if bf16 else 'float32'}"
        + (f", {num_processes()} processes" if num_processes() > 1 else "")
    )

    def loss_of(batch: Any, warmup: float, compute=task.loss) -> tuple[torch.Tensor, dict]:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return compute(batch, progress.step, warmup)

    def save(path: Path) -> None:
        if is_main():
            save_checkpoint(
                path,
                model=model.state_dict(),
                model_avg=average,
                averaged_steps=progress.step // settings.average_period * settings.average_period,
                optimizer=optimizer.state_dict(),
                progress=asdict(progress),
                sums=dict(sums),
            )

    on_gpu = device.type == "cuda"
    if settings.scan_batches == "always" or (settings.scan_batches == "auto" and on_gpu):
        model.train()
        # Past any warm-up, when all losses count.
        scan(model, task.largest_batches(), lambda b: loss_of(b, 3.0)[0], task.describe, device)
    module: nn.Module = _Loss(task)
    if num_processes() > 1:
        module = _exchanging_gradients(module, device)

    def accumulate_gradients(
        own: list[Any], divisor: float, warmup: float
    ) -> tuple[list[dict[str, float]], list[str]]:
        """Figures of the batches of all processes, or what is wrong with some of them."""
        found: list[dict[str, float]] = []
        for index, batch in enumerate(own):
            seed_everything(settings.seed, progress.step, rank(), index)
            exchanging = index == len(own) - 1 or num_processes() == 1
            with named_if_too_large(task.describe(batch)), contextlib.ExitStack() as stack:
                if not exchanging:
                    stack.enter_context(module.no_sync())
                loss, figures = loss_of(batch, warmup, module)
                problem = None
                if not torch.isfinite(loss):
                    problem = _save_bad_batch(task, batch, folder, progress.step, index)
                # Agreed on before a backward, in which the processes wait for each other.
                everyone = gathered((figures, problem))
                if problems := [problem for _, problem in everyone if problem is not None]:
                    return [], problems
                found += [figures for figures, _ in everyone]
                if divisor > 0:
                    loss = loss / divisor
                if num_processes() > 1:  # the exchange takes the mean, a step the sum
                    loss = loss * num_processes()
                loss.backward()
        return found, []

    started = last_saved = time.monotonic()
    speech_at_start, seconds_at_start = progress.speech_seconds, progress.train_seconds
    while progress.epoch <= settings.num_epochs:
        model.train()
        batches = task.batches(progress.epoch, progress.batch)
        for own, seconds, divisor in _steps(task, batches, settings.accumulate):
            progress.batch += len(own)
            progress.step += 1
            for batch_seconds in seconds:
                progress.speech_seconds += batch_seconds
            lr = schedule.set(progress)
            warmup = progress.step / settings.warmup_steps
            optimizer.zero_grad(set_to_none=True)
            found, problems = accumulate_gradients(own, divisor, warmup)
            if problems:
                # A left-out step is one all the same to the average, the log and the checkpoints.
                _count_bad_batches(problems, progress, settings)
            else:
                _fill_gradients(model)
                if settings.grad_clip > 0:
                    nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
                optimizer.step()
            if progress.step % settings.average_period == 0:
                _update_average(average, model, progress.step, settings.average_period)
            for figures in found:
                for name, value in figures.items():
                    sums[name] += value
            now = time.monotonic()
            progress.train_seconds = seconds_at_start + now - started
            if progress.step % settings.log_every_steps == 0 and sums:
                weight = sums.pop("weight", 0.0) or 1.0
                means = {name: value / weight for name, value in sums.items()}
                sums.clear()
                if log is not None:
                    log.write("train", progress, {**means, "lr": lr})
                rate = (progress.speech_seconds - speech_at_start) / (now - started)
                left = (total_seconds - progress.speech_seconds) / rate
                _say(
                    f"epoch {progress.epoch}/{settings.num_epochs}, step {progress.step}: "
                    f"{_shown(means)}, lr {lr:.2e}, {rate:.0f} x real time, "
                    f"{max(left, 0) / 60:.1f} min left"
                )
            if settings.save_every_steps and progress.step % settings.save_every_steps == 0:
                save(folder / f"checkpoint-{progress.step}.pt")
                outdated = progress.step - settings.save_every_steps * settings.keep_steps
                _remove(folder / f"checkpoint-{outdated}.pt")
            if now - last_saved > settings.checkpoint_seconds:
                save(checkpoint_path)
                last_saved = now
        epoch = progress.epoch
        if epoch % settings.valid_every_epochs == 0 or epoch == settings.num_epochs:
            begun = time.monotonic()
            model.eval()
            with torch.no_grad():
                figures = task.validate()
            progress.train_seconds = seconds_at_start + time.monotonic() - started
            if log is not None:
                log.write("dev", progress, figures, time.monotonic() - begun)
            _say(f"epoch {epoch}/{settings.num_epochs}, dev: {_shown(figures)}")
        progress.epoch, progress.batch = epoch + 1, 0
        save(folder / f"epoch-{epoch}.pt")
        outdated = epoch - settings.keep_epochs
        if settings.keep_every_epochs == 0 or outdated % settings.keep_every_epochs > 0:
            _remove(folder / f"epoch-{outdated}.pt")
        save(checkpoint_path)
        last_saved = time.monotonic()


def _say(message: str) -> None:
    if is_main():
        logging.info(message)


def _shown(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


def _remove(path: Path) -> None:
    if is_main():
        path.unlink(missing_ok=True)


def _shared_out(progress: Progress) -> Progress:
    """``progress`` for as many processes as there are now; exact where there were as many."""
    before, now = progress.num_processes, num_processes()
    if before != now:
        _say(f"the checkpoint is of {before} processes, now {now}: the data order changes")
        progress.batch = progress.batch * before // now
        progress.num_processes = now
    return progress


def _save_bad_batch(task: Task, batch: Any, folder: Path, step: int, index: int) -> str:
    """Save what gave a loss that is not finite; what to say of it."""
    where = "".join(f"-{number}" for number in (rank(), index)) if rank() or index else ""
    path = folder / f"bad-batch-{step}{where}.pt"
    with written_aside(path) as aside:
        # Plain tensors, lists and strings load with weights_only=True.
        torch.save(vars(batch) if is_dataclass(batch) else batch, aside)
    return (
        f"{path}: the loss of step {step} is not finite; batch saved there, "
        f"it holds {task.describe(batch)}"
    )


def _count_bad_batches(problems: list[str], progress: Progress, settings: TrainingSettings) -> None:
    progress.bad_batches += len(problems)
    if progress.bad_batches > settings.max_bad_batches:
        raise RecipeError(f"{problems[0]}; look at these utterances, or lower lr")
    if is_main():
        for problem in problems:
            logging.warning(problem)
