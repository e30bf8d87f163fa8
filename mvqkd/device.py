"""Which device to run on."""

from __future__ import annotations

import os
import platform

import torch

from mvqkd.errors import RecipeError


def pick_device(name: str) -> torch.device:
    """``auto`` (CUDA where it is, else the CPU), ``cpu`` or ``cuda``.

    Of several CUDA devices, each process that torchrun starts on a host takes the next.

    Raises:
      RecipeError: another name, or CUDA asked for where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"--device {name}: not known; give auto, cpu or cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise RecipeError("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    device = torch.device("cuda" if available and name != "cpu" else "cpu")
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Absent from older versions of torch, which then go the safe way.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def describe_device(device: torch.device) -> str:
    """What a result was computed on."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.get_num_threads()} of {os.cpu_count()} cores, {platform.machine()}"
