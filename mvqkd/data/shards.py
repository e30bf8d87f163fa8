"""Work over a manifest in shards: the unit of work and of resume.

A shard's arrays are in ``<number>.h5`` and its cuts in ``<number>.jsonl.gz``, both
written aside and renamed, the cuts last: a shard whose cuts exist is done.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path

import h5py
import numpy as np
from lhotse import CutSet

from mvqkd.files import written_aside


class ArrayFile:
    """Arrays of one shard, by key, as lhotse's ``numpy_hdf5`` storage reads them."""

    STORAGE_TYPE = "numpy_hdf5"

    def __init__(self, aside: Path, final: Path) -> None:
        self._file = h5py.File(aside, "w")
        # The path that manifests name: where the file will be.
        self.path = str(final)

    def store(self, key: str, array: np.ndarray) -> None:
        self._file.create_dataset(key, data=array)

    def close(self) -> None:
        self._file.close()


def worker_pool(num_workers: int, tasks_per_child: int | None = None) -> Pool:
    """Forked processes that end at once on SIGTERM, with which a pool ends them.

    A Python handler, as entry scripts set one, would not do: a signal that comes just before
    the worker waits for its next task is seen after it, that is, never.
    """
    return multiprocessing.get_context("fork").Pool(
        num_workers,
        initializer=signal.signal,
        initargs=(signal.SIGTERM, signal.SIG_DFL),
        maxtasksperchild=tasks_per_child,
    )


# Gives the shard's cuts with what it has stored of them.
Process = Callable[[CutSet, ArrayFile], CutSet]


def _do_shard(process: Process, job: tuple[Path, CutSet]) -> float:
    stem, cuts = job
    arrays_path, cuts_path = stem.with_suffix(".h5"), stem.with_suffix(".jsonl.gz")
    with written_aside(arrays_path) as aside:
        arrays = ArrayFile(aside, arrays_path)
        try:
            done = process(cuts, arrays)
        finally:
            arrays.close()
    with written_aside(cuts_path) as aside:
        done.to_file(aside)
    return sum(cut.duration for cut in cuts)


def map_shards(
    cuts: CutSet,
    folder: Path,
    process: Process,
    shard_size: int,
    num_workers: int = 0,
    what: str = "shards",
) -> CutSet:
    """``process`` each shard of ``shard_size`` cuts that is not done; all of their cuts, in order.

    Args:
      num_workers: processes; 0: this one (a model on a GPU cannot be forked).
    """
    folder.mkdir(parents=True, exist_ok=True)
    everything = list(cuts)
    starts = range(0, len(everything), shard_size)
    stems = [folder / f"{number:05d}" for number in range(len(starts))]
    jobs = [
        (stem, CutSet.from_cuts(everything[start : start + shard_size]))
        for stem, start in zip(stems, starts)
    ]
    left = [job for job in jobs if not job[0].with_suffix(".jsonl.gz").exists()]
    if len(left) < len(jobs):
        logging.info(f"{what}: {len(jobs) - len(left)} of {len(jobs)} shards are done already")
    started, done_seconds = time.monotonic(), 0.0
    total_seconds = sum(cut.duration for _, shard in left for cut in shard)
    do_shard = partial(_do_shard, process)
    pool = worker_pool(num_workers) if num_workers > 0 else None
    try:
        results = pool.imap(do_shard, left) if pool else map(do_shard, left)
        for number, seconds in enumerate(results, start=1):
            done_seconds += seconds
            rate = done_seconds / (time.monotonic() - started)
            minutes_left = (total_seconds - done_seconds) / rate / 60
            logging.info(
                f"{what}: shard {number}/{len(left)}, {rate:.0f} x real time, "
                f"{minutes_left:.1f} min left"
            )
    finally:
        if pool:
            pool.terminate()
    return CutSet.from_cuts(
        cut for stem in stems for cut in CutSet.from_file(stem.with_suffix(".jsonl.gz"))
    )
