"""Units: the cluster that each frame of MFCC, or of a teacher's layer, belongs to.

K: units, D: dimension, F: frames, T: frames of an utterance.

Source: Hsu et al., "HuBERT: Self-Supervised Speech Representation Learning by Masked Prediction
of Hidden Units", 2021 (arXiv 2106.07447), section III.A; mini-batches: Sculley, "Web-scale k-means
clustering", 2010; where they start: Arthur and Vassilvitskii, "k-means++", 2007.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from lhotse import CutSet
from torch.nn import functional as F

from mvqkd.data.audio import bucketed_batches, collate_good
from mvqkd.data.bad_utterances import check_bad
from mvqkd.data.labels import Dumper, LabelSettings, Origin, dump_labels, out_of_range
from mvqkd.data.manifests import read_cuts
from mvqkd.device import matrix_dtype
from mvqkd.errors import RecipeError
from mvqkd.processes import gathered, is_main
from mvqkd.teachers.base import Teacher
from mvqkd.training.checkpoint import load_checkpoint, save_checkpoint

FIELD = "units"
# Where `UnitSettings.labels` are set.
CONF = "unit_labels.labels"
_MOST_UNITS = 65536


@dataclass
class KMeansSettings:
    """How frames are clustered.

    Attributes:
      sample_hours: of speech, drawn at random; it is held in memory, in float32.
      batch_size: frames of a step.
      num_epochs: times that each frame is taken.
      num_starts: draws of first centroids, of which the best is taken.
    """

    num_units: int = 100
    sample_hours: float = 10
    batch_size: int = 10_000
    num_epochs: int = 20
    num_starts: int = 5
    seed: int = 1


@dataclass
class UnitSettings:
    """What is clustered, and how all frames get their units."""

    # Of the teacher, from 1; MFCC have one.
    layer: int = 1
    kmeans: KMeansSettings = field(default_factory=KMeansSettings)
    labels: LabelSettings = field(default_factory=LabelSettings)


def nearest(x_FD: torch.Tensor, centroids_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(index of the nearest centroid (F,), squared distance to it (F,))."""
    scores_FK = torch.addmm((centroids_KD**2).sum(1), x_FD, centroids_KD.T, alpha=-2)
    least_F, indexes_F = scores_FK.min(1)
    return indexes_F, (least_F + (x_FD**2).sum(1)).clamp(min=0)


def mean_distance(x_FD: torch.Tensor, centroids_KD: torch.Tensor) -> float:
    """The objective of k-means: mean squared distance of a frame to the nearest centroid."""
    parts = x_FD.split(10_000)
    return sum(nearest(p.to(centroids_KD), centroids_KD)[1].sum().item() for p in parts) / len(x_FD)


