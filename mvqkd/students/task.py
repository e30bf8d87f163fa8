"""Training of a student: a `Task` of the training loop.

B: utterances, T: frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from mvqkd.data.datamodule import Augment, SpecAugmentSettings, StudentBatch, StudentData
from mvqkd.decoding.scoring import Result, word_error_rate
from mvqkd.decoding.search import greedy_search_batch
from mvqkd.losses.distillation import Distillation
from mvqkd.processes import gathered, num_processes, rank
from mvqkd.students.conformer import subsampled_lengths
from mvqkd.students.transducer import Transducer, TransducerSettings

SIMPLE_LOSS_SCALE = 0.5


def pruned_loss_scale(warmup: float) -> float:
    """0 while the simple loss has not yet found where tokens are, then 0.1, then 1."""
    if warmup < 1:
        return 0.0
    return 0.1 if 1 < warmup < 2 else 1.0


class StudentTask:
    """A transducer on transcribed speech, with or without a teacher; with one also on speech that
    nobody has transcribed."""

    def __init__(
        self,
        model: Transducer,
        settings: TransducerSettings,
        train_data: StudentData,
        dev_data: dict[str, StudentData],
        distillation: Distillation | None,
        spec_augment: SpecAugmentSettings,
        tokens,
        device: torch.device,
    ) -> None:
        self.model = model
        self.epoch_seconds = train_data.seconds
        self._settings, self._train, self._dev = settings, train_data, dev_data
        self._distillation, self._tokens, self._device = distillation, tokens, device
        self._augment = Augment(spec_augment)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[StudentBatch, float]]:
        return self._train.batches(epoch, start, rank(), num_processes())

    def largest_batches(self) -> list[StudentBatch]:
        return self._train.largest()

    def divisor(self, batch: StudentBatch) -> float:
        """0: the losses are summed over the batch, as published."""
        return 0.0

    def loss(
        self, batch: StudentBatch, step: int, warmup: float
    ) -> tuple[torch.Tensor, dict[str, float]]:
        features_BTF, warps = self._augment(batch.features_BTF, batch.lengths_B)
        output = self._forward(features_BTF.to(self._device), batch, warmup)
        simple, pruned = output.simple_loss_B.sum(), output.pruned_loss_B.sum()
        scale = pruned_loss_scale(warmup)
        loss = SIMPLE_LOSS_SCALE * simple
        if scale > 0:
            loss = loss + scale * pruned
        found = {"simple": simple, "pruned": pruned}
        # Figures are shown per encoder frame, as icefall shows them.
        weight = float(subsampled_lengths(batch.lengths_B).sum())
        if self._distillation is not None:
            distilled = self._distillation.losses(
                output.middle_outputs, output.encoder_lens_B, self._labels(batch), warps
            )
            for name, (term_loss, accuracy_N) in distilled.items():
                loss = loss + term_loss
                found[f"{name}distillation"] = term_loss
                if accuracy_N is not None:
                    # Accuracies are no sums: weighted, they are averaged over the frames.
                    for n, accuracy in enumerate(accuracy_N.double() * weight):
                        found[f"{name}accuracy-{n}"] = accuracy
        # All at once: each look at a number waits for the GPU.
        values = torch.stack([value.detach().double() for value in found.values()]).tolist()
        return loss, {**dict(zip(found, values)), "weight": weight}

    def _labels(self, batch: StudentBatch) -> dict[str, torch.Tensor]:
        """Stored, and from the teachers in the loop."""
        labels = {name: labels.to(self._device) for name, labels in batch.labels.items()}
        if self._distillation.in_loop:
            labels |= self._distillation.computed_labels(
                batch.waveforms_BL.to(self._device), batch.samples_B.to(self._device)
            )
        return labels

    def _forward(self, features_BTF: torch.Tensor, batch: StudentBatch, warmup: float):
        return self.model(
            features_BTF,
            batch.lengths_B.to(self._device),
            batch.tokens,
            prune_range=self._settings.prune_range,
            am_scale=self._settings.am_scale,
            lm_scale=self._settings.lm_scale,
            warmup=warmup,
        )

    def validate(self) -> dict[str, float]:
        figures = {}
        for part, data in self._dev.items():
            pruned, frames = 0.0, 0
            results: list[Result] = []
            for batch in data.every_nth(rank(), num_processes()):
                output = self._forward(batch.features_BTF.to(self._device), batch, warmup=1.0)
                pruned += output.pruned_loss_B.sum().item()
                frames += int(output.encoder_lens_B.sum())
                # As many tokens a frame as it will: one would hide what the student has learned.
                found = greedy_search_batch(
                    self.model, output.encoder_out_BTC, output.encoder_lens_B, max_sym_per_frame=4
                )
                for name, text, hypothesis in zip(batch.ids, batch.texts, found):
                    words = self._tokens.decode(hypothesis.tokens).split()
                    results.append((name, text.split(), words))
            # Of several processes each has decoded its share.
            pruned, frames, results = zip(*gathered((pruned, frames, results)))
            figures[f"pruned-{part}"] = sum(pruned) / sum(frames)
            figures[f"wer-{part}"] = word_error_rate(list(itertools.chain(*results)))
        return figures

    def describe(self, batch: StudentBatch) -> str:
        return ", ".join(batch.ids)
