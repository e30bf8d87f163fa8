"""Clicks at known times, through every augmentation: features and labels say the same time.

Speed, truncation, padding, noise, batching and time warp; labels stored and in the loop.
"""

import random

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.utils import fastcopy

from mvqkd.data.datamodule import Augment, DataSettings, SpecAugmentSettings, StudentData
from mvqkd.data.features import FeatureSettings, compute_features
from mvqkd.data.labels import Dumper, Embeddings, LabelSettings, dump_labels
from mvqkd.losses.distillation import Distillation, Pairing, Term, TermSettings
from mvqkd.teachers.base import Teacher
from tests.conftest import CPU

SECONDS, RATE, FIELD = 2.6, 16000, "embeddings"


class ClickTeacher(Teacher):
    """Its embedding is the loudest sample that a frame hears."""

    name, dim, num_layers, stride, receptive_field = "clicks", 2, 1, 320, 400
    window_frames = 10**6

    def _layers(self, prepared_BL, lengths_B, layers):
        loudest_BT = prepared_BL.unfold(1, 400, 320).abs().amax(-1)
        return [loudest_BT[..., None].expand(-1, -1, 2) for _ in layers]


class Words:
    def encode(self, text):
        return [len(word) for word in text.split()]


def recorded(folder, name, click_times, generator):
    samples_L = 1e-4 * generator.standard_normal(round(SECONDS * RATE))
    samples_L[[round(t * RATE) for t in click_times]] = 0.8
    soundfile.write(folder / f"{name}.wav", samples_L, RATE, subtype="PCM_16")
    cut = Recording.from_file(folder / f"{name}.wav").to_cut()
    said = SupervisionSegment(name, cut.recording_id, 0, cut.duration, text="click " * 3)
    return fastcopy(cut, id=name, supervisions=[said] if len(click_times) else [])


@pytest.fixture(scope="module")
def teacher():
    return ClickTeacher()


@pytest.fixture(scope="module")
def cuts(tmp_path_factory, teacher):
    """Utterances of three clicks at three speeds; cut, padded and mixed with noise."""
    folder = tmp_path_factory.mktemp("clicks")
    generator = np.random.default_rng(1)
    plain = [
        recorded(folder, f"u{n}", generator.uniform((0.3, 1.1, 1.9), (0.6, 1.4, 2.2)), generator)
        for n in range(2)
    ]
    settings = FeatureSettings(num_mel_bins=40)
    noise = compute_features(
        CutSet.from_cuts([recorded(folder, "noise", [], generator)]),
        folder / "noise.jsonl.gz",
        False,
        settings,
        1,
    )[0]
    featured = compute_features(
        CutSet.from_cuts(plain), folder / "train.jsonl.gz", True, settings, 1
    )
    dumper = Dumper([Embeddings(teacher, 1, "float16", FIELD)], LabelSettings(), CPU)
    labelled = dump_labels(featured, folder / "labels/train.jsonl.gz", dumper, 10)
    assert len(labelled) == 6
    parts = []
    for cut in labelled:
        for offset in (0.0, 0.15, 0.81):
            part = cut.truncate(offset=offset, duration=cut.duration - offset - 0.2)
            more = part.duration + 0.36
            parts += [
                part,
                part.pad(duration=more),
                part.pad(duration=more, direction="left"),
                part.mix(noise, offset_other_by=0.3),
                noise.truncate(duration=1.0).mix(part, offset_other_by=0.25),
            ]
    return CutSet.from_cuts(fastcopy(cut, id=f"{n:03d}") for n, cut in enumerate(parts))


def middles(loud_T, times_T):
    """Middle (s) of each run of frames that is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loud_T.astype(int), [0]])))
    return [times_T[a:b].mean() for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("time_warp_factor", [0, 20])
def test_features_and_labels_hear_a_click_at_the_same_time(cuts, teacher, time_warp_factor):
    # A student of a frame for each of the features'.
    pairing = Pairing(0.01, 0.005, teacher.frame_shift, teacher.frame_offset)
    term = Term(TermSettings("l2", field=FIELD), 4, pairing, None, torch.zeros(2), torch.ones(2))
    in_loop = Distillation([term], [Embeddings(teacher, 1, "float32", FIELD)])
    data = StudentData(cuts, Words(), DataSettings(20), 1, [FIELD], with_audio=True)
    augment = Augment(
        SpecAugmentSettings(
            time_warp_factor, p=1.0, features_mask_size=1, num_frame_masks=1, frames_mask_size=1
        )
    )
    random.seed(1)
    compared, moved = 0, 0.0
    for batch, _ in data.batches(1):
        features_BTF, warps = augment(batch.features_BTF, batch.lengths_B)
        assert (warps is None) == (time_warp_factor == 0)
        heard = in_loop.computed_labels(batch.waveforms_BL, batch.samples_B)
        num_frames = features_BTF.shape[1]
        times_T = (np.arange(num_frames) + 0.5) * 0.01
        for labels in (batch.labels, heard):
            paired_BTD = pairing.pair(labels[FIELD], num_frames, warps)[:, :, 0]
            for row, length in enumerate(batch.lengths_B.tolist()):
                loudness_T = features_BTF[row, :length].mean(1).numpy()
                in_features = middles(loudness_T > loudness_T.max() - 5, times_T[:length])
                loud_T = (paired_BTD[row, :length, 0] > 0.3).numpy()
                in_labels = np.array(middles(loud_T, times_T[:length]))
                assert len(in_labels) == len(in_features) >= 2, batch.ids[row]
                # A teacher's frame counts until the next one is heard: half a frame of 20 ms.
                # Truncation of labels rounds to half a frame.
                np.testing.assert_allclose(in_labels - 0.01, in_features, atol=0.03)
                compared += 1
                if warps is not None and warps[row] is not None:
                    before = warps[row].source(torch.from_numpy(np.array(in_features))).numpy()
                    moved = max(moved, np.abs(before - in_features).max())
    assert compared == 2 * len(cuts)
    # Far more than the tolerance.
    assert (moved > 0.1) == (time_warp_factor > 0)
