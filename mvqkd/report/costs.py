"""What steps of the recipe would cost, from rates that were measured somewhere."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from mvqkd.errors import RecipeError
from mvqkd.experiments.plan import read_plan
from mvqkd.report.table import NOT_MEASURED, format_bytes, format_seconds
from mvqkd.training.progress import KEEP_EPOCHS

# How the steps begin that are run side by side.
_SIDE_BY_SIDE = "student-"


@dataclass
class StepCost:
    """Of one step; None where it was not measured."""

    # Of which speech the amounts per hour are; "part": of the one that the step's name ends with.
    speech: Literal["corpus", "train", "test", "part", "none"] = "none"
    # On top of what does not depend on the speech; of training, per epoch.
    seconds_per_hour: float | None = None
    seconds: float | None = None
    bytes_per_hour: float | None = None
    bytes: float | None = None
    # Of what it fetches and unpacks, on top of these; nothing where --dl_dir names a copy.
    download_bytes: float = 0.0
    download_bytes_per_hour: float = 0.0
    # Of training: what an epoch takes beside its steps, and a checkpoint.
    seconds_per_epoch: float = 0.0
    checkpoint_bytes: float | None = None
    # GB of the host or, on a GPU, of the GPU; at its highest.
    memory: float | None = None
    epochs: bool = False


@dataclass
class CostSettings:
    """Rates and the amounts that they are multiplied by."""

    # The device and the run that the rates were measured in, in words.
    measured: str = "nowhere"
    # What the times and memory of steps that take a device (--device) are of.
    device: Literal["cpu", "cuda"] = "cpu"
    # Hours of speech: all ("corpus"), the training set at all speeds ("train"), the test sets
    # ("test"), and parts that may be learned from without transcripts, by their names.
    speech: dict[str, float] = field(default_factory=dict)
    # By the name of a step, or how it begins up to a dash: student, labels, student-streaming.
    steps: dict[str, StepCost] = field(default_factory=dict)


# Which teacher a call takes: the recipe's own, the same trained anew, or another.
Teacher = Literal["own", "made", "other"]
_RATES_OF_OWN: dict[Teacher, tuple[str, ...]] = {
    "own": (),
    "made": ("teacher",),
    "other": ("teacher", "verify-teacher", "embeddings", "labels", "more-labels"),
}


def with_teacher(settings: CostSettings, teacher: Teacher) -> CostSettings:
    """Without the rates that say nothing of this teacher."""
    gone = _RATES_OF_OWN[teacher]
    return replace(
        settings,
        steps={
            key: rates
            for key, rates in settings.steps.items()
            if not any(key == step or key.startswith(f"{step}-") for step in gone)
        },
    )


@dataclass(frozen=True)
class Cost:
    """Of one step in full; None where it was not measured."""

    seconds: float | None
    bytes: float | None
    memory: float | None
    # That it keeps busy; 0 where it runs on the CPU.
    gpus: int = 0

    @property
    def gpu_hours(self) -> float | None:
        if self.gpus == 0:
            return 0.0
        return None if self.seconds is None else self.seconds / 3600 * self.gpus


@dataclass(frozen=True)
class TrainingAmounts:
    """What a training's costs are multiplied by."""

    epochs: int
    # Of the training set's speech.
    share: float
    # At most, with the one to go on from.
    checkpoints: int


def training_amounts(command: Sequence[str]) -> TrainingAmounts:
    """What the last of a training's conf files says of each.

    Raises:
      RecipeError: none of them says how many epochs, or one what is no number.
    """
    training: dict[str, Any] = {}
    share = 1.0
    for option, path in itertools.pairwise(command):
        if option == "--config":
            conf = yaml.safe_load(Path(path).read_text()) or {}
            training |= conf.get("training") or {}
            share = conf.get("transcribed_share", share)
    if "num_epochs" not in training:
        raise RecipeError(f"{' '.join(command)}: no conf has training.num_epochs; add it")
    try:
        epochs = int(training["num_epochs"])
        kept = min(epochs, int(training.get("keep_epochs", KEEP_EPOCHS)))
        every = int(training.get("keep_every_epochs", 0))
        share = float(share)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"{' '.join(command)}: num_epochs, keep_epochs, keep_every_epochs or transcribed_share "
            f"of a conf is no number ({error}); mend it"
        ) from error
    kept += (epochs - kept) // every if every else 0
    return TrainingAmounts(epochs, share, kept + 1)


def gpus_of(command: Sequence[str]) -> int:
    """That a step keeps busy where there are some: 0 of one that takes no device."""
    if "--device" not in command:
        return 0
    processes = [n for option, n in itertools.pairwise(command) if option == "--nproc-per-node"]
    return int(processes[0]) if processes else 1


