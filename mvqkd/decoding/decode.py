"""Decode a test set with a trained student."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mvqkd.data.datamodule import StudentData
from mvqkd.decoding.scoring import Result
from mvqkd.decoding.search import BeamSearch, GreedySearch, Hypothesis
from mvqkd.decoding.streaming import decode_streaming
from mvqkd.errors import RecipeError
from mvqkd.files import require
from mvqkd.students.conformer import ConformerSettings
from mvqkd.students.transducer import Transducer, TransducerSettings, build_transducer
from mvqkd.training.checkpoint import averaged_weights


@dataclass
class DecodingSettings:
    """How to search; a student with causal convolutions is decoded as a stream."""

    method: Literal["greedy_search", "modified_beam_search"] = "modified_beam_search"
    beam: int = 4
    # Weights: the mean over the last `avg` epochs up to `epoch` (0: the last one trained).
    epoch: int = 0
    avg: int = 10
    # Seconds of speech in a batch.
    max_duration: float = 300
    # Of a stream, in encoder frames of 40 ms: new frames a step, and what attention
    # sees before them and ahead of them.
    chunk_size: int = 16
    left_context: int = 64
    right_context: int = 0

    def name(self, epoch: int, streaming: bool) -> str:
        """As icefall names its result files."""
        parts = [self.method]
        if self.method == "modified_beam_search":
            parts.append(f"beam_size_{self.beam}")
        if streaming:
            chunk = f"chunk-{self.chunk_size}-left-{self.left_context}-right-{self.right_context}"
            parts.append(chunk)
        return "-".join([*parts, f"epoch-{epoch}-avg-{self.avg}"])


def load_student(exp_dir: Path, settings: DecodingSettings) -> tuple[Transducer, int]:
    """The student in ``exp_dir`` without its distillation head, and the epoch it is from.

    Raises:
      RecipeError: it has not been trained, or a checkpoint is damaged.
    """
    document = json.loads(require(exp_dir / "settings.json", "run stage 6").read_text())
    model_settings = dict(document["model"])
    encoder = ConformerSettings(**model_settings.pop("encoder"))
    encoder.middle_output_layers = []
    model = build_transducer(TransducerSettings(encoder=encoder, **model_settings))
    epoch = settings.epoch or document["training"]["num_epochs"]
    weights = averaged_weights(exp_dir, epoch, settings.avg)
    weights = {k: v for k, v in weights.items() if not k.startswith("codebook_loss_net.")}
    model.load_state_dict(weights)
    return model.eval(), epoch


@torch.inference_mode()
def decode(
    model: Transducer, data: StudentData, tokens, settings: DecodingSettings, device: torch.device
) -> tuple[list[Result], float]:
    """(cut id, reference words, hypothesis words) of each utterance, and the real-time factor."""
    model = model.to(device)
    results: list[Result] = []
    speech = spent = 0.0
    for batch, seconds in data.batches(epoch=0):
        started = time.perf_counter()
        features_BTF, lens_B = batch.features_BTF.to(device), batch.lengths_B.to(device)
        search: BeamSearch | GreedySearch = (
            BeamSearch(model, settings.beam)
            if settings.method == "modified_beam_search"
            else GreedySearch(model)
        )
        found: list[Hypothesis]
        if model.encoder.settings.causal:
            found = decode_streaming(
                model,
                features_BTF,
                lens_B,
                settings.chunk_size,
                settings.left_context,
                settings.right_context,
                search,
            )
        else:
            encoder_out_BTC, encoder_lens_B, _ = model.encoder(features_BTF, lens_B)
            search.step(encoder_out_BTC, encoder_lens_B)
            found = search.finish()
        spent += time.perf_counter() - started
        speech += seconds
        for name, text, hypothesis in zip(batch.ids, batch.texts, found):
            results.append((name, text.split(), tokens.decode(hypothesis.tokens).split()))
        logging.info(f"decoded {speech:.0f} of {data.seconds:.0f} s, RTF {spent / speech:.4f}")
    if not results:
        raise RecipeError("decoding: the test set has no utterances; make its manifest again")
    return sorted(results), spent / speech
