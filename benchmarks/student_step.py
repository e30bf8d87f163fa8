"""A student's training step: seconds, peak memory, and the share of the matrix rate it reaches.

    python3 -m benchmarks.student_step [--size paper] [--devices '[cpu]'] [--precisions '[bf16]']
    python3 -m benchmarks.student_step --peer_dir FOLDER     # beside the published model

Random weights and batches of `benchmarks.distillation`'s sizes: at ``paper`` 5 utterances of 1200
feature frames and 45 tokens, 12 layers of 512. Either side's step masks the features (the same
SpecAugment on the CPU), takes the batch to the device, and makes loss, backward and Eve's update,
with all losses, which are read at the end of the forward pass. Each row runs in processes of its
own, which take turns; ours keep the memory that a step frees, as in training. Time is the median of
a process's steps, and the lowest of its rounds. Memory is the process's peak over what it held
before its model was made, libraries imported; on a GPU that of torch's allocator.
Matrix products and convolutions are counted as they run (2 for a multiplication and an addition),
forward and backward; the matrix rate is that of one large square product in the row's precision.

FOLDER holds the model code of icefall's ``pruned_transducer_stateless6`` (conformer.py, decoder.py,
encoder_interface.py, joiner.py, model.py, optim.py, scaling.py). Where k2 or multi_quantization
does not import, it gets the losses of `mvqkd.losses` under their names: the rest of the step is
what is compared then, and the output says so.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.distillation import NUM_CODEBOOKS, SIZES, Size, make_task
from benchmarks.processes import alternating, peak_bytes, resident_bytes
from mvqkd import cli, cpu_kernels  # noqa: F401  held before a model is made, not its memory
from mvqkd.data.datamodule import Augment, SpecAugmentSettings
from mvqkd.device import describe_device, pick_device
from mvqkd.errors import RecipeError
from mvqkd.losses import rnnt
from mvqkd.students.task import SIMPLE_LOSS_SCALE
from mvqkd.training.memory import keep_freed_memory
from mvqkd.training.optim import Eve

try:
    from multi_quantization.prediction import JointCodebookLoss
except ImportError:
    from mvqkd.losses import JointCodebookLoss

# Rows of `benchmarks.distillation`; the published code has the first two.
KINDS = ("none", "mvq", "mvq-l2")
PEER_KINDS = ("none", "mvq")
CODEBOOK_LOSS_SCALE = 0.1


def _product_flops(sum_shape, a_shape, b_shape, **_) -> int:
    return 2 * math.prod(a_shape) * b_shape[-1]


def _convolution_backward_flops(grad_shape, x_shape, weight_shape, *rest, **_) -> int:
    num_gradients = sum(rest[-1][:2])  # of input and weight
    return 2 * math.prod(grad_shape) * math.prod(weight_shape[1:]) * num_gradients


# Where FlopCounterMode knows of no formula, or of one that is only right for one group.
FORMULAS = {
    torch.ops.aten.addmm_: _product_flops,
    torch.ops.aten.baddbmm_: _product_flops,
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
}

# Rows of the square matrices whose product gives the rate.
GEMM_ROWS = {"cpu": 2048, "cuda": 8192}
PEER_FILES = ("conformer", "decoder", "encoder_interface", "joiner", "model", "optim", "scaling")

Precision = Literal["float32", "bf16"]


@dataclass
class Settings:
    """What is measured."""

    size: Literal["paper", "mini", "tiny"] = "paper"
    devices: list[Literal["cpu", "cuda"]] = field(default_factory=lambda: ["cpu", "cuda"])
    precisions: list[Precision] = field(default_factory=lambda: ["float32", "bf16"])
    kinds: list[Literal["none", "mvq", "mvq-l2"]] = field(default_factory=lambda: list(KINDS))
    # A folder with the published model code.
    peer_dir: Path | None = None
    rounds: int = 2
    # Of a process, after one that is not counted.
    steps: int = 3


@dataclass(frozen=True)
class Step:
    """One row in one process."""

    seconds: float
    peak_bytes: int
    flops: int
    device: str
    # What its losses are computed by.
    losses: str


class Ragged:
    """As much of k2.RaggedTensor, of two axes, as the published model asks for."""

    num_axes = 2

    def __init__(self, rows: list[list[int]], device: torch.device | str = "cpu") -> None:
        self.rows, self._device = rows, device
        self.dim0 = len(rows)
        lengths = torch.tensor([0] + [len(row) for row in rows])
        splits = lengths.cumsum(0).to(torch.int32).to(device)
        self.shape = SimpleNamespace(row_splits=lambda axis: splits)

    def to(self, device: torch.device) -> Ragged:
        return Ragged(self.rows, device)

    def pad(self, mode: str, padding_value: int) -> torch.Tensor:
        rows = [torch.tensor(row, dtype=torch.int32) for row in self.rows]
        padded = torch.nn.utils.rnn.pad_sequence(rows, True, padding_value)
        return padded.to(self._device)


def _pad_mask(lengths_B: torch.Tensor, max_len: int = 0) -> torch.Tensor:
    size = max(max_len, int(lengths_B.max()))
    return torch.arange(size, device=lengths_B.device) >= lengths_B[:, None]


class CodebookLoss(JointCodebookLoss):
    """In float32, as our own step has it, also where autocast hands it bfloat16."""

    def forward(self, predictor_BTC: torch.Tensor, indexes_BTN: torch.Tensor) -> torch.Tensor:
        with torch.autocast(predictor_BTC.device.type, enabled=False):
            return super().forward(predictor_BTC.float(), indexes_BTN)


# What the published model imports from packages that need not be here.
STAND_INS = {
    "k2": {"RaggedTensor": Ragged}
    | {
        name: partial(getattr(rnnt, name), backend="native")
        for name in (
            *("rnnt_loss_smoothed", "get_rnnt_prune_ranges"),
            *("do_rnnt_pruning", "rnnt_loss_pruned"),
        )
    },
    "icefall": {"is_module_available": lambda *names: True},
    "icefall.utils": {
        "add_sos": lambda ragged, sos_id: Ragged(
            [[sos_id, *row] for row in ragged.rows], ragged._device
        ),
        "make_pad_mask": _pad_mask,
        "is_jit_tracing": torch.jit.is_tracing,
        "subsequent_chunk_mask": None,
    },
    "multi_quantization": {},
}


def import_peer(folder: Path) -> SimpleNamespace:
    """The modules of the published model by name, and ``k2``, or what stands for it."""
    for name in PEER_FILES:
        if not (folder / f"{name}.py").exists():
            raise RecipeError(
                f"--peer_dir {folder}: has no {name}.py; give the folder of the published model"
            )
    for package, members in STAND_INS.items():
        try:
            importlib.import_module(package)
        except (ImportError, OSError):
            sys.modules[package] = types.ModuleType(package)
            vars(sys.modules[package]).update(members)
    prediction = types.ModuleType("multi_quantization.prediction")
    prediction.JointCodebookLoss = CodebookLoss
    sys.modules[prediction.__name__] = prediction
    sys.path.insert(0, str(folder))
    names = ("k2", *PEER_FILES)
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def our_step(kind: str, size: Size, device: torch.device) -> tuple[torch.nn.Module, Callable, type]:
    """The model, its loss as a function, and its optimizer."""
    if device.type == "cpu":
        keep_freed_memory()  # as our training loop does; the published one does not
    task, batch = make_task(kind, size, device)
    # Past the warm-up, when all losses count.
    return task.model, lambda: task.loss(batch, 1, 3.0)[0], Eve


def peer_step(
    folder: Path, kind: str, size: Size, device: torch.device
) -> tuple[torch.nn.Module, Callable, type]:
    """As `our_step`, of the published code, with the same batch."""
    peer = import_peer(folder)
    _, batch = make_task(kind, size, torch.device("cpu"))
    torch.manual_seed(0)
    encoder = {
        **{"num_features": 80, "d_model": 512, "nhead": 8, "dim_feedforward": 2048},
        **{"num_encoder_layers": 12, "cnn_module_kernel": 31},
    }
    # Its subsampling has the published number of channels at any size.
    encoder |= {name: value for name, value in size.encoder.items() if name in encoder}
    if kind == "mvq":
        encoder["middle_output_layer"] = size.layer - 1
    model = peer.model.Transducer(
        encoder=peer.conformer.Conformer(**encoder, subsampling_factor=4, layer_dropout=0.0),
        decoder=peer.decoder.Decoder(
            vocab_size=size.vocab_size, decoder_dim=size.joiner_dim, blank_id=0, context_size=2
        ),
        joiner=peer.joiner.Joiner(
            encoder_dim=encoder["d_model"],
            decoder_dim=size.joiner_dim,
            joiner_dim=size.joiner_dim,
            vocab_size=size.vocab_size,
        ),
        encoder_dim=encoder["d_model"],
        decoder_dim=size.joiner_dim,
        joiner_dim=size.joiner_dim,
        vocab_size=size.vocab_size,
        num_codebooks=2 * NUM_CODEBOOKS if kind == "mvq" else 0,
    )
    augment = Augment(SpecAugmentSettings())

    def loss() -> torch.Tensor:
        # What `StudentTask` does in a step, and the published loop or its data loader.
        features, _ = augment(batch.features_BTF, batch.lengths_B)
        labels = next(iter(batch.labels.values())).to(device) if kind == "mvq" else None
        simple, pruned, codebook = model(
            features.to(device),
            batch.lengths_B.to(device),
            peer.k2.RaggedTensor(batch.tokens).to(device),
            prune_range=5,
            am_scale=0.0,
            lm_scale=0.25,
            warmup=3.0,
            codebook_indexes=labels,
        )
        found = [simple.sum(), pruned.sum(), *([] if codebook is None else [codebook])]
        torch.stack([value.detach().double() for value in found]).tolist()
        scales = SIMPLE_LOSS_SCALE, 1.0, CODEBOOK_LOSS_SCALE
        return sum(scale * value for scale, value in zip(scales, found))

    return model, loss, peer.optim.Eve


def our_losses() -> str:
    """Imports what `our_step` needs, and says where its losses come from."""
    return f"transducer losses of {'k2' if rnnt.import_k2() else 'mvqkd'}, codebook loss of mvqkd"


def peer_losses(folder: Path) -> str:
    """As `our_losses`, of `peer_step`."""
    transducer = "mvqkd" if import_peer(folder).k2.RaggedTensor is Ragged else "k2"
    codebooks = JointCodebookLoss.__module__.partition(".")[0]
    return f"transducer losses of {transducer}, codebook loss of {codebooks}"


def measure(
    make: Callable,
    imports: Callable[[], str],
    precision: Precision,
    device_name: str,
    steps: int,
) -> Step:
    """
    Args:
      make: from a device to a model, its loss and its optimizer.
      imports: the libraries that it takes, whose memory is none of the step's; says which.
    """
    device = pick_device(device_name)
    losses = imports()
    before = resident_bytes()
    model, loss_of, optimizer_class = make(device)
    model.to(device).train()
    optimizer = optimizer_class(model.parameters(), lr=1e-4)
    seconds, flops = [], 0
    for step in range(steps + 1):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        with counter if step == 0 else contextlib.nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_of()
            loss.backward()
        flops = flops or counter.get_total_flops()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return Step(
        statistics.median(seconds[1:]),
        peak_bytes(device, before),
        flops,
        describe_device(device),
        losses,
    )


def matrix_rate(precision: Precision, device_name: str, rows: int) -> float:
    """Operations a second of a product of two square matrices."""
    device = pick_device(device_name)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(rows, rows, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * rows**3 / min(seconds[1:])


def measure_all(device: str, precision: Precision, settings: Settings) -> None:
    """Print the table of a device and a precision."""
    size = SIZES[settings.size]
    sides = {kind: (partial(our_step, kind, size), our_losses) for kind in settings.kinds}
    if (folder := settings.peer_dir) is not None:
        for kind in PEER_KINDS:
            if kind in settings.kinds:
                make = partial(peer_step, folder, kind, size)
                sides[f"published, {kind}"] = make, partial(peer_losses, folder)
    jobs: dict[str, Callable] = {
        row: partial(measure, make, imports, precision, device, settings.steps)
        for row, (make, imports) in sides.items()
    }
    rows = 256 if settings.size == "tiny" else GEMM_ROWS[device]
    not_measured: dict[str, str] = {}
    rates = alternating(
        {"matrix rate": partial(matrix_rate, precision, device, rows)},
        settings.rounds,
        not_measured,
    )
    if not_measured:
        print(f"\n{device}, {precision}: not measured: {not_measured['matrix rate']}")
        return
    rate = max(rates["matrix rate"])
    found = {
        row: Step(
            min(step.seconds for step in measured),
            min(step.peak_bytes for step in measured),
            measured[0].flops,
            measured[0].device,
            measured[0].losses,
        )
        for row, measured in alternating(jobs, settings.rounds, not_measured).items()
    }
    where = next(iter(found.values())).device if found else device
    print(f"\n{where}, {precision}: matrix products at {rate / 1e9:.1f} GFLOP/s")
    print(f"{'student':<20}{'step':>12}{'peak':>11}{'counted':>14}{'of the rate':>13}")
    for row, step in found.items():
        print(
            f"{row:<20}{step.seconds:>10.3f} s{step.peak_bytes / 2**20:>7.0f} MiB"
            f"{step.flops / 1e9:>8.1f} GFLOP{step.flops / step.seconds / rate:>12.1%}"
        )
    for row, reason in not_measured.items():
        print(f"{row:<20} not measured: {reason}")
    for row, step in found.items():
        print(f"{row}: {step.losses}")
    for kind in PEER_KINDS:
        published = found.get(f"published, {kind}")
        if published and kind in found:
            print(
                f"{kind}: {published.seconds / found[kind].seconds:.2f} x the speed of the "
                f"published code, {found[kind].peak_bytes / published.peak_bytes:.2f} x its memory"
            )


def main(settings: Settings) -> None:
    if settings.peer_dir is not None and not settings.peer_dir.is_dir():
        raise RecipeError(f"--peer_dir {settings.peer_dir}: no such folder")
    num_utterances, seconds, num_tokens = SIZES[settings.size].batch
    print(
        f"{settings.size}: {num_utterances} utterances of {100 * seconds:.0f} frames and "
        f"{num_tokens} tokens, {settings.rounds} rounds of {settings.steps} steps\n"
        "a step, on either side: SpecAugment, batch to the device, losses, their values read, "
        "backward, Eve\n"
        "peak: over what the process held before its model was made"
    )
    if settings.peer_dir is None:
        print("published code: not measured, no --peer_dir")
    for device in settings.devices:
        for precision in settings.precisions:
            measure_all(device, precision, settings)


if __name__ == "__main__":
    cli.run(main, Settings)
