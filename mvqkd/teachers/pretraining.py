"""Masked prediction of units: how a HuBERT is trained without transcripts.

B: utterances, L: samples, T: frames (`T_teacher`), C: channels of the front end, D: dimension,
F: frames of all utterances one after the other, K: units, P: dimension of the projection.

Source: Hsu et al., "HuBERT: Self-Supervised Speech Representation Learning by Masked Prediction
of Hidden Units", 2021 (arXiv 2106.07447), section III; spans: Baevski et al., "wav2vec 2.0", 2020
(arXiv 2006.11477), section 3.1.
"""

from __future__ import annotations

import itertools
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from lhotse import CutSet
from torch import nn
from torch.nn import functional as F

from mvqkd.data.audio import bucketed_batches, collate_audio, largest_batches
from mvqkd.data.labels import load_labels
from mvqkd.errors import RecipeError
from mvqkd.processes import gathered, num_processes, rank
from mvqkd.teachers.base import Teacher
from mvqkd.teachers.hubert import HubertTeacher
from mvqkd.teachers.units import FIELD, units_at_frames


@dataclass
class PredictionSettings:
    """What is masked, and how its units are predicted.

    Attributes:
      mask_prob: share of the frames at which a masked span begins; spans may overlap.
      mask_length: frames of a span.
      projection_dim: of the space in which frames and units are compared, by their cosine.
      temperature: that divides the cosine.
      feature_grad_scale: of the gradient that reaches the convolutions.
      feature_penalty: weight of the mean square of what the convolutions give.
    """

    mask_prob: float = 0.08
    mask_length: int = 10
    projection_dim: int = 256
    temperature: float = 0.1
    feature_grad_scale: float = 1.0
    feature_penalty: float = 0.0


@dataclass
class MaskedBatch:
    """B utterances of 16 kHz speech, with the unit of each frame, and whether it is masked.

    Past an utterance's frames ``mask_BT`` is false.
    """

    ids: list[str]
    waveforms_BL: torch.Tensor
    lengths_B: torch.Tensor
    units_BT: torch.Tensor
    mask_BT: torch.Tensor


def draw_mask(
    num_frames: int, settings: PredictionSettings, rng: np.random.Generator
) -> np.ndarray:
    """Bool (num_frames,): spans whose starts are drawn without replacement; one at least."""
    length = min(settings.mask_length, num_frames)
    places = num_frames - length + 1
    # A fraction of a span is one as often as it is large.
    number = int(settings.mask_prob * num_frames + rng.random())
    starts = rng.choice(places, min(max(number, 1), places), replace=False)
    mask_T = np.zeros(num_frames, bool)
    mask_T[starts[:, None] + np.arange(length)] = True
    return mask_T


