"""Training steps per second of the paper's trainer, beside the authors' package.

Both start from the same weights and make their steps on the same frames, in turns, with as many
threads; phase two starts from the product of the same phase-one weights. Both draw one or two
rounds of refinement for each step; here all steps make two.
"""

from __future__ import annotations

from unittest import mock

import torch
from multi_quantization import QuantizerTrainer as PeerTrainer

from benchmarks.quantizer.clock import fastest
from benchmarks.quantizer.encode_rate import (
    CODEBOOK_SIZE,
    DIM,
    NUM_CODEBOOKS,
    PEER,
    frames_like_embeddings,
)
from benchmarks.quantizer.rows import Row
from mvqkd.quantizer import QuantizerTrainer, trainer

FRAMES = 512


def _floor(phase: int) -> tuple[str, float]:
    """Operations of one step, in words and GFLOP: one that makes two rounds."""
    N, K = (2 * NUM_CODEBOOKS, 16) if phase == 1 else (NUM_CODEBOOKS, CODEBOOK_SIZE)
    M = N * K
    product = 2 * FRAMES * DIM * M / 1e9
    gram = DIM * M * M * (N - 1) / N / 1e9
    weights = 2 * DIM * M * 4 / 1e6
    text = (
        f"3 products of {FRAMES} x {DIM} x {M} (logits, their weights' gradient, centers): "
        f"{3 * product:.2f} GFLOP; Gram matrix, its {N * (N - 1) // 2} blocks: {gram:.2f} GFLOP; "
        f"weights and 2 moments read and written: {6 * weights:.0f} MB"
    )
    return text, 3 * product + gram


def measure(device: str, repeats: int, seed: int) -> list[Row]:
    """A row for each phase."""
    rows = []
    for phase in (1, 2):
        what = f"training step of {FRAMES} frames, phase {phase}, D={DIM}, N={NUM_CODEBOOKS}"
        floor_text, gflop = _floor(phase)
        if device == "cuda" and not torch.cuda.is_available():
            rows.append(
                Row(what, device, "steps/s", None, PEER, None, None, None, floor_text, None)
            )
            continue
        generator = torch.Generator().manual_seed(seed)
        x_BD = frames_like_embeddings(FRAMES, generator).to(device)
        ours = QuantizerTrainer(DIM, NUM_CODEBOOKS, device, seed=seed)
        peer = PeerTrainer(DIM, NUM_CODEBOOKS, torch.device(device))
        peer.quantizer.load_state_dict(ours.quantizer.state_dict())
        if phase == 2:
            # The last step of phase one makes the products.
            ours.cur_iter = ours.phase_one_iters
            ours.step(x_BD)
            peer._begin_second_phase()
            peer.quantizer.load_state_dict(ours.quantizer.state_dict())
            peer.cur_iter = ours.cur_iter
        peer.two_iter_prob = 1.0

        M = ours.quantizer.num_codebooks * ours.quantizer.codebook_size
        centers_MD = torch.randn(M, DIM, generator=generator).to(device)

        def products(x_BD=x_BD, centers_MD=centers_MD, K=ours.quantizer.codebook_size) -> None:
            logits_BM = x_BD @ centers_MD.t()
            x_BD @ centers_MD.t()
            logits_BM.t() @ x_BD
            size = len(centers_MD) // 2
            while size >= K:
                for start in range(0, len(centers_MD), 2 * size):
                    middle = start + size
                    centers_MD[start:middle] @ centers_MD[middle : middle + size].t()
                size //= 2

        calls = {
            "ours": lambda ours=ours, x_BD=x_BD: ours.step(x_BD),
            "peer": lambda peer=peer, x_BD=x_BD: peer.step(x_BD),
            "floor": products,
        }
        with mock.patch.object(trainer, "_draw", lambda generator: 0.0):
            times = fastest(calls, repeats, device)
        wall = {name: seconds.wall for name, seconds in times.items()}
        cpu = {name: seconds.cpu for name, seconds in times.items()}
        rows.append(
            Row(
                what=what,
                device=device,
                unit="steps/s",
                ours=1 / wall["ours"],
                peer_name=PEER,
                peer=1 / wall["peer"],
                ratio=wall["peer"] / wall["ours"],
                ratio_cpu=cpu["peer"] / cpu["ours"] if device == "cpu" else None,
                floor=floor_text,
                floor_rate=1 / wall["floor"],
                details={
                    "threads": torch.get_num_threads(),
                    "floor_gflop": gflop,
                    "seconds_per_step": wall,
                    "cpu_seconds_per_step": cpu,
                },
            )
        )
    return rows
