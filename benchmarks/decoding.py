"""Beam search beside greedy search, and a stream beside whole utterances: one random student.

    python3 -m benchmarks.decoding [--device cpu] [--num_utterances 20] [--seconds 12]

A student of the published sizes with random weights, its blank made likely enough that greedy
search emits a token at about one frame in five, as speech has it. Each search runs over the same
encoder output of one batch, in turn with the others; the times are the medians of ``--rounds``.
It may give one token a frame, the default of ``conf/decoding.yaml``, or up to 4, that of
``conf/laptop``.

Columns: seconds for the batch; real-time factor; time over that of greedy search with as many
tokens a frame.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from mvqkd import cli
from mvqkd.decoding.decode import DecodingSettings, decode_batch, make_search
from mvqkd.decoding.search import Hypothesis, greedy_search_batch
from mvqkd.device import describe_device, pick_device
from mvqkd.students.scaling import fold_scales
from mvqkd.students.transducer import BLANK, Transducer, TransducerSettings, build_transducer

# Share of frames at which greedy search emits a token.
EMITTING = 0.2


@dataclass
class Settings:
    """What is decoded."""

    device: str = "auto"
    num_utterances: int = 20
    seconds: float = 12
    beam: int = 4
    # Tokens that a frame may give: a pair of rows for each.
    max_sym_per_frame: list[int] = field(default_factory=lambda: [1, 4])
    rounds: int = 5
    # Also from features to tokens, as whole utterances and as streams.
    with_encoder: bool = True
    decoding: DecodingSettings = field(default_factory=DecodingSettings)
    model: TransducerSettings = field(default_factory=TransducerSettings)


def random_student(settings: Settings, device: torch.device) -> Transducer:
    torch.manual_seed(0)
    settings.model.encoder.causal = True  # decodes both ways
    model = fold_scales(build_transducer(settings.model).to(device)).eval()
    with torch.no_grad():
        # A new model's symbols are nearly all alike: every beam would hold the same ones.
        model.joiner.output_linear.weight *= 6
    return model


def make_blank_likely(model: Transducer, encoder_out_BTC, lens_B) -> float:
    """Move blank's bias until `EMITTING` holds; returns the share that it came to."""
    bias_V = model.joiner.output_linear.bias
    low, high, share = -20.0, 40.0, 0.0
    for _ in range(12):
        with torch.no_grad():
            bias_V[BLANK] = (low + high) / 2
        found = greedy_search_batch(model, encoder_out_BTC, lens_B)
        share = sum(len(h.tokens) for h in found) / int(lens_B.sum())
        if share > EMITTING:
            low = float(bias_V[BLANK])
        else:
            high = float(bias_V[BLANK])
    return share


def timed(
    calls: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each, one after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


@torch.inference_mode()
def main(settings: Settings) -> None:
    device = pick_device(settings.device)
    model = random_student(settings, device)
    B, F = settings.num_utterances, settings.model.encoder.num_features
    # Utterances of a bucket are of like, not of the same, length.
    lens_B = torch.linspace(0.8, 1, B).mul(100 * settings.seconds).long().to(device)
    features_BTF = torch.randn(B, int(lens_B.max()), F, device=device)
    encoder_out_BTC, encoder_lens_B, _ = model.encoder(features_BTF, lens_B)
    share = make_blank_likely(model, encoder_out_BTC, encoder_lens_B)

    def search(decoding: DecodingSettings) -> list[Hypothesis]:
        search = make_search(model, decoding)
        search.step(encoder_out_BTC, encoder_lens_B)
        return search.finish()

    def decode_as(causal: bool, decoding: DecodingSettings) -> None:
        # The convolutions were built causal, which either pass takes.
        model.encoder.settings.causal = causal
        decode_batch(model, features_BTF, lens_B, decoding)
        model.encoder.settings.causal = True

    passes: dict[str, Callable[[DecodingSettings], object]] = {"search alone": search}
    if settings.with_encoder:
        passes["whole utterances"] = partial(decode_as, False)
        passes["streams"] = partial(decode_as, True)
    speech = float(lens_B.sum()) / 100
    print(f"{describe_device(device)}; {B} utterances, {speech:.0f} s; {share:.2f} tokens a frame")
    print(f"{'':<40}{'seconds':>10}{'RTF':>10}{'over greedy':>14}")
    for name, call in passes.items():
        for most in settings.max_sym_per_frame:
            decoding = replace(settings.decoding, beam=settings.beam, max_sym_per_frame=most)
            calls = {
                short: partial(call, replace(decoding, method=method))
                for short, method in (
                    ("greedy", "greedy_search"),
                    (f"beam {settings.beam}", "modified_beam_search"),
                )
            }
            seconds = timed(calls, settings.rounds, device)
            for short, value in seconds.items():
                row = f"{name}, {short}, {most} a frame"
                ratio = value / seconds["greedy"]
                print(f"{row:<40}{value:>10.3f}{value / speech:>10.5f}{ratio:>14.2f}")


if __name__ == "__main__":
    cli.run(main, Settings)
