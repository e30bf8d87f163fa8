"""On how many frames of real speech the indexes are those of the authors' package.

::

    . ./path.sh
    python3 -m benchmarks.quantizer.exactness --recordings recordings/ --threads 2

Frames are embeddings of the shipped teacher, of a folder of WAV files of which one in ten is held
out. For each number of codebooks a quantizer is trained on the others, briefly, and both have its
weights. A frame whose indexes differ after 0 to 5 rounds is looked at where the two part: from the
peer's indexes before that round, ours and the peer's next ones are a tie where their squared errors
agree within float rounding, 1e-5 of the frame's squared length and of the error.

With ``--device cuda`` ours searches there; the peer stays on the CPU.

F: frames, D: dimension, N: codebooks, b: frames of a part.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from multi_quantization import Quantizer as PeerQuantizer
from torch import Tensor

from benchmarks.quantizer.codecs import TEACHER, embeddings, split_recordings
from benchmarks.quantizer.encode_rate import train_briefly
from benchmarks.quantizer.rows import markdown
from mvqkd.quantizer import Quantizer

ROUNDS = 5
_PEER_FRAMES = 32  # at a time: it holds a vector per candidate


def _apart(
    ours: Quantizer, x_FD: Tensor, before_FN: Tensor | None, expected_FN: Tensor
) -> tuple[int, int]:
    """Of one round from the peer's own indexes: frames that differ, and those that are no tie."""
    if before_FN is None:
        found_FN = ours.encode(x_FD, 0, as_bytes=False)
    else:
        found_FN = ours.search_tables().refine(x_FD, before_FN, 1)
    differs_F = (found_FN != expected_FN).any(dim=1)
    x_FD, found_FN, expected_FN = (t[differs_F] for t in (x_FD, found_FN, expected_FN))
    one_F, other_F = (
        (ours.decode(indexes_FN) - x_FD).double().square().sum(dim=1)
        for indexes_FN in (found_FN, expected_FN)
    )
    size_F = x_FD.double().square().sum(dim=1) + one_F
    no_tie_F = (one_F - other_F).abs() > 1e-5 * size_F
    return len(x_FD), int(no_tie_F.sum())


@torch.no_grad()
def compare(ours: Quantizer, x_FD: Tensor) -> list[tuple[int, int, int]]:
    """By rounds from 0: frames whose indexes differ from the peer's after so many, frames that
    differ after that round alone, and those of the latter that are no tie."""
    peer = PeerQuantizer(ours.dim, ours.codebook_size, ours.num_codebooks)
    peer.load_state_dict({name: value.cpu() for name, value in ours.state_dict().items()})
    device = ours.centers.device
    x_on_device_FD = x_FD.to(device)
    found = []
    before_FN = None
    for rounds in range(ROUNDS + 1):
        parts = x_FD.split(_PEER_FRAMES)
        if before_FN is None:
            expected_FN = torch.cat([peer._compute_indexes(x_bD, 0) for x_bD in parts])
        else:
            # The peer's rounds are the same however many follow.
            pairs = zip(parts, before_FN.cpu().split(_PEER_FRAMES))
            expected_FN = torch.cat([peer._refine_indexes(*pair) for pair in pairs])
        expected_FN = expected_FN.to(device)
        whole_FN = ours.encode(x_on_device_FD, rounds, as_bytes=False)
        differ = int((whole_FN != expected_FN).any(dim=1).sum())
        found.append((differ, *_apart(ours, x_on_device_FD, before_FN, expected_FN)))
        before_FN = expected_FN
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recordings", type=Path, required=True, help="folder of WAV files")
    parser.add_argument("--codebooks", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--max-recordings", type=int, help="at random; default: all")
    parser.add_argument(
        "--frames", type=int, default=4000, help="at random, at most; fewer above 8 codebooks"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    parts = split_recordings(options.recordings, options.max_recordings, 0.1, options.seed)
    train_FD, unseen_FD = (torch.from_numpy(embeddings(part, TEACHER, layer=5)) for part in parts)
    generator = torch.Generator().manual_seed(options.seed)
    order_F = torch.randperm(len(unseen_FD), generator=generator)
    head = (
        *("codebooks", "frames", f"differ after 0, 1 .. {ROUNDS} rounds"),
        *("parted by one round or the first guess", "of these no tie"),
    )
    rows = []
    for num_codebooks in options.codebooks:
        started = time.perf_counter()
        ours = train_briefly(train_FD, options.seed, num_codebooks).to(options.device)
        # The peer's time grows with the square of N.
        x_FD = unseen_FD[order_F[: options.frames * 8 // max(8, num_codebooks)]]
        whole, alone, no_tie = zip(*compare(ours, x_FD))
        rows.append((num_codebooks, len(x_FD), ", ".join(map(str, whole)), sum(alone), sum(no_tie)))
        print(f"N = {num_codebooks}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    print(markdown(head, rows))


if __name__ == "__main__":
    main()
