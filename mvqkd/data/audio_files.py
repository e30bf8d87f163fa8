"""Audio files of any kind as features, a block at a time.

The blocks are those of the whole file: resampling and filterbanks see across their edges. Memory
does not grow with the file.

L: samples, T: feature frames, F: bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
from lhotse.features.base import FeatureExtractor
from scipy.signal import firwin, resample_poly

from mvqkd.data import SAMPLE_RATE
from mvqkd.errors import RecipeError, reason_of

BLOCK_SECONDS = 20

# What is shorter holds no word, and lhotse's filterbank fails on some such lengths.
MIN_SECONDS = 0.025


class AudioFile:
    """An audio file that soundfile reads, at any sampling rate, with any number of channels.

    Attributes:
      seconds: what has been read so far; after the last block, the length of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = 0.0

    def blocks(self) -> Iterator[np.ndarray]:
        """Samples (L,), float32, at 16 kHz, the channels averaged.

        Raises:
          RecipeError: the file is missing, not audio, empty, cut short, or holds samples that are
            not finite.
        """
        if not self.path.exists():
            raise RecipeError(f"{self.path}: no such file; check the name")
        if self.path.is_dir():
            raise RecipeError(f"{self.path}: is a folder; name the files in it")
        try:
            with soundfile.SoundFile(self.path) as file:
                yield from resampled(self._native_blocks(file), file.samplerate, SAMPLE_RATE)
        except (soundfile.SoundFileError, OSError) as error:
            reason = getattr(error, "error_string", "").strip() or reason_of(error)
            raise RecipeError(
                f"{self.path}: cannot be decoded ({reason}); convert it to WAV or FLAC, or fetch "
                "it again"
            ) from error

    def _native_blocks(self, file: soundfile.SoundFile) -> Iterator[np.ndarray]:
        read, rate = 0, file.samplerate
        while len(block_LC := file.read(BLOCK_SECONDS * rate, "float32", always_2d=True)):
            read += len(block_LC)
            self.seconds = read / rate
            block_L = block_LC.mean(axis=1)
            if not np.isfinite(block_L).all():
                raise RecipeError(
                    f"{self.path}: holds samples that are not finite, before {self.seconds:.0f} s; "
                    "write it anew from its source"
                )
            yield block_L
        if read == 0:
            raise RecipeError(f"{self.path}: holds no sample; record it again")
        # By as little as that, the header of a compressed file may be wrong.
        if read < file.frames - rate / 10:
            raise RecipeError(
                f"{self.path}: cut short: holds {self.seconds:.1f} of {file.frames / rate:.1f} s; "
                "fetch it again"
            )


def _blockwise(
    blocks: Iterable[np.ndarray],
    function: Callable[[np.ndarray], np.ndarray],
    size_in: int,
    size_out: int,
    margin: int,
) -> Iterator[np.ndarray]:
    """``function`` over a signal that comes in blocks, as if over the whole of it.

    A unit, ``size_in`` samples, gives ``size_out`` outputs, which depend on no sample more than
    ``margin`` units before or after it.
    """
    held, given = None, 0  # given: units at the start of `held` whose outputs have been
    for block in blocks:
        held = block if held is None else np.concatenate([held, block])
        ready = len(held) // size_in - margin
        if ready > given:
            yield function(held)[given * size_out : ready * size_out]
            dropped = max(ready - margin, 0)
            held, given = held[dropped * size_in :], ready - dropped
    if held is not None:
        yield function(held)[given * size_out :]


def resampled(blocks: Iterable[np.ndarray], rate: int, new_rate: int) -> Iterator[np.ndarray]:
    """Blocks (L,) at ``rate`` Hz as blocks at ``new_rate``: scipy's polyphase filter."""
    if rate == new_rate:
        yield from blocks
        return
    common = math.gcd(rate, new_rate)
    up, down = new_rate // common, rate // common
    # scipy's own default, designed once.
    half = 10 * max(up, down)
    filter_L = firwin(2 * half + 1, 1 / max(up, down), window=("kaiser", 5.0)).astype(np.float32)
    resample = partial(resample_poly, up=up, down=down, window=filter_L)
    yield from _blockwise(blocks, resample, down, up, math.ceil(half / (up * down)) + 1)


def feature_blocks(
    blocks: Iterable[np.ndarray], extractor: FeatureExtractor
) -> Iterator[np.ndarray]:
    """Samples (L,) at 16 kHz as features (T, F): ``extractor.extract`` of the whole, in blocks.

    Audio shorter than 25 ms has none.
    """

    def extract(samples_L: np.ndarray) -> np.ndarray:
        if len(samples_L) < MIN_SECONDS * SAMPLE_RATE:
            return np.zeros((0, extractor.feature_dim(SAMPLE_RATE)), np.float32)
        return extractor.extract(samples_L, SAMPLE_RATE)

    # A frame sees 7.5 ms before and after its 10.
    yield from _blockwise(blocks, extract, round(extractor.frame_shift * SAMPLE_RATE), 1, 2)
