"""Batches of features, tokens and labels for the student.

B: utterances, T: feature frames, U: teacher frames, N: codebooks or dimensions, L: samples.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from lhotse import CutSet
from lhotse.cut import MixedCut, PaddingCut
from lhotse.dataset import CutMix, SpecAugment

from mvqkd.data.audio import bucketed_batches, collate_audio, largest_batches
from mvqkd.data.labels import collate_labels, load_labels
from mvqkd.data.prefetch import ahead
from mvqkd.data.time_warp import TimeWarp
from mvqkd.errors import RecipeError

# Of the noise, that a batch draws from: lhotse shuffles what it is given only so far ahead.
NOISE_CUTS = 100
# More than there are epochs: orders of the speech without transcripts, by epoch and pass.
UNREAD_ORDERS = 100_000
# What padding frames hold: the log of silence, as lhotse pads.
LOG_EPSILON = -23.025850929940457


@dataclass
class SpecAugmentSettings:
    """Park et al. 2019 (arXiv 1904.08779)."""

    # Most feature frames by which time is moved; labels are moved with it. 0, as published: none.
    time_warp_factor: int = 0
    num_feature_masks: int = 2
    features_mask_size: int = 27
    num_frame_masks: int = 10
    frames_mask_size: int = 100
    max_frames_mask_fraction: float = 0.15
    # Share of the utterances that are masked, and of those that are warped.
    p: float = 0.9


@dataclass
class NoiseSettings:
    """Recordings that are mixed into the training speech: MUSAN (Snyder et al. 2015, arXiv
    1510.08484), as published."""

    # Cuts with features, see local/prepare_noise.py; None: no noise.
    manifest: Path | None = None
    # Share of the utterances, and the range of the signal-to-noise ratio in dB.
    p: float = 0.5
    snr: tuple[float, float] = (10.0, 20.0)


@dataclass
class DataSettings:
    """How batches are filled."""

    # Seconds of speech in a batch.
    max_duration: float = 300
    # Seconds of speech without transcript that each training batch has on top of so much of
    # transcribed speech. An epoch is then one pass over the transcripts, in the batches that they
    # have without the others. 0: all of it is one set, in one order.
    max_untranscribed: float = 0.0
    # Training utterances that are shorter or longer are left out (None: none is too long).
    min_seconds: float = 0.0
    max_seconds: float | None = None
    num_buckets: int = 20
    # Keep features and labels in memory after the first epoch.
    cache: bool = False
    # Training batches that a thread loads, mixes and pads ahead; 0: none. null: some for a GPU,
    # none for a CPU, whose cores have enough to do.
    prefetch: int | None = None
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    spec_augment: SpecAugmentSettings = field(default_factory=SpecAugmentSettings)

    def __post_init__(self) -> None:
        if self.prefetch is not None and self.prefetch < 0:
            raise RecipeError(f"data.prefetch: {self.prefetch}; give 0 for none, or more")


@dataclass
class StudentBatch:
    """B utterances, with what the student is distilled by: stored labels, or the waveforms.

    An utterance without transcript has no tokens (None) and an empty text.
    """

    ids: list[str]
    features_BTF: torch.Tensor
    lengths_B: torch.Tensor
    tokens: list[list[int] | None]
    texts: list[str]
    # By field: indexes (B, U, N) or embeddings (B, U, D).
    labels: dict[str, torch.Tensor] = field(default_factory=dict)
    # For teachers in the training loop.
    waveforms_BL: torch.Tensor | None = None
    samples_B: torch.Tensor | None = None


def load_features(cut) -> np.ndarray:
    """(T, F).

    Raises:
      RecipeError: the file that the manifest names is missing or damaged.
    """
    if not cut.has_features:
        raise RecipeError(f"cut {cut.id}: has no features; run stage 0")
    try:
        # lhotse pads to float64.
        return cut.load_features().astype(np.float32, copy=False)
    except (OSError, KeyError) as error:
        tracks = [track.cut for track in cut.tracks] if isinstance(cut, MixedCut) else [cut]
        paths = dict.fromkeys(
            track.features.storage_path
            for track in tracks
            if not isinstance(track, PaddingCut) and track.has_features
        )
        raise RecipeError(
            f"{' or '.join(paths)}: features of cut {cut.id} cannot be read "
            f"({type(error).__name__}); remove it and the stamp of features or noise in "
            "exp/<name>/stamps, then run stage 0"
        ) from error


def transcript(cut) -> str | None:
    """What is said in ``cut``; None where nobody has written it down."""
    texts = [s.text for s in cut.supervisions if s.text is not None]
    return " ".join(texts) if texts else None


def _longest(cuts: CutSet) -> float:
    return max(cut.duration for cut in cuts)


class StudentData:
    """The batches of one manifest.

    Args:
      fields: of the labels that batches hold.
      with_audio: whether they hold the waveforms too.
      noise: what is mixed into the features; waveforms and labels stay clean.

    With neither fields nor audio, every cut must have a transcript. ``max_untranscribed`` takes
    effect where ``cuts`` are of both kinds.
    """

    def __init__(
        self,
        cuts: CutSet,
        tokens: sentencepiece.SentencePieceProcessor,
        settings: DataSettings,
        seed: int,
        fields: Sequence[str] = (),
        with_audio: bool = False,
        noise: CutSet | None = None,
    ) -> None:
        self._cuts, self._tokens, self._settings = cuts, tokens, settings
        # Apart from the others where batches have a part of their own for them.
        self._unread: CutSet | None = None
        if settings.max_untranscribed > 0:
            unread = [cut for cut in cuts if transcript(cut) is None]
            if 0 < len(unread) < len(cuts):
                self._unread = CutSet.from_cuts(unread)
                self._cuts = cuts.filter(lambda cut: transcript(cut) is not None).to_eager()
        self._seed, self._fields, self._with_audio = seed, fields, with_audio
        self._noise = None if noise is None else list(noise)
        self._cache: dict[str, tuple] = {}
        self._audio_cache: dict[str, np.ndarray] | None = {} if settings.cache else None
        # Of an epoch, about.
        self.seconds = sum(cut.duration for cut in self._cuts)
        if self._unread is not None:
            self.seconds *= 1 + settings.max_untranscribed / settings.max_duration

    def batches(
        self, epoch: int, start: int = 0, rank: int = 0, num_processes: int = 1
    ) -> Iterator[tuple[StudentBatch, float]]:
        """(batch, its seconds of speech), in an order that depends on (seed, epoch) alone.

        From batch ``start`` on of the share that process ``rank`` has of an epoch, see
        :func:`mvqkd.data.audio.bucketed_batches`. With ``prefetch`` they are made by a thread;
        nothing in them depends on a generator that others draw from.
        """
        numbered = enumerate(self._cut_batches(epoch, rank, num_processes))
        chosen = itertools.islice(numbered, start, None)
        batches = (
            (
                self._collate(cuts, self._mixed(cuts, f"{self._seed}/{epoch}/{rank}/{number}")),
                sum(cut.duration for cut in cuts),
            )
            for number, cuts in chosen
        )
        prefetch = self._settings.prefetch or 0
        return ahead(batches, prefetch) if prefetch > 0 else batches

    def every_nth(self, first: int, n: int) -> Iterator[StudentBatch]:
        """Batches ``first``, ``first + n``, ... of epoch 0: one of n shares that make the whole."""
        for cuts in itertools.islice(self._cut_batches(epoch=0), first, None, n):
            yield self._collate(cuts)

    def largest(self) -> list[StudentBatch]:
        """The batches of the first epoch that are likely to need most memory."""
        return [self._collate(cuts) for cuts in largest_batches(self._cut_batches(epoch=1))]

    def _cut_batches(self, epoch: int, rank: int = 0, num_processes: int = 1) -> Iterator[CutSet]:
        batches = self._bucketed(
            self._cuts, self._settings.max_duration, epoch, rank, num_processes
        )
        if self._unread is None:
            return batches
        return self._with_unread(batches, epoch, rank, num_processes)

    def _bucketed(
        self, cuts: CutSet, max_duration: float, epoch: int, rank: int, num_processes: int
    ) -> Iterator[CutSet]:
        settings = self._settings
        return bucketed_batches(
            cuts, max_duration, self._seed, epoch, settings.num_buckets, rank, num_processes
        )

    def _with_unread(
        self, batches: Iterator[CutSet], epoch: int, rank: int, num_processes: int
    ) -> Iterator[CutSet]:
        """Each of ``batches`` and, after it, one of the cuts without transcript: of those that are
        left in a pass over them the one whose longest cut is most like, which saves padding."""
        left: list[tuple[float, CutSet]] = []
        number_of_pass = itertools.count()
        for cuts in batches:
            if not left:
                # Passes of an epoch have orders of their own, and so have those of other epochs.
                order = epoch + UNREAD_ORDERS * next(number_of_pass)
                max_duration = self._settings.max_untranscribed
                unread = self._bucketed(self._unread, max_duration, order, rank, num_processes)
                left = [(_longest(one), one) for one in unread]
            longest = _longest(cuts)
            nearest = min(range(len(left)), key=lambda n: abs(left[n][0] - longest))
            yield CutSet.from_cuts([*cuts, *left.pop(nearest)[1]])

    def _mixed(self, cuts: CutSet, seed: str) -> CutSet | None:
        """``cuts`` with noise, which follows from ``seed``; None without noise."""
        if self._noise is None:
            return None
        rng, settings = random.Random(seed), self._settings.noise
        drawn = rng.sample(self._noise, min(NOISE_CUTS, len(self._noise)))
        mix = CutMix(
            CutSet.from_cuts(drawn),
            snr=settings.snr,
            p=settings.p,
            pad_to_longest=False,
            preserve_id=True,
            seed=rng,
        )
        return mix(cuts)

    def _load(self, cut) -> tuple:
        if cut.id in self._cache:
            return self._cache[cut.id]
        text = transcript(cut)
        if text is None and not self._fields and not self._with_audio:
            raise RecipeError(
                f"cut {cut.id}: has no transcript, and no teacher to learn from; remove it"
            )
        item = (
            torch.from_numpy(load_features(cut)),
            None if text is None else self._tokens.encode(text),
            text or "",
            [load_labels(cut, field) for field in self._fields],
        )
        if self._settings.cache:
            self._cache[cut.id] = item
        return item

    def _collate(self, cuts: CutSet, noisy: CutSet | None = None) -> StudentBatch:
        features, tokens, texts, labels = zip(*map(self._load, cuts))
        if noisy is not None:
            features = [
                torch.from_numpy(load_features(cut)[: len(clean_TF)])
                if isinstance(cut, MixedCut)
                else clean_TF
                for cut, clean_TF in zip(noisy, features)
            ]
        audio = collate_audio(cuts, self._audio_cache) if self._with_audio else None
        return StudentBatch(
            ids=[cut.id for cut in cuts],
            features_BTF=torch.nn.utils.rnn.pad_sequence(
                features, batch_first=True, padding_value=LOG_EPSILON
            ),
            lengths_B=torch.tensor([len(f) for f in features]),
            tokens=list(tokens),
            texts=list(texts),
            labels={
                field: collate_labels(of_cuts) for field, of_cuts in zip(self._fields, zip(*labels))
            },
            waveforms_BL=audio.waveforms_BL if audio else None,
            samples_B=audio.lengths_B if audio else None,
        )


def make_spec_augment(settings: SpecAugmentSettings) -> SpecAugment:
    """The masks, which are lhotse's; they are drawn from the generators of Python and torch."""
    return SpecAugment(
        time_warp_factor=None,
        num_feature_masks=settings.num_feature_masks,
        features_mask_size=settings.features_mask_size,
        num_frame_masks=settings.num_frame_masks,
        frames_mask_size=settings.frames_mask_size,
        max_frames_mask_fraction=settings.max_frames_mask_fraction,
        p=settings.p,
    )


class Augment:
    """SpecAugment, which also tells what it does to time."""

    def __init__(self, settings: SpecAugmentSettings) -> None:
        self._settings, self._mask = settings, make_spec_augment(settings)

    def __call__(
        self, features_BTF: torch.Tensor, lengths_B: torch.Tensor
    ) -> tuple[torch.Tensor, list[TimeWarp | None] | None]:
        """The augmented features, and how each utterance is warped; None where none is."""
        warps = None
        if self._settings.time_warp_factor > 0:
            warps = [self._warp(length) for length in lengths_B.tolist()]
            features_BTF = torch.stack(
                [x_TF if w is None else w.features(x_TF) for w, x_TF in zip(warps, features_BTF)]
            )
        return self._mask(features_BTF), warps

    def _warp(self, num_frames: int) -> TimeWarp | None:
        if random.random() >= self._settings.p:
            return None
        return TimeWarp.drawn(num_frames, self._settings.time_warp_factor)
