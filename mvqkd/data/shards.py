"""Work over a manifest in shards: the unit of work and of resume, for one process or many.

A shard's arrays are in ``<number>.h5`` and its cuts in ``<number>.jsonl.gz``, both
written aside and renamed, the cuts last: a shard whose cuts exist is done. Which cuts a
shard holds follows from the manifest and the shard size alone, and so do its bytes,
whoever makes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from lhotse import CutSet

from mvqkd.data.manifests import write_cuts
from mvqkd.data.workers import map_in_processes
from mvqkd.errors import RecipeError, reason_of
from mvqkd.files import written_aside

# Bytes up to which an array lies in its own header, which is smaller so (HDF5 allows 64 KiB).
COMPACT_BYTES = 60_000
# Of larger arrays whose parts are read.
CHUNK_FRAMES = 100


class _Sink(io.FileIO):
    """A file that remembers what the system refused, and lets HDF5 go on.

    HDF5 that cannot write tries again while it tidies up, and ends in a segmentation fault.
    """

    error: OSError | None = None

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view) and self.error is None:
            try:
                done += super().write(view[done:])
            except OSError as error:
                self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def flush(self) -> None:
        """Nothing is held back. In a forked process h5py did not find the inherited one."""

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        if self.error is not None:  # part of it was never written
            memoryview(buffer).cast("B")[count:] = bytes(len(buffer) - count)
            return len(buffer)
        return count

    def check(self) -> None:
        """
        Raises:
          OSError: something could not be written.
        """
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def hdf5_aside(path: Path) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """Give a new HDF5 file, which takes the place of ``path`` on success, and a function that
    raises what the system has refused to write so far.

    Raises:
      RecipeError: the disk is full; nothing is left of what was half-written.
    """
    with written_aside(path) as aside, contextlib.closing(_Sink(aside, "w+")) as sink:
        with h5py.File(sink, "w") as file:
            yield file, sink.check
        sink.check()


class ArrayFile:
    """Arrays of one shard, by key, as lhotse's ``numpy_hdf5`` storage reads them."""

    STORAGE_TYPE = "numpy_hdf5"

    def __init__(self, aside: Path, final: Path) -> None:
        self._sink = _Sink(aside, "w+")
        # Version 1.8 of the format, which every reader knows, has smaller headers than the first.
        self._file = h5py.File(self._sink, "w", libver=("v108", "v108"))
        # The path that manifests name: where the file will be.
        self.path = str(final)

    def store(self, key: str, array: np.ndarray, chunked: bool = False) -> None:
        """Keep ``array``, frames first.

        Args:
          chunked: in pieces of at most `CHUNK_FRAMES`, of which a reader takes what it needs.

        Raises:
          OSError: it cannot be written.
        """
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        chunks = None
        if array.nbytes <= COMPACT_BYTES:
            layout.set_layout(h5py.h5d.COMPACT)
        elif chunked:
            # Of one size, so that the last is as full as the others.
            num_chunks = -(-len(array) // CHUNK_FRAMES)
            chunks = (-(-len(array) // num_chunks), *array.shape[1:])
        self._file.create_dataset(key, data=array, chunks=chunks, dcpl=layout)
        self._sink.check()

    def close(self) -> None:
        """
        Raises:
          OSError: it cannot be written.
        """
        self._file.close()
        with contextlib.closing(self._sink):
            self._sink.check()


def place_in_job(env: dict[str, str] | None = None) -> tuple[int, int]:
    """(number of this process from 0, how many there are) under torchrun, in a Slurm array, in
    an array of torchruns, or alone."""
    env = dict(os.environ) if env is None else env
    rank, size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    if "SLURM_ARRAY_TASK_ID" in env:
        first, step = env.get("SLURM_ARRAY_TASK_MIN", 0), env.get("SLURM_ARRAY_TASK_STEP", 1)
        task = (int(env["SLURM_ARRAY_TASK_ID"]) - int(first)) // int(step)
        rank, size = rank + task * size, size * int(env.get("SLURM_ARRAY_TASK_COUNT", 1))
    return rank % size, size


@contextlib.contextmanager
def taken(path: Path, mine_anyway: bool) -> Iterator[bool]:
    """Whether the lock ``path`` was free; held within. Killed processes hold none.

    Args:
      mine_anyway: the answer where the file system has no locks.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:
            yield mine_anyway
        else:
            yield True


# Gives the shard's cuts with what it has stored of them.
Process = Callable[[CutSet, ArrayFile], CutSet]
# The path of a shard, without suffix, and what it holds.
Job = tuple[Path, CutSet]


def _do_shard(process: Process, job: Job) -> float:
    stem, cuts = job
    arrays_path, cuts_path = stem.with_suffix(".h5"), stem.with_suffix(".jsonl.gz")
    with written_aside(arrays_path) as aside:
        arrays = ArrayFile(aside, arrays_path)
        try:
            done = process(cuts, arrays)
        finally:
            arrays.close()
    with written_aside(cuts_path) as aside:
        write_cuts(done, aside)
    return _seconds(cuts)


def _seconds(cuts: CutSet) -> float:
    return sum(cut.duration for cut in cuts)


class _Progress:
    def __init__(self, what: str, left: list[Job], num_sharers: int = 1) -> None:
        self._what, self._number, self._done = what, 0, 0.0
        self._count = len(left)
        # The share of this process, about.
        self._total = sum(_seconds(cuts) for _, cuts in left) / num_sharers
        self._started = time.monotonic()

    def add(self, seconds: float) -> None:
        self._number += 1
        self._done += seconds
        rate = self._done / (time.monotonic() - self._started)
        logging.info(
            f"{self._what}: shard {self._number}/{self._count}, {rate:.0f} x real time, "
            f"{max(0, self._total - self._done) / rate / 60:.1f} min left"
        )


class Shards:
    """``cuts`` in shards of ``shard_size``, kept in ``folder``.

    Args:
      what: their name in messages.
      joined: a manifest that, once it exists, stands for the cuts of all shards.
    """

    def __init__(
        self, cuts: CutSet, folder: Path, shard_size: int, what: str, joined: Path | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        everything = list(cuts)
        self._folder, self._what, self._joined = folder, what, joined
        self._jobs: list[Job] = [
            (folder / f"{number:05d}", CutSet.from_cuts(everything[start : start + shard_size]))
            for number, start in enumerate(range(0, len(everything), shard_size))
        ]

    def _is_done(self, job: Job) -> bool:
        stem = job[0]
        kept = self._joined is not None and self._joined.exists()
        return stem.with_suffix(".h5").exists() and (kept or stem.with_suffix(".jsonl.gz").exists())

    def _left(self) -> list[Job]:
        left = [job for job in self._jobs if not self._is_done(job)]
        if len(left) < len(self._jobs):
            done = len(self._jobs) - len(left)
            logging.info(f"{self._what}: {done} of {len(self._jobs)} shards are done already")
        return left

    def run(self, process: Process, num_workers: int = 0) -> None:
        """``process`` each shard that is not done.

        Args:
          num_workers: processes; 0: this one (a model on a GPU cannot be forked).
        """
        left = self._left()
        progress = _Progress(self._what, left)
        do_shard = partial(_do_shard, process)
        if num_workers > 0:
            seconds_of_shards = map_in_processes(do_shard, left, num_workers)
        else:
            seconds_of_shards = map(do_shard, left)
        for seconds in seconds_of_shards:
            progress.add(seconds)

    def share(self, process: Process) -> bool:
        """``process`` shards that no other process has in hand, until none is left.

        Any number of processes, on any number of hosts that see the folder, may do so at once.
        A shard is in hand of who holds its lock. Where the file system has no locks, each keeps
        to every n-th shard, by its place in the job.

        Returns:
          whether all shards are done: of many processes at least the last to end sees it.
        """
        rank, size = place_in_job()
        what = f"{self._what}, process {rank + 1} of {size}" if size > 1 else self._what
        progress = _Progress(what, self._left(), size)
        # Each begins elsewhere, so that they seldom meet.
        order = list(enumerate(self._jobs))
        first = rank * len(order) // size
        for number, job in order[first:] + order[:first]:
            if self._is_done(job):
                continue
            lock = job[0].with_suffix(".lock")
            with taken(lock, mine_anyway=number % size == rank) as mine:
                if not mine:
                    continue
                if not self._is_done(job):
                    progress.add(_do_shard(process, job))
                lock.unlink(missing_ok=True)
        return all(self._is_done(job) for job in self._jobs)

    def cuts(self) -> CutSet:
        """Those of all shards, in the manifest's order."""
        manifests = (CutSet.from_file(stem.with_suffix(".jsonl.gz")) for stem, _ in self._jobs)
        # Of a shard that no cut is left of lhotse gives None.
        return CutSet.from_cuts(cut for cuts in manifests if cuts is not None for cut in cuts)

    def stored(self, key: str) -> Iterator[np.ndarray]:
        """The array of that key of each shard that has one, in order.

        Raises:
          RecipeError: a shard is damaged.
        """
        for stem, _ in self._jobs:
            path = stem.with_suffix(".h5")
            try:
                with h5py.File(path) as file:
                    array = file[key][:] if key in file else None
            except OSError as error:
                raise RecipeError(
                    f"{path}: the shard cannot be read ({reason_of(error)}); remove the file and "
                    "run the stage again"
                ) from error
            if array is not None:
                yield array

    def leave_arrays(self) -> None:
        """Remove all but the arrays, once a manifest stands for the cuts of all shards."""
        for stem, _ in self._jobs:
            stem.with_suffix(".jsonl.gz").unlink(missing_ok=True)
            stem.with_suffix(".lock").unlink(missing_ok=True)
        # Of processes that were killed on other hosts.
        for stale in self._folder.glob(".part-*-[0-9]*"):
            stale.unlink(missing_ok=True)


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
    shards = Shards(cuts, folder, shard_size, what)
    shards.run(process, num_workers)
    return shards.cuts()
