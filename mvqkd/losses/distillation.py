"""What a student learns from a teacher's stored codebook indexes.

``mvq``: predict the indexes, cross-entropy per codebook (Guo, Yang et al., ICASSP 2023, arXiv
2211.00508, section 3). ``mvq-l2`` and ``mvq-l1``: decode the indexes to the embedding that
they stand for (a look-up of N centers and a sum), and regress on it.

B: utterances, T: student frames, U: teacher frames, N: codebooks, R: teacher frames that
a student frame answers for, C: channels of the student, D: dimension of the teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from mvqkd.data.labels import IGNORED
from mvqkd.errors import RecipeError
from mvqkd.losses.codebook import JointCodebookLoss
from mvqkd.quantizer import Quantizer


@dataclass
class DistillationSettings:
    """What is distilled, into which layer, and how strongly."""

    kind: Literal["none", "mvq", "mvq-l1", "mvq-l2"] = "none"
    # The quantizer that made the labels. ``mvq`` does without, on labels that others have made:
    # it then needs the entries of their codebooks, and the centre of the teacher's frame 0 (s).
    quantizer: Path | None = None
    codebook_size: int = 256
    frame_offset: float = 0.0125
    # Beside the transducer's losses, all summed over the batch.
    scale: float = 0.1
    # The student's layer whose output predicts, from 1.
    layer: int = 6
    # Teacher frames by which a student frame's partners are moved; 0 as published.
    pairing_shift: int = 0
    # Take labels that do not say what made them (icefall's, the published ones).
    accept_unknown_origin: bool = False


class Codebooks(NamedTuple):
    """Sizes of a quantizer of which nothing else is known."""

    num_codebooks: int
    codebook_size: int


@dataclass
class Pairing:
    """Which teacher frames a student frame answers for.

    A student frame takes R = student shift / teacher shift neighbours: the latest such
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
        self.group_size = round(ratio)
        if self.group_size < 1 or abs(ratio - self.group_size) > 1e-6:
            raise RecipeError(
                f"labels: a student frame of {1000 * self.student_shift:g} ms is no multiple of "
                f"a teacher frame of {1000 * self.teacher_shift:g} ms; use another teacher"
            )

    def first_frame(self) -> int:
        """The teacher frame that student frame 0's group begins with."""
        group_centre = self.teacher_offset + (self.group_size - 1) / 2 * self.teacher_shift
        late = (self.student_offset - group_centre) / self.teacher_shift
        return math.floor(late + 1e-6) + self.extra_shift

    def pair(self, labels_BUN: torch.Tensor, num_frames: int) -> torch.Tensor:
        """The labels of each student frame: (B, T, R, N), `IGNORED` where there is none."""
        first, size = self.first_frame(), self.group_size
        frames_TR = torch.arange(num_frames)[:, None] * size + first + torch.arange(size)
        num_labels = labels_BUN.shape[1]
        outside_TR = (frames_TR < 0) | (frames_TR >= num_labels)
        paired_BTRN = labels_BUN[:, frames_TR.clamp(0, num_labels - 1)]
        return paired_BTRN.masked_fill(outside_TR[None, :, :, None].to(labels_BUN.device), IGNORED)


class RegressionHead(nn.Module):
    """A linear layer from the student's frame to its teacher frames' normalized embeddings.

    The centers, and the mean and deviation that each dimension is normalized by, come from
    the quantizer and are not part of the checkpoint.
    """

    def __init__(
        self,
        channels: int,
        group_size: int,
        quantizer: Quantizer,
        mean_D: torch.Tensor,
        std_D: torch.Tensor,
        power: int,
    ) -> None:
        super().__init__()
        self.power = power
        self.linear = nn.Linear(channels, group_size * quantizer.dim)
        with torch.no_grad():
            centers_NKD = quantizer.get_centers().detach() / std_D
        self.register_buffer("centers_NKD", centers_NKD.clone(), persistent=False)
        self.register_buffer("origin_D", mean_D / std_D, persistent=False)

    def forward(self, x_BTC: torch.Tensor, labels_BTRN: torch.Tensor) -> torch.Tensor:
        """Averaged over the dimensions and teacher frames of a student frame, summed over those."""
        counts_BTR = (labels_BTRN != IGNORED).all(-1)
        num_codebooks, codebook_size, dim = self.centers_NKD.shape
        offsets_N = torch.arange(num_codebooks, device=labels_BTRN.device) * codebook_size
        flat_FN = (labels_BTRN[counts_BTR] + offsets_N).long()
        target_FD = F.embedding_bag(flat_FN, self.centers_NKD.flatten(0, 1), mode="sum")
        target_FD = target_FD - self.origin_D
        predicted_FD = self.linear(x_BTC).unflatten(-1, (-1, dim))[counts_BTR]
        error_FD = predicted_FD.float() - target_FD
        error = error_FD.abs() if self.power == 1 else error_FD.square()
        return error.mean(-1).sum() / labels_BTRN.shape[2]


class Distillation:
    """The loss on the student's middle layer, and the head that the student carries for it."""

    def __init__(
        self,
        settings: DistillationSettings,
        channels: int,
        pairing: Pairing,
        quantizer: Quantizer | Codebooks,
        meta: dict,
    ) -> None:
        """
        Raises:
          RecipeError: nothing but ``mvq`` learns from indexes whose quantizer is not known.
        """
        self._pairing, self._scale = pairing, settings.scale
        if settings.kind == "mvq":
            self.head: nn.Module = JointCodebookLoss(
                channels,
                pairing.group_size * quantizer.num_codebooks,
                codebook_size=quantizer.codebook_size,
                is_joint=False,
                ignore_index=IGNORED,
            )
        elif isinstance(quantizer, Codebooks):
            raise RecipeError(
                f"distillation.quantizer: kind {settings.kind} regresses on what the quantizer "
                "decodes; name its file, or take kind mvq"
            )
        else:
            power = 2 if settings.kind == "mvq-l2" else 1
            self.head = RegressionHead(
                channels, pairing.group_size, quantizer, meta["mean"], meta["std"], power
            )

    def loss(
        self, middle_BTC: torch.Tensor, lens_B: torch.Tensor, labels_BUN: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss, scaled and summed over the batch; with ``mvq`` also how often each codebook's
        index was the most probable one, (N,), averaged over a student frame's teacher frames."""
        num_frames = middle_BTC.shape[1]
        labels_BTRN = self._pairing.pair(labels_BUN, num_frames)
        padding_BT = torch.arange(num_frames, device=lens_B.device) >= lens_B[:, None]
        labels_BTRN = labels_BTRN.masked_fill(padding_BT[:, :, None, None], IGNORED)
        if isinstance(self.head, JointCodebookLoss):
            loss, accuracy_RN = self.head.loss_and_accuracy(middle_BTC, labels_BTRN.flatten(2))
            accuracy_N = accuracy_RN.view(labels_BTRN.shape[2:]).mean(dim=0)
            return self._scale * loss, accuracy_N
        return self._scale * self.head(middle_BTC, labels_BTRN), None
