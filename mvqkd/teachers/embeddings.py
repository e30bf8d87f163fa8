"""Embeddings of a sample of utterances, for training codebooks."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from lhotse import CutSet

from mvqkd.data.audio import bucketed_batches, collate_good
from mvqkd.data.bad_utterances import check_bad, list_bad
from mvqkd.data.shards import hdf5_aside
from mvqkd.device import Precision, matrix_dtype
from mvqkd.errors import RecipeError
from mvqkd.quantizer.frames import require_finite
from mvqkd.teachers.base import Teacher


@dataclass
class SampleSettings:
    """Which utterances of the training set are looked at."""

    num_utterances: int = 1000
    # Of them, kept from training, to measure the codebooks on: at least 1, at most a fifth.
    num_unseen: int = 50
    max_duration: float = 100
    seed: int = 1
    # Of the teacher's matrices; see `matrix_dtype`.
    precision: Precision = "auto"
    # Share of the sample that may be broken; it is left out and listed.
    max_bad_share: float = 0.01


def sample_embeddings(
    cuts: CutSet,
    teacher: Teacher,
    layer: int,
    out: Path,
    settings: SampleSettings,
    device: torch.device,
) -> None:
    """`sample_layers` of one layer; bad utterances are listed in ``bad-utterances.txt`` beside
    ``out``."""
    listing = out.with_name("bad-utterances.txt")
    sample_layers(cuts, teacher, {layer: out}, settings, device, listing)


def sample_layers(
    cuts: CutSet,
    teacher: Teacher,
    outs: Mapping[int, Path],
    settings: SampleSettings,
    device: torch.device,
    listing: Path,
    conf: str = "sample.yaml",
) -> None:
    """Write, for each layer in ``outs``, its path (HDF5): float32 (F, D) data sets ``train`` and
    ``unseen``, each from whole utterances, what utterance begins where (``train-utterances``,
    ``train-starts`` ...), and attributes ``teacher``, ``layer``, ``frame_shift``,
    ``frame_offset``.

    The speech goes through the teacher once, and no more than a batch is held in memory.
    `open_sample` reads the files.

    Args:
      listing: lists the utterances that are left out, whose audio cannot be read, or is too short
        for a frame.
      conf: where ``settings`` are set, for messages.

    Raises:
      RecipeError: fewer than two utterances, too many bad ones, a frame with NaN or infinity, or
        the disk is full.
    """
    everything = list(cuts)
    order = np.random.default_rng(settings.seed).permutation(len(everything))
    chosen = [everything[i] for i in order[: settings.num_utterances]]
    num_unseen = max(1, min(settings.num_unseen, len(chosen) // 5))
    if len(chosen) < 2:
        raise RecipeError(
            "sample.num_utterances: the sample has fewer than 2 utterances, one to train and one "
            "to measure on; raise it, or give more speech"
        )
    dtype = matrix_dtype(settings.precision, device)
    bad: dict[str, str] = {}
    started, done = time.monotonic(), 0.0
    with contextlib.ExitStack() as stack:
        opened = {layer: stack.enter_context(hdf5_aside(out)) for layer, out in outs.items()}
        files = {layer: file for layer, (file, _) in opened.items()}
        for name, part in (("unseen", chosen[:num_unseen]), ("train", chosen[num_unseen:])):
            for file in files.values():
                file.create_dataset(
                    name,
                    (0, teacher.dim),
                    np.float32,
                    maxshape=(None, teacher.dim),
                    chunks=(64, teacher.dim),
                )
            utterances, starts, end = [], [], 0
            batches = bucketed_batches(CutSet.from_cuts(part), settings.max_duration, 0, 0)
            for batch_cuts in batches:
                batch, wrong = collate_good(batch_cuts, teacher.check_length)
                bad.update(wrong)
                check_bad(bad, len(chosen), settings.max_bad_share, conf)
                if batch is None:
                    continue
                embeddings, frames_B = teacher.embed_layers(
                    batch.waveforms_BL.to(device), batch.lengths_B, list(files), dtype
                )
                frames_B = frames_B.tolist()
                utterances += batch.ids
                starts += [end + before for before in itertools.accumulate([0, *frames_B[:-1]])]
                for (layer, file), embeddings_BTD in zip(files.items(), embeddings):
                    frames = file[name]
                    frames.resize(end + sum(frames_B), axis=0)
                    # An utterance at a time: together they could be too much to copy.
                    for cut_id, start, embeddings_TD, count in zip(
                        batch.ids, starts[-len(frames_B) :], embeddings_BTD, frames_B
                    ):
                        embeddings_TD = embeddings_TD[:count].float().cpu()
                        require_finite(
                            embeddings_TD, f"layer {layer} of {teacher.name}", [cut_id], [count]
                        )
                        frames[start : start + count] = embeddings_TD.numpy()
                for _, check in opened.values():
                    check()
                end += sum(frames_B)
                done += sum(cut.duration for cut in batch_cuts)
            for file in files.values():
                file[f"{name}-utterances"] = utterances
                file[f"{name}-starts"] = starts
            logging.info(
                f"{name}: {len(part)} utterances, {end} frames, "
                f"{done / (time.monotonic() - started):.0f} x real time"
            )
        for layer, file in files.items():
            file.attrs["teacher"] = teacher.name
            file.attrs["layer"] = layer
            file.attrs["frame_shift"] = teacher.frame_shift
            file.attrs["frame_offset"] = teacher.frame_offset
    list_bad(bad, listing)


@dataclass
class Part:
    """One of the sample's two sets of frames.

    Attributes:
      name: of file and part, for messages.
      frames: HDF5 data set, float32 (F, D).
      utterances, starts: ids, and the numbers of their first frames in the set.
      describe: tells the utterance of a frame's number in the set, and the frame's in it.
    """

    name: str
    frames: h5py.Dataset
    utterances: list[str]
    starts: list[int]
    describe: Callable[[int], str]


@contextlib.contextmanager
def open_sample(path: Path) -> Iterator[tuple[Part, Part, dict]]:
    """What `sample_embeddings` wrote: the parts ``train`` and ``unseen``, and the attributes.

    Raises:
      RecipeError: the file is damaged, cut short, or none of these.
    """
    remake = "remove it, then run stage 3"
    try:
        file = h5py.File(path)
    except OSError as error:
        raise RecipeError(f"{path}: damaged or cut short ({error}); {remake}") from error
    with file:
        try:
            train, unseen = (_part(path, file, name) for name in ("train", "unseen"))
            facts = {
                "teacher": str(file.attrs["teacher"]),
                "layer": int(file.attrs["layer"]),
                "frame_shift": float(file.attrs["frame_shift"]),
                "frame_offset": float(file.attrs["frame_offset"]),
            }
        except KeyError as error:
            raise RecipeError(f"{path}: no teacher embeddings ({error}); {remake}") from error
        except OSError as error:
            raise RecipeError(f"{path}: damaged or cut short ({error}); {remake}") from error
        yield train, unseen, facts


def _part(path: Path, file: h5py.File, name: str) -> Part:
    utterances = file[f"{name}-utterances"].asstr()[:].tolist()
    starts = file[f"{name}-starts"][:].tolist()

    def describe(number: int) -> str:
        place = bisect.bisect_right(starts, number) - 1
        return f"utterance {utterances[place]} frame {number - starts[place]}"

    return Part(f"{path} ({name})", file[name], utterances, starts, describe)
