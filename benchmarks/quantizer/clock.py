"""Timing on a machine that others may use too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Seconds:
    """Of one call: on the wall, and of processor time over all threads of this process."""

    wall: float
    cpu: float


def fastest(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu"
) -> dict[str, Seconds]:
    """Each call's least times over ``repeats`` turns.

    The calls take turns, so that what else the machine does meets all of them; the least time is
    the one that it disturbed least. Each is called once before, for compilation and caches.
    """
    least = {name: Seconds(float("inf"), float("inf")) for name in calls}
    for turn in range(-1, repeats):
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn >= 0:
                least[name] = Seconds(min(wall, least[name].wall), min(cpu, least[name].cpu))
    return least
