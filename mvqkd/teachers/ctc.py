"""CTC training of a HuBERT on transcribed speech: a `Task` of the training loop.

B: utterances, T: frames, V: symbols.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lhotse import CutSet
from torch import nn
from torch.nn import functional as F
from transformers import HubertConfig, HubertForCTC

from mvqkd.data.audio import AudioBatch, bucketed_batches, collate_audio, largest_batches
from mvqkd.decoding.scoring import Result, word_error_rate
from mvqkd.errors import RecipeError, reason_of
from mvqkd.processes import gathered, num_processes, rank
from mvqkd.teachers.base import Teacher
from mvqkd.teachers.front_end import initialize_filterbank
from mvqkd.teachers.hubert import HubertTeacher

SYMBOLS = ["<pad>", "|", "'", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]


@dataclass
class HubertSettings:
    """Keys of transformers' HubertConfig, beyond its defaults."""

    config: dict[str, Any] = field(default_factory=dict)
    # Start the first two convolutions as a filterbank.
    filterbank_init: bool = True


def new_hubert(settings: HubertSettings, seed: int) -> HubertTeacher:
    """A HuBERT with a CTC head and random weights."""
    torch.manual_seed(seed)
    try:
        config = HubertConfig(vocab_size=len(SYMBOLS), pad_token_id=0, **settings.config)
        model = HubertForCTC(config)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"hubert.config: {reason_of(error)}; mend the teacher conf") from error
    if settings.filterbank_init:
        initialize_filterbank(model, seed)
    return HubertTeacher(model, do_normalize=True, vocabulary=SYMBOLS)


def add_ctc_head(teacher: Teacher, seed: int) -> None:
    """Give ``teacher``, which has none, a CTC head with random weights.

    Raises:
      RecipeError: it is not of HuBERT's kin.
    """
    if not isinstance(teacher, HubertTeacher):
        raise RecipeError(
            f"teacher {teacher.name}: takes no CTC head; give a HuBERT, wav2vec 2.0 or WavLM"
        )
    model = teacher.model
    head = nn.Linear(teacher.dim, len(SYMBOLS))
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(head.weight, std=model.config.initializer_range, generator=generator)
    nn.init.zeros_(head.bias)
    model.lm_head = head
    model.config.vocab_size, model.config.pad_token_id = len(SYMBOLS), 0
    teacher.vocabulary = list(SYMBOLS)


class CtcTask:
    """Fine-tune ``teacher`` on ``train_cuts``, each epoch at speeds drawn anew."""

    def __init__(
        self,
        teacher: HubertTeacher,
        train_cuts: CutSet,
        dev_cuts: dict[str, CutSet],
        max_duration: float,
        seed: int,
        device: torch.device,
        mask_inputs: bool,
        speed_factors: Sequence[float] = (1.0,),
    ) -> None:
        self.model = teacher
        self.epoch_seconds = sum(c.duration for c in train_cuts)
        self._cuts, self._dev_cuts = train_cuts, dev_cuts
        self._max_duration, self._seed, self._device = max_duration, seed, device
        self._mask_inputs, self._speed_factors = mask_inputs, speed_factors
        self._symbol_ids = {symbol: index for index, symbol in enumerate(teacher.vocabulary)}
        self._cache: dict[str, np.ndarray] = {}

    def batches(self, epoch: int, start: int) -> Iterator[tuple[AudioBatch, float]]:
        batches = self._cut_batches(epoch, rank(), num_processes())
        for cuts in itertools.islice(batches, start, None):
            yield collate_audio(cuts, self._cache), sum(c.duration for c in cuts)

    def largest_batches(self) -> list[AudioBatch]:
        return [collate_audio(c, self._cache) for c in largest_batches(self._cut_batches(epoch=1))]

    def _cut_batches(self, epoch: int, rank: int = 0, num_processes: int = 1) -> Iterator[CutSet]:
        return bucketed_batches(
            self._at_speeds(epoch),
            self._max_duration,
            self._seed,
            epoch,
            rank=rank,
            num_processes=num_processes,
        )

    def _at_speeds(self, epoch: int) -> CutSet:
        """Each utterance at one of the speeds, which moves its pitch and formants too."""
        rng = np.random.default_rng([self._seed, epoch])
        factors = rng.choice(self._speed_factors, len(self._cuts))
        return CutSet.from_cuts(
            cut if factor == 1 else cut.perturb_speed(factor)
            for cut, factor in zip(self._cuts, factors.tolist())
        )

    def _targets(self, batch: AudioBatch) -> list[list[int]]:
        targets = []
        for name, text in zip(batch.ids, batch.texts):
            try:
                targets.append([self._symbol_ids[s] for s in text.upper().replace(" ", "|")])
            except KeyError as error:
                raise RecipeError(
                    f"cut {name}: its transcript has {error}, which is no symbol of the teacher; "
                    "normalize the transcripts"
                ) from error
        return targets

    def loss(
        self, batch: AudioBatch, step: int, warmup: float
    ) -> tuple[torch.Tensor, dict[str, float]]:
        logits_BTV, frames_B = self.model.ctc_logits(
            batch.waveforms_BL.to(self._device), batch.lengths_B.to(self._device), self._mask_inputs
        )
        targets = self._targets(batch)
        log_probs_TBV = logits_BTV.float().log_softmax(-1).transpose(0, 1)
        loss = F.ctc_loss(
            log_probs_TBV,
            torch.tensor([s for t in targets for s in t], device=self._device),
            frames_B,
            torch.tensor([len(t) for t in targets], device=self._device),
            reduction="sum",
            zero_infinity=True,
        )
        return loss, {"ctc": loss.item(), "weight": sum(map(len, targets))}

    def divisor(self, batch: AudioBatch) -> float:
        """The number of symbols, so that a step is as large for long batches as for short ones."""
        return sum(len(text) for text in batch.texts)

    def validate(self) -> dict[str, float]:
        return {
            f"wer-{name}": word_error_rate(transcribe_cuts(self.model, cuts, self._device))
            for name, cuts in self._dev_cuts.items()
        }

    def describe(self, batch: AudioBatch) -> str:
        return ", ".join(batch.ids)


def transcribe_cuts(
    teacher: HubertTeacher, cuts: CutSet, device: torch.device, max_duration: float = 100
) -> list[Result]:
    """(cut id, reference words, hypothesis words) of each cut, by greedy CTC.

    Of several processes each transcribes its share, and all get the whole.
    """
    results: list[Result] = []
    batches = bucketed_batches(cuts, max_duration, seed=0, epoch=0)
    for batch_cuts in itertools.islice(batches, rank(), None, num_processes()):
        batch = collate_audio(batch_cuts)
        texts = teacher.transcribe(batch.waveforms_BL.to(device), batch.lengths_B.to(device))
        for name, reference, text in zip(batch.ids, batch.texts, texts):
            results.append((name, reference.split(), text.split()))
    return sorted(itertools.chain(*gathered(results)))
