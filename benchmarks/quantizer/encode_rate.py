"""Frames per second that the quantizer encodes, beside the authors' package.

Both have the same weights and get the same frames, in turns, with as many threads. The authors'
package holds a vector per candidate, so its rate depends on how many frames it is given at a time:
few, which its vectors find room for in the caches, or the 512 of a training step. There is a row
for its best number and one for 512. Ours takes its own chunks of whatever it is given.
"""

from __future__ import annotations

import importlib.metadata

import torch
from multi_quantization import Quantizer as PeerQuantizer
from torch import Tensor
from torch.nn import functional as F

from benchmarks.quantizer.clock import fastest
from benchmarks.quantizer.rows import Row
from mvqkd.quantizer import LeastSquaresTrainer, Quantizer, QuantizerSettings

DIM, NUM_CODEBOOKS, CODEBOOK_SIZE, ROUNDS = 1280, 8, 256, 5
PEER = f"multi_quantization {importlib.metadata.version('multi_quantization')}"
PEER_FRAMES = (4, 8, 32, 128, 512)  # at a time


def frames_like_embeddings(num_frames: int, generator: torch.Generator) -> Tensor:
    """Frames (F, 1280) about as hard to quantize as a teacher's: variance falls with the axis."""
    deviation_D = torch.arange(1, DIM + 1).float() ** -0.6
    rotation_DD = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))[0]
    mean_D = torch.randn(DIM, generator=generator)
    return torch.randn(num_frames, DIM, generator=generator) * deviation_D @ rotation_DD + mean_D


def train_briefly(frames_FD: Tensor, seed: int, num_codebooks: int = NUM_CODEBOOKS) -> Quantizer:
    """A quantizer whose first guess the search has work to do on, in some seconds."""
    settings = QuantizerSettings(
        num_codebooks=num_codebooks,
        codebook_size=CODEBOOK_SIZE,
        seed=seed,
        lsq_iters=1,
        logits_iters=20,
    )
    trainer = LeastSquaresTrainer(frames_FD, settings, "cpu")
    while not trainer.done():
        trainer.step()
    return trainer.get_quantizer()


def _mean_rounds(quantizer: Quantizer, x_BD: Tensor) -> float:
    """Rounds per frame, the one that finds nothing to change included."""
    total = 0
    codes = quantizer.encode(x_BD, 0)
    moved = torch.ones(len(x_BD), dtype=torch.bool)
    for rounds in range(1, ROUNDS + 1):
        total += int(moved.sum())
        before, codes = codes, quantizer.encode(x_BD, rounds)
        moved = (codes != before).any(dim=1)
    return total / len(x_BD)


@torch.no_grad()
def measure(device: str, num_frames: int, repeats: int, seed: int) -> list[Row]:
    """The row of one device."""
    M = NUM_CODEBOOKS * CODEBOOK_SIZE
    what = f"encode, D={DIM}, N={NUM_CODEBOOKS}, K={CODEBOOK_SIZE}, {ROUNDS} rounds"
    floor = f"two products of {DIM} x {M}: {4 * DIM * M / 1e6:.1f} MFLOP; {4 * DIM} B in, 8 out"
    on_gpu = device == "cuda"
    peer_name = "1,000,000 frames/s" if on_gpu else PEER
    if on_gpu and not torch.cuda.is_available():
        return [Row(what, device, "frames/s", None, peer_name, None, None, None, floor, None)]

    generator = torch.Generator().manual_seed(seed)
    frames_FD = frames_like_embeddings(6144 + num_frames, generator)
    with torch.enable_grad():
        ours = train_briefly(frames_FD[:6144], seed)
    mean_D = frames_FD[:6144].mean(dim=0)
    x_BD = frames_FD[6144:]

    def rrl(rounds: int) -> float:
        error = (ours.decode(ours.encode(x_BD, rounds)) - x_BD).square().sum()
        return float(error / (x_BD - mean_D).square().sum())

    details = {
        "threads": torch.get_num_threads(),
        "frames": len(x_BD),
        "rrl": {str(rounds): rrl(rounds) for rounds in (0, ROUNDS)},
        "rounds_per_frame": _mean_rounds(ours, x_BD[:1024]),
        "table_bytes": 4 * M * (M + 2 * DIM),
    }
    peer = PeerQuantizer(DIM, CODEBOOK_SIZE, NUM_CODEBOOKS)
    peer.load_state_dict(ours.state_dict())
    compared_BD = x_BD[: max(PEER_FRAMES)]
    expected_Bn = peer.encode(compared_BD, ROUNDS)
    ours, x_BD = ours.to(device), x_BD.to(device)
    equal_B = (ours.encode(compared_BD.to(device), ROUNDS).cpu() == expected_Bn).all(dim=1)
    details["frames_equal_to_peer"] = f"{int(equal_B.sum())} of {len(equal_B)}"
    tables = ours.search_tables()

    def products() -> None:
        for x_bD in x_BD.split(tables.chunk_frames()):
            F.linear(x_bD, ours.to_logits.weight, ours.to_logits.bias)
            torch.addmm(tables.half_sumsq_M, x_bD, tables.centers_MD.t(), alpha=-1)

    calls = {"ours": lambda: ours.encode(x_BD, ROUNDS), "floor": products}
    if on_gpu:
        times = fastest(calls, repeats, device)
        rate = len(x_BD) / times["ours"].wall
        floor_rate = len(x_BD) / times["floor"].wall
        ratio = rate / 1e6
        row = Row(
            what, device, "frames/s", rate, peer_name, 1e6, ratio, None, floor, floor_rate, details
        )
        return [row]

    for size in PEER_FRAMES:
        calls[f"peer {size}"] = lambda size=size: peer.encode(x_BD[:size], ROUNDS)
    times = fastest(calls, repeats)
    wall = {size: size / times[f"peer {size}"].wall for size in PEER_FRAMES}
    cpu = {size: size / times[f"peer {size}"].cpu for size in PEER_FRAMES}
    rate, rate_cpu = len(x_BD) / times["ours"].wall, len(x_BD) / times["ours"].cpu
    details["frames_per_cpu_second"] = {
        "ours": rate_cpu,
        "floor": len(x_BD) / times["floor"].cpu,
        "peer by frames at a time": {str(size): value for size, value in cpu.items()},
    }
    best = max(PEER_FRAMES, key=wall.__getitem__)
    rows = []
    for name, size in (("at its best", best), ("a training step's frames", 512)):
        row = Row(
            what=what,
            device=device,
            unit="frames/s",
            ours=rate,
            peer_name=f"{peer_name}, {name}: {size} at a time",
            peer=wall[size],
            ratio=rate / wall[size],
            ratio_cpu=rate_cpu / (max(cpu.values()) if size == best else cpu[size]),
            floor=floor,
            floor_rate=len(x_BD) / times["floor"].wall,
            details=details,
        )
        rows.append(row)
    return rows