def _first_centroids(x_FD: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
    """Frames drawn one after the other, by their squared distance to those drawn before."""
    first = int(torch.randint(len(x_FD), (1,), generator=generator))
    chosen, distance_F = [first], ((x_FD - x_FD[first]) ** 2).sum(1)
    while len(chosen) < number:
        weight_F = distance_F.double().cpu()
        if not weight_F.any():  # fewer different frames than centroids
            weight_F = torch.ones_like(weight_F)
        # By hand, for torch.multinomial takes 2^24 categories at most.
        point = torch.rand(1, dtype=torch.float64, generator=generator) * weight_F.sum()
        index = min(int(torch.searchsorted(weight_F.cumsum(0), point)), len(x_FD) - 1)
        chosen.append(index)
        distance_F = torch.minimum(distance_F, ((x_FD - x_FD[index]) ** 2).sum(1))
    return x_FD[chosen].clone()


def fit_kmeans(x_FD: torch.Tensor, settings: KMeansSettings, device: torch.device) -> torch.Tensor:
    """Centroids (K, D) by mini-batches: each goes to the mean of all frames that it was given.

    Raises:
      RecipeError: fewer frames than units, or more units than a label holds.
    """
    if not 1 <= settings.num_units <= min(len(x_FD), _MOST_UNITS):
        raise RecipeError(
            f"units.kmeans.num_units: {settings.num_units} of {len(x_FD)} frames; give at least 1 "
            f"and at most {_MOST_UNITS}, or more speech"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    number = max(3 * settings.batch_size, 3 * settings.num_units)
    some_FD = x_FD[torch.randperm(len(x_FD), generator=generator)[:number]].to(device)
    starts = [
        _first_centroids(some_FD, settings.num_units, generator)
        for _ in range(max(1, settings.num_starts))
    ]
    centroids_KD = min(starts, key=lambda start_KD: mean_distance(some_FD, start_KD))
    counts_K1 = torch.zeros(settings.num_units, 1, device=device)
    for _ in range(settings.num_epochs):
        order = torch.randperm(len(x_FD), generator=generator)
        for rows in order.split(settings.batch_size):
            batch_FD = x_FD[rows].to(device)
            indexes_F, _ = nearest(batch_FD, centroids_KD)
            # A product, not a scattered sum, whose order on a GPU is another each time.
            given_FK = F.one_hot(indexes_F, settings.num_units).to(batch_FD)
            given_K1 = given_FK.sum(0)[:, None]
            counts_K1 += given_K1
            change_KD = given_FK.T @ batch_FD - given_K1 * centroids_KD
            centroids_KD += change_KD / counts_K1.clamp(min=1)
    return centroids_KD.cpu()


def unit_figures(x_FD: torch.Tensor, centroids_KD: torch.Tensor) -> dict[str, float]:
    """How units are used by frames ``x_FD``.

    Returns:
      ``perplexity``, the exponential of the entropy of a unit; ``used``, the share of the units
      that a frame has; ``error``, the mean squared distance over the variance.
    """
    indexes_F = torch.cat([nearest(part, centroids_KD)[0] for part in x_FD.split(10_000)])
    share_K = torch.bincount(indexes_F, minlength=len(centroids_KD)).double() / len(x_FD)
    entropy = -torch.special.xlogy(share_K, share_K).sum()
    variance = x_FD.var(0, correction=0).sum().item()
    return {
        "perplexity": entropy.exp().item(),
        "used": (share_K > 0).double().mean().item(),
        "error": mean_distance(x_FD, centroids_KD) / max(variance, 1e-20),
    }


class Units:
    """Labels of one unit a frame of ``teacher``: uint16 (T, 1), a kind for `Dumper`."""

    dtype = np.dtype(np.uint16)
    columns = 1
    field = FIELD

    def __init__(self, teacher: Teacher, layer: int, centroids_KD: torch.Tensor) -> None:
        teacher.check_layer(layer)
        self.teacher, self._centroids_KD = teacher, centroids_KD
        digest = hashlib.sha256(centroids_KD.contiguous().numpy().tobytes()).hexdigest()
        self.origin = Origin(teacher.name, layer, f"kmeans-{len(centroids_KD)}", digest)

    def to(self, device: torch.device) -> None:
        self.teacher.to(device)
        self._centroids_KD = self._centroids_KD.to(device)

    def made_from(self) -> dict:
        return asdict(self.origin)

    def encode(self, embeddings_FD: torch.Tensor) -> torch.Tensor:
        """uint16 (F, 1)."""
        parts = embeddings_FD.float().split(10_000)
        indexes_F = torch.cat([nearest(part, self._centroids_KD)[0] for part in parts])
        return indexes_F[:, None].to(torch.uint16)

    def what_is_wrong(self, units_T1: np.ndarray) -> str | None:
        return out_of_range(units_T1, len(self._centroids_KD))


def _sample_frames(
    cuts: CutSet,
    num_labelled: int,
    teacher: Teacher,
    settings: UnitSettings,
    device: torch.device,
) -> torch.Tensor:
    """(F, D) of whole utterances; bad ones are left out, and listed when all cuts are labelled.

    Args:
      num_labelled: how many those are, of which the bad ones may be a share.

    Raises:
      RecipeError: more of them are bad, or all that are looked at.
    """
    everything, seed = list(cuts), settings.kmeans.seed
    order = np.random.default_rng(seed).permutation(len(everything))
    ends = itertools.accumulate(everything[i].duration for i in order)
    limit = 3600 * settings.kmeans.sample_hours
    chosen = [everything[i] for i, end in zip(order, ends) if end <= limit]
    frames, bad = [], {}
    teacher.to(device)
    dtype = matrix_dtype(settings.labels.precision, device)
    for batch_cuts in bucketed_batches(
        CutSet.from_cuts(chosen or everything[:1]), settings.labels.max_duration, seed, 0
    ):
        batch, wrong = collate_good(batch_cuts, teacher.check_length)
        bad.update(wrong)
        check_bad(bad, num_labelled, settings.labels.max_bad_share, CONF)
        if batch is None:
            continue
        embeddings_BTD, frames_B = teacher.embed(
            batch.waveforms_BL.to(device), batch.lengths_B, settings.layer, dtype
        )
        pairs = zip(embeddings_BTD, frames_B.tolist())
        frames += [x_TD[:count].float().cpu() for x_TD, count in pairs]
    if not frames:
        raise RecipeError(
            f"{next(iter(bad.values()))} (nothing else was drawn for k-means); raise "
            "unit_labels.kmeans.sample_hours"
        )
    return torch.cat(frames)


def label_units(
    train_cuts: CutSet,
    dev_cuts: CutSet,
    teacher: Teacher,
    settings: UnitSettings,
    folder: Path,
    device: torch.device,
) -> tuple[CutSet, dict[str, float]]:
    """Cuts of both with units, found from those of ``train_cuts``; see `unit_figures` for the rest.

    Bad cuts are left out, up to a share, and listed in ``bad-utterances.txt``, see `dump_labels`.

    Goes on where a killed run has stopped: k-means is in ``centroids.pt``, labels are in shards,
    which several processes, `connected`, share.

    Raises:
      RecipeError: the folder holds units made from something else, a cut is given twice, or too
        many are bad.
    """
    cuts = CutSet.from_cuts([*train_cuts, *dev_cuts])
    ids = [cut.id for cut in cuts]
    if len(set(ids)) < len(ids):
        twice = next(name for name, number in Counter(ids).items() if number > 1)
        raise RecipeError(f"cut {twice}: is there twice; name each manifest once")
    path = folder / "centroids.pt"
    made_from = {
        "teacher": teacher.name,
        "layer": settings.layer,
        **asdict(settings.kmeans),
    }
    if is_main() and not path.exists():
        teacher.check_layer(settings.layer)
        frames_FD = _sample_frames(train_cuts, len(cuts), teacher, settings, device)
        logging.info(f"k-means: {settings.kmeans.num_units} units of {len(frames_FD)} frames")
        centroids_KD = fit_kmeans(frames_FD, settings.kmeans, device)
        save_checkpoint(
            path,
            model={"centroids_KD": centroids_KD},
            figures=unit_figures(frames_FD, centroids_KD),
            made_from=made_from,
        )
    gathered(None)  # the others wait for the centroids
    saved = load_checkpoint(path)
    for key, value in made_from.items():
        if saved["made_from"].get(key) != value:
            raise RecipeError(
                f"{path}: its units are of {key} {saved['made_from'].get(key)}, and this run's of "
                f"{value}; give it another folder, or remove this one"
            )
    kind = Units(teacher, settings.layer, saved["model"]["centroids_KD"])
    out = folder / "labels.jsonl.gz"
    dumper = Dumper([kind], settings.labels, device, CONF)
    dump_labels(cuts, out, dumper, settings.labels.shard_size)
    gathered(None)  # the last to end writes the manifest
    return read_cuts(out), saved["figures"]


class _Clock(Protocol):
    """Of a teacher, when its frames are, in samples."""

    stride: int
    receptive_field: int


def units_at_frames(
    units_T: np.ndarray, units_clock: _Clock, clock: _Clock, num_frames: int
) -> np.ndarray:
    """(num_frames,): the unit whose window's centre is nearest to that of each frame of ``clock``.

    Centres are compared in half samples, so that a tie goes the same way everywhere: to the later.
    """
    frames_T = np.arange(num_frames)
    behind = clock.receptive_field - units_clock.receptive_field
    halves_T = 2 * clock.stride * frames_T + behind + units_clock.stride
    return units_T[(halves_T // (2 * units_clock.stride)).clip(0, len(units_T) - 1)]
