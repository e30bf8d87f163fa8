"""Decode a test set with a trained student."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mvqkd.data.datamodule import StudentData
from mvqkd.decoding.scoring import Result
from mvqkd.decoding.search import BeamSearch, FastBeamSearch, GreedySearch, Hypothesis
from mvqkd.decoding.streaming import decode_streaming
from mvqkd.decoding.times import (
    EmissionDelay,
    Token,
    emission_delays,
    summarize_delays,
    tokens_with_times,
    words_with_times,
)
from mvqkd.errors import RecipeError
from mvqkd.files import read_json
from mvqkd.students.conformer import ConformerSettings, subsampled_lengths
from mvqkd.students.scaling import fold_scales
from mvqkd.students.transducer import Transducer, TransducerSettings, build_transducer
from mvqkd.training.checkpoint import averaged_weights


@dataclass
class DecodingSettings:
    """How to search; a student with causal convolutions is decoded as a stream."""

    # fast_beam_search needs k2.
    method: Literal["greedy_search", "modified_beam_search", "fast_beam_search"] = (
        "modified_beam_search"
    )
    # Hypotheses of modified_beam_search.
    beam: int = 4
    # Tokens that a frame may give, in greedy_search and modified_beam_search.
    max_sym_per_frame: int = 1
    # Of fast_beam_search: the worst score kept, in nats below the best; contexts and states.
    fast_beam: float = 20.0
    max_contexts: int = 8
    max_states: int = 64
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

    def __post_init__(self):
        if self.beam < 1:
            raise RecipeError(f"decoding.beam: {self.beam} is no beam; set it to 1 or more")
        for name in ("max_sym_per_frame", "fast_beam", "max_contexts", "max_states"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"decoding.{name}: {getattr(self, name)}; give more than 0")

    def name(self, weights: int | str, streaming: bool) -> str:
        """As icefall names its result files.

        Args:
          weights: their last epoch, or what else they are called.
        """
        parts = [self.method]
        if self.method == "modified_beam_search":
            parts.append(f"beam_size_{self.beam}")
        if self.method == "fast_beam_search":
            parts.append(f"beam-{self.fast_beam}-max-contexts-{self.max_contexts}")
            parts.append(f"max-states-{self.max_states}")
        elif self.max_sym_per_frame > 1:
            parts.append(f"max-sym-per-frame-{self.max_sym_per_frame}")
        if streaming:
            chunk = f"chunk-{self.chunk_size}-left-{self.left_context}-right-{self.right_context}"
            parts.append(chunk)
        if isinstance(weights, int):
            weights = f"epoch-{weights}-avg-{self.avg}"
        return "-".join([*parts, weights])


def load_student(exp_dir: Path, settings: DecodingSettings) -> tuple[Transducer, int]:
    """The student in ``exp_dir`` without its distillation head, and the epoch it is from.

    Raises:
      RecipeError: it has not been trained, or a checkpoint is damaged.
    """
    stamp = exp_dir.parent / "stamps" / f"student-{exp_dir.name}"  # of a folder that is there
    document = read_json(
        exp_dir / "settings.json", "run stage 6", f"remove {stamp}, then run stage 6"
    )
    model_settings = dict(document["model"])
    encoder = ConformerSettings(**model_settings.pop("encoder"))
    encoder.middle_output_layers = []
    model = build_transducer(TransducerSettings(encoder=encoder, **model_settings))
    epoch = settings.epoch or document["training"]["num_epochs"]
    weights = averaged_weights(exp_dir, epoch, settings.avg)
    weights = {k: v for k, v in weights.items() if not k.startswith("codebook_loss_net.")}
    model.load_state_dict(weights)
    return fold_scales(model).eval(), epoch


def check_vocabulary(model: Transducer, tokens, tokens_dir: Path) -> None:
    """
    Raises:
      RecipeError: the word pieces in ``tokens_dir`` are not as many as the student's.
    """
    vocab_size = model.joiner.output_linear.out_features
    if len(tokens) != vocab_size:
        raise RecipeError(
            f"{tokens_dir}: holds {len(tokens)} word pieces and the student was trained on "
            f"{vocab_size}; name the folder that it was trained with"
        )


Search = BeamSearch | FastBeamSearch | GreedySearch


def make_search(model: Transducer, settings: DecodingSettings) -> Search:
    """The search that ``settings`` name, over ``model``.

    Raises:
      RecipeError: it needs k2, which is not there.
    """
    if settings.method == "fast_beam_search":
        return FastBeamSearch(model, settings.fast_beam, settings.max_contexts, settings.max_states)
    if settings.method == "modified_beam_search":
        return BeamSearch(model, settings.beam, settings.max_sym_per_frame)
    return GreedySearch(model, settings.max_sym_per_frame)


def _decode_whole(
    search: Search, features_BTF: torch.Tensor, lens_B: torch.Tensor
) -> list[Hypothesis]:
    encoder_out_BTC, encoder_lens_B, _ = search.model.encoder(features_BTF, lens_B)
    search.step(encoder_out_BTC, encoder_lens_B)
    return search.finish()


@torch.inference_mode()
def decode_batch(
    model: Transducer,
    features_BTF: torch.Tensor,
    lens_B: torch.Tensor,
    settings: DecodingSettings,
) -> list[Hypothesis]:
    """Decode a batch of utterances: as streams if the student is causal, else as wholes.

    Args:
      model: in evaluation mode.
      features_BTF, lens_B: on the model's device; what lies past a length is not seen.
    Raises:
      RecipeError: an utterance is too short for the encoder of a student that is no stream.
    """
    search = make_search(model, settings)
    if not model.encoder.settings.causal:
        return _decode_whole(search, features_BTF, lens_B)
    return decode_streaming(
        model,
        features_BTF,
        lens_B,
        settings.chunk_size,
        settings.left_context,
        settings.right_context,
        search,
    )


def _delays(
    model: Transducer,
    features_BTF: torch.Tensor,
    lens_B: torch.Tensor,
    settings: DecodingSettings,
    streamed: list[Hypothesis],
) -> list[list[tuple[float, float] | None]]:
    """`emission_delays` of each of a batch of streams."""
    delays: list[list[tuple[float, float] | None]] = [[None] * len(h.tokens) for h in streamed]
    # The whole-utterance pass takes none that is too short for a frame.
    chosen = (subsampled_lengths(lens_B) > 0).nonzero()[:, 0]
    if len(chosen) == 0:
        return delays
    whole = _decode_whole(make_search(model, settings), features_BTF[chosen], lens_B[chosen])
    chunks = (settings.chunk_size, settings.right_context)
    for b, hypothesis in zip(chosen.tolist(), whole):
        delays[b] = emission_delays(streamed[b], hypothesis, model.encoder, *chunks)
    return delays


@dataclass
class Decoded:
    """What became of a test set."""

    # (cut id, reference words, hypothesis words) of each utterance, sorted.
    results: list[Result]
    # Real-time factor: seconds of computing for a second of speech, from features to tokens.
    rtf: float
    # Of a streaming student whose test set had a token to compare.
    emission_delay: EmissionDelay | None
    # By cut id: start and end of each hypothesis word, in seconds, as `words_with_times` has them.
    times: dict[str, list[tuple[float, float]]]
    # By cut id, as `tokens_with_times` has them.
    tokens: dict[str, list[Token]]
    # By cut id, of a streaming student: seconds by which each token comes later than where the
    # whole utterance is seen, None for one that does not come there; see `emission_delays`.
    delays: dict[str, list[float | None]]


@torch.inference_mode()
def decode(
    model: Transducer, data: StudentData, tokens, settings: DecodingSettings, device: torch.device
) -> Decoded:
    """Decode a test set, in batches.

    Args:
      tokens: the sentencepiece model.
    Raises:
      RecipeError: there is no utterance, or one is too short for the encoder.
    """
    model = model.to(device)
    results: list[Result] = []
    all_delays: list[tuple[float, float] | None] = []
    times: dict[str, list[tuple[float, float]]] = {}
    emitted: dict[str, list[Token]] = {}
    delays: dict[str, list[float | None]] = {}
    speech = spent = 0.0
    for batch, seconds in data.batches(epoch=0):
        started = time.perf_counter()
        features_BTF, lens_B = batch.features_BTF.to(device), batch.lengths_B.to(device)
        found = decode_batch(model, features_BTF, lens_B, settings)
        spent += time.perf_counter() - started
        speech += seconds
        for b, (name, text, hypothesis) in enumerate(zip(batch.ids, batch.texts, found)):
            results.append((name, text.split(), tokens.decode(hypothesis.tokens).split()))
            length = int(batch.lengths_B[b]) * model.encoder.feature_frame_shift
            words = words_with_times(model.encoder, hypothesis, tokens, length)
            times[name] = [(word.start, word.end) for word in words]
            emitted[name] = tokens_with_times(model.encoder, hypothesis, tokens)
        if model.encoder.settings.causal:
            of_batch = _delays(model, features_BTF, lens_B, settings, found)
            for name, of_tokens in zip(batch.ids, of_batch):
                delays[name] = [None if d is None else round(d[0], 2) for d in of_tokens]
                all_delays += of_tokens
        logging.info(f"decoded {speech:.0f} of {data.seconds:.0f} s, RTF {spent / speech:.4f}")
    if not results:
        raise RecipeError("decoding: the test set has no utterances; make its manifest again")
    delay = summarize_delays(all_delays)
    return Decoded(sorted(results), spent / speech, delay, times, emitted, delays)
