"""Batches of waveforms and transcripts for the teacher."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import soundfile
import torch
from lhotse import CutSet
from lhotse.cut import MixedCut, PaddingCut
from lhotse.dataset import DynamicBucketingSampler
from lhotse.utils import compute_num_samples

from mvqkd.data import SAMPLE_RATE
from mvqkd.errors import RecipeError, reason_of

# As soundfile calls them.
_16_BITS = ("PCM_16", "PCM_S8", "PCM_U8", "ULAW", "ALAW")


@dataclass
class AudioBatch:
    """B utterances of 16 kHz speech."""

    ids: list[str]
    waveforms_BL: torch.Tensor
    lengths_B: torch.Tensor
    texts: list[str]


def num_samples(cut) -> int:
    """How many samples `load_audio` gives."""
    return compute_num_samples(cut.duration, SAMPLE_RATE)


def transcript_of(cut) -> str:
    """What is said in ``cut``; empty where nobody has written it down."""
    return (cut.supervisions[0].text or "") if cut.supervisions else ""


def load_audio(cut) -> np.ndarray:
    """Samples (L,) of ``cut`` at 16 kHz, whatever its own sampling rate is.

    Raises:
      RecipeError: the audio is missing, cannot be decoded, or holds samples that are not finite.
    """
    try:
        if cut.sampling_rate != SAMPLE_RATE:
            cut = cut.resample(SAMPLE_RATE)
        samples_L = cut.load_audio()[0]
    except Exception as error:  # lhotse's backends raise their own kinds
        raise RecipeError(
            f"{_told(cut)} cannot be read ({reason_of(error)}); "
            "restore the file, or make the manifests again"
        ) from error
    if not np.isfinite(samples_L).all():
        raise RecipeError(
            f"{_told(cut)} holds samples that are not finite; write the file anew from its "
            "source, or remove the cut"
        )
    return samples_L


def _told(cut) -> str:
    # A mixed cut has several recordings; its reason names the one.
    source = "" if isinstance(cut, MixedCut) else f"{cut.recording.sources[0].source}: "
    return f"{source}cut {cut.id}"


def _read(cut, cache: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """Samples (L,) of 16 bits, or float32 where the file has more of them.

    16 bits are no loss of what a file of 16 bits holds, and are kept where its speed or sampling
    rate is another than the file's, too. What ``cache`` keeps by cut id has always 16 bits, half
    the memory.
    """
    samples_L = cache.get(cut.id) if cache is not None else None
    if samples_L is None:
        float_L = load_audio(cut)
        scaled_L = np.round(float_L * 32768).clip(-32768, 32767)
        lossless = np.array_equal(scaled_L, float_L * 32768)
        if not lossless and cache is None and not _has_16_bits(cut):
            return float_L.astype(np.float32)
        samples_L = scaled_L.astype(np.int16)
        if cache is not None:
            cache[cut.id] = samples_L
    return samples_L


def _has_16_bits(cut) -> bool:
    """Whether the files of ``cut`` hold samples of at most 16 bits."""
    parts = [track.cut for track in cut.tracks] if isinstance(cut, MixedCut) else [cut]
    sources = [
        source
        for part in parts
        if not isinstance(part, PaddingCut)
        for source in part.recording.sources
    ]
    try:
        return all(
            s.type == "file" and soundfile.info(s.source).subtype in _16_BITS for s in sources
        )
    except soundfile.LibsndfileError:  # of a kind that lhotse reads by other means
        return False


def collate_audio(cuts: CutSet, cache: dict[str, np.ndarray] | None = None) -> AudioBatch:
    """Load and pad; ``cache`` keeps samples of 16 bits by cut id, see `_read`."""
    return _padded(list(cuts), [_read(cut, cache) for cut in cuts])


def _padded(cuts: Sequence, samples: Sequence[np.ndarray]) -> AudioBatch:
    waves = [
        wave_L.float() / (1 if wave_L.is_floating_point() else 32768)
        for wave_L in map(torch.from_numpy, samples)
    ]
    return AudioBatch(
        ids=[cut.id for cut in cuts],
        waveforms_BL=torch.nn.utils.rnn.pad_sequence(waves, batch_first=True),
        lengths_B=torch.tensor([len(w) for w in waves]),
        texts=[transcript_of(cut) for cut in cuts],
    )


def collate_good(
    cuts: Iterable, check_length: Callable[[str, int], None]
) -> tuple[AudioBatch | None, dict[str, str]]:
    """`collate_audio` of the cuts that can be read and that ``check_length`` (of the cut's name and
    its samples) lets through.

    Returns:
      (the batch, None where no cut is left; by id, what is wrong with the others)
    """
    good, samples, bad = [], [], {}
    for cut in cuts:
        try:
            samples_L = _read(cut)
            check_length(f"cut {cut.id}", len(samples_L))
        except RecipeError as error:
            bad[cut.id] = str(error)
        else:
            good.append(cut)
            samples.append(samples_L)
    return (_padded(good, samples) if good else None), bad


def bucketed_batches(
    cuts: CutSet,
    max_duration: float,
    seed: int,
    epoch: int,
    num_buckets: int = 20,
    rank: int = 0,
    num_processes: int = 1,
) -> Iterator[CutSet]:
    """Batches of like durations, in an order that depends on (seed, epoch) alone.

    Of several processes each gets as many batches as the others, at any moment of like durations;
    the last ones are split, and where there are too few cuts even for that, some are repeated.
    """
    if len(cuts) == 1:  # lhotse wants a cut for each of at least two buckets
        return iter([cuts])
    with warnings.catch_warnings():
        # Of cuts in memory, which these are meant to be.
        warnings.filterwarnings("ignore", message=".*eagerly read CutSet")
        # Of the mean of no bounds, where a few cuts all fall into one bucket.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="numpy")
        sampler = DynamicBucketingSampler(
            cuts,
            max_duration=max_duration,
            shuffle=True,
            seed=seed,
            num_buckets=min(num_buckets, max(2, len(cuts) // 20)),
            rank=rank,
            world_size=num_processes,
        )
        sampler.set_epoch(epoch)
        # A sampler is its own iterator: at each `iter` it begins anew, and warns anew.
        return (batch for batch in sampler)


def largest_batches(batches: Iterable[CutSet]) -> list[CutSet]:
    """Those of ``batches`` that are likely to need most memory, none twice.

    By seconds with padding; by seconds times longest utterance, which attention grows with; and by
    seconds times longest transcript, as the lattice of a transducer.
    """
    largest: dict[str, tuple[float, CutSet]] = {}
    for cuts in batches:
        longest = max(cut.duration for cut in cuts)
        longest_text = max((len(s.text or "") for cut in cuts for s in cut.supervisions), default=0)
        padded = len(cuts) * longest
        sizes = {"all": padded, "attention": padded * longest, "lattice": padded * longest_text}
        for kind, size in sizes.items():
            if kind not in largest or size > largest[kind][0]:
                largest[kind] = (size, cuts)
    return list({id(cuts): cuts for _, cuts in largest.values()}.values())
