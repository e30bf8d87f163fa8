"""Time and memory of the pruned transducer loss, native beside k2's.

    tests/k2/run.sh                                                  # makes the environment
    .venv-k2/bin/python -m benchmarks.transducer_loss --threads 2

A turn is what a training step does between the networks and the optimizer: simple loss, prune
ranges, pruning, joiner, pruned loss, and the gradients of all inputs and of the joiner. Both make
their turns on the same inputs in the same torch, alternating, and each in a process of its own, so
that the growth of its resident memory over the inputs is its own.

The floor counts what any implementation must do at float32: the two products of the joiner
(output, and the gradients of its input and weight: 6·B·T·R·D·V operations) and of the simple loss's
normalizers (6·B·(S+1)·T·V), and one pass over the pruned logits and their gradient.

Shapes: B utterances, T frames, S tokens, V vocabulary, D joiner dimension, R prune range.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

SIZES = (
    {"B": 8, "T": 250, "S": 40, "V": 500, "D": 512},
    {"B": 4, "T": 400, "S": 80, "V": 500, "D": 512},
)
R = 5
BACKENDS = ("native", "k2")


def _serve(backend: str, size: dict[str, int], threads: int) -> None:
    """One turn for each line of standard input, answered with its seconds and the peak so far."""
    import torch

    from mvqkd.losses import rnnt

    torch.set_num_threads(threads)
    B, T, S, V, D = (size[name] for name in "BTSVD")
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    encoder_BTD, decoder_BSD, joiner_DV = leaf(B, T, D), leaf(B, S + 1, D), leaf(D, V)
    am_BTV, lm_BSV = leaf(B, T, V), leaf(B, S + 1, V)
    leaves = [encoder_BTD, decoder_BSD, joiner_DV, am_BTV, lm_BSV]
    symbols = torch.randint(1, V, (B, S), generator=generator)
    boundary = torch.tensor([0, 0, S, T]).repeat(B, 1)
    shared = {"boundary": boundary, "reduction": "sum", "backend": backend}

    def turn() -> None:
        for tensor in leaves:
            tensor.grad = None
        simple, occupations = rnnt.rnnt_loss_smoothed(
            lm_BSV, am_BTV, symbols, 0, lm_only_scale=0.25, return_grad=True, **shared
        )
        ranges = rnnt.get_rnnt_prune_ranges(*occupations, boundary, R, backend=backend)
        pruned = rnnt.do_rnnt_pruning(encoder_BTD, decoder_BSD, ranges, backend=backend)
        logits = torch.tanh(pruned[0] + pruned[1]) @ joiner_DV
        loss = rnnt.rnnt_loss_pruned(logits, symbols, ranges, 0, **shared)
        (0.5 * simple + loss).backward()

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--serve", choices=BACKENDS, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=json.loads, help="of SIZES, as JSON")
    args = parser.parse_args()
    if args.serve:
        _serve(args.serve, args.size, args.threads)
        return
    import torch

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
