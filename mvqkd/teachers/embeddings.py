"""Embeddings of a sample of utterances, for training codebooks."""

from __future__ import annotations

import logging
import time
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
    utterances, and attributes ``teacher``, ``layer``, ``frame_shift``, ``frame_offset``.

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
            frames = []
            batches = bucketed_batches(CutSet.from_cuts(part), settings.max_duration, 0, 0)
            for batch_cuts in batches:
                batch = collate_audio(batch_cuts)
                embeddings_BTD, frames_B = teacher.embed(
                    batch.waveforms_BL.to(device), batch.lengths_B.to(device), layer
                )
                inside_BT = torch.arange(embeddings_BTD.shape[1], device=device) < frames_B[:, None]
                frames.append(embeddings_BTD[inside_BT].float().cpu().numpy())
                done += sum(cut.duration for cut in batch_cuts)
            file[name] = np.concatenate(frames)
            logging.info(
                f"{name}: {len(part)} utterances, {len(file[name])} frames, "
                f"{done / (time.monotonic() - started):.0f} x real time"
            )
        file.attrs["teacher"] = teacher.name
        file.attrs["layer"] = layer
        file.attrs["frame_shift"] = teacher.frame_shift
        file.attrs["frame_offset"] = teacher.frame_offset
