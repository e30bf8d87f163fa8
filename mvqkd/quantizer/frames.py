"""Frames to train and judge quantizers on, which may be more than memory holds.

Frames are (F, D): a tensor, a NumPy or memory-mapped array, or an HDF5 dataset.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvqkd.errors import RecipeError

_BLOCK_FRAMES = 16384  # read at a time
# Batches are drawn from a pool in memory. Where it cannot hold all frames, it is filled with runs
# of successive ones from random places: a file is then read in large pieces, each once an epoch.
_POOL_FRAMES = 65536
_RUN_FRAMES = 64


def check_frames(
    frames_FD: Tensor,
    least: int,
    name: str = "frames",
    first: int = 0,
    describe: Callable[[int], str] = str,
) -> None:
    """Refuse frames that no quantizer can be trained on or judged by.

    Args:
      frames_FD: the frames.
      least: how many are needed.
      name: a file or what else the frames are from, for the message.
      first: number of the first of them in ``name``.
      describe: says which frame a number is; by default the number itself.
    Raises:
      RecipeError: too few frames, or one with NaN or infinity, the first of which are named.
    """
    require_frames(frames_FD, least, name)
    _refuse_not_finite(frames_FD, name, first, describe)


def require_finite(
    frames_FD: Tensor, name: str, utterances: Sequence[str], counts: Sequence[int]
) -> None:
    """
    Args:
      frames_FD: those of some utterances one after the other.
      name: what they are, for the message.
      utterances, counts: their ids, and how many frames each has.
    Raises:
      RecipeError: a frame with NaN or infinity; its utterance is named.
    """
    ends = list(itertools.accumulate(counts))

    def describe(number: int) -> str:
        place = bisect.bisect_right(ends, number)
        return f"cut {utterances[place]} frame {number - ends[place] + counts[place]}"

    _refuse_not_finite(frames_FD, name, 0, describe)


def _refuse_not_finite(
    frames_FD: Tensor, name: str, first: int, describe: Callable[[int], str]
) -> None:
    wrong_F = ~torch.isfinite(frames_FD).all(dim=1)
    if bool(wrong_F.any()):
        numbers = (wrong_F.nonzero()[:, 0] + first).tolist()
        shown = ", ".join(map(describe, numbers[:5])) + (" ..." if len(numbers) > 5 else "")
        raise RecipeError(
            f"{name}: {len(numbers)} frames with NaN or infinity ({shown}); leave out their "
            "utterances or run the teacher in float32"
        )


def require_frames(frames: Any, least: int, name: str = "frames") -> None:
    """
    Raises:
      RecipeError: ``frames`` are not (F, D) with F at least ``least``.
    """
    if len(frames.shape) != 2 or frames.shape[0] < least:
        raise RecipeError(
            f"{name}: {frames.shape[0]} frames, at least {least} are needed, one for each entry of "
            "a codebook; take more utterances"
        )


def read_rows(frames: Any, rows: slice, name: str) -> Tensor:
    """Some rows as float32, on the CPU unless ``frames`` is a tensor elsewhere.

    Raises:
      RecipeError: a file that is damaged or cut short.
    """
    if isinstance(frames, Tensor):
        return frames[rows].float()
    try:
        return torch.from_numpy(np.array(frames[rows], dtype=np.float32))
    except OSError as error:
        raise RecipeError(
            f"{name}: cannot be read, damaged or cut short ({error}); write the frames again"
        ) from error


def read_blocks(frames: Any, name: str) -> Iterator[tuple[int, Tensor]]:
    """All frames in order, in pieces: the number of the first and the frames, as `read_rows`."""
    for start in range(0, len(frames), _BLOCK_FRAMES):
        end = min(start + _BLOCK_FRAMES, len(frames))
        yield start, read_rows(frames, slice(start, end), name)


def frame_statistics(
    frames: Any, name: str = "frames", describe: Callable[[int], str] = str
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each dimension, float32 (D,), in one pass.

    Args:
      frames: see the top of the module.
      name, describe: for messages, as in `check_frames`.
    Raises:
      RecipeError: a frame with NaN or infinity, or a file that is cut short.
    """
    total = square = 0.0
    shift = None
    for start, x in read_blocks(frames, name):
        check_frames(x, 1, name, start, describe)
        x = x.double()
        shift = x.mean(dim=0) if shift is None else shift
        total, square = total + (x - shift).sum(dim=0), square + (x - shift).square().sum(dim=0)
    if shift is None:
        raise RecipeError(f"{name}: no frames; take more utterances")
    mean = total / len(frames)
    variance = (square / len(frames) - mean.square()).clamp(min=0.0)
    return (shift + mean).float().cpu(), variance.sqrt().float().cpu()


def random_rows(frames: Any, count: int, seed: int, name: str) -> Tensor:
    """``count`` frames drawn without repetition, in random order, on the CPU; the file is read
    once, in order."""
    order = np.random.default_rng(seed).permutation(len(frames))[:count]
    sample = torch.empty(len(order), frames.shape[1])
    by_row = np.argsort(order)
    rows = order[by_row]
    for start, x in read_blocks(frames, name):
        low, high = np.searchsorted(rows, (start, start + len(x)))
        if high > low:
            picked = x[torch.from_numpy(rows[low:high] - start)]
            sample[torch.from_numpy(by_row[low:high])] = picked.cpu()
    return sample


class ShuffledFrames:
    """Batches of frames in random order, a function of seed and step alone.

    >>> frames = ShuffledFrames(h5py.File("embeddings.h5")["train"], batch_size=512, seed=0)
    >>> x_BD = frames.batch(step=17)
    """

    def __init__(self, frames: Any, batch_size: int, seed: int, name: str = "frames"):
        self._frames, self._seed, self._name = frames, seed, name
        self._size = min(batch_size, len(frames))
        if len(frames) <= _POOL_FRAMES:
            self._run, self._runs_per_pool, num_runs = len(frames), 1, 1
        else:
            self._run = _RUN_FRAMES
            self._runs_per_pool = max(_POOL_FRAMES, self._size) // self._run
            # A last run that is shorter is left out.
            num_runs = len(frames) // self._run
        self._num_runs = num_runs
        self._batches_per_pool = self._runs_per_pool * self._run // self._size
        full_pools, rest = divmod(num_runs, self._runs_per_pool)
        self.batches_per_epoch = (
            full_pools * self._batches_per_pool + rest * self._run // self._size
        )
        self._held: tuple[int, int] | None = None

    def batch(self, step: int) -> Tensor:
        """Frames (B, D) of a step, float32."""
        epoch, place = divmod(step, self.batches_per_epoch)
        pool, place = divmod(place, self._batches_per_pool)
        if self._held != (epoch, pool):
            self._pool_FD = self._read_pool(epoch, pool)
            order = np.random.default_rng((self._seed, epoch, pool)).permutation(len(self._pool_FD))
            self._order = torch.from_numpy(order).to(self._pool_FD.device)
            self._held = (epoch, pool)
        return self._pool_FD[self._order[place * self._size : (place + 1) * self._size]]

    def _read_pool(self, epoch: int, pool: int) -> Tensor:
        if self._num_runs == 1:
            whole = self._held is not None
            return self._pool_FD if whole else read_rows(self._frames, slice(None), self._name)
        order = np.random.default_rng((self._seed, epoch)).permutation(self._num_runs)
        runs = np.sort(order[pool * self._runs_per_pool : (pool + 1) * self._runs_per_pool])
        starts = (runs * self._run).tolist()
        return torch.cat(
            [read_rows(self._frames, slice(s, s + self._run), self._name) for s in starts]
        )
