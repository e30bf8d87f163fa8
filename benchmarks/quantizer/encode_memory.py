"""Memory that encoding holds beyond its input and output, beside the authors' package.

::

    . ./path.sh
    python3 -m benchmarks.quantizer.encode_memory --threads 2

Ours gets a million frames in one call, 5 GB of input that is not counted. The authors' package,
with the same weights, gets the 512 of a training step. Linux only: the peak of resident memory is
read from ``/proc``.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from multi_quantization import Quantizer as PeerQuantizer

from benchmarks.quantizer.codecs import status_kib
from benchmarks.quantizer.encode_rate import (
    CODEBOOK_SIZE,
    DIM,
    NUM_CODEBOOKS,
    PEER,
    ROUNDS,
    frames_like_embeddings,
    train_briefly,
)
from benchmarks.quantizer.rows import markdown


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes by which resident memory rose at most while ``call`` ran, its result included."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free already is not to be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = status_kib("VmRSS")
    call()
    return 1024 * (status_kib("VmHWM") - before)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    frames_FD = frames_like_embeddings(8192, torch.Generator().manual_seed(options.seed))
    with torch.enable_grad():
        ours = train_briefly(frames_FD[:6144], options.seed)
    peer = PeerQuantizer(DIM, CODEBOOK_SIZE, NUM_CODEBOOKS)
    peer.load_state_dict(ours.state_dict())
    ours.encode(frames_FD[:64], ROUNDS)  # what is compiled or made once
    many_FD = frames_FD.repeat(-(-options.frames // len(frames_FD)), 1)[: options.frames]
    rows = []
    for name, quantizer, x_FD in (("ours", ours, many_FD), (PEER, peer, frames_FD[:512])):
        started = time.perf_counter()
        held = peak_growth(partial(quantizer.encode, x_FD, ROUNDS)) - len(x_FD) * NUM_CODEBOOKS
        rate = len(x_FD) / (time.perf_counter() - started)
        rows.append((name, f"{len(x_FD):,}", f"{held / 2**20:,.0f}", f"{rate:,.0f}"))
    head = ("quantizer", "frames at once", "MiB held beyond input and output", "frames/s")
    print(markdown(head, rows))


if __name__ == "__main__":
    main()