def cost_of(name: str, command: Sequence[str], settings: CostSettings, device: str = "cpu") -> Cost:
    """
    Args:
      name: of the step, as its stamp has it.
      command: its words.
      device: cpu or cuda, where it would run; what was measured on the other says nothing of it.
    """
    gpus = gpus_of(command) if device == "cuda" else 0
    fits = [key for key in settings.steps if name == key or name.startswith(f"{key}-")]
    if not fits:
        return Cost(None, None, None, gpus)
    rates = settings.steps[max(fits, key=len)]
    hours = _hours(name, rates, settings)
    training = training_amounts(command) if rates.epochs else TrainingAmounts(1, 1.0, 0)

    def amount(fixed: float | None, per_hour: float | None, times: float) -> float | None:
        if (fixed is None and per_hour is None) or (per_hour is not None and hours is None):
            return None
        return (fixed or 0.0) + (per_hour or 0.0) * (hours or 0.0) * times

    num_bytes = amount(rates.bytes, rates.bytes_per_hour, 1)
    if "--dl_dir" not in command and hours is not None:
        fetched = rates.download_bytes + rates.download_bytes_per_hour * hours
        num_bytes = (num_bytes or 0.0) + fetched if fetched else num_bytes
    if rates.checkpoint_bytes is not None:
        num_bytes = (num_bytes or 0.0) + rates.checkpoint_bytes * training.checkpoints
    if "--device" in command and device != settings.device:
        return Cost(None, num_bytes, None, gpus)
    seconds = amount(rates.seconds, rates.seconds_per_hour, training.epochs * training.share)
    if seconds is not None:
        seconds += rates.seconds_per_epoch * training.epochs
    return Cost(seconds, num_bytes, rates.memory, gpus)


def _hours(name: str, rates: StepCost, settings: CostSettings) -> float | None:
    if rates.speech == "none":
        return 0.0
    if rates.speech == "part":
        return next((h for part, h in settings.speech.items() if name.endswith(f"-{part}")), None)
    return settings.speech.get(rates.speech)


def plan_text(plan: str, settings: CostSettings, num_jobs: int = 1, device: str = "cpu") -> str:
    """Each command with its cost in a comment before it, and the sum.

    Args:
      plan: as `mvqkd.experiments.plan.read_plan` takes it.
      num_jobs: students that are trained side by side.
      device: cpu or cuda, where the steps would run that take a device.
    """
    lines: list[str] = []
    costs: list[Cost] = []
    students: list[Cost] = []
    for step in read_plan(plan):
        if step.done:
            lines.append(f"# {step.name}: done already")
            continue
        cost = cost_of(step.name, step.words, settings, device)
        (students if step.name.startswith(_SIDE_BY_SIDE) else costs).append(cost)
        lines += [f"# {step.name}: {_in_words(cost, device)}", step.command]
    one_by_one = _sum([cost.seconds for cost in costs])
    side_by_side = _side_by_side([cost.seconds for cost in students], num_jobs)
    memories = sorted(cost.memory for cost in students if cost.memory is not None)
    memories = [sum(memories[-num_jobs:])] if memories else []
    memories += [cost.memory for cost in costs if cost.memory is not None]
    costs += students
    total = _amounts_in_words(
        _sum([one_by_one, side_by_side]),
        _sum([cost.bytes for cost in costs]),
        max(memories, default=None),
    )
    if device == "cuda":
        total += f", GPU-hours {_gpu_hours(_sum([cost.gpu_hours for cost in costs if cost.gpus]))}"
    if len(students) > 1 and num_jobs > 1:
        total += f"; {min(num_jobs, len(students))} students at once"
    lines.append(f"# {len(costs)} steps to do: {total}")
    measures = [("time", "seconds"), ("disk", "bytes"), ("memory", "memory")]
    measures += [("GPU-hours", "gpu_hours")] if device == "cuda" else []
    for what, key in measures:
        unknown = sum(getattr(cost, key) is None for cost in costs)
        if unknown:
            lines.append(f"# {what} of {unknown} of these: {NOT_MEASURED}, and not in the sum")
    lines.append(f"# rates: {settings.measured}")
    return "\n".join(lines) + "\n"


def _side_by_side(seconds: Sequence[float | None], num_jobs: int) -> float | None:
    """Of steps that begin in turn, each as soon as one of ``num_jobs`` before it has ended."""
    known = [one for one in seconds if one is not None]
    ends = [0.0] * num_jobs
    for one in known:
        heapq.heapreplace(ends, ends[0] + one)
    return max(ends) if known else None


def _sum(amounts: Sequence[float | None]) -> float | None:
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if known else None


def _gpu_hours(hours: float | None) -> str:
    return NOT_MEASURED if hours is None else f"{hours:.1f}"


def _amounts_in_words(seconds: float | None, num_bytes: float | None, memory: float | None) -> str:
    time = NOT_MEASURED if seconds is None else format_seconds(seconds)
    disk = NOT_MEASURED if num_bytes is None else format_bytes(num_bytes)
    gigabytes = NOT_MEASURED if memory is None else f"{memory:.1f} GB"
    return f"time {time}, disk {disk}, memory {gigabytes}"


def _in_words(cost: Cost, device: str) -> str:
    text = _amounts_in_words(cost.seconds, cost.bytes, cost.memory)
    if device == "cuda" and cost.gpus:
        text += f", GPU-hours {_gpu_hours(cost.gpu_hours)}"
    return text
