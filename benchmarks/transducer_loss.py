"""Time and memory of the pruned transducer loss: beside k2's, and on a GPU.

    tests/k2/run.sh                                                  # makes the environment
    .venv-k2/bin/python -m benchmarks.transducer_loss --threads 2
    python3 -m benchmarks.transducer_loss --device cuda

A turn is what a training step does between the networks and the optimizer: simple loss, prune
ranges, pruning, joiner, pruned loss, and the gradients of all inputs and of the joiner. Both make
their turns on the same inputs in the same torch, alternating, and each in a process of its own, so
that the growth of its resident memory over the inputs is its own.

The floor counts what any implementation must do at float32: the two products of the joiner
(output, and the gradients of its input and weight: 6·B·T·R·D·V operations) and of the simple loss's
normalizers (6·B·(S+1)·T·V), and one pass over the pruned logits and their gradient.

On a GPU the floor is one of bytes, at the rate of a copy on the same device: a lattice's is that of
`mvqkd.losses.rnnt_triton`; a loss also reads its logits and writes their gradient; a turn does so
with all inputs, and writes and reads the pruned logits and their gradient. Beside them stands the
full-lattice loss of torchaudio, where that has one, from its logits on: it knows no bf16, and the
joiner that makes the logits is not counted.

Shapes: B utterances, T frames, S tokens, V vocabulary, D joiner dimension, R prune range.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

SIZES = (
    {"B": 8, "T": 250, "S": 40, "V": 500, "D": 512},
    {"B": 4, "T": 400, "S": 80, "V": 500, "D": 512},
)
GPU_SIZE = {"B": 32, "T": 400, "S": 100, "V": 500, "D": 512}
R = 5
BACKENDS = ("native", "k2")
# Of a cell of the lattice: two edges are read, and their occupations written, in float32.
BYTES_PER_CELL = 16


def _make_turn(backend: str, size: dict[str, int], device="cpu", bf16=False) -> Callable[[], None]:
    import torch

    from mvqkd.losses import rnnt

    B, T, S, V, D = (size[name] for name in "BTSVD")
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device).requires_grad_()

    encoder_BTD, decoder_BSD, joiner_DV = leaf(B, T, D), leaf(B, S + 1, D), leaf(D, V)
    am_BTV, lm_BSV = leaf(B, T, V), leaf(B, S + 1, V)
    leaves = [encoder_BTD, decoder_BSD, joiner_DV, am_BTV, lm_BSV]
    symbols = torch.randint(1, V, (B, S), generator=generator).to(device)
    boundary = torch.tensor([0, 0, S, T]).repeat(B, 1).to(device)
    shared = {"boundary": boundary, "reduction": "sum", "backend": backend}

    def turn() -> None:
        for tensor in leaves:
            tensor.grad = None
        simple, occupations = rnnt.rnnt_loss_smoothed(
            lm_BSV, am_BTV, symbols, 0, lm_only_scale=0.25, return_grad=True, **shared
        )
        ranges = rnnt.get_rnnt_prune_ranges(*occupations, boundary, R, backend=backend)
        pruned = rnnt.do_rnnt_pruning(encoder_BTD, decoder_BSD, ranges, backend=backend)
        with torch.autocast(str(device).split(":")[0], torch.bfloat16, enabled=bf16):
            logits = torch.tanh(pruned[0] + pruned[1]) @ joiner_DV
        loss = rnnt.rnnt_loss_pruned(logits, symbols, ranges, 0, **shared)
        (0.5 * simple + loss).backward()

    return turn


def _serve(backend: str, size: dict[str, int], threads: int) -> None:
    """One turn for each line of standard input, answered with its seconds and the peak so far."""
    import torch

    torch.set_num_threads(threads)
    turn = _make_turn(backend, size)

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    resting = peak()
    for _ in sys.stdin:
        started = time.perf_counter()
        turn()
        answer = {"seconds": time.perf_counter() - started, "bytes": peak() - resting}
        print(json.dumps(answer), flush=True)


def _ask(process: subprocess.Popen) -> dict:
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def _floor_gflop(B: int, T: int, S: int, V: int, D: int) -> float:
    return (6 * B * T * R * D * V + 6 * B * (S + 1) * T * V) / 1e9


def measure(size: dict[str, int], threads: int, repeats: int) -> dict:
    """Least seconds of a turn and peak bytes, by backend."""
    command = [sys.executable, "-m", "benchmarks.transducer_loss", "--threads", str(threads)]
    processes = {
        backend: subprocess.Popen(
            [*command, "--serve", backend, "--size", json.dumps(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for backend in BACKENDS
    }
    answers: dict[str, list[dict]] = {backend: [] for backend in BACKENDS}
    for _ in range(repeats + 1):
        for backend, process in processes.items():
            answers[backend].append(_ask(process))
    for process in processes.values():
        process.communicate()
    return {
        backend: {
            # The first turn allocates.
            "seconds": min(answer["seconds"] for answer in of_one[1:]),
            "bytes": of_one[-1]["bytes"],
        }
        for backend, of_one in answers.items()
    }


def _seconds_and_bytes(turn: Callable[[], object], device, repeats: int) -> tuple[float, int]:
    """Least seconds of a turn, of ten in a row, and the bytes that it takes at its peak."""
    import torch

    cuda = device.type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    turn()
    synchronize()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        resting = torch.cuda.memory_allocated()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(10):
            turn()
        synchronize()
        seconds.append((time.perf_counter() - started) / 10)
    return min(seconds), torch.cuda.max_memory_allocated() - resting if cuda else 0


def _copy_rate(device, num_bytes: int, repeats: int) -> float:
    """Bytes read and written in a second."""
    import torch

    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    seconds, _ = _seconds_and_bytes(lambda: target.copy_(source), device, repeats)
    return 2 * 4 * source.numel() / seconds


def _full_lattice_turn(size: dict[str, int], device) -> Callable[[], None]:
    """torchaudio's loss and its gradient.

    Raises ImportError, OSError, AttributeError or RuntimeError where torchaudio is not here, was
    built for another torch, or without this loss.
    """
    import torch
    from torchaudio.functional import rnnt_loss

    B, T, S, V = (size[name] for name in "BTSV")
    logits = torch.randn(B, T, S + 1, V, device=device, requires_grad=True)
    symbols = torch.randint(1, V, (B, S), device=device, dtype=torch.int32)
    frames, tokens = (torch.full((B,), n, device=device, dtype=torch.int32) for n in (T, S))

    def turn() -> None:
        logits.grad = None
        rnnt_loss(logits, symbols, frames, tokens, blank=0, reduction="sum").backward()

    turn()
    return turn


def measure_on(device, size: dict[str, int], repeats: int) -> None:
    """Print the table of the top of this file for one device, on which torch runs."""
    import torch

    from mvqkd.losses import rnnt

    B, T, S, V, D = (size[name] for name in "BTSVD")
    cells = B * (S + 1) * T
    # What fits no cache, or as much as the size itself.
    rate = _copy_rate(device, min(2**30, 4 * cells * V), repeats)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {where}, a copy moves {rate / 1e9:.0f} GB/s,", end=" ")
    print(", ".join(f"{name} {value}" for name, value in size.items()))

    px, py = -torch.rand(B, S, T + 1, device=device), -torch.rand(B, S + 1, T, device=device)
    px[:, :, T] = -torch.inf
    lattice = (px, py, torch.tensor([S, T], device=device).expand(B, 2), True)
    walks = {"torch": rnnt._walk_lattice}
    if (chosen := rnnt._choose_walk(px)) is not rnnt._walk_lattice:
        walks["Triton"] = chosen
        differences = (
            (mine - of_torch).abs().max() / of_torch.abs().max()
            for mine, of_torch in zip(chosen(*lattice), rnnt._walk_lattice(*lattice))
        )
        print("Triton differs from torch at most by", f"{max(differences):.1e} of the largest")

    print("\n| what | type | time | peak MiB | floor | time / floor |")
    print("| --- | --- | --- | --- | --- | --- |")

    def row(what: str, dtype: str, turn: Callable[[], object], floor_bytes: int) -> None:
        seconds, peak = _seconds_and_bytes(turn, device, repeats)
        floor = floor_bytes / rate
        print(
            f"| {what} | {dtype} | {1e3 * seconds:.3f} ms | {peak / 2**20:.0f} "
            f"| {1e3 * floor:.3f} ms | {seconds / floor:.1f} |",
            flush=True,
        )

    lattice_bytes = BYTES_PER_CELL * cells
    for kind, walk in walks.items():
        name = f"lattice with occupations, {kind}"
        row(name, "float32", lambda walk=walk: walk(*lattice), lattice_bytes)
    symbols = torch.randint(1, V, (B, S), device=device)
    begin_T = torch.linspace(0, S + 1 - R, T, device=device).long()
    ranges = (begin_T[:, None] + torch.arange(R, device=device)).expand(B, T, R).contiguous()
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.randn(B, T, R, V, device=device, dtype=dtype, requires_grad=True)

        def loss(logits=logits) -> None:
            logits.grad = None
            rnnt.rnnt_loss_pruned(logits, symbols, ranges, 0, backend="native").backward()

        type_name = str(dtype).removeprefix("torch.")
        row("pruned loss", type_name, loss, 2 * logits.nbytes + lattice_bytes)
        inputs = B * (T + S + 1) * (D + V) + D * V
        turn = _make_turn("native", size, device, bf16=dtype == torch.bfloat16)
        floor_bytes = 2 * 4 * inputs + 4 * logits.nbytes + 2 * lattice_bytes
        row("turn", type_name, turn, floor_bytes)
        del logits, turn
    try:
        full = _full_lattice_turn(size, device)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        print(f"\ntorchaudio's loss does not run here: {error}")
    else:
        row("torchaudio's loss of the full lattice", "float32", full, 2 * 4 * cells * V)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--serve", choices=BACKENDS, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=json.loads, help="of SIZES, as JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: beside k2")
    args = parser.parse_args(arguments)
    if args.serve:
        _serve(args.serve, args.size, args.threads)
        return
    import torch

    from mvqkd.losses.rnnt import import_k2

    if args.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no GPU")
        measure_on(torch.device("cuda"), args.size or GPU_SIZE, args.repeats)
        return
    if import_k2() is None:
        parser.error("k2 does not import; call tests/k2/run.sh, then .venv-k2/bin/python")
    print(f"torch {torch.__version__}, {args.threads} threads, least of {args.repeats} turns\n")
    print("| size | native | k2 | ratio | native MiB | k2 MiB | ratio | floor |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for size in [args.size] if args.size else SIZES:
        found = measure(size, args.threads, args.repeats)
        native, k2 = (found[backend] for backend in BACKENDS)
        print(
            f"| {', '.join(f'{name} {value}' for name, value in size.items())} "
            f"| {native['seconds']:.3f} s | {k2['seconds']:.3f} s "
            f"| {native['seconds'] / k2['seconds']:.2f} "
            f"| {native['bytes'] / 2**20:.0f} | {k2['bytes'] / 2**20:.0f} "
            f"| {native['bytes'] / k2['bytes']:.2f} | {_floor_gflop(**size):.1f} GFLOP |",
            flush=True,
        )


if __name__ == "__main__":
    main()
