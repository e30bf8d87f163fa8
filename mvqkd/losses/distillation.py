"""What a student learns from a teacher: a sum of terms, each on the output of one layer.

``mvq``: predict the codebook indexes of the teacher's embedding, cross-entropy per codebook (Guo,
Yang et al., ICASSP 2023, arXiv 2211.00508, section 4); ``mvq-joint``: each codebook also sees the
true indexes of those before it. ``mvq-l2`` and ``mvq-l1``: decode the indexes to the embedding that
they stand for (a look-up of N centers and a sum), and regress on it. ``l2`` and ``l1``: regress on
the embedding itself.

B: utterances, T: student frames, U: teacher frames, N: codebooks, R: teacher frames that
a student frame answers for, C: channels of the student, D: dimension of the teacher, X: N or D,
F: pairs of a student and a teacher frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from mvqkd.data.labels import FIELD, IGNORED, LabelKind, compute_labels, has_label, no_label
from mvqkd.data.time_warp import TimeWarp
from mvqkd.errors import RecipeError
from mvqkd.losses.codebook import JointCodebookLoss
from mvqkd.quantizer import Quantizer

Kind = Literal["none", "mvq", "mvq-joint", "mvq-l1", "mvq-l2", "l1", "l2"]
# The other kinds regress.
PREDICTS_INDEXES = ("mvq", "mvq-joint")
# A dimension of the teacher that never changes has none; its normalized value stays finite.
_MIN_DEVIATION = 1e-5


@dataclass
class TermSettings:
    """What is distilled, into which layer, and how strongly."""

    kind: Kind = "none"
    # Beside the transducer's losses, all summed over the batch.
    scale: float = 0.1
    # The student's layer whose output predicts, from 1.
    layer: int = 6
    # The cuts' field that holds the labels; None: codebook_indexes, and of l1 and l2 embeddings.
    field: str | None = None
    # The quantizer that made the labels. Of l1 and l2: one that knows the mean and deviation of
    # the embeddings; where none does, they are taken over some of the training set. ``mvq`` and
    # ``mvq-joint`` do without one, on stored labels that others have made.
    quantizer: Path | None = None
    # Entries of the codebooks of a quantizer that is not known.
    codebook_size: int = 256
    # Run the teacher inside the training step instead of reading labels.
    in_loop: bool = False
    # The teacher, and of l1 and l2 its layer, from 1; None: the quantizer's (or the labels').
    teacher: str | None = None
    teacher_layer: int | None = None
    # Of a teacher in the loop that is named by its name on the hub: a commit. None: the newest.
    revision: str | None = None
    # Rounds of refinement of indexes that are made in the loop.
    refine_iters: int = 5
    # Seconds from the start of the audio to the centre of the teacher's first frame, of stored
    # labels; None: as the quantizer says of its teacher. Where it says nothing, or none is known,
    # indexes are taken to be of HuBERT (0.0125), and embeddings need it here.
    frame_offset: float | None = None
    # Teacher frames by which a student frame's partners are moved; 0 as published.
    pairing_shift: int = 0
    # Take labels that do not say what made them (icefall's, the published ones).
    accept_unknown_origin: bool = False

    def on_indexes(self) -> bool:
        """Whether this kind learns from codebook indexes; else from embeddings."""
        return self.kind.startswith("mvq")


@dataclass
class MoreSettings:
    """A term beside the first one, whose values it takes where it has None; but a field of its own.

    See `TermSettings`.
    """

    kind: Kind
    scale: float | None = None
    layer: int | None = None
    field: str | None = None
    quantizer: Path | None = None
    codebook_size: int | None = None
    in_loop: bool | None = None
    teacher: str | None = None
    teacher_layer: int | None = None
    revision: str | None = None
    refine_iters: int | None = None
    frame_offset: float | None = None
    pairing_shift: int | None = None
    accept_unknown_origin: bool | None = None


@dataclass
class DistillationSettings(TermSettings):
    """The first term, and those beside it."""

    more: list[MoreSettings] = field(default_factory=list)

    def terms(self) -> list[TermSettings]:
        """All terms, each with all of its values.

        Raises:
          RecipeError: there are terms beside none.
        """
        if self.kind == "none":
            if self.more:
                raise RecipeError("distillation.more: the first kind is none; name it there")
            return []
        first = TermSettings(**{f.name: getattr(self, f.name) for f in fields(TermSettings)})
        terms = [first]
        for more in self.more:
            if more.kind == "none":
                raise RecipeError("distillation.more: a term of kind none; leave it out")
            given = {k: v for k, v in vars(more).items() if v is not None}
            terms.append(replace(first, **{"field": None, **given}))
        for term in terms:
            if term.field is None:
                term.field = FIELD if term.on_indexes() else "embeddings"
        return terms

    def layers(self) -> list[int]:
        """The student's layers that the terms are on, in order."""
        return sorted({term.layer for term in self.terms()})


class Codebooks(NamedTuple):
    """Sizes of a quantizer of which nothing else is known."""

    num_codebooks: int
    codebook_size: int


