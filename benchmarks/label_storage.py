"""Bytes that labels take on disk, beside lhotse's own writer.

    python3 -m benchmarks.label_storage [--num_utterances 10000] [--seconds 12]

Random labels of utterances of one length go through `dump_labels`. Counted are the allocated
blocks of all files but the manifest, and what the labels add to the manifest (gzip). Embeddings
are those of HuBERT X-Large, 1280 dimensions, of fewer utterances.

Columns: bytes an hour of speech; how many bytes for one of the array itself (T x N, or T x D x
bytes of the type); how much less than float32.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lhotse import CutSet, MonoCut, NumpyHdf5Writer, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.cut import Cut
from lhotse.features import Features

from mvqkd import cli
from mvqkd.data.labels import (
    CodebookIndexes,
    Dumper,
    Embeddings,
    LabelSettings,
    Origin,
    dump_labels,
)
from mvqkd.data.manifests import write_cuts
from mvqkd.quantizer import Quantizer

DIM = 1280


@dataclass
class Settings:
    """What is simulated."""

    num_utterances: int = 10_000
    # Of embeddings, which are large.
    num_embedded: int = 100
    seconds: float = 12
    shard_size: int = 500


class FrameClock:
    """Of a teacher, how many frames there are."""

    name, dim, frame_shift = "facebook/hubert-xlarge-ls960-ft", DIM, 0.02

    def num_frames(self, num_samples: int) -> int:
        return (num_samples - 400) // 320 + 1

    def check_layer(self, layer: int) -> None:
        pass

    def sha256(self) -> None:
        pass

    def to(self, device: torch.device) -> None:
        pass


class RandomDumper(Dumper):
    """Gives each cut random values."""

    def _load(self, cuts: list[Cut]) -> tuple[list[Cut], list[Cut], dict[str, str]]:
        return cuts, cuts, {}

    def _compute(self, cuts: list[Cut]) -> dict[str, tuple[torch.Tensor, list[int]]]:
        rng, labels = np.random.default_rng(len(cuts)), {}
        for kind in self.kinds:
            frames = [kind.teacher.num_frames(cut.num_samples) for cut in cuts]
            shape = (sum(frames), kind.columns)
            if kind.dtype == np.uint8:
                array_FX = rng.integers(0, 256, shape, np.uint8)
            else:
                array_FX = rng.standard_normal(shape, np.float32).astype(kind.dtype)
            labels[kind.field] = torch.from_numpy(array_FX), frames
        return labels


def simulated_cuts(count: int, seconds: float) -> CutSet:
    """Cuts with features, as LibriSpeech's of a third of the corpus at each speed."""
    draw, cuts = random.Random(1), []
    words = ["".join(draw.choices("ABCDEFGHILMNORSTUW", k=draw.randint(2, 8))) for _ in range(3000)]
    for number in range(count):
        chapter = 134686 + number // 30
        speed = ("", "_sp0.9", "_sp1.1")[number % 3]
        name = f"{1000 + number // 60}-{chapter}-{number % 30:04d}{speed}"
        audio = f"data/librispeech-100/corpus/train-clean-100/{chapter}/{name}.flac"
        samples = round(seconds * 16000)
        cut = MonoCut(
            id=name,
            start=0,
            duration=seconds,
            channel=0,
            recording=Recording(name, [AudioSource("file", [0], audio)], 16000, samples, seconds),
            supervisions=[
                SupervisionSegment(
                    name,
                    name,
                    0,
                    seconds,
                    text=" ".join(draw.choices(words, k=round(2.7 * seconds))),
                    speaker=name.split("-")[0],
                )
            ],
            features=Features(
                type="kaldi-fbank",
                num_frames=round(seconds * 100),
                num_features=80,
                frame_shift=0.01,
                sampling_rate=16000,
                start=0,
                duration=seconds,
                storage_type="numpy_hdf5",
                storage_path=f"data/librispeech-100/fbank/train/{number // 500:05d}.h5",
                storage_key=name,
                recording_id=name,
                channels=0,
            ),
        )
        cuts.append(cut)
    return CutSet.from_cuts(cuts)


def allocated(paths) -> int:
    return sum(path.stat().st_blocks * 512 for path in paths if path.is_file())


def bytes_of(kind, cuts: CutSet, settings: Settings) -> int:
    """What labels of ``kind`` of ``cuts`` take."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = folder / "labels/mvq/train.jsonl.gz"
        dumper = RandomDumper([kind], LabelSettings(max_duration=300), torch.device("cpu"))
        dump_labels(cuts, out, dumper, settings.shard_size)
        files = set(out.parent.rglob("*")) - {out}
        plain = folder / "plain.jsonl.gz"
        write_cuts(cuts, plain)
        return allocated(files) + out.stat().st_size - plain.stat().st_size


def bytes_by_lhotse(cuts: CutSet, labelled_kind) -> int:
    """The same, of lhotse's own writer into one file, without an origin."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dumper = RandomDumper([labelled_kind], LabelSettings(), torch.device("cpu"))
        labelled = []
        with NumpyHdf5Writer(folder / "labels.h5") as writer:
            for cut in cuts:
                array_TX, _ = dumper._compute([cut])[labelled_kind.field]
                stored = writer.store_array(
                    cut.id, array_TX.numpy(), frame_shift=0.02, temporal_dim=0, start=cut.start
                )
                labelled.append(cut.with_id(cut.id))
                labelled[-1].custom = {labelled_kind.field: stored}
        write_cuts(CutSet.from_cuts(labelled), folder / "labelled.jsonl.gz")
        write_cuts(cuts, folder / "plain.jsonl.gz")
        sizes = [(folder / f"{n}.jsonl.gz").stat().st_size for n in ("labelled", "plain")]
        return allocated([folder / "labels.h5"]) + sizes[0] - sizes[1]


def main(settings: Settings) -> None:
    teacher = FrameClock()
    rows = []
    many = simulated_cuts(settings.num_utterances, settings.seconds)
    few = CutSet.from_cuts(list(many)[: settings.num_embedded])
    frames = teacher.num_frames(round(settings.seconds * 16000))

    def add(name: str, kind, cuts: CutSet, found: int) -> None:
        hours = len(cuts) * settings.seconds / 3600
        alone = len(cuts) * frames * kind.columns * kind.dtype.itemsize
        rows.append((name, found / hours, found / alone))

    for dtype in ("float32", "float16"):
        kind = Embeddings(teacher, 36, dtype, "embeddings")
        add(dtype, kind, few, bytes_of(kind, few, settings))
    for num_codebooks in (16, 8, 4):
        quantizer = Quantizer(8, 256, num_codebooks)
        quantizer.set_id_from_weights()
        origin = Origin(teacher.name, 36, quantizer.get_id(), quantizer.weights_sha256())
        kind = CodebookIndexes(teacher, quantizer, origin)
        add(f"N = {num_codebooks}", kind, many, bytes_of(kind, many, settings))
        if num_codebooks == 8:
            add("N = 8, lhotse's writer", kind, many, bytes_by_lhotse(many, kind))
    print(f"{len(many)} utterances of {settings.seconds:g} s (embeddings: {len(few)})")
    print(f"{'labels':<24}{'bytes an hour':>16}{'of the array':>14}{'less than float32':>19}")
    for name, an_hour, ratio in rows:
        less = f"{rows[0][1] / an_hour:.1f}"
        print(f"{name:<24}{an_hour:>16,.0f}{ratio:>14.4f}{less:>19}")


if __name__ == "__main__":
    cli.run(main, Settings)
