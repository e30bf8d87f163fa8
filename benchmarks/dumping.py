"""What dumping adds to the teacher's own forward pass, and how fast both are.

    python3 -m benchmarks.dumping [--devices [cuda]] [--rounds 3]
    python3 -m benchmarks.dumping --size tiny --devices [cpu] --num_utterances 3 --seconds 2

HuBERT X-Large with random weights, up to layer 36, and N = 8 codebooks with 5 rounds of refinement.
The utterances are FLAC files of noise at three speeds, as a training set has them. Rows:

  forward   the teacher over the batches that a dump makes, decoded before, in memory
  + encode  the same, and the quantizer
  dump      `dump_labels`: decode, embed, quantize, check, write, read again and verify

They take turns, and the least time of each counts. A device that is not there is not measured.

Floor. A layer of width D with feed-forward width H takes 2 T (4 D² + 2 D H) + 4 T² D operations for
T frames (projections, attention), the front end and the position convolution 6 of 82 billion a
second of speech. X-Large to layer 36 and 12 s: 82e9 operations a second of speech. A card that
multiplies bfloat16 matrices at 989e12 operations a second (an H100's data sheet) cannot go beyond
12,000 times real time; 1000 times is 8% of that rate, 2000 times 17%. The last column is the share
of the rate that the same device reaches here on one large square product of the same type.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import torch
from lhotse import CutSet, Recording
from scipy.signal import lfilter
from transformers import HubertConfig, HubertForCTC

from benchmarks.quantizer.clock import fastest
from mvqkd import cli
from mvqkd.data import SAMPLE_RATE
from mvqkd.data.labels import (
    CodebookIndexes,
    Dumper,
    LabelSettings,
    Origin,
    compute_labels,
    dump_labels,
)
from mvqkd.device import Precision, describe_device, matrix_dtype
from mvqkd.quantizer import Quantizer
from mvqkd.teachers.hubert import HubertTeacher

LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
SIZES = {
    "xlarge": {
        **LAYER_NORM,
        "hidden_size": 1280,
        "num_attention_heads": 16,
        "intermediate_size": 5120,
    },
    # To see that it runs.
    "tiny": {
        **LAYER_NORM,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "conv_dim": [16] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
    },
}
# Files; a manifest names each of them several times.
NUM_FILES = 30
# Utterances where the settings do not say: few for a CPU, a shard for a GPU.
UTTERANCES = {"cpu": 2, "cuda": 500}


@dataclass
class Settings:
    """What is measured."""

    size: Literal["xlarge", "tiny"] = "xlarge"
    layer: int = 36
    # Of an utterance.
    seconds: float = 12
    # 0: as many as suit the device.
    num_utterances: int = 0
    devices: list[Literal["cpu", "cuda"]] = field(default_factory=lambda: ["cpu", "cuda"])
    precision: Precision = "auto"
    rounds: int = 3
    labels: LabelSettings = field(default_factory=LabelSettings)


def operations(config: HubertConfig, num_layers: int, num_samples: int) -> float:
    """Of one utterance through the first ``num_layers``: two for each product that is summed."""
    total, length, channels = 0, num_samples, 1
    for dim, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride):
        length = (length - kernel) // stride + 1
        total += length * dim * channels * kernel
        channels = dim
    D, H = config.hidden_size, config.intermediate_size
    groups = config.num_conv_pos_embedding_groups
    total += length * D * (channels + D // groups * config.num_conv_pos_embeddings)
    total += num_layers * (length * (4 * D * D + 2 * D * H) + 2 * length * length * D)
    return 2.0 * total


def matrix_rate(device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    """Operations a second of a large square product."""
    size = 8192 if device.type == "cuda" else 1024
    x = torch.randn(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / fastest({"": lambda: x @ x}, rounds, device.type)[""].wall


def make_cuts(folder: Path, count: int, seconds: float) -> CutSet:
    generator, recordings = np.random.default_rng(1), []
    for number in range(min(count, NUM_FILES)):
        noise_L = generator.standard_normal(round(seconds * SAMPLE_RATE))
        path = folder / f"{number:02d}.flac"
        # Coloured, as speech is, so that a decoder has something to do.
        soundfile.write(path, 0.02 * lfilter([1.0], [1.0, -0.9], noise_L), SAMPLE_RATE)
        recordings.append(Recording.from_file(path))
    cuts = []
    for number, recording in zip(range(count), itertools.cycle(recordings)):
        cut = recording.to_cut()
        if number % 3:
            cut = cut.perturb_speed((0.9, 1.1)[number % 3 - 1])
        cuts.append(cut.with_id(f"{number:06d}"))
    return CutSet.from_cuts(cuts)


def measure(settings: Settings, device: torch.device, folder: Path) -> None:
    torch.manual_seed(1)
    config = HubertConfig(**SIZES[settings.size], num_hidden_layers=settings.layer, vocab_size=32)
    teacher = HubertTeacher(HubertForCTC(config), True).eval()
    quantizer = Quantizer(teacher.dim, 256, 8).eval()
    quantizer.set_id_from_weights()
    origin = Origin("random", settings.layer, quantizer.get_id(), quantizer.weights_sha256())
    kind = CodebookIndexes(teacher, quantizer, origin, settings.labels.refine_iters)
    settings.labels.precision = settings.precision
    dumper = Dumper([kind], settings.labels, device)
    dtype = matrix_dtype(settings.precision, device)
    cuts = make_cuts(folder, settings.num_utterances or UTTERANCES[device.type], settings.seconds)
    if device.type == "cpu":
        torch.set_num_threads(settings.labels.num_threads)
    batches = [dumper._load(batch)[1] for batch in dumper._batches(cuts)]

    def forward() -> None:
        for batch in batches:
            waveforms_BL = batch.waveforms_BL.to(device, non_blocking=True)
            teacher.embed(waveforms_BL, batch.lengths_B, settings.layer, dtype)

    def encode() -> None:
        for batch in batches:
            waveforms_BL = batch.waveforms_BL.to(device, non_blocking=True)
            compute_labels([kind], waveforms_BL, batch.lengths_B, dtype)

    def dump() -> None:
        out = folder / "labels/train.jsonl.gz"
        dump_labels(cuts, out, dumper, settings.labels.shard_size)
        shutil.rmtree(out.parent)

    calls = {"forward": forward, "+ encode": encode, "dump": dump}
    found = fastest(calls, settings.rounds, device.type)
    speech = sum(cut.duration for cut in cuts)
    work = sum(
        operations(config, settings.layer, n) for batch in batches for n in batch.lengths_B.tolist()
    )
    rate = matrix_rate(device, dtype, settings.rounds)
    print(
        f"{describe_device(device)}, {str(dtype).removeprefix('torch.')}: {settings.size} to layer "
        f"{settings.layer}, {len(cuts)} utterances of {settings.seconds:g} s at three speeds, "
        f"batches of {settings.labels.max_duration:g} s\n"
        f"{work / speech / 1e9:.2f} G operations a second of speech; a product of matrices goes at "
        f"{rate / 1e12:.3g} T a second: floor {rate * speech / work:,.0f} x real time"
    )
    print(f"{'':<12}{'seconds':>10}{'x real time':>14}{'over forward':>14}{'of the rate':>13}")
    for name, seconds in found.items():
        over = 100 * (seconds.wall / found["forward"].wall - 1)
        print(
            f"{name:<12}{seconds.wall:>10.3f}{speech / seconds.wall:>14,.1f}{over:>+13.1f}%"
            f"{100 * work / seconds.wall / rate:>12.1f}%"
        )


def main(settings: Settings) -> None:
    for name in settings.devices:
        if name == "cuda" and not torch.cuda.is_available():
            print("cuda: not measured; PyTorch finds no CUDA device here")
            continue
        with tempfile.TemporaryDirectory() as folder:
            measure(settings, torch.device(name), Path(folder))


if __name__ == "__main__":
    cli.run(main, Settings)
