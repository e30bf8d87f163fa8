"""From the settings of a distillation to its terms: quantizers, teachers, checks of the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lhotse import CutSet

from mvqkd.data.audio import collate_audio
from mvqkd.data.labels import (
    CodebookIndexes,
    Embeddings,
    LabelKind,
    Origin,
    check_origin,
    common_facts,
    compute_labels,
    labelled_part,
    load_labels,
    origin_field,
)
from mvqkd.errors import RecipeError
from mvqkd.losses.distillation import (
    PREDICTS_INDEXES,
    Codebooks,
    Distillation,
    DistillationSettings,
    Pairing,
    Term,
    TermSettings,
)
from mvqkd.quantizer import Quantizer, load_quantizer
from mvqkd.quantizer.frames import frame_statistics
from mvqkd.students.conformer import Conformer
from mvqkd.teachers import load_teacher

if TYPE_CHECKING:
    from mvqkd.teachers.base import Teacher

# Utterances of the training set, spread over it, whose embeddings give mean and deviation.
_STATISTICS_UTTERANCES = 100
# Centre of the first frame (s) of indexes whose quantizer does not say: those that others have
# published are HuBERT's.
_HUBERT_OFFSET = 0.0125


def build_distillation(
    settings: DistillationSettings, encoder: Conformer, cuts: CutSet, device: torch.device
) -> Distillation | None:
    """What ``settings`` ask for; None where that is nothing.

    Args:
      encoder: the student's.
      cuts: the training set. All labels that are to be learned from are checked.
      device: of the teachers in the loop.

    Raises:
      RecipeError: a setting is missing, or labels are not what the settings name.
    """
    wanted = settings.terms()
    if not wanted:
        return None
    sources = _Sources(cuts, device)
    return Distillation([sources.term(term, encoder) for term in wanted], sources.in_loop)


class _Sources:
    """What terms learn from; that of several is loaded and checked once."""

    def __init__(self, cuts: CutSet, device: torch.device) -> None:
        self._cuts, self._device = cuts, device
        self._teachers: dict[tuple, Teacher] = {}
        self._kinds: dict[tuple, LabelKind] = {}

    @property
    def in_loop(self) -> list[LabelKind]:
        return list(self._kinds.values())

    def term(self, term: TermSettings, encoder: Conformer) -> Term:
        quantizer, meta = None, {}
        if term.quantizer is not None:
            quantizer, meta = load_quantizer(term.quantizer)
        elif term.on_indexes():
            quantizer = self._unknown_quantizer(term)
        if term.in_loop:
            kind = self._kind(term, quantizer, meta)
            term.field, origin = kind.field, kind.origin
            shift, offset = kind.teacher.frame_shift, kind.teacher.frame_offset
        else:
            origin = None
            if not isinstance(quantizer, Codebooks):  # whose labels have been checked
                origin = self._checked_origin(term, meta)
            part, _ = labelled_part(self._cuts[0], term.field)
            shift = part.custom[term.field].frame_shift
            offset = _stored_offset(term, meta, origin)
        pairing = Pairing(
            encoder.frame_shift, encoder.frame_offset, shift, offset, term.pairing_shift
        )
        mean_D = std_D = None
        if term.kind not in PREDICTS_INDEXES:
            mean_D, std_D = self._statistics(term, meta, origin)
        return Term(term, encoder.settings.d_model, pairing, quantizer, mean_D, std_D)

    def _unknown_quantizer(self, term: TermSettings) -> Codebooks:
        """What stored indexes that others have made tell of their quantizer."""
        if term.in_loop:
            raise RecipeError(f"distillation.quantizer: kind {term.kind} needs one; name its file")
        if term.kind not in PREDICTS_INDEXES:
            raise RecipeError(
                f"distillation.quantizer: kind {term.kind} regresses on what the quantizer "
                "decodes; name its file, or take kind mvq"
            )
        num_codebooks, _ = common_facts(self._cuts, term.accept_unknown_origin, term.field)
        return Codebooks(num_codebooks, term.codebook_size)

    def _checked_origin(self, term: TermSettings, meta: dict[str, Any]) -> Origin:
        """That of a term's stored labels, which all cuts have."""
        if term.on_indexes():
            origin = _quantizer_origin(meta)
        else:
            # Embeddings know what made them; the conf may insist on it.
            custom = labelled_part(self._cuts[0], term.field)[0].custom or {}
            found = custom.get(origin_field(term.field), {})
            origin = Origin(
                term.teacher or found.get("teacher", ""),
                term.teacher_layer or found.get("layer", 0),
                found.get("quantizer", "embeddings"),
                "",
            )
        for cut in self._cuts:
            check_origin(cut, origin, term.accept_unknown_origin, term.field)
        return origin

    def _kind(
        self, term: TermSettings, quantizer: Quantizer | None, meta: dict[str, Any]
    ) -> LabelKind:
        """The labels that a teacher in the loop makes."""
        name = term.teacher or meta.get("teacher")
        layer = meta.get("layer") if term.on_indexes() else term.teacher_layer or meta.get("layer")
        if name is None or layer is None:
            raise RecipeError(
                "distillation.in_loop: neither the conf nor a quantizer says which layer of which "
                "teacher; give teacher and teacher_layer"
            )
        indexed = (str(term.quantizer), term.refine_iters) if term.on_indexes() else None
        key = (name, term.revision, layer, indexed)
        if key not in self._kinds:
            if key[:2] not in self._teachers:
                teacher = load_teacher(name, term.revision).eval().to(self._device)
                self._teachers[key[:2]] = teacher.requires_grad_(False)
            teacher = self._teachers[key[:2]]
            field = f"in_loop_{len(self._kinds) + 1}"
            kind: LabelKind
            if quantizer is not None and term.on_indexes():
                if teacher.dim != quantizer.dim:
                    raise RecipeError(
                        f"{term.quantizer}: quantizes {quantizer.dim} dimensions, and teacher "
                        f"{name} has {teacher.dim}; name the quantizer's teacher"
                    )
                teacher.check_layer(layer)
                # The head decodes on the device of the student, by centers of its own.
                origin = Origin(name, layer, meta["quantizer_id"], meta["sha256"])
                kind = CodebookIndexes(teacher, quantizer, origin, term.refine_iters, field)
            else:
                kind = Embeddings(teacher, layer, "float32", field)
            kind.to(self._device)
            self._kinds[key] = kind
        return self._kinds[key]

    def _statistics(
        self, term: TermSettings, meta: dict[str, Any], origin: Origin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the embeddings that a term regresses on, (D,) each."""
        same = (meta.get("teacher"), meta.get("layer")) == (origin.teacher, origin.layer)
        if "mean" in meta and (same or term.on_indexes()):
            return meta["mean"], meta["std"]
        if term.on_indexes():
            raise RecipeError(
                f"{term.quantizer}: knows no mean and deviation of its frames, which {term.kind} "
                "needs; train it here, or use kind mvq"
            )
        cuts = list(self._cuts)
        chosen = cuts[:: -(-len(cuts) // _STATISTICS_UTTERANCES)]
        frames = [self._embeddings(term, cut) for cut in chosen]
        return frame_statistics(np.concatenate(frames), term.field)

    def _embeddings(self, term: TermSettings, cut) -> np.ndarray:
        """float32 (T, D)."""
        if not term.in_loop:
            embeddings_TD = load_labels(cut, term.field)
            return embeddings_TD[~np.isnan(embeddings_TD[:, 0])].astype(np.float32)
        batch = collate_audio([cut])
        kinds: Sequence[LabelKind] = [k for k in self.in_loop if k.field == term.field]
        waveforms_BL = batch.waveforms_BL.to(self._device)
        found = compute_labels(kinds, waveforms_BL, batch.lengths_B.to(self._device))
        return found[term.field][0].cpu().numpy()


def _quantizer_origin(meta: dict[str, Any]) -> Origin:
    # The authors' files say nothing of a teacher; the hash of the weights tells them all the same.
    known = {"teacher": "", "layer": 0, **meta}
    return Origin.of(known)


def _stored_offset(term: TermSettings, meta: dict[str, Any], origin: Origin | None) -> float:
    if term.frame_offset is not None:
        return term.frame_offset
    if "frame_offset" in meta and (term.on_indexes() or meta["teacher"] == origin.teacher):
        return meta["frame_offset"]
    if term.on_indexes():
        return _HUBERT_OFFSET
    raise RecipeError(
        f"distillation: nothing says when the first frame of {term.field} is; give frame_offset, "
        "the seconds to its centre (0.0125 for HuBERT, WavLM and wav2vec 2.0, 0 for Whisper)"
    )