@dataclass
class Pairing:
    """Which teacher frames a student frame answers for.

    A student frame takes R = student shift / teacher shift neighbours, rounded up: the latest such
    group that is not centred after the student frame. For a student of 40 ms (first centre
    35 ms) and HuBERT (20 ms, 12.5 ms) those are (2j, 2j + 1), as published.
    """

    student_shift: float
    student_offset: float
    teacher_shift: float
    teacher_offset: float
    extra_shift: int = 0

    def __post_init__(self) -> None:
        ratio = self.student_shift / self.teacher_shift
        # Up, so that no teacher frame is left out where the ratio is no whole number.
        self.group_size = max(1, math.ceil(ratio - 1e-6))

    def first_frames(self, times: torch.Tensor) -> torch.Tensor:
        """The teacher frames that the groups of student frames centred at ``times`` (s, float64)
        begin with."""
        group_centre = self.teacher_offset + (self.group_size - 1) / 2 * self.teacher_shift
        late = (times - group_centre) / self.teacher_shift
        return (late + 1e-6).floor().long() + self.extra_shift

    def pair(
        self,
        labels_BUX: torch.Tensor,
        num_frames: int,
        warps: Sequence[TimeWarp | None] | None = None,
    ) -> torch.Tensor:
        """The labels of each student frame: (B, T, R, X), `no_label` where there is none.

        ``warps``, one an utterance, say how the student's features were warped in time.
        """
        num_labels, num_columns = labels_BUX.shape[1:]
        nothing = no_label(labels_BUX.dtype)
        if num_labels == 0:
            shape = (len(labels_BUX), num_frames, self.group_size, num_columns)
            return labels_BUX.new_full(shape, nothing)
        times_T = torch.arange(num_frames, dtype=torch.float64) * self.student_shift
        times_T += self.student_offset
        if warps is None:
            times_BT = times_T[None]
        else:
            times_BT = torch.stack([times_T if w is None else w.source(times_T) for w in warps])
        frames_BTR = self.first_frames(times_BT)[:, :, None] + torch.arange(self.group_size)
        outside_BTR = (frames_BTR < 0) | (frames_BTR >= num_labels)
        frames_BTR = frames_BTR.clamp(0, num_labels - 1)
        if warps is None:
            paired_BTRX = labels_BUX[:, frames_BTR[0]]
        else:
            paired_BTRX = labels_BUX[torch.arange(len(labels_BUX))[:, None, None], frames_BTR]
        return paired_BTRX.masked_fill(outside_BTR[..., None].to(labels_BUX.device), nothing)


class RegressionHead(nn.Module):
    """A linear layer from the student's frame to its teacher frames' normalized embeddings.

    The centers, and the mean and deviation that each dimension is normalized by, are not part of
    the checkpoint.

    Args:
      mean_D, std_D: of the teacher's embeddings.
      power: 1 or 2.
      quantizer: decodes labels that are indexes; None: they are embeddings.
    """

    def __init__(
        self,
        channels: int,
        group_size: int,
        mean_D: torch.Tensor,
        std_D: torch.Tensor,
        power: int,
        quantizer: Quantizer | None = None,
    ) -> None:
        super().__init__()
        self.power = power
        self.linear = nn.Linear(channels, group_size * len(mean_D))
        std_D = std_D.clamp(min=_MIN_DEVIATION)
        self.register_buffer("std_D", std_D, persistent=False)
        self.register_buffer("origin_D", mean_D / std_D, persistent=False)
        self.centers_NKD: torch.Tensor | None
        centers_NKD = None
        if quantizer is not None:
            with torch.no_grad():
                centers_NKD = quantizer.get_centers().detach().to(std_D.device) / std_D
        self.register_buffer("centers_NKD", centers_NKD, persistent=False)

    def _target(self, labels_FX: torch.Tensor) -> torch.Tensor:
        """float32 (F, D)."""
        if self.centers_NKD is None:
            return labels_FX.float() / self.std_D - self.origin_D
        num_codebooks, codebook_size, _ = self.centers_NKD.shape
        offsets_N = torch.arange(num_codebooks, device=labels_FX.device) * codebook_size
        entries_FN = (labels_FX + offsets_N).long()
        decoded_FD = F.embedding_bag(entries_FN, self.centers_NKD.flatten(0, 1), mode="sum")
        return decoded_FD - self.origin_D

    def forward(self, x_BTC: torch.Tensor, labels_BTRX: torch.Tensor) -> torch.Tensor:
        """Averaged over the dimensions and teacher frames of a student frame, summed over those."""
        counts_BTR = has_label(labels_BTRX)
        target_FD = self._target(labels_BTRX[counts_BTR])
        dim = len(self.origin_D)
        predicted_FD = self.linear(x_BTC).unflatten(-1, (-1, dim))[counts_BTR]
        error_FD = predicted_FD.float() - target_FD
        error = error_FD.abs() if self.power == 1 else error_FD.square()
        return error.mean(-1).sum() / labels_BTRX.shape[2]


