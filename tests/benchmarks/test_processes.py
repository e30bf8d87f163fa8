"""Measurements in processes that take turns."""

import mmap
import os

import numpy as np
import pytest
import torch

from benchmarks.processes import alternating, peak_bytes, resident_bytes
from mvqkd.errors import RecipeError

MIB = 2**20


def test_results_of_each_round():
    assert alternating({"a": lambda: 1, "b": lambda: "two"}, 2) == {"a": [1, 1], "b": ["two"] * 2}


def test_a_job_that_fails_is_named_or_left_out():
    def raises():
        raise ValueError("no such thing")

    jobs = {"good": lambda: 1, "bad": raises, "dead": lambda: os._exit(1)}
    with pytest.raises(RecipeError, match=r"bad: .*no such thing"):
        alternating(jobs, 1)
    not_measured = {}
    assert alternating(jobs, 2, not_measured) == {"good": [1, 1]}
    assert "no such thing" in not_measured["bad"] and "ended early" in not_measured["dead"]


def _new_memory(num_bytes):
    """Of no heap, which may have as much left over from before."""
    pages = mmap.mmap(-1, num_bytes)
    np.frombuffer(pages, np.uint8)[:] = 1
    return pages


def test_peak_leaves_out_what_was_held_before():
    def job():
        library = _new_memory(64 * MIB)
        before = resident_bytes()
        model = _new_memory(32 * MIB)
        return peak_bytes(torch.device("cpu"), before), len(library) + len(model)

    ((peak, _),) = alternating({"job": job}, 1)["job"]
    assert 32 * MIB <= peak + MIB < 48 * MIB
