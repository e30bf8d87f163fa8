"""Codebook indexes in manifests: dump, verify, load.

A label is the custom field ``codebook_indexes`` of a cut, a lhotse `TemporalArray` of
uint8 (T_teacher, N), in the form that icefall's recipe reads. The custom field
``codebook_indexes_origin`` beside it says what made it.

N: codebooks, T: teacher frames, B: cuts.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from lhotse import CutSet
from lhotse.array import Array, TemporalArray
from lhotse.cut import MixedCut, PaddingCut
from lhotse.utils import fastcopy

from mvqkd.data.audio import collate_audio
from mvqkd.data.shards import ArrayFile, map_shards
from mvqkd.errors import RecipeError
from mvqkd.files import written_aside
from mvqkd.quantizer import Quantizer

if TYPE_CHECKING:  # transformers takes seconds to import, and students do not need it
    from mvqkd.teachers.base import Teacher

FIELD = "codebook_indexes"
ORIGIN_FIELD = "codebook_indexes_origin"
# What padding is filled with: cross-entropy leaves it out. 0 would be a valid index.
IGNORED = -100


@dataclass
class Origin:
    """What made a label."""

    teacher: str
    layer: int
    quantizer: str
    # sha256 of the quantizer's weights.
    sha256: str

    @staticmethod
    def of(meta: dict) -> Origin:
        """From the facts that `save_quantizer` keeps beside a quantizer."""
        return Origin(meta["teacher"], meta["layer"], meta["quantizer_id"], meta["sha256"])


@dataclass
class LabelSettings:
    """How labels are dumped."""

    # Seconds of speech in a batch of the teacher.
    max_duration: float = 100
    shard_size: int = 500
    refine_iters: int = 5


class Dumper:
    """Gives cuts their labels, a shard at a time."""

    def __init__(
        self,
        teacher: Teacher,
        quantizer: Quantizer,
        origin: Origin,
        settings: LabelSettings,
        device: torch.device,
    ) -> None:
        if quantizer.codebook_size > 256:
            raise RecipeError(
                f"quantizer {origin.quantizer}: an index of {quantizer.codebook_size} entries does "
                "not fit a byte; use 256 or fewer"
            )
        self._teacher, self._quantizer = teacher.to(device), quantizer.to(device)
        self._origin, self._settings, self._device = origin, settings, device

    @torch.inference_mode()
    def _indexes(self, cuts: CutSet) -> list[np.ndarray]:
        batch = collate_audio(cuts)
        embeddings_BTD, frames_B = self._teacher.embed(
            batch.waveforms_BL.to(self._device),
            batch.lengths_B.to(self._device),
            self._origin.layer,
        )
        inside_BT = torch.arange(embeddings_BTD.shape[1], device=self._device) < frames_B[:, None]
        indexes_FN = self._quantizer.encode(
            embeddings_BTD[inside_BT],
            refine_indexes_iters=self._settings.refine_iters,
            as_bytes=False,  # N columns whatever K is
        )
        indexes_FN = indexes_FN.to(torch.uint8).cpu()
        return [i.numpy() for i in indexes_FN.split(frames_B.tolist())]

    def __call__(self, cuts: CutSet, arrays: ArrayFile) -> CutSet:
        cuts = CutSet.from_cuts([fastcopy(cut) for cut in cuts])  # the caller's stay as they are
        by_length = sorted(cuts, key=lambda cut: -cut.duration)
        batch: list = []
        for cut in by_length:
            longest = batch[0].duration if batch else cut.duration
            if batch and longest * (len(batch) + 1) > self._settings.max_duration:
                self._label(batch, arrays)
                batch = []
            batch.append(cut)
        self._label(batch, arrays)
        return cuts

    def _label(self, cuts: list, arrays: ArrayFile) -> None:
        for cut, indexes_TN in zip(cuts, self._indexes(CutSet.from_cuts(cuts))):
            arrays.store(cut.id, indexes_TN)
            array = TemporalArray(
                array=Array(
                    storage_type=arrays.STORAGE_TYPE,
                    storage_path=arrays.path,
                    storage_key=cut.id,
                    shape=list(indexes_TN.shape),
                ),
                temporal_dim=0,
                frame_shift=self._teacher.frame_shift,
                start=cut.start,
            )
            cut.custom = {
                **(cut.custom or {}),
                FIELD: array,
                ORIGIN_FIELD: asdict(self._origin),
            }


def dump_labels(cuts: CutSet, out: Path, dumper: Dumper, shard_size: int) -> CutSet:
    """Write ``out``: ``cuts`` with labels; arrays go to shards in its folder."""
    labelled = map_shards(cuts, out.parent / "shards", dumper, shard_size, what="labels")
    with written_aside(out) as aside:
        labelled.to_file(aside)
    return labelled


def verify_labels(
    cuts: CutSet,
    teacher: Teacher,
    num_codebooks: int,
    origin: Origin,
    codebook_size: int = 256,
) -> None:
    """Every cut has indexes, as many as its duration asks for, in range, of ``origin``.

    For cuts as they were dumped, not truncated since.

    Raises:
      RecipeError: the first cut that has not.
    """
    num_frames = 0
    for cut in cuts:
        check_origin(cut, origin, accept_unknown=False)
        # All of the array: lhotse cuts off what is too long for the cut.
        indexes_TN = _stored_indexes(cut, whole=True)
        if indexes_TN.dtype != np.uint8:
            raise RecipeError(
                f"cut {cut.id}: its indexes are {indexes_TN.dtype}, not uint8; dump them again"
            )
        expected = teacher.num_frames(cut.num_samples)
        # One more is what icefall stores.
        shapes = [(expected, num_codebooks), (expected + 1, num_codebooks)]
        if indexes_TN.shape not in shapes:
            raise RecipeError(
                f"cut {cut.id}: its indexes have shape {indexes_TN.shape}, but "
                f"{cut.duration:.2f} s ask for {shapes[0]}; dump them again"
            )
        if indexes_TN.max(initial=0) >= codebook_size:
            raise RecipeError(
                f"cut {cut.id}: holds index {indexes_TN.max()}, but codebooks have "
                f"{codebook_size} entries; dump them again"
            )
        num_frames += len(indexes_TN)
    logging.info(
        f"verified: {len(cuts)} cuts have indexes, {num_frames} frames of {num_codebooks} bytes"
    )


def check_origin(cut, origin: Origin, accept_unknown: bool) -> None:
    """
    Raises:
      RecipeError: ``cut`` has no labels, or labels that ``origin`` did not make.
    """
    custom = cut.custom or {}
    if FIELD not in custom:
        raise RecipeError(f"cut {cut.id}: has no {FIELD}; run stage 5")
    found = custom.get(ORIGIN_FIELD)
    if found is None:
        if not accept_unknown:
            raise RecipeError(
                f"cut {cut.id}: its labels do not say what made them; "
                "set accept_unknown_origin: true if you know"
            )
    elif found["sha256"] != origin.sha256:
        raise RecipeError(
            f"cut {cut.id}: its labels were made by quantizer {found['quantizer']} (sha256 "
            f"{found['sha256'][:12]}), not by {origin.quantizer} (sha256 {origin.sha256[:12]}) "
            "that the conf names; run stage 5 again, or name the other quantizer"
        )


def _stored_indexes(cut, whole: bool = False) -> np.ndarray:
    """uint8 (T, N): the part of the array that lies in ``cut``, or the ``whole`` array."""
    if FIELD not in (cut.custom or {}):
        raise RecipeError(f"cut {cut.id}: has no {FIELD}; run stage 5")
    try:
        return cut.custom[FIELD].load() if whole else cut.load_custom(FIELD)
    except (OSError, KeyError) as error:
        raise RecipeError(
            f"{cut.custom[FIELD].array.storage_path}: indexes of cut {cut.id} cannot be read "
            f"({type(error).__name__}); run stage 5 again"
        ) from error


def load_indexes(cut) -> np.ndarray:
    """int64 (T, N) over the whole cut; `IGNORED` where a padded or mixed cut has no label.

    Raises:
      RecipeError: there are no labels, or their file is missing or damaged.
    """
    if not isinstance(cut, MixedCut):
        return _stored_indexes(cut).astype(np.int64)
    tracks = [
        track
        for track in cut.tracks
        if not isinstance(track.cut, PaddingCut) and FIELD in (track.cut.custom or {})
    ]
    if len(tracks) != 1:
        raise RecipeError(
            f"cut {cut.id}: {len(tracks)} of its tracks have {FIELD}; exactly one must"
        )
    track = tracks[0]
    labels_TN = _stored_indexes(track.cut)
    frame_shift = track.cut.custom[FIELD].frame_shift
    padded_TN = np.full((round(cut.duration / frame_shift), labels_TN.shape[1]), IGNORED)
    first = round(track.offset / frame_shift)
    last = min(first + len(labels_TN), len(padded_TN))
    padded_TN[first:last] = labels_TN[: last - first]
    return padded_TN


def collate_indexes(indexes: list[np.ndarray]) -> torch.Tensor:
    """int64 (B, T, N), padded with `IGNORED`."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(i) for i in indexes], batch_first=True, padding_value=IGNORED
    )
