"""The processes of one training run: one, or those that torchrun started.

torchrun tells each process in its environment which of how many it is (``RANK``,
``WORLD_SIZE``, ``LOCAL_RANK``); without them there is one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from mvqkd.errors import RecipeError

T = TypeVar("T")

# How long one waits for the others. That the main process clusters hours of speech, or the last
# shard of labels is on its way, is no failure; one that has ended is noticed without it.
_TIMEOUT = timedelta(hours=12)

PEER_LOST = "another process of this run has ended; its message says why"


def rank() -> int:
    """Which process this is, from 0."""
    return int(os.environ.get("RANK", 0))


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the process that writes files and logs."""
    return rank() == 0


@contextlib.contextmanager
def connected(device: torch.device) -> Iterator[None]:
    """Inside, the processes can exchange tensors on ``device`` and objects; all leave at once.

    Within another one it does nothing.
    """
    if num_processes() == 1 or distributed.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=_TIMEOUT)
    # One that ended at once would leave the others waiting to be connected.
    gathered(None)
    yield
    # Not after an error: the others may wait in an exchange that will not come about.
    gathered(None)  # what the main process writes last is there for all
    distributed.destroy_process_group()


def gathered(value: T) -> list[T]:
    """The ``value`` of each process, in the order of their ranks.

    Raises:
      RecipeError: one of them has ended.
    """
    if num_processes() == 1:
        return [value]
    values: list = [None] * num_processes()
    try:
        distributed.all_gather_object(values, value)
    except RuntimeError as error:
        raise RecipeError(PEER_LOST) from error
    return values