class Term:
    """One loss on the output of one of the student's layers, and the head that it takes.

    Args:
      settings: with all of its values.
      channels: C.
      quantizer: of the kinds that learn from indexes; its sizes are enough to predict them.
      mean_D, std_D: of the kinds that regress, over some of the teacher's embeddings.
    """

    head: nn.Module

    def __init__(
        self,
        settings: TermSettings,
        channels: int,
        pairing: Pairing,
        quantizer: Quantizer | Codebooks | None = None,
        mean_D: torch.Tensor | None = None,
        std_D: torch.Tensor | None = None,
    ) -> None:
        self.settings, self._pairing = settings, pairing
        if settings.kind in PREDICTS_INDEXES:
            self.head = JointCodebookLoss(
                channels,
                pairing.group_size * quantizer.num_codebooks,
                codebook_size=quantizer.codebook_size,
                is_joint=settings.kind == "mvq-joint",
                ignore_index=IGNORED,
            )
        else:
            power = 2 if settings.kind.endswith("l2") else 1
            decoder = quantizer if settings.on_indexes() else None
            self.head = RegressionHead(channels, pairing.group_size, mean_D, std_D, power, decoder)

    def loss(
        self,
        middle_BTC: torch.Tensor,
        lens_B: torch.Tensor,
        labels_BUX: torch.Tensor,
        warps: Sequence[TimeWarp | None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss, scaled and summed over the batch; where indexes are predicted also how often
        each codebook's was the most probable one, (N,), averaged over a student frame's teacher
        frames."""
        num_frames = middle_BTC.shape[1]
        labels_BTRX = self._pairing.pair(labels_BUX, num_frames, warps)
        padding_BT = torch.arange(num_frames, device=lens_B.device) >= lens_B[:, None]
        labels_BTRX = labels_BTRX.masked_fill(
            padding_BT[:, :, None, None], no_label(labels_BTRX.dtype)
        )
        if isinstance(self.head, JointCodebookLoss):
            loss, accuracy_RN = self.head.loss_and_accuracy(middle_BTC, labels_BTRX.flatten(2))
            accuracy_N = accuracy_RN.view(labels_BTRX.shape[2:]).mean(dim=0)
            return self.settings.scale * loss, accuracy_N
        return self.settings.scale * self.head(middle_BTC, labels_BTRX), None


class Distillation:
    """The terms of a student's distillation.

    Args:
      terms: at least one; the field of each is stored in the cuts or computed by ``in_loop``.
      in_loop: labels that are computed inside the training step, by a teacher that is not trained.

    Attributes:
      head: what the student carries: the head of the only term, or a list of all heads.
      layers: the student's layers that the terms are on, in order.
      fields: of the stored labels.
      in_loop: whether a teacher wants to hear the batch.
    """

    def __init__(self, terms: Sequence[Term], in_loop: Sequence[LabelKind] = ()) -> None:
        self._terms, self._kinds = list(terms), list(in_loop)
        heads = [term.head for term in terms]
        self.head = heads[0] if len(heads) == 1 else nn.ModuleList(heads)
        self.layers = sorted({term.settings.layer for term in terms})
        computed = {kind.field for kind in in_loop}
        wanted = dict.fromkeys(term.settings.field for term in terms)
        self.fields = [name for name in wanted if name not in computed]
        self.in_loop = bool(in_loop)

    def computed_labels(
        self, waveforms_BL: torch.Tensor, samples_B: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """By field, what the teachers in the loop say of a batch: (B, U, N) or (B, U, D)."""
        labels = {}
        # As stored labels are made: in float32, whatever the student is trained in.
        with torch.autocast(waveforms_BL.device.type, enabled=False):
            found = compute_labels(self._kinds, waveforms_BL, samples_B)
        for name, (encoded_FX, frames) in found.items():
            if not encoded_FX.is_floating_point():
                encoded_FX = encoded_FX.long()
            labels[name] = nn.utils.rnn.pad_sequence(
                encoded_FX.split(frames),
                batch_first=True,
                padding_value=no_label(encoded_FX.dtype),
            )
        return labels

    def losses(
        self,
        middle_outputs: Sequence[torch.Tensor],
        lens_B: torch.Tensor,
        labels: Mapping[str, torch.Tensor],
        warps: Sequence[TimeWarp | None] | None = None,
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
        """What `Term.loss` gives of each term, by a name: that of the only one is empty.

        Args:
          middle_outputs: (B, T, C) each, of ``layers``.
          lens_B: student frames.
          labels: by field, (B, U, X).
          warps: how the features were warped in time.
        """
        found = {}
        for number, term in enumerate(self._terms, 1):
            settings = term.settings
            name = f"{number}-{settings.kind}-" if len(self._terms) > 1 else ""
            middle_BTC = middle_outputs[self.layers.index(settings.layer)]
            found[name] = term.loss(middle_BTC, lens_B, labels[settings.field], warps)
        return found
