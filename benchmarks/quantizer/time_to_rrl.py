"""Time until our trainer has the RRL that the authors' package has after all of its steps.

::

    . ./path.sh
    python3 -m benchmarks.quantizer.time_to_rrl --recordings recordings/ --peer-steps 1000 \
        --out-dir exp/benchmarks/time-to-rrl

Frames are 32-bin filterbanks of a folder of WAV files, stacked to ``--dim`` dimensions. Whole
recordings are held out; the relative reconstruction loss (RRL) is that of their frames after 5
rounds of refinement, against the mean of the others. The peer is trained first, by ``--peer-steps``
steps of 512 frames in each phase; what it reports of itself, every 200 steps, is part of its time.
Ours, the least-squares trainer with the linear first guess and with a beam search of 16, is then
timed step by step until its RRL is as low. Measuring the RRL is part of neither time.

The peer's training is saved each minute and each result as it comes: a run that is started again in
the same folder goes on.

F: frames, D: dimension, B: frames of a step, N: codebooks, K: entries of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from multi_quantization import QuantizerTrainer as PeerTrainer
from torch import Tensor

from benchmarks.quantizer.clock import fastest
from benchmarks.quantizer.codecs import RESIDUAL, filterbanks, split_recordings
from benchmarks.quantizer.encode_rate import PEER
from benchmarks.quantizer.rows import Row, markdown_table
from benchmarks.quantizer.saved import go_on, save
from mvqkd.device import describe_device
from mvqkd.errors import RecipeError
from mvqkd.files import written_aside
from mvqkd.quantizer import LeastSquaresTrainer, Quantizer, QuantizerSettings
from mvqkd.quantizer.frames import random_rows

BINS, STEP_FRAMES, ROUNDS, K = 32, 512, 5, 256
# Fewer than 80 an entry would not do for centers that hold for unseen frames.
FLOOR_FRAMES = 80 * K
SAVE_SECONDS = 60.0
CPU = torch.device("cpu")
# As the codecs of these names are trained.
OURS = {"linear first guess": {}, "beam 16": {"beam": 16, **RESIDUAL}}


@dataclasses.dataclass
class Frames:
    """What both are trained and measured on: (F, D), and the mean of the training frames."""

    train_FD: Tensor
    unseen_FD: Tensor
    mean_D: Tensor

    def rrl(self, reconstruct: Callable[[Tensor], Tensor]) -> float:
        """Of ``reconstruct``, (b, D) to (b, D), on the unseen frames."""
        with torch.no_grad():
            parts = self.unseen_FD.split(64)
            error = sum(float((reconstruct(x_bD) - x_bD).square().sum()) for x_bD in parts)
        return error / float((self.unseen_FD - self.mean_D).square().sum())


class Stopwatch:
    """Seconds on the wall, and of processor time over all threads, between start and stop."""

    def __init__(self, wall: float = 0.0, cpu: float = 0.0) -> None:
        self.wall, self.cpu = wall, cpu

    def start(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.wall += time.perf_counter() - self._started[0]
        self.cpu += time.process_time() - self._started[1]

    def seconds(self) -> dict[str, float]:
        return {"seconds": self.wall, "cpu_seconds": self.cpu}


def _peer_state(trainer: PeerTrainer, watch: Stopwatch) -> dict[str, Any]:
    return {
        "cur_iter": trainer.cur_iter,
        "wall": watch.wall,
        "cpu": watch.cpu,
        "quantizer": trainer.quantizer.state_dict(),
        "optimizer": trainer.optim.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
    }


def _load_peer(trainer: PeerTrainer, watch: Stopwatch, path: Path) -> None:
    state = torch.load(path, weights_only=True)
    if state["cur_iter"] > trainer.phase_one_iters:
        trainer.cur_iter = state["cur_iter"]
        trainer._begin_second_phase()
    trainer.cur_iter = state["cur_iter"]
    trainer.quantizer.load_state_dict(state["quantizer"])
    trainer.optim.load_state_dict(state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    watch.wall, watch.cpu = state["wall"], state["cpu"]
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])


def train_peer(
    frames: Frames, num_bytes: int, steps: int, seed: int, checkpoint: Path
) -> dict[str, Any]:
    """Seconds and RRL by rounds of the authors' package; goes on from ``checkpoint``."""
    torch.manual_seed(seed)
    random.seed(seed)
    # It starts from centers of a fixed size, so frames are brought to about that.
    mean_D = frames.mean_D
    deviation = float((frames.train_FD - mean_D).square().mean().sqrt())
    watch = Stopwatch()
    watch.start()
    trainer = PeerTrainer(len(mean_D), num_bytes, CPU, phase_one_iters=steps, phase_two_iters=steps)
    watch.stop()
    if checkpoint.exists():
        _load_peer(trainer, watch, checkpoint)
        print(f"peer: goes on at step {trainer.cur_iter}", file=sys.stderr)
    saved = time.monotonic()
    while not trainer.done():
        watch.start()
        rows_B = torch.randint(len(frames.train_FD), (STEP_FRAMES,))
        trainer.step((frames.train_FD[rows_B] - mean_D) / deviation)
        watch.stop()
        if time.monotonic() - saved > SAVE_SECONDS:
            with written_aside(checkpoint) as aside:
                torch.save(_peer_state(trainer, watch), aside)
            print(f"peer: step {trainer.cur_iter}/{2 * steps}, {watch.wall:.0f} s", file=sys.stderr)
            saved = time.monotonic()
    quantizer = trainer.get_quantizer()

    def reconstruct(x_bD: Tensor, rounds: int) -> Tensor:
        codes = quantizer.encode((x_bD - mean_D) / deviation, rounds)
        return quantizer.decode(codes) * deviation + mean_D

    rrl = {str(n): frames.rrl(lambda x_bD, n=n: reconstruct(x_bD, n)) for n in (0, 1, ROUNDS)}
    return {**watch.seconds(), "rrl": rrl}


