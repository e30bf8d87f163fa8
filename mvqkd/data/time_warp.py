"""SpecAugment's time warp, and what it does to times, so that labels can follow.

Park et al. 2019 (arXiv 1904.08779), section 2; drawn and interpolated as lhotse does, which does
not say what it has drawn.

T: feature frames, F: bins.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class TimeWarp:
    """What lies before frame ``center`` of an utterance of ``num_frames`` is stretched or squeezed
    to end at frame ``moved``; what lies behind it takes up the rest."""

    num_frames: int
    center: int
    moved: int
    # Seconds.
    frame_shift: float = 0.01

    @staticmethod
    def drawn(num_frames: int, factor: int) -> TimeWarp | None:
        """One by at most ``factor`` frames, from Python's ``random``; None for utterances of no
        more than 2 * ``factor`` + 1 frames, and where nothing moves."""
        if num_frames <= 2 * factor + 1:
            return None
        center = random.randrange(factor + 1, num_frames - factor)
        moved = random.randint(center - factor, center + factor)
        return TimeWarp(num_frames, center, moved) if moved != center else None

    def features(self, x_TF: torch.Tensor) -> torch.Tensor:
        """``x_TF`` warped; frames from ``num_frames`` on stay."""
        before_TF, after_TF = x_TF[: self.center], x_TF[self.center : self.num_frames]
        return torch.cat(
            [
                _resampled(before_TF, self.moved),
                _resampled(after_TF, self.num_frames - self.moved),
                x_TF[self.num_frames :],
            ]
        )

    def source(self, times: torch.Tensor) -> torch.Tensor:
        """At what time before the warp that was which is now at ``times``; both in seconds."""
        frames = times / self.frame_shift
        before = frames * (self.center / self.moved)
        stretch = (self.num_frames - self.center) / (self.num_frames - self.moved)
        after = self.center + (frames - self.moved) * stretch
        after = torch.where(frames < self.num_frames, after, frames)
        return torch.where(frames < self.moved, before, after) * self.frame_shift


def _resampled(x_TF: torch.Tensor, num_frames: int) -> torch.Tensor:
    size = (num_frames, x_TF.shape[1])
    return F.interpolate(x_TF[None, None], size, mode="bicubic", align_corners=False)[0, 0]
