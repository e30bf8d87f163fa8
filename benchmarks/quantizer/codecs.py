"""Quantizers of as many bytes beside each other, on real speech: quality, time, rate, memory.

::

    . ./path.sh
    pip install -r benchmarks/quantizer/requirements.txt
    python3 -m benchmarks.quantizer.codecs --recordings recordings/ --out-dir exp/benchmarks/codecs

Frames are 40-bin filterbanks stacked over 10 frames (D = 400), and embeddings of the shipped
teacher, both of a folder of WAV files such as the Free Spoken Digit Dataset's. Whole recordings are
held out, and the relative reconstruction loss (RRL) is that of their frames, against the mean of
the others. Each quantizer is trained and encodes in a process of its own, whose growth is its
memory. ``--peer-steps`` adds the authors' package, trained by as many steps in each phase.

What is measured is saved at once: a run that is started again in the same folder goes on, and one
that asks for other codecs, bytes or frames adds them to the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import multiprocessing
import random
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lhotse import Fbank, FbankConfig, Recording

from benchmarks.quantizer.clock import fastest
from benchmarks.quantizer.rows import markdown
from benchmarks.quantizer.saved import go_on, save
from mvqkd.device import describe_device
from mvqkd.errors import RecipeError, reason_of
from mvqkd.files import written_aside
from mvqkd.quantizer import QuantizerSettings, train_quantizer
from mvqkd.teachers import load_teacher

STACKED = 10
ENCODINGS = 5  # timed, of which the fastest counts
TEACHER = Path(__file__).parents[2] / "egs/mini/teacher"
CPU = torch.device("cpu")
PEER = "multi_quantization"
# Settings of residual codebooks, which a beam search encodes.
RESIDUAL = {"lsq_iters": 3, "lsq_pull": 3.0}


@dataclass
class Result:
    """One quantizer on one kind of frames.

    Attributes:
      frames: what kind.
      codec: whose quantizer, and its settings.
      num_bytes: per frame.
      rrl: on frames of recordings that were held out.
      train_seconds, train_cpu_seconds: on the wall, and of processor time over all threads.
      frames_per_second, frames_per_cpu_second: encoded.
      memory_mib: by which the process grew, the frames themselves apart.
    """

    frames: str
    codec: str
    num_bytes: int
    rrl: float
    train_seconds: float
    train_cpu_seconds: float
    frames_per_second: float
    frames_per_cpu_second: float
    memory_mib: float


Encode = Callable[[np.ndarray], np.ndarray]
# Gives, for training frames, a function that encodes and decodes: codes, and frames from codes.
Trainer = Callable[[np.ndarray, int, int], tuple[Encode, Encode]]


def _faiss(make: Callable, frames: np.ndarray, num_bytes: int, seed: int) -> tuple[Encode, Encode]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    quantizer = make(faiss, frames.shape[1], num_bytes)
    quantizer.train(frames)
    return quantizer.compute_codes, quantizer.decode


def _product(faiss, dim: int, num_bytes: int):
    return faiss.ProductQuantizer(dim, num_bytes, 8)


def _residual(faiss, dim: int, num_bytes: int, beam: int):
    quantizer = faiss.ResidualQuantizer(dim, num_bytes, 8)
    quantizer.max_beam_size = beam
    # Tables of products between centers in place of vectors: the same codes, sooner.
    quantizer.use_beam_LUT = 1
    return quantizer


def _local_search(faiss, dim: int, num_bytes: int):
    return faiss.LocalSearchQuantizer(dim, num_bytes, 8)


def _ours(
    frames: np.ndarray, num_bytes: int, seed: int, rounds: int = 5, **settings
) -> tuple[Encode, Encode]:
    wanted = QuantizerSettings(num_codebooks=num_bytes, seed=seed, **settings)
    quantizer = train_quantizer(torch.from_numpy(frames), wanted, progress=None)
    return _numpy(partial(quantizer.encode, refine_indexes_iters=rounds)), _numpy(quantizer.decode)


def _peer(frames: np.ndarray, num_bytes: int, seed: int, steps: int) -> tuple[Encode, Encode]:
    from multi_quantization import QuantizerTrainer

    torch.manual_seed(seed)
    random.seed(seed)  # for the rounds of refinement of a step
    frames_FD = torch.from_numpy(frames)
    # It starts from centers of a fixed size, so frames are brought to about that.
    mean_D, deviation = frames_FD.mean(dim=0), frames_FD.std(dim=0).square().mean().sqrt()
    trainer = QuantizerTrainer(
        frames.shape[1], num_bytes, CPU, phase_one_iters=steps, phase_two_iters=steps
    )
    started = time.monotonic()
    while not trainer.done():
        if trainer.cur_iter % 100 == 0:
            passed = time.monotonic() - started
            print(f"  step {trainer.cur_iter}/{2 * steps}, {passed:.0f} s", file=sys.stderr)
        trainer.step((frames_FD[torch.randint(len(frames_FD), (512,))] - mean_D) / deviation)
    quantizer = trainer.get_quantizer()

    def encode(x_FD: torch.Tensor) -> torch.Tensor:
        parts = ((x_FD - mean_D) / deviation).split(32)
        return torch.cat([quantizer.encode(part) for part in parts])

    return _numpy(encode), _numpy(lambda codes: quantizer.decode(codes) * deviation + mean_D)


def _numpy(function: Callable[[torch.Tensor], torch.Tensor]) -> Encode:
    @torch.no_grad()
    def call(array: np.ndarray) -> np.ndarray:
        return function(torch.from_numpy(array)).numpy()

    return call


def codecs(peer_steps: int) -> dict[str, Trainer]:
    """All that are compared, by name."""
    found: dict[str, Trainer] = {
        "FAISS product": partial(_faiss, _product),
        "FAISS residual, beam 5": partial(_faiss, partial(_residual, beam=5)),
        "FAISS residual, beam 16": partial(_faiss, partial(_residual, beam=16)),
        "FAISS local search": partial(_faiss, _local_search),
        "ours, 1 round": partial(_ours, rounds=1),
        "ours, 5 rounds": _ours,
        "ours, 5 rounds, 20 alternations": partial(_ours, lsq_iters=20),
        "ours, beam 8": partial(_ours, rounds=0, **RESIDUAL, beam=8),
        "ours, beam 16": partial(_ours, rounds=0, **RESIDUAL, beam=16),
        "ours, beam 16, 1 round": partial(_ours, rounds=1, **RESIDUAL, beam=16),
    }
    annealed = {"lsq_iters": 50, "lsq_noise": 1.0, "beam": 16, "restarts": 4}
    found["ours, annealed, beam 16, 3 rounds, 4 restarts"] = partial(_ours, rounds=3, **annealed)
    if peer_steps:
        steps = partial(_peer, steps=peer_steps)
        found[f"{PEER}, {peer_steps} + {peer_steps} steps"] = steps
    return found


def status_kib(field: str) -> int:
    """A number of ``/proc/self/status``, such as VmRSS."""
    # getrusage's peak is that of the parent where it is larger.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _measure(
    trainer: Trainer, paths: tuple[Path, Path], num_bytes: int, seed: int, threads: int, pipe
) -> None:
    torch.set_num_threads(threads)
    train, unseen = (np.load(path) for path in paths)
    before = status_kib("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    encode, decode = trainer(train, num_bytes, seed)
    train_seconds = time.perf_counter() - wall, time.process_time() - cpu
    codes = encode(unseen)
    grown = status_kib("VmHWM") - before
    seconds = fastest({"encode": lambda: encode(unseen)}, ENCODINGS)["encode"]
    assert codes.nbytes == num_bytes * len(unseen)
    error = np.square(decode(codes) - unseen, dtype=np.float64).sum()
    total = np.square(unseen - train.mean(axis=0, dtype=np.float64)).sum()
    rates = len(unseen) / seconds.wall, len(unseen) / seconds.cpu
    pipe.send((error / total, *train_seconds, *rates, grown / 1024))


def _measure_or_say(*job) -> None:
    try:
        _measure(*job)
    except Exception as error:  # of whatever codec
        job[-1].send(reason_of(error))


def measure_apart(
    trainer: Trainer, paths: tuple[Path, Path], num_bytes: int, seed: int, threads: int
) -> tuple[float, ...] | str:
    """What `Result` has beside names, measured in a process of its own, or why it is not."""
    spawn = multiprocessing.get_context("spawn")
    receive, send = spawn.Pipe(duplex=False)
    process = spawn.Process(
        target=_measure_or_say, args=(trainer, paths, num_bytes, seed, threads, send)
    )
    process.start()
    send.close()
    try:
        found = receive.recv()
    except EOFError:
        found = None
    process.join()
    return f"its process ended with {process.exitcode}" if found is None else found


def _read(path: Path, rate: int) -> torch.Tensor:
    return torch.from_numpy(Recording.from_file(path).resample(rate).load_audio())


def split_recordings(
    folder: Path, max_recordings: int | None, unseen_share: float, seed: int
) -> tuple[list[Path], list[Path]]:
    """WAV files in random order, those to train on and those held out.

    Raises:
      RecipeError: the folder has fewer than two.
    """
    paths = sorted(folder.rglob("*.wav"))
    if len(paths) < 2:
        raise RecipeError(f"{folder}: fewer than 2 WAV files; name another folder")
    order = np.random.default_rng(seed).permutation(len(paths))[:max_recordings]
    num_unseen = max(1, round(unseen_share * len(order)))
    return [paths[i] for i in order[num_unseen:]], [paths[i] for i in order[:num_unseen]]


def filterbanks(paths: list[Path], num_bins: int = 40, stacked: int = STACKED) -> np.ndarray:
    """Log filterbanks of recordings at 8 kHz, ``stacked`` successive ones a frame: (F, D)."""
    fbank = Fbank(FbankConfig(sampling_rate=8000, num_mel_bins=num_bins))
    pieces = []
    for path in paths:
        features = np.asarray(fbank.extract(_read(path, 8000).numpy(), 8000))
        if len(features) < stacked:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(features, stacked, axis=0)
        pieces.append(windows.transpose(0, 2, 1).reshape(len(windows), -1))
    return np.concatenate(pieces).astype(np.float32)


def embeddings(paths: list[Path], teacher_path: Path, layer: int) -> np.ndarray:
    """A teacher's embeddings (F, D) of recordings at 16 kHz."""
    teacher = load_teacher(str(teacher_path))
    pieces = []
    for path in paths:
        waveform_1L = _read(path, 16000)
        frames_1TD, lengths_1 = teacher.embed(
            waveform_1L, torch.tensor(waveform_1L.shape[1:]), layer
        )
        pieces.append(frames_1TD[0, : int(lengths_1)].numpy())
    return np.concatenate(pieces).astype(np.float32)