def train_ours(frames: Frames, settings: QuantizerSettings, target: float) -> dict[str, Any]:
    """Seconds until the RRL is at or below ``target``, and until the training's own end."""

    def rrl(quantizer: Quantizer) -> float:
        return frames.rrl(lambda x_bD: quantizer.decode(quantizer.encode(x_bD, ROUNDS)))

    watch = Stopwatch()
    watch.start()
    count = min(settings.lsq_frames, len(frames.train_FD))
    sample_FD = random_rows(frames.train_FD, count, settings.seed, "frames")
    trainer = LeastSquaresTrainer(sample_FD, settings, CPU)
    watch.stop()
    reached = None
    while not trainer.done():
        watch.start()
        trainer.step()
        # To take out the quantizer is part of what it takes to have one.
        quantizer = trainer.quantizer_so_far()
        watch.stop()
        if reached is None and (found := rrl(quantizer)) <= target:
            reached = {**watch.seconds(), "rrl": found, "steps": trainer.cur_iter}
    return {"reached": reached, "end": {**watch.seconds(), "rrl": rrl(trainer.get_quantizer())}}


def make_rows(document: dict[str, Any]) -> list[Row]:
    """A row for each of ours that is measured."""
    F, D = document["frames"]["train"]
    N, steps, peer = document["bytes"], document["peer_steps"], document.get("peer")
    used = min(F, FLOOR_FRAMES)
    floor = (
        f"each of {used} frames meets {K} entries once, those of N codebooks D / N dimensions "
        f"each: {2 * used * D * K / 1e9:.2g} GFLOP; {4 * used * D / 1e6:.2g} MB read"
    )
    rows = []
    for name, ours in document["ours"].items():
        reached = ours["reached"]
        what = f"RRL {peer['rrl'][str(ROUNDS)]:.4f} reached, D={D}, N={N}, K={K}, ours by {name}"
        if reached is None:
            what += f" (not reached: {ours['end']['rrl']:.4f} after {ours['end']['seconds']:.0f} s)"
        row = Row(
            what=what,
            device="cpu",
            unit="times/h",
            ours=reached and 3600 / reached["seconds"],
            peer_name=f"{PEER}, {steps} + {steps} steps",
            peer=3600 / peer["seconds"],
            ratio=reached and peer["seconds"] / reached["seconds"],
            ratio_cpu=reached and peer["cpu_seconds"] / reached["cpu_seconds"],
            floor=floor,
            floor_rate=3600 / document["floor_seconds"],
            details={"ours": ours, "peer": peer},
        )
        rows.append(row)
    return rows


