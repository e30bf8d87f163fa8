"""CTC training of a HuBERT on transcribed speech: a `Task` of the training loop.

B: utterances, T: frames, V: symbols.
"""

from __future__ import annotations

import itertools
import json
import logging
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from torch import nn
from torch.nn import functional as F
from transformers import HubertConfig, HubertForCTC

from mvqkd.data.audio import (
    AudioBatch,
    bucketed_batches,
    collate_audio,
    largest_batches,
    transcript_of,
)
from mvqkd.decoding.scoring import Result, word_error_rate
from mvqkd.errors import RecipeError, reason_of
from mvqkd.files import written_aside
from mvqkd.processes import gathered, num_processes, rank
from mvqkd.teachers.base import Teacher
from mvqkd.teachers.front_end import initialize_filterbank
from mvqkd.teachers.hubert import HubertTeacher

BLANK, WORD_BOUNDARY = "<pad>", "|"


def with_blank(characters: Iterable[str]) -> list[str]:
    """The symbols of a CTC head by index: blank, word boundary, ``characters``."""
    return [BLANK, WORD_BOUNDARY, *characters]


# Those of the shipped teacher.
SYMBOLS = with_blank("'ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def plain_text(text: str) -> str:
    """``text`` in one spelling: Unicode's NFC, words parted by one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def symbols_of(cuts: Iterable[Cut]) -> list[str]:
    """Symbols for a CTC head that can spell the transcripts of ``cuts``: their characters, sorted.

    Raises:
      RecipeError: there are none.
    """
    characters = {character for cut in cuts for character in plain_text(transcript_of(cut))}
    characters -= {" ", WORD_BOUNDARY}
    if not characters:
        raise RecipeError("training cuts: none has a transcript; give transcribed speech")
    logging.info(f"CTC symbols: the {len(characters)} characters of the training transcripts")
    return with_blank(sorted(characters))


def symbols_from(characters: str) -> list[str]:
    """Symbols for a CTC head, of the ``characters`` that a conf gives.

    Raises:
      RecipeError: there are none, or one is there twice or parts words.
    """
    found = unicodedata.normalize("NFC", characters)
    wrong = [c for c in found if c.isspace() or c == WORD_BOUNDARY or found.count(c) > 1]
    if wrong or not found:
        cause = f"{wrong[0]!r} is there twice, or parts words" if wrong else "empty"
        raise RecipeError(
            f"symbols: {cause}; give each character of the transcripts once, and no space"
        )
    return with_blank(found)


def claim_for_symbols(work_dir: Path, symbols: Sequence[str]) -> None:
    """Note in ``work_dir`` that what is trained there has a head of ``symbols``.

    Raises:
      RecipeError: it is of others.
    """
    path = work_dir / "symbols.json"
    with written_aside(path, first_stays=True) as aside:
        aside.write_text(json.dumps(symbols) + "\n")
    if json.loads(path.read_text()) != symbols:
        raise RecipeError(
            f"{path}: the training there is of other symbols; give another work_dir, or remove "
            "this one"
        )


class Spelling:
    """How transcripts are written in a CTC head's symbols.

    As `plain_text` has them; in capitals where the symbols have no small letters, and the other
    way round.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self._ids = {symbol: index for index, symbol in enumerate(vocabulary) if symbol != " "}
        if WORD_BOUNDARY in self._ids:
            self._ids[" "] = self._ids.pop(WORD_BOUNDARY)
        letters = [symbol for symbol in self._ids if len(symbol) == 1]
        self._has_small = any(letter != letter.upper() for letter in letters)
        self._has_capitals = any(letter != letter.lower() for letter in letters)

    def __call__(self, text: str) -> str:
        text = plain_text(text)
        if self._has_small == self._has_capitals:
            return text
        return plain_text(text.lower() if self._has_small else text.upper())

    def indexes(self, text: str) -> list[int]:
        """The symbols of ``text``, which lacks none."""
        return [self._ids[character] for character in self(text)]

    def lacking(self, cuts: Iterable[Cut]) -> dict[str, list[str]]:
        """By cut id, the characters of a transcript that are no symbols, where there are any."""
        found = {cut.id: set(self(transcript_of(cut))) - set(self._ids) for cut in cuts}
        return {name: sorted(characters) for name, characters in found.items() if characters}

    def warn_of_lacking(self, name: str, cuts: CutSet) -> None:
        """Say which characters of the test set ``name`` the head can only get wrong."""
        if lacking := self.lacking(cuts):
            logging.warning(
                f"{name}: {len(lacking)} of {len(cuts)} transcripts have characters that are no "
                f"symbols of the teacher ({_listed(lacking)}); they count as errors"
            )


def _listed(lacking: Mapping[str, list[str]], most: int = 10) -> str:
    characters = sorted(set(itertools.chain(*lacking.values())))
    more = f" and {len(characters) - most} more" if len(characters) > most else ""
    return ", ".join(map(repr, characters[:most])) + more


@dataclass
class HubertSettings:
    """Keys of transformers' HubertConfig, beyond its defaults."""

    config: dict[str, Any] = field(default_factory=dict)
    # Start the first two convolutions as a filterbank.
    filterbank_init: bool = True


def new_hubert(
    settings: HubertSettings, seed: int, symbols: Sequence[str] = SYMBOLS
) -> HubertTeacher:
    """A HuBERT with a CTC head of ``symbols``, blank first, and random weights."""
    torch.manual_seed(seed)
    try:
        config = HubertConfig(vocab_size=len(symbols), pad_token_id=0, **settings.config)
        model = HubertForCTC(config)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"hubert.config: {reason_of(error)}; mend the teacher conf") from error
    if settings.filterbank_init:
        initialize_filterbank(model, seed)
    return HubertTeacher(model, do_normalize=True, vocabulary=list(symbols))


