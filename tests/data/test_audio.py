"""Samples as the teacher gets them, of files of 16 bits and of more."""

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording

from mvqkd.data.audio import collate_audio, collate_good, load_audio
from mvqkd.errors import RecipeError

RNG = np.random.default_rng(1)


def written(path, samples_L, subtype):
    soundfile.write(path, samples_L, 16000, subtype)
    return Recording.from_file(path).to_cut()


def in_16_bits(samples_L):
    scaled_L = np.round(samples_L * 32768).clip(-32768, 32767)
    return torch.from_numpy(scaled_L.astype(np.int16)).float() / 32768


def test_files_of_16_bits_are_read_as_such(plain_cuts, tmp_path):
    """At another speed and sampling rate too."""
    loud = written(tmp_path / "loud.wav", RNG.uniform(-1, 1, 8000), "PCM_16")
    for cut in [*list(plain_cuts)[:2], loud]:
        slow = cut.perturb_speed(0.9)
        for other in (cut, slow, cut.resample(12000), slow.pad(duration=9), slow.mix(loud, snr=9)):
            batch = collate_audio(CutSet.from_cuts([other]))
            expected_L = in_16_bits(load_audio(other))
            assert torch.equal(batch.waveforms_BL[0], expected_L) and expected_L.any()


@pytest.mark.parametrize("subtype", ["FLOAT", "PCM_24"])
def test_quiet_and_loud_samples_of_more_bits_are_kept(subtype, tmp_path):
    gain = {"FLOAT": 3.0, "PCM_24": 0.99}[subtype]
    loud_L = gain * RNG.uniform(-1, 1, 8000).astype(np.float32)
    for name, samples_L in (("quiet", 1e-4 * loud_L), ("loud", loud_L)):
        cut = written(tmp_path / f"{name}.wav", samples_L, subtype)
        batch = collate_audio(CutSet.from_cuts([cut]))
        np.testing.assert_allclose(batch.waveforms_BL[0], samples_L, atol=1e-6)
        assert not torch.equal(batch.waveforms_BL[0], in_16_bits(samples_L))
        # Kept in memory, they take 16 bits.
        cache = {}
        for _ in range(2):
            kept = collate_audio(CutSet.from_cuts([cut]), cache)
            assert torch.equal(kept.waveforms_BL[0], in_16_bits(load_audio(cut)))
        assert cache[cut.id].dtype == np.int16


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(value, tmp_path, plain_cuts):
    samples_L = RNG.uniform(-1, 1, 8000).astype(np.float32)
    samples_L[4000] = value
    path = tmp_path / "a.wav"
    cut = written(path, samples_L, "FLOAT")
    said = f"{path}: cut {cut.id} holds samples that are not finite; write the file anew"
    with pytest.raises(RecipeError, match=f"^{said}"):
        load_audio(cut)
    good = next(iter(plain_cuts))
    batch, bad = collate_good([cut, good], lambda name, length: None)
    assert batch.ids == [good.id] and bad.keys() == {cut.id} and bad[cut.id].startswith(said)