def _floor_seconds(frames_FD: Tensor) -> float:
    x_FD = frames_FD[:FLOOR_FRAMES].contiguous()
    centers_KD = x_FD[torch.arange(K) % len(x_FD)]

    def product() -> None:
        for x_BD in x_FD.split(4096):
            x_BD @ centers_KD.t()

    return fastest({"product": product}, repeats=3)["product"].wall


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Raises:
      RecipeError: too few recordings, a dimension that filterbanks do not stack to, or results of
        other settings.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recordings", type=Path, required=True, help="folder of WAV files")
    parser.add_argument("--dim", type=int, default=256, help=f"a multiple of {BINS}")
    parser.add_argument("--bytes", type=int, default=8)
    parser.add_argument("--peer-steps", type=int, default=1000, help="per phase")
    parser.add_argument("--max-recordings", type=int, help="at random; default: all")
    parser.add_argument("--unseen-share", type=float, default=0.1, help="of the recordings")
    parser.add_argument("--unseen-frames", type=int, default=4096, help="at random, at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out-dir", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.dim < BINS or options.dim % BINS:
        raise RecipeError(f"--dim: {options.dim} is not a multiple of {BINS}")

    parts = split_recordings(
        options.recordings, options.max_recordings, options.unseen_share, options.seed
    )
    train_FD, unseen_FD = (
        torch.from_numpy(filterbanks(paths, BINS, options.dim // BINS)) for paths in parts
    )
    count = min(options.unseen_frames, len(unseen_FD))
    unseen_FD = random_rows(unseen_FD, count, options.seed, "unseen frames")
    frames = Frames(train_FD, unseen_FD, train_FD.mean(dim=0))
    settings = {
        "bytes": options.bytes,
        "peer_steps": options.peer_steps,
        "threads": options.threads,
        "seed": options.seed,
        "device": describe_device(CPU),
        "torch": torch.__version__,
        "frames": {"train": list(train_FD.shape), "unseen": list(unseen_FD.shape)},
    }
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python3", "-m", "benchmarks.quantizer.time_to_rrl", *typed])
    options.out_dir.mkdir(parents=True, exist_ok=True)
    document = go_on(options.out_dir / "results.json", settings)
    if document is None:
        document = {**settings, "command": command, "ours": {}, "rows": []}
        document["floor_seconds"] = _floor_seconds(train_FD)

    def save_document() -> None:
        rows = make_rows(document)
        document["rows"] = [dataclasses.asdict(row) for row in rows]
        save(options.out_dir, document, markdown_table(rows))

    save_document()
    checkpoint = options.out_dir / "peer.pt"
    if "peer" not in document:
        document["peer"] = train_peer(
            frames, options.bytes, options.peer_steps, options.seed, checkpoint
        )
        save_document()
        checkpoint.unlink(missing_ok=True)
    print(f"peer: {document['peer']}", file=sys.stderr, flush=True)
    # What is compiled once is compiled here.
    Quantizer(options.dim, K, options.bytes).encode(unseen_FD[:8])
    for name, values in OURS.items():
        if name not in document["ours"]:
            own = QuantizerSettings(num_codebooks=options.bytes, seed=options.seed, **values)
            target = document["peer"]["rrl"][str(ROUNDS)]
            document["ours"][name] = train_ours(frames, own, target)
            save_document()
        print(f"ours, {name}: {document['ours'][name]}", file=sys.stderr, flush=True)
    print(markdown_table(make_rows(document)))


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        sys.exit(f"benchmarks.quantizer.time_to_rrl: {error}")
