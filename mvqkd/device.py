"""Which device to run on."""

from __future__ import annotations

import torch

from mvqkd.errors import RecipeError


def pick_device(name: str) -> torch.device:
    """``auto`` (CUDA where it is, else the CPU), ``cpu`` or ``cuda``.

    Raises:
      RecipeError: another name, or CUDA asked for where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"--device {name}: not known; give auto, cpu or cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise RecipeError("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
