"""Which device to run on."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from typing import Literal

import torch

from mvqkd.errors import RecipeError


def pick_device(name: str) -> torch.device:
    """``auto`` (CUDA where it is, else the CPU), ``cpu`` or ``cuda``.

    Of several processes that torchrun started on a host, each has its own CUDA device.

    Raises:
      RecipeError: another name, or CUDA asked for where there is none, or not enough of it.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"--device {name}: not known; give auto, cpu or cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise RecipeError("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    if not available or name == "cpu":
        return torch.device("cpu")
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None:
        return torch.device("cuda")
    if int(local_rank) >= torch.cuda.device_count():
        raise RecipeError(
            f"--num-gpus: process {local_rank} of this host finds no device of its own among "
            f"{torch.cuda.device_count()}; ask for as many as there are"
        )
    torch.cuda.set_device(int(local_rank))
    return torch.device("cuda", int(local_rank))


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Absent from older versions of torch, which then go the safe way.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


Precision = Literal["auto", "float32", "bf16"]


def matrix_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """What a teacher's matrices are multiplied in.

    ``auto`` is bfloat16 on a CUDA device that has it, and float32 on every CPU: which kind of CPU
    a teacher ran on should not show in its labels.
    """
    on_gpu = precision == "auto" and device.type == "cuda" and has_bf16(device)
    return torch.bfloat16 if on_gpu or precision == "bf16" else torch.float32


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Within, what is computed in float32 on a GPU is of float32: neither matrix products nor
    convolutions, which cuDNN is otherwise free to, round their factors to TF32 (10 bits)."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def describe_device(device: torch.device) -> str:
    """What a result was computed on."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.get_num_threads()} of {os.cpu_count()} cores, {platform.machine()}"
