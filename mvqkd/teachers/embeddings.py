"""Embeddings of a sample of utterances, for training codebooks."""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from lhotse import CutSet

from mvqkd.data.audio import bucketed_batches, collate_audio
from mvqkd.errors import RecipeError
from mvqkd.files import written_aside
from mvqkd.teachers.base import Teacher


@dataclass
class SampleSettings:
    """Which utterances of the training set are looked at."""

    num_utterances: int = 1000
    # Of them, kept from training, to measure the codebooks on: at least 1, at most a fifth.
    num_unseen: int = 50
    max_duration: float = 100
    seed: int = 1


def sample_embeddings(
    cuts: CutSet,
    teacher: Teacher,
    layer: int,
    out: Path,
    settings: SampleSettings,
    device: torch.device,
) -> None:
    """Write ``out`` (HDF5): float32 (F, D) data sets ``train`` and ``unseen``, each from whole
    utterances, what utterance begins where (``train-utterances``, ``train-starts`` ...), and
    attributes ``teacher``, ``layer``, ``frame_shift``, ``frame_offset``.

    No more than a batch is held in memory. `open_sample` reads the file.

    Raises:
      RecipeError: fewer than two utterances.
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
    started, done = time.monotonic(), 0.0
    with written_aside(out) as aside, h5py.File(aside, "w") as file:
        for name, part in (("unseen", chosen[:num_unseen]), ("train", chosen[num_unseen:])):
            frames = file.create_dataset(
                name,
                (0, teacher.dim),
                np.float32,
                maxshape=(None, teacher.dim),
                chunks=(64, teacher.dim),
            )
            utterances, starts = [], []
            batches = bucketed_batches(CutSet.from_cuts(part), settings.max_duration, 0, 0)
            for batch_cuts in batches:
                batch = collate_audio(batch_cuts)
                embeddings_BTD, frames_B = teacher.embed(
                    batch.waveforms_BL.to(device), batch.lengths_B.to(device), layer
                )
                frames_B = frames_B.tolist()
                end = len(frames)
                frames.resize(end + sum(frames_B), axis=0)
                for cut, embeddings_TD, count in zip(batch_cuts, embeddings_BTD, frames_B):
                    frames[end : end + count] = embeddings_TD[:count].float().cpu().numpy()
                    utterances.append(cut.id)
                    starts.append(end)
                    end += count
                done += sum(cut.duration for cut in batch_cuts)
            file[f"{name}-utterances"] = utterances
            file[f"{name}-starts"] = starts
            logging.info(
                f"{name}: {len(part)} utterances, {len(frames)} frames, "
                f"{done / (time.monotonic() - started):.0f} x real time"
            )
        file.attrs["teacher"] = teacher.name
        file.attrs["layer"] = layer
        file.attrs["frame_shift"] = teacher.frame_shift
        file.attrs["frame_offset"] = teacher.frame_offset


@dataclass
class Part:
    """One of the sample's two sets of frames.

    Attributes:
      name: of file and part, for messages.
      frames: HDF5 data set, float32 (F, D).
      describe: tells the utterance of a frame's number in the set, and the frame's in it.
    """

    name: str
    frames: h5py.Dataset
    describe: Callable[[int], str]


@contextmanager
def open_sample(path: Path) -> Iterator[tuple[Part, Part, dict]]:
    """What `sample_embeddings` wrote: the parts ``train`` and ``unseen``, and the attributes.

    Raises:
      RecipeError: the file is damaged, cut short, or none of these.
    """
    remake = "run stage 3 again"
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
    utterances = file[f"{name}-utterances"].asstr()[:]
    starts = file[f"{name}-starts"][:].tolist()

    def describe(number: int) -> str:
        place = bisect.bisect_right(starts, number) - 1
        return f"utterance {utterances[place]} frame {number - starts[place]}"

    return Part(f"{path} ({name})", file[name], describe)
