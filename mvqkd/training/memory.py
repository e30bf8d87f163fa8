"""Memory of a training: kept from step to step; batches that do not fit into it, found before the
first step, or named when they are met."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mvqkd.errors import RecipeError

# What comes on top of weights, gradients and activations: Adam's two moments, and the buffers
# in which several processes exchange gradients.
MORE_COPIES = 3

# glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Have the C library keep for the next step what a step on a CPU frees.

    glibc gives free memory at the end of its heap back to the system, after each backward pass most
    of what activations took, and the next step gets it again page by page: a student of 12 layers
    of 512 and 60 s of speech 260,000 of them, which take 7% of a step's processor time. Other C
    libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    # The largest there is: from it on, each tensor has pages of its own.
    mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)


@contextlib.contextmanager
def named_if_too_large(name: str) -> Iterator[None]:
    """
    Raises:
      RecipeError: what runs inside finds no memory left; ``name`` says for which batch.
    """
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        on_cpu = "can't allocate memory" in message
        if not on_cpu and not isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        # Its frames hold the tensors that fill the memory.
        error.__traceback__ = None
    else:
        return
    raise RecipeError(f"{name}: this batch does not fit into memory; lower max_duration")


def scan(
    model: nn.Module,
    batches: list[Any],
    loss: Callable[[Any], torch.Tensor],
    describe: Callable[[Any], str],
    device: torch.device,
) -> None:
    """Forward and backward of ``batches``, the largest ones, beside what training will hold.

    Changes nothing but gradients, which it clears.

    Raises:
      RecipeError: one of them does not fit.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    with named_if_too_large("training state"):
        held = [torch.empty_like(p) for p in trained for _ in range(MORE_COPIES)]
    for batch in batches:
        with named_if_too_large(describe(batch)):
            loss(batch).backward()
        model.zero_grad(set_to_none=True)
    del held
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[1]
        logging.info(f"largest batches take {peak / 2**30:.1f} of {total / 2**30:.1f} GiB")
        torch.cuda.empty_cache()
