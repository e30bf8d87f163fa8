"""What distillation adds to a training step: time and peak memory, by kind.

    python3 -m benchmarks.distillation [--size paper] [--device cuda] [--precision bf16]

Random weights, features, transcripts and labels of the sizes in use; a step is loss, backward
and Eve. Each kind runs in processes of its own, one after the other and all of them in each round,
so that whatever else the machine does meets all alike. Labels lie in memory: what reading them from
disk takes is not in here. Time is the median of a process's steps, and the lowest of its rounds.
Memory is the peak of the process over what it held before its model was made; on a GPU, of
torch's allocator.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Literal

import torch
from transformers import HubertConfig, HubertForCTC

from benchmarks.processes import alternating, peak_bytes, resident_bytes
from mvqkd import cli, cpu_kernels  # noqa: F401  held before a model is made, not its memory
from mvqkd.data.datamodule import SpecAugmentSettings, StudentBatch
from mvqkd.data.labels import FIELD, CodebookIndexes, LabelKind, Origin
from mvqkd.device import pick_device
from mvqkd.errors import RecipeError
from mvqkd.losses.distillation import Distillation, Kind, Pairing, Term, TermSettings
from mvqkd.quantizer import Quantizer
from mvqkd.students.conformer import ConformerSettings
from mvqkd.students.task import StudentTask
from mvqkd.students.transducer import TransducerSettings, build_transducer
from mvqkd.teachers.hubert import HubertTeacher
from mvqkd.training.memory import keep_freed_memory
from mvqkd.training.optim import Eve


@dataclass
class Size:
    """A student, its teacher, and a batch of B utterances of so many seconds and tokens."""

    encoder: dict
    joiner_dim: int
    vocab_size: int
    layer: int
    # transformers' HubertConfig, and the layer that is learned from.
    teacher: dict
    teacher_layer: int
    batch: tuple[int, float, int]


HUBERT = {
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
    "vocab_size": 32,
}
# Windows of 15 ms every 10, then two of them, as of the embedded corpus's teacher.
SHORT = {"conv_kernel": [240, 1, 2], "conv_stride": [160, 1, 2]}
SIZES = {
    # The published student and batch, HuBERT X-Large.
    "paper": Size(
        {"layer_dropout": 0.0},
        512,
        500,
        6,
        {
            **HUBERT,
            "hidden_size": 1280,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "intermediate_size": 5120,
        },
        36,
        (5, 12.0, 45),
    ),
    # conf/laptop and the embedded teacher.
    "mini": Size(
        {
            "num_features": 40,
            "d_model": 128,
            "nhead": 4,
            "dim_feedforward": 384,
            "num_encoder_layers": 4,
            "cnn_module_kernel": 15,
            "subsampling_channels": (8, 16, 64),
            "layer_dropout": 0.0,
        },
        128,
        80,
        3,
        {
            **HUBERT,
            **SHORT,
            "hidden_size": 192,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "intermediate_size": 768,
            "conv_dim": [320, 256, 256],
            "num_conv_pos_embeddings": 31,
        },
        5,
        (16, 3.0, 15),
    ),
    # To see that it runs.
    "tiny": Size(
        {
            "num_features": 40,
            "d_model": 32,
            "nhead": 2,
            "dim_feedforward": 48,
            "num_encoder_layers": 2,
            "subsampling_channels": (4, 8, 16),
            "layer_dropout": 0.0,
        },
        32,
        30,
        1,
        {
            **HUBERT,
            **SHORT,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "conv_dim": [24, 24, 24],
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
        },
        2,
        (2, 1.0, 3),
    ),
}
NUM_CODEBOOKS = 8
# Row of the table: the kinds of its terms, and whether the teacher is in the loop.
ROWS: dict[str, tuple[list[Kind], bool]] = {
    "none": ([], False),
    "mvq": (["mvq"], False),
    "mvq-l2": (["mvq-l2"], False),
    "mvq + mvq-l2": (["mvq", "mvq-l2"], False),
    "l2 on stored float16": (["l2"], False),
    "mvq, teacher in the loop": (["mvq"], True),
}


@dataclass
class Settings:
    """What is measured."""

    size: Literal["paper", "mini", "tiny"] = "mini"
    device: str = "auto"
    precision: Literal["float32", "bf16"] = "float32"
    rounds: int = 3
    # Of a process, after one that is not counted.
    steps: int = 5
    # Rows of the table; all where empty.
    rows: list[str] = field(default_factory=list)


def make_teacher(size: Size) -> HubertTeacher:
    return HubertTeacher(HubertForCTC(HubertConfig(**size.teacher)), True).eval()


def make_task(row: str, size: Size, device: torch.device) -> tuple[StudentTask, StudentBatch]:
    torch.manual_seed(0)
    kinds, in_loop = ROWS[row]
    encoder = ConformerSettings(**size.encoder, middle_output_layers=[size.layer] if kinds else [])
    settings = TransducerSettings(encoder, size.joiner_dim, size.joiner_dim, size.vocab_size)
    model = build_transducer(settings)
    num_utterances, seconds, num_tokens = size.batch
    num_samples, dim = round(16000 * seconds), size.teacher["hidden_size"]
    labels_shape = (num_utterances, (num_samples - 400) // 320 + 1)
    labels: dict[str, torch.Tensor] = {}
    distillation = None
    if kinds:
        quantizer = Quantizer(dim, 256, NUM_CODEBOOKS).eval()
        statistics = torch.zeros(dim), torch.ones(dim)
        pairing = Pairing(model.encoder.frame_shift, model.encoder.frame_offset, 0.02, 0.0125)
        terms, in_loop_kinds = [], []
        for kind in kinds:
            term = TermSettings(kind, layer=size.layer, field=FIELD)
            if not term.on_indexes():
                term.field = "embeddings"
                labels[term.field] = torch.randn(*labels_shape, dim).half()
            elif not in_loop:
                labels[FIELD] = torch.randint(0, 256, (*labels_shape, NUM_CODEBOOKS))
            terms.append(Term(term, encoder.d_model, pairing, quantizer, *statistics))
        if in_loop:
            origin = Origin("random", size.teacher_layer, "random", "")
            kind: LabelKind = CodebookIndexes(make_teacher(size), quantizer, origin)
            kind.to(device)
            in_loop_kinds.append(kind)
        distillation = Distillation(terms, in_loop_kinds)
        model.codebook_loss_net = distillation.head
    batch = StudentBatch(
        ids=[str(n) for n in range(num_utterances)],
        features_BTF=torch.randn(num_utterances, round(100 * seconds), encoder.num_features),
        lengths_B=torch.full((num_utterances,), round(100 * seconds)),
        tokens=torch.randint(1, size.vocab_size, (num_utterances, num_tokens)).tolist(),
        texts=[""] * num_utterances,
        labels=labels,
        waveforms_BL=torch.randn(num_utterances, num_samples) / 10 if in_loop else None,
        samples_B=torch.full((num_utterances,), num_samples) if in_loop else None,
    )
    data = SimpleNamespace(seconds=1.0)
    task = StudentTask(model, settings, data, {}, distillation, SpecAugmentSettings(), None, device)
    return task, batch


def measure(row: str, settings: Settings) -> tuple[float, int]:
    """(seconds of a step, bytes at the peak)."""
    device = pick_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()  # as the training loop does
    before = resident_bytes()
    task, batch = make_task(row, SIZES[settings.size], device)
    model = task.model.to(device).train()
    optimizer = Eve(model.parameters(), lr=1e-4)
    seconds = []
    for step in range(settings.steps + 1):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            # Past the warm-up, when all losses count.
            loss, _ = task.loss(batch, step, 3.0)
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]), peak_bytes(device, before)


def main(settings: Settings) -> None:
    rows = settings.rows or list(ROWS)
    for row in rows:
        if row not in ROWS:
            raise RecipeError(f"--rows {row}: not known; it has: {', '.join(ROWS)}")
    jobs = {row: partial(measure, row, settings) for row in rows}
    found = alternating(jobs, settings.rounds)
    num_utterances, seconds, _ = SIZES[settings.size].batch
    print(
        f"{settings.size}: {num_utterances} utterances of {seconds:g} s, {settings.precision}, "
        f"{settings.rounds} rounds of {settings.steps} steps"
    )
    print(f"{'kind':<26}{'step':>10}{'added':>9}{'memory':>12}{'added':>9}")
    base: tuple[float, int] | None = None
    for row, measured in found.items():
        times, peaks = zip(*measured)
        best = min(times), min(peaks)
        base = base or best
        step, memory = (100 * (x / y - 1) for x, y in zip(best, base))
        print(
            f"{row:<26}{1000 * best[0]:>7.1f} ms{step:>+8.1f}%{best[1] / 2**20:>8.0f} MiB"
            f"{memory:>+8.1f}%"
        )


if __name__ == "__main__":
    cli.run(main, Settings)
