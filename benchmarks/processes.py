"""Measurements in processes that take turns: what else a machine does meets all alike."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from mvqkd.errors import RecipeError, reason_of

T = TypeVar("T")


def alternating(
    jobs: Mapping[str, Callable[[], T]], rounds: int, not_measured: dict[str, str] | None = None
) -> dict[str, list[T]]:
    """What each job returns in ``rounds`` rounds of all of them, each time in a new process.

    Args:
      not_measured: a job that raises is left out from then on, and why is noted here; without it,
        that ends all.

    Raises:
      RecipeError: a process has ended early, or its job has raised.
    """
    # Forked, a process need not import torch again; this one never touches the GPU.
    context = multiprocessing.get_context("fork")
    found: dict[str, list[T]] = {name: [] for name in jobs}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name, job in jobs.items():
            if name in failed:
                continue
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send_result, args=(job, sender.send))
            process.start()
            sender.close()
            try:
                result, reason = receiver.recv()
            except EOFError:
                result, reason = None, "its process ended early; see above"
            process.join()
            if reason is None:
                found[name].append(result)
            elif not_measured is None:
                raise RecipeError(f"{name}: {reason}")
            else:
                failed[name] = reason
    if not_measured is not None:
        not_measured |= failed
    return {name: results for name, results in found.items() if name not in failed}


def _send_result(job: Callable[[], T], send: Callable) -> None:
    try:
        answer = job(), None
    except Exception as error:
        answer = None, str(error) if isinstance(error, RecipeError) else reason_of(error)
    send(answer)


def resident_bytes() -> int:
    """What this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_bytes(device: torch.device, resident_before: int) -> int:
    """The most that this process has held: of torch's allocator on a GPU, else resident.

    Args:
      resident_before: what `resident_bytes` gave before that which is measured was made, libraries
        for the most part; it does not count.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident_before