def _table(results: list[Result]) -> str:
    head = (
        *("frames", "bytes", "quantizer", "RRL, unseen", "training s", "training CPU s"),
        *("frames/s", "frames/CPU s", "memory MiB"),
    )
    rows = [
        (
            *(r.frames, r.num_bytes, r.codec, f"{r.rrl:.4f}"),
            *(f"{r.train_seconds:.0f}", f"{r.train_cpu_seconds:.0f}"),
            *(f"{r.frames_per_second:,.0f}", f"{r.frames_per_cpu_second:,.0f}"),
            f"{r.memory_mib:,.0f}",
        )
        for r in results
    ]
    return markdown(head, rows)


def plot(results: list[Result], path: Path) -> None:
    """RRL against bytes, training time and encoding rate; a row for each kind of frames."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(r.frames for r in results))
    names = list(dict.fromkeys(r.codec for r in results))
    panels = (
        ("bytes per frame", "num_bytes"),
        ("training time (s)", "train_seconds"),
        ("encoding rate (frames/s)", "frames_per_second"),
    )
    figure = Figure(figsize=(15, 4.2 * len(kinds)), dpi=100, layout="constrained")
    all_axes = figure.subplots(len(kinds), len(panels), squeeze=False)
    for row, kind in zip(all_axes, kinds):
        for axes, (label, key) in zip(row, panels):
            for k, name in enumerate(names):
                points = [r for r in results if r.frames == kind and r.codec == name]
                xs, ys = [getattr(r, key) for r in points], [r.rrl for r in points]
                style = "s-" if name.startswith("ours") else "o--"
                axes.plot(xs, ys, style, markersize=4, color=colormaps["tab20"](k), label=name)
            axes.set_xscale("log")
            axes.set_yscale("log")
            if key == "num_bytes":
                ticks = sorted({r.num_bytes for r in results})
                axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
                axes.set_xticks([], minor=True)
            axes.set(title=kind, xlabel=label, ylabel="RRL on unseen frames")
            axes.grid(alpha=0.3, which="both")
    lines, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4)
    with written_aside(path) as aside:
        FigureCanvasAgg(figure).print_png(aside)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Raises:
      RecipeError: too few recordings, results of other settings, or codecs that failed, after
        all others are measured.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recordings", type=Path, required=True, help="folder of WAV files")
    parser.add_argument("--teacher", type=Path, default=TEACHER)
    parser.add_argument("--layer", type=int, default=5, help="of the teacher")
    parser.add_argument("--frames", nargs="+", choices=("fbank", "teacher"), default=None)
    parser.add_argument("--bytes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--only", nargs="+", metavar="CODEC", help="begin of names; default: all")
    parser.add_argument("--max-recordings", type=int, help="at random; default: all")
    parser.add_argument("--unseen-share", type=float, default=0.1, help="of the recordings")
    parser.add_argument("--peer-steps", type=int, default=0, help="per phase; 0: leave it out")
    parser.add_argument("--peer-bytes", type=int, nargs="+", help="of --bytes; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out-dir", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    parts = split_recordings(
        options.recordings, options.max_recordings, options.unseen_share, options.seed
    )
    kinds = {
        "fbank": (f"filterbanks, {STACKED} x 40", filterbanks),
        "teacher": (
            f"embeddings of {options.teacher.parent.name}'s teacher",
            partial(embeddings, teacher_path=options.teacher, layer=options.layer),
        ),
    }
    trainers = {
        name: trainer
        for name, trainer in codecs(options.peer_steps).items()
        if options.only is None or name.startswith(tuple(options.only))
    }
    names = "\n".join(path.name for part in parts for path in [*part, Path("/")])
    settings = {
        "device": describe_device(CPU),
        "threads": options.threads,
        "torch": torch.__version__,
        "seed": options.seed,
        "recordings": {
            "train": len(parts[0]),
            "unseen": len(parts[1]),
            "sha256": hashlib.sha256(names.encode()).hexdigest()[:12],
        },
        "teacher": f"{options.teacher}, layer {options.layer}",
    }
    options.out_dir.mkdir(parents=True, exist_ok=True)
    document = go_on(options.out_dir / "results.json", settings)
    document = document or {**settings, "commands": [], "frames": {}, "results": []}
    results = [Result(**result) for result in document["results"]]
    done = {(result.frames, result.num_bytes, result.codec) for result in results}
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python3", "-m", "benchmarks.quantizer.codecs", *typed])
    failed = []
    for key in options.frames or kinds:
        kind, make = kinds[key]
        wanted = [
            (num_bytes, name)
            for num_bytes in options.bytes
            for name in trainers
            if (
                not name.startswith(PEER)
                or options.peer_bytes is None
                or num_bytes in options.peer_bytes
            )
            and (kind, num_bytes, name) not in done
        ]
        if not wanted:
            continue
        frame_paths = tuple(options.out_dir / f"{key}-{part}.npy" for part in ("train", "unseen"))
        for recordings, path in zip(parts, frame_paths):
            frames = make(recordings)
            np.save(path, frames)
            document["frames"][path.stem] = list(frames.shape)
            print(f"{kind}: {len(recordings)} recordings, {frames.shape}", file=sys.stderr)
        for num_bytes, name in wanted:
            found = measure_apart(
                trainers[name], frame_paths, num_bytes, options.seed, options.threads
            )
            if isinstance(found, str):
                failed.append(f"{name} at {num_bytes} bytes")
                print(f"{kind}, {failed[-1]}: failed, {found}", file=sys.stderr, flush=True)
                continue
            result = Result(kind, name, num_bytes, *found)
            results = sorted([*results, result], key=lambda r: (r.frames, r.num_bytes))
            document["results"] = [dataclasses.asdict(r) for r in results]
            document["commands"] = list(dict.fromkeys([*document["commands"], command]))
            save(options.out_dir, document, _table(results))
            print(_table([result]).splitlines()[-1], file=sys.stderr, flush=True)
        for path in frame_paths:
            path.unlink()
    print(_table(results))
    if results:
        plot(results, options.out_dir / "codecs.png")
    if failed:
        raise RecipeError(
            f"{options.out_dir}: {len(failed)} codecs failed ({', '.join(failed)}); mend what the "
            "lines above say, and start again: what is done is kept"
        )


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        sys.exit(f"benchmarks.quantizer.codecs: {error}")
