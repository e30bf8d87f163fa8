"""Batches of features, tokens and labels for the student.

B: utterances, T: feature frames, U: teacher frames, N: codebooks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import sentencepiece
import torch
from lhotse import CutSet
from lhotse.dataset import SpecAugment

from mvqkd.data.audio import bucketed_batches, largest_batches
from mvqkd.data.labels import collate_indexes, load_indexes
from mvqkd.errors import RecipeError

# What padding frames hold: the log of silence, as lhotse pads.
LOG_EPSILON = -23.025850929940457


@dataclass
class SpecAugmentSettings:
    """Park et al. 2019 (arXiv 1904.08779); no time warp, which labels would not follow."""

    num_feature_masks: int = 2
    features_mask_size: int = 27
    num_frame_masks: int = 10
    frames_mask_size: int = 100
    max_frames_mask_fraction: float = 0.15
    p: float = 0.9


@dataclass
class DataSettings:
    """How batches are filled."""

    # Seconds of speech in a batch.
    max_duration: float = 300
    num_buckets: int = 20
    # Keep features and labels in memory after the first epoch.
    cache: bool = False
    spec_augment: SpecAugmentSettings = field(default_factory=SpecAugmentSettings)


@dataclass
class StudentBatch:
    """B utterances; labels where the student is distilled."""

    ids: list[str]
    features_BTF: torch.Tensor
    lengths_B: torch.Tensor
    tokens: list[list[int]]
    texts: list[str]
    labels_BUN: torch.Tensor | None


def load_features(cut) -> np.ndarray:
    """(T, F).

    Raises:
      RecipeError: the file that the manifest names is missing or damaged.
    """
    if cut.features is None:
        raise RecipeError(f"cut {cut.id}: has no features; run stage 0")
    try:
        return cut.load_features()
    except (OSError, KeyError) as error:
        raise RecipeError(
            f"{cut.features.storage_path}: features of cut {cut.id} cannot be read "
            f"({type(error).__name__}); run stage 0 again"
        ) from error


class StudentData:
    """The batches of one manifest."""

    def __init__(
        self,
        cuts: CutSet,
        tokens: sentencepiece.SentencePieceProcessor,
        settings: DataSettings,
        seed: int,
        with_labels: bool,
    ) -> None:
        self._cuts, self._tokens, self._settings = cuts, tokens, settings
        self._seed, self._with_labels = seed, with_labels
        self._cache: dict[str, tuple] = {}
        self.seconds = sum(cut.duration for cut in cuts)

    def batches(
        self, epoch: int, start: int = 0, rank: int = 0, num_processes: int = 1
    ) -> Iterator[tuple[StudentBatch, float]]:
        """(batch, its seconds of speech), in an order that depends on (seed, epoch) alone.

        From batch ``start`` on of the share that process ``rank`` has of an epoch, see
        :func:`mvqkd.data.audio.bucketed_batches`.
        """
        for cuts in itertools.islice(self._cut_batches(epoch, rank, num_processes), start, None):
            yield self._collate(cuts), sum(cut.duration for cut in cuts)

    def every_nth(self, first: int, n: int) -> Iterator[StudentBatch]:
        """Batches ``first``, ``first + n``, ... of epoch 0: one of n shares that make the whole."""
        for cuts in itertools.islice(self._cut_batches(epoch=0), first, None, n):
            yield self._collate(cuts)

    def largest(self) -> list[StudentBatch]:
        """The batches of the first epoch that are likely to need most memory."""
        return [self._collate(cuts) for cuts in largest_batches(self._cut_batches(epoch=1))]

    def _cut_batches(self, epoch: int, rank: int = 0, num_processes: int = 1) -> Iterator[CutSet]:
        settings = self._settings
        return bucketed_batches(
            self._cuts,
            settings.max_duration,
            self._seed,
            epoch,
            settings.num_buckets,
            rank,
            num_processes,
        )

    def _load(self, cut) -> tuple:
        if cut.id in self._cache:
            return self._cache[cut.id]
        text = cut.supervisions[0].text
        item = (
            torch.from_numpy(load_features(cut)),
            self._tokens.encode(text),
            text,
            load_indexes(cut) if self._with_labels else None,
        )
        if self._settings.cache:
            self._cache[cut.id] = item
        return item

    def _collate(self, cuts: CutSet) -> StudentBatch:
        features, tokens, texts, labels = zip(*map(self._load, cuts))
        return StudentBatch(
            ids=[cut.id for cut in cuts],
            features_BTF=torch.nn.utils.rnn.pad_sequence(
                features, batch_first=True, padding_value=LOG_EPSILON
            ),
            lengths_B=torch.tensor([len(f) for f in features]),
            tokens=list(tokens),
            texts=list(texts),
            labels_BUN=collate_indexes(list(labels)) if self._with_labels else None,
        )


def make_spec_augment(settings: SpecAugmentSettings) -> SpecAugment:
    """lhotse's; it draws from Python's ``random``."""
    return SpecAugment(
        time_warp_factor=None,
        num_feature_masks=settings.num_feature_masks,
        features_mask_size=settings.features_mask_size,
        num_frame_masks=settings.num_frame_masks,
        frames_mask_size=settings.frames_mask_size,
        max_frames_mask_fraction=settings.max_frames_mask_fraction,
        p=settings.p,
    )
