"""Filterbank features of a part, stored beside its cuts.

Speed perturbation happens here, before any label is dumped: lhotse's
``perturb_speed`` leaves a label array as it is, which would then no longer fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lhotse import CutSet, Fbank, FbankConfig
from lhotse.array import TemporalArray
from lhotse.cut import Cut
from lhotse.features.base import FeatureExtractor, Features
from lhotse.utils import fastcopy

from mvqkd.data import SAMPLE_RATE
from mvqkd.data.audio import load_audio
from mvqkd.data.shards import ArrayFile, map_shards
from mvqkd.errors import RecipeError, reason_of
from mvqkd.files import written_aside


@dataclass
class FeatureSettings:
    """What the students hear."""

    # "fbank" is lhotse's, in torch; "kaldifeat-fbank" needs the package kaldifeat.
    extractor: Literal["fbank", "kaldifeat-fbank"] = "fbank"
    num_mel_bins: int = 80
    # Copies of the training parts beside the original.
    speed_factors: list[float] = field(default_factory=lambda: [0.9, 1.1])
    shard_size: int = 500


def extractor_of(cut: Cut) -> str:
    """``FeatureSettings.extractor`` that the features of ``cut`` were computed by."""
    return "kaldifeat-fbank" if cut.features.type == "kaldifeat-fbank" else "fbank"


def make_extractor(settings: FeatureSettings) -> FeatureExtractor:
    """
    Raises:
      RecipeError: kaldifeat is asked for, and not installed or built for another torch.
    """
    if settings.extractor == "fbank":
        return Fbank(FbankConfig(sampling_rate=SAMPLE_RATE, num_mel_bins=settings.num_mel_bins))
    try:
        import kaldifeat  # noqa: F401  lhotse says less of what is wrong with it
        from lhotse.features.kaldifeat import (
            KaldifeatFbank,
            KaldifeatFbankConfig,
            KaldifeatMelOptions,
        )
    except (ImportError, OSError) as error:  # not there, or of another torch
        pages = "https://csukuangfj.github.io/kaldifeat/cpu.html"
        raise RecipeError(
            "features.extractor: kaldifeat-fbank needs the package kaldifeat, which does not "
            f"import ({reason_of(error)}); pip install kaldifeat==VERSION -f {pages} (or cuda.html "
            f"there), where VERSION is one that ends in torch{torch.__version__.split('+')[0]}; or "
            "set it to fbank"
        ) from error
    return KaldifeatFbank(
        KaldifeatFbankConfig(mel_opts=KaldifeatMelOptions(num_bins=settings.num_mel_bins))
    )


def _extract(settings: FeatureSettings, cuts: CutSet, arrays: ArrayFile) -> CutSet:
    torch.set_num_threads(1)
    extractor = make_extractor(settings)  # here: kaldifeat's need not go to another process
    done = []
    for cut in cuts:
        matrix_TF = extractor.extract(load_audio(cut), SAMPLE_RATE)
        arrays.store(cut.id, matrix_TF)
        features = Features(
            type=extractor.name,
            num_frames=matrix_TF.shape[0],
            num_features=matrix_TF.shape[1],
            frame_shift=extractor.frame_shift,
            sampling_rate=SAMPLE_RATE,
            start=0,
            duration=cut.duration,
            storage_type=arrays.STORAGE_TYPE,
            storage_path=arrays.path,
            storage_key=cut.id,
            recording_id=cut.recording_id,
            channels=0,
        )
        done.append(fastcopy(cut, features=features))
    return CutSet.from_cuts(done)


def compute_features(
    cuts: CutSet, out: Path, perturb: bool, settings: FeatureSettings, num_workers: int
) -> CutSet:
    """Write ``out``, the cuts with features; arrays go to a folder of its name beside it.

    Args:
      perturb: add the copies at other speeds (training parts).

    Raises:
      RecipeError: a cut to be perturbed carries labels.
    """
    if perturb:
        originals = cuts
        for factor in settings.speed_factors:
            cuts = cuts + perturb_speed(originals, factor)
    folder = out.with_name(out.name.split(".")[0])
    make_extractor(settings)  # what it needs is missed before anything is begun
    extract = partial(_extract, settings)
    done = map_shards(cuts, folder, extract, settings.shard_size, num_workers, f"features {out}")
    with written_aside(out) as aside:
        done.to_file(aside)
    return done


def perturb_speed(cuts: CutSet, factor: float) -> CutSet:
    """lhotse's ``perturb_speed`` for cuts without labels.

    Raises:
      RecipeError: a cut carries labels, which would stay at the old speed.
    """
    for cut in cuts:
        labels = [k for k, v in (cut.custom or {}).items() if isinstance(v, TemporalArray)]
        if labels:
            raise RecipeError(
                f"cut {cut.id}: carries {labels[0]}, which speed perturbation would leave "
                "at the old speed; perturb first, then dump the labels"
            )
    return cuts.perturb_speed(factor)
