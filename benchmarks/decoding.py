"""Beam search beside greedy search, and a stream beside whole utterances: one random student.

    python3 benchmarks/decoding.py [--device cpu] [--num_utterances 20] [--seconds 12]

A student of the published sizes with random weights, its blank made likely enough that greedy
search emits a token at about one frame in five, as speech has it. Each search runs over the same
encoder output of one batch, in turn with the others; the times are the medians of ``--rounds``.

Columns: seconds for the batch; real-time factor; time over that of greedy search.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from mvqkd import cli
from mvqkd.decoding.decode import DecodingSettings, decode_batch
from mvqkd.decoding.search import greedy_search_batch, modified_beam_search
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

    def over(method: str):
        values = {**asdict(settings.decoding), "method": method, "beam": settings.beam}
        return DecodingSettings(**values)

    beam = f"beam {settings.beam}"
    calls: dict[str, dict[str, Callable[[], object]]] = {
        "search alone": {
            "greedy": lambda: greedy_search_batch(model, encoder_out_BTC, encoder_lens_B),
            beam: lambda: modified_beam_search(
                model, encoder_out_BTC, encoder_lens_B, settings.beam
            ),
        }
    }
    if settings.with_encoder:
        for causal, name in ((False, "whole utterances"), (True, "streams")):
            calls[name] = {
                "greedy": lambda causal=causal: decode_as(causal, over("greedy_search")),
                beam: lambda causal=causal: decode_as(causal, over("modified_beam_search")),
            }

    def decode_as(causal: bool, decoding: DecodingSettings) -> None:
        # The convolutions were built causal, which either pass takes.
        model.encoder.settings.causal = causal
        decode_batch(model, features_BTF, lens_B, decoding)
        model.encoder.settings.causal = True

    speech = float(lens_B.sum()) / 100
    print(f"{describe_device(device)}; {B} utterances, {speech:.0f} s; {share:.2f} tokens a frame")
    print(f"{'':<28}{'seconds':>10}{'RTF':>10}{'over greedy':>14}")
    for name, pair in calls.items():
        seconds = timed(pair, settings.rounds, device)
        for search, value in seconds.items():
            ratio = value / seconds["greedy"]
            print(f"{f'{name}, {search}':<28}{value:>10.3f}{value / speech:>10.5f}{ratio:>14.2f}")


if __name__ == "__main__":
    cli.run(main, Settings)