def add_ctc_head(teacher: Teacher, seed: int, symbols: Sequence[str]) -> None:
    """Give ``teacher`` a CTC head of ``symbols``, blank first, with random weights.

    Raises:
      RecipeError: it is not of HuBERT's kin.
    """
    if not isinstance(teacher, HubertTeacher):
        raise RecipeError(
            f"teacher {teacher.name}: takes no CTC head; give a HuBERT, wav2vec 2.0 or WavLM"
        )
    model = teacher.model
    head = nn.Linear(teacher.dim, len(symbols))
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(head.weight, std=model.config.initializer_range, generator=generator)
    nn.init.zeros_(head.bias)
    model.lm_head = head
    model.config.vocab_size, model.config.pad_token_id = len(symbols), 0
    teacher.vocabulary = list(symbols)


class CtcTask:
    """Fine-tune ``teacher`` on ``train_cuts``, each epoch at speeds drawn anew.

    Raises:
      RecipeError: a transcript of ``train_cuts`` has a character that is no symbol of the teacher;
        from `batches`, a cut is too short for a frame.
    """

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
        cache_audio: bool = True,
    ) -> None:
        self.model = teacher
        self.epoch_seconds = sum(c.duration for c in train_cuts)
        self._cuts, self._dev_cuts = train_cuts, dev_cuts
        self._max_duration, self._seed, self._device = max_duration, seed, device
        self._mask_inputs, self._speed_factors = mask_inputs, speed_factors
        self._cache: dict[str, np.ndarray] | None = {} if cache_audio else None
        self._spelling = Spelling(teacher.vocabulary)
        if lacking := self._spelling.lacking(train_cuts):
            name = next(iter(lacking))
            raise RecipeError(
                f"cut {name}: its transcript has {', '.join(map(repr, lacking[name]))}, no symbol "
                f"of the teacher ({len(lacking)} of {len(train_cuts)} transcripts have such: "
                f"{_listed(lacking)}); normalize them, add to symbols, or set new_head: true"
            )
        for name, cuts in dev_cuts.items():
            self._spelling.warn_of_lacking(name, cuts)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[AudioBatch, float]]:
        batches = self._cut_batches(epoch, rank(), num_processes())
        for cuts in itertools.islice(batches, start, None):
            yield _collated(self.model, cuts, self._cache), sum(c.duration for c in cuts)

    def largest_batches(self) -> list[AudioBatch]:
        largest = largest_batches(self._cut_batches(epoch=1))
        return [_collated(self.model, cuts, self._cache) for cuts in largest]

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
        return [self._spelling.indexes(text) for text in batch.texts]

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
        return sum(map(len, self._targets(batch)))

    def validate(self) -> dict[str, float]:
        return {
            f"wer-{name}": word_error_rate(transcribe_cuts(self.model, cuts, self._device))
            for name, cuts in self._dev_cuts.items()
        }

    def describe(self, batch: AudioBatch) -> str:
        return ", ".join(batch.ids)


def _collated(
    teacher: Teacher, cuts: CutSet, cache: dict[str, np.ndarray] | None = None
) -> AudioBatch:
    """`collate_audio` of cuts that are all long enough for a frame of ``teacher``."""
    batch = collate_audio(cuts, cache)
    for name, length in zip(batch.ids, batch.lengths_B.tolist()):
        teacher.check_length(f"cut {name}", length)
    return batch


def transcribe_cuts(
    teacher: HubertTeacher, cuts: CutSet, device: torch.device, max_duration: float = 100
) -> list[Result]:
    """(cut id, reference words, hypothesis words) of each cut, by greedy CTC.

    References are in the spelling of the teacher's symbols, see `Spelling`.

    Of several processes each transcribes its share, and all get the whole.

    Raises:
      RecipeError: a cut cannot be read, or is too short for a frame.
    """
    results: list[Result] = []
    spelling = Spelling(teacher.vocabulary)
    batches = bucketed_batches(cuts, max_duration, seed=0, epoch=0)
    for batch_cuts in itertools.islice(batches, rank(), None, num_processes()):
        batch = _collated(teacher, batch_cuts)
        texts = teacher.transcribe(batch.waveforms_BL.to(device), batch.lengths_B.to(device))
        for name, reference, text in zip(batch.ids, batch.texts, texts):
            results.append((name, spelling(reference).split(), text.split()))
    return sorted(itertools.chain(*gathered(results)))
