"""What steps of the recipe would cost, from rates that were measured somewhere."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from mvqkd.errors import RecipeError
from mvqkd.report.table import NOT_MEASURED, format_bytes, format_seconds


@dataclass
class StepCost:
    """Of one step; None where it was not measured."""

    # Of which speech the amounts per hour are.
    speech: Literal["corpus", "train", "test", "none"] = "none"
    # On top of what does not depend on the speech; of training, per epoch.
    seconds_per_hour: float | None = None
    seconds: float | None = None
    bytes_per_hour: float | None = None
    bytes: float | None = None
    # GB of the host or, on a GPU, of the GPU; at its highest.
    memory: float | None = None
    epochs: bool = False


@dataclass
class CostSettings:
    """Rates and the amounts that they are multiplied by."""

    # The device and the run that the rates were measured in, in words.
    measured: str = "nowhere"
    # Hours of speech: all, the training set at all speeds, the test sets.
    speech: dict[str, float] = field(default_factory=dict)
    # By the name of a step, or how it begins up to a dash: student, labels, student-streaming.
    steps: dict[str, StepCost] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """Of one step in full."""

    seconds: float | None
    bytes: float | None
    memory: float | None


def epochs_of(command: Sequence[str]) -> int:
    """Of a training: what the last of its conf files says.

    Raises:
      RecipeError: none of them says it.
    """
    epochs = None
    for option, path in itertools.pairwise(command):
        if option == "--config":
            training = (yaml.safe_load(Path(path).read_text()) or {}).get("training") or {}
            epochs = training.get("num_epochs", epochs)
    if epochs is None:
        raise RecipeError(f"{' '.join(command)}: no conf has training.num_epochs; add it")
    return epochs


def cost_of(name: str, command: Sequence[str], settings: CostSettings) -> Cost:
    """
    Args:
      name: of the step, as its stamp has it.
      command: its words.
    """
    fits = [key for key in settings.steps if name == key or name.startswith(f"{key}-")]
    if not fits:
        return Cost(None, None, None)
    rates = settings.steps[max(fits, key=len)]
    hours = 0.0 if rates.speech == "none" else settings.speech.get(rates.speech)
    epochs = epochs_of(command) if rates.epochs else 1

    def amount(fixed: float | None, per_hour: float | None, times: int) -> float | None:
        if (fixed is None and per_hour is None) or (per_hour is not None and hours is None):
            return None
        return (fixed or 0.0) + (per_hour or 0.0) * (hours or 0.0) * times

    return Cost(
        amount(rates.seconds, rates.seconds_per_hour, epochs),
        amount(rates.bytes, rates.bytes_per_hour, 1),
        rates.memory,
    )


def plan_text(plan: str, settings: CostSettings) -> str:
    """Each command with its cost in a comment before it, and the sum.

    Args:
      plan: lines of a step's name, ``todo`` or ``done``, and its command as a shell quotes it.
    """
    lines: list[str] = []
    costs: list[Cost] = []
    for entry in plan.splitlines():
        name, state, command = entry.split(" ", 2)
        if state == "done":
            lines.append(f"# {name}: done already")
            continue
        cost = cost_of(name, shlex.split(command), settings)
        costs.append(cost)
        lines += [f"# {name}: {_in_words(cost)}", command.strip()]
    total = Cost(*(_sum([getattr(c, what) for c in costs]) for what in ("seconds", "bytes")), None)
    memory = max((cost.memory for cost in costs if cost.memory is not None), default=None)
    lines.append(
        f"# {len(costs)} steps to do: {_in_words(Cost(total.seconds, total.bytes, memory))}"
    )
    for what, key in (("time", "seconds"), ("disk", "bytes"), ("memory", "memory")):
        unknown = sum(getattr(cost, key) is None for cost in costs)
        if unknown:
            lines.append(f"# {what} of {unknown} of these: {NOT_MEASURED}, and not in the sum")
    lines.append(f"# rates: {settings.measured}")
    return "\n".join(lines) + "\n"


def _sum(amounts: Sequence[float | None]) -> float | None:
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if known else None


def _in_words(cost: Cost) -> str:
    time = NOT_MEASURED if cost.seconds is None else format_seconds(cost.seconds)
    disk = NOT_MEASURED if cost.bytes is None else format_bytes(cost.bytes)
    memory = NOT_MEASURED if cost.memory is None else f"{cost.memory:.1f} GB"
    return f"time {time}, disk {disk}, memory {memory}"