class MaskedPrediction(nn.Module):
    """``teacher`` and what tells units by its output.

    Raises:
      RecipeError: the teacher has no embedding for masked frames.
    """

    def __init__(
        self, teacher: HubertTeacher, num_units: int, settings: PredictionSettings, seed: int
    ) -> None:
        super().__init__()
        if getattr(teacher.model.base_model, "masked_spec_embed", None) is None:
            raise RecipeError(
                "hubert.config.mask_time_prob: 0 leaves the model no embedding of masked frames; "
                "set it above 0"
            )
        self.teacher = teacher
        if hasattr(teacher.model, "lm_head"):
            teacher.model.lm_head.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        shape = (settings.projection_dim, teacher.dim)
        self.projection = nn.Linear(shape[1], shape[0])
        with torch.no_grad():
            weight_PD = torch.randn(shape, generator=generator)
            self.projection.weight.copy_(weight_PD / shape[1] ** 0.5)
            self.projection.bias.zero_()
        self.units_KP = nn.Parameter(torch.randn(num_units, shape[0], generator=generator))
        self._settings = settings

    def forward(
        self, waveforms_BL: torch.Tensor, lengths_B: torch.Tensor, mask_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logits_FK, inside_BT, penalty_B): of the frames inside, in float32.

        ``penalty_B`` is the mean square of what the convolutions give of each utterance.
        """
        squares_BT: list[torch.Tensor] = []

        def see_features(module: nn.Module, args: tuple) -> tuple | None:
            (features_BTC,) = args
            squares_BT.append(features_BTC.float().square().mean(-1))
            scale = self._settings.feature_grad_scale
            if scale == 1:
                return None
            # The value as it is, a part of its gradient.
            return (features_BTC * scale + features_BTC.detach() * (1 - scale),)

        projection = self.teacher.model.base_model.feature_projection
        hook = projection.register_forward_pre_hook(see_features)
        try:
            _, final_BTD, frames_B = self.teacher.hidden_states(
                waveforms_BL, lengths_B, [], mask_inputs=mask_BT
            )
        finally:
            hook.remove()
        inside_BT = torch.arange(final_BTD.shape[1], device=frames_B.device) < frames_B[:, None]
        projected_FP = self.projection(final_BTD[inside_BT])
        # A cosine in bfloat16 has three digits, of which the temperature takes one.
        with torch.autocast(projected_FP.device.type, enabled=False):
            cosine_FK = F.linear(
                F.normalize(projected_FP.float(), dim=-1), F.normalize(self.units_KP, dim=-1)
            )
        penalty_B = (squares_BT[0] * inside_BT).sum(1) / frames_B
        return cosine_FK / self._settings.temperature, inside_BT, penalty_B


class PretrainingTask:
    """Train ``teacher`` to predict the units of masked frames.

    Args:
      train_cuts, dev_cuts: with units, see `label_units`.
      units_teacher: whose frames the units are of.
      cache: keep what has been read in memory, 2 bytes a sample.
    """

    def __init__(
        self,
        teacher: HubertTeacher,
        num_units: int,
        units_teacher: Teacher,
        train_cuts: CutSet,
        dev_cuts: dict[str, CutSet],
        settings: PredictionSettings,
        max_duration: float,
        seed: int,
        device: torch.device,
        cache: bool = False,
    ) -> None:
        self.model = MaskedPrediction(teacher, num_units, settings, seed)
        self.epoch_seconds = sum(c.duration for c in train_cuts)
        self._teacher, self._units_teacher = teacher, units_teacher
        self._cuts, self._dev_cuts = train_cuts, dev_cuts
        self._settings, self._max_duration = settings, max_duration
        self._seed, self._device = seed, device
        self._audio: dict[str, np.ndarray] | None = {} if cache else None
        self._units: dict[str, np.ndarray] = {}

    def batches(self, epoch: int, start: int) -> Iterator[tuple[MaskedBatch, float]]:
        batches = self._cut_batches(epoch, rank(), num_processes())
        for cuts in itertools.islice(batches, start, None):
            yield self.collate(cuts, epoch), sum(c.duration for c in cuts)

    def largest_batches(self) -> list[MaskedBatch]:
        return [self.collate(c, 1) for c in largest_batches(self._cut_batches(1))]

    def _cut_batches(self, epoch: int, rank: int = 0, num_processes: int = 1) -> Iterator[CutSet]:
        return bucketed_batches(
            self._cuts,
            self._max_duration,
            self._seed,
            epoch,
            rank=rank,
            num_processes=num_processes,
        )

    def collate(self, cuts: CutSet, epoch: int) -> MaskedBatch:
        """The mask of an utterance depends on seed, epoch and its id alone."""
        audio = collate_audio(cuts, self._audio)
        units, masks = [], []
        for cut, length in zip(cuts, audio.lengths_B.tolist()):
            num_frames = self._teacher.num_frames(length)
            if num_frames < 1:
                raise RecipeError(
                    f"cut {cut.id}: {length} samples are less than one frame "
                    f"({self._teacher.receptive_field}); remove it"
                )
            units_T = self._units.get(cut.id)
            if units_T is None:
                units_T = units_at_frames(
                    load_labels(cut, FIELD)[:, 0], self._units_teacher, self._teacher, num_frames
                ).astype(np.uint16)
                self._units[cut.id] = units_T
            rng = np.random.default_rng([self._seed, epoch, zlib.crc32(cut.id.encode())])
            units.append(torch.from_numpy(units_T.astype(np.int64)))
            masks.append(torch.from_numpy(draw_mask(num_frames, self._settings, rng)))
        pad = nn.utils.rnn.pad_sequence
        return MaskedBatch(
            audio.ids,
            audio.waveforms_BL,
            audio.lengths_B,
            pad(units, batch_first=True),
            pad(masks, batch_first=True),
        )

    def loss(
        self, batch: MaskedBatch, step: int, warmup: float
    ) -> tuple[torch.Tensor, dict[str, float]]:
        loss, sums = self._loss_and_sums(batch)
        weight = sums["masked"]
        return loss, {
            "loss": sums["loss"],
            "masked-accuracy": 100 * sums["right-masked"],
            # Of as many frames as there are masked ones: one weight divides all figures.
            "unmasked-accuracy": 100 * sums["right-unmasked"] / max(sums["unmasked"], 1) * weight,
            "weight": weight,
        }

    def _loss_and_sums(self, batch: MaskedBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss; its part that is cross-entropy, how many frames there are and are right."""
        mask_BT = batch.mask_BT.to(self._device)
        logits_FK, inside_BT, penalty_B = self.model(
            batch.waveforms_BL.to(self._device), batch.lengths_B.to(self._device), mask_BT
        )
        masked_F, units_F = mask_BT[inside_BT], batch.units_BT.to(self._device)[inside_BT]
        masked_loss = F.cross_entropy(logits_FK[masked_F], units_F[masked_F], reduction="sum")
        loss = masked_loss
        if self._settings.feature_penalty:
            loss = loss + self._settings.feature_penalty * (penalty_B * mask_BT.sum(1)).sum()
        right_F = logits_FK.detach().argmax(-1) == units_F
        sums = {
            "loss": masked_loss.detach(),
            "right-masked": (right_F & masked_F).sum(),
            "right-unmasked": (right_F & ~masked_F).sum(),
            "masked": masked_F.sum(),
            "unmasked": (~masked_F).sum(),
        }
        # Together, for each on its own would have a GPU waited for.
        values = torch.stack([value.double() for value in sums.values()]).tolist()
        return loss, dict(zip(sums, values))

    def divisor(self, batch: MaskedBatch) -> float:
        """The number of masked frames."""
        return int(batch.mask_BT.sum())

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss (nats), and accuracy (%) of masked and unmasked frames; masks are always the same.

        Of several processes each has its share of the batches, and all get the whole.
        """
        figures = {}
        for name, cuts in self._dev_cuts.items():
            sums: dict[str, float] = defaultdict(float)
            batches = bucketed_batches(cuts, self._max_duration, seed=0, epoch=0)
            for batch_cuts in itertools.islice(batches, rank(), None, num_processes()):
                for key, value in self._loss_and_sums(self.collate(batch_cuts, 0))[1].items():
                    sums[key] += value
            total: dict[str, float] = defaultdict(float)
            for part in gathered(dict(sums)):
                for key, value in part.items():
                    total[key] += value
            figures[f"loss-{name}"] = total["loss"] / max(total["masked"], 1)
            for kind in ("masked", "unmasked"):
                share = total[f"right-{kind}"] / max(total[kind], 1)
                figures[f"{kind}-accuracy-{name}"] = 100 * share
        return figures

    def describe(self, batch: MaskedBatch) -> str:
        return ", ".join(batch.ids)
