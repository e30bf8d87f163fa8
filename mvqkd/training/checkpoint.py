"""Checkpoints: plain tensors and numbers, loaded with ``weights_only=True``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mvqkd.errors import RecipeError
from mvqkd.files import require, written_aside


def save_checkpoint(path: Path, **entries: Any) -> None:
    """Write ``entries`` aside and rename: a file that exists is whole."""
    with written_aside(path) as aside:
        torch.save(entries, aside)


_GOES_ON = "remove it, and the stage goes on from the one before it or starts anew"


def load_checkpoint(path: Path, remedy: str = _GOES_ON) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
      RecipeError: the file is missing, cut short, or no checkpoint; damaged ones with ``remedy``.
    """
    require(path, "run the stage that makes it")
    try:
        entries = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler and zip reader do
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        if isinstance(error, OSError):  # says nothing of the file
            reason = "cut short"
        raise RecipeError(f"{path}: cannot be read as a checkpoint ({reason}); {remedy}") from error
    if not isinstance(entries, dict) or "model" not in entries:
        raise RecipeError(f"{path}: not a checkpoint of this recipe; remove it")
    return entries


def averaged_weights(folder: Path, epoch: int, avg: int) -> dict[str, torch.Tensor]:
    """Mean of the weights over the last ``avg`` epochs up to ``epoch``.

    ``model_avg`` of epoch e is the mean over the first ``averaged_steps`` steps, so
    the mean over the epochs (epoch - avg, epoch] is the difference of two of them,
    weighted by their steps; ``avg`` >= ``epoch`` is the whole run. ``avg`` 0 takes
    the last weights as they are, and so do epochs too short for the average.

    Raises:
      RecipeError: a checkpoint is missing or damaged.
    """
    remedy = f"remove {folder} and train again, or decode another epoch"
    last = load_checkpoint(folder / f"epoch-{epoch}.pt", remedy)
    end, begin, first = last["averaged_steps"], 0, None
    if 0 < avg < epoch:
        first = load_checkpoint(folder / f"epoch-{epoch - avg}.pt", remedy)
        begin = first["averaged_steps"]
    if avg == 0 or begin == end:
        return last["model"]
    if first is None or begin == 0:
        return last["model_avg"]
    return mean_between(first["model_avg"], begin, last["model_avg"], end)


def mean_between(
    first: dict[str, torch.Tensor], begin: int, last: dict[str, torch.Tensor], end: int
) -> dict[str, torch.Tensor]:
    """Mean of the weights over the steps (begin, end], of the means ``first`` over ``begin`` steps
    and ``last`` over ``end``; what is no float is taken from ``last``."""
    mean = {}
    for name, value in last.items():
        if value.is_floating_point():
            total = value.double() * end - first[name].double() * begin
            mean[name] = (total / (end - begin)).to(value.dtype)
        else:
            mean[name] = value
    return mean
