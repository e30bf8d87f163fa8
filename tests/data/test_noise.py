"""Noise: its cuts, and what mixing it in does to a batch."""

import numpy as np
import pytest
import soundfile
import torch

from mvqkd.data.datamodule import DataSettings, NoiseSettings, StudentData
from mvqkd.data.features import FeatureSettings
from mvqkd.data.noise import prepare_noise
from mvqkd.errors import RecipeError


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Three recordings of 2.5 s in pieces of one."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(1)
    for name, rate in (("music/a", 16000), ("noise/a", 16000), ("noise/b", 8000)):
        path = folder / f"musan/{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.standard_normal(int(2.5 * rate)) * 0.1, rate)
    out = folder / "features/noise.jsonl.gz"
    return prepare_noise(folder / "musan", out, 1.0, FeatureSettings(), num_workers=1)


class Letters:
    """Tokens: the letters."""

    def encode(self, text):
        return list(text.encode())


def data_of(cuts, noise, p=1.0, **kwargs):
    settings = DataSettings(max_duration=20, cache=True, noise=NoiseSettings(p=p))
    return StudentData(cuts, Letters(), settings, 1, noise=noise, **kwargs)


def test_pieces_have_features_of_their_own(noise):
    assert [round(cut.duration, 3) for cut in noise] == [1.0, 1.0, 0.5] * 3
    assert len({cut.id for cut in noise}) == 9
    first, second, _ = [cut.load_features() for cut in list(noise)[:3]]
    assert first.shape == second.shape == (100, 80) and not np.allclose(first, second)


def test_noise_changes_features_alone(labelled_cuts, noise):
    fields = ["codebook_indexes"]
    with_noise = data_of(labelled_cuts, noise, fields=fields, with_audio=True)
    without = data_of(labelled_cuts, None, fields=fields, with_audio=True)
    for (noisy, _), (clean, _) in zip(with_noise.batches(1), without.batches(1), strict=True):
        assert noisy.ids == clean.ids and noisy.tokens == clean.tokens
        assert torch.equal(noisy.lengths_B, clean.lengths_B)
        assert torch.equal(noisy.waveforms_BL, clean.waveforms_BL)
        assert torch.equal(noisy.labels["codebook_indexes"], clean.labels["codebook_indexes"])
        for b, length in enumerate(clean.lengths_B.tolist()):
            change_TF = noisy.features_BTF[b, :length] - clean.features_BTF[b, :length]
            assert change_TF.abs().max() > 0.1
            # In the log domain added power raises the energy.
            assert change_TF.mean() > 0


def test_noise_follows_from_seed_epoch_and_batch(feature_cuts, noise):
    first = [batch.features_BTF for batch, _ in data_of(feature_cuts, noise).batches(1)]
    data = data_of(feature_cuts, noise)
    again = [batch.features_BTF for batch, _ in data.batches(1, start=1)]
    assert len(again) == len(first) - 1
    assert all(torch.equal(one, other) for one, other in zip(first[1:], again))
    sums = {float(b.features_BTF.sum()) for epoch in (1, 2) for b, _ in data.batches(epoch)}
    assert len(sums) == 2 * len(first)


def test_no_share_no_noise(feature_cuts, noise):
    none, clean = data_of(feature_cuts, noise, p=0.0), data_of(feature_cuts, None)
    for (one, _), (other, _) in zip(none.batches(1), clean.batches(1), strict=True):
        assert torch.equal(one.features_BTF, other.features_BTF)


def test_folder_without_sound_is_refused(tmp_path):
    (tmp_path / "README").write_text("none here\n")
    with pytest.raises(RecipeError, match="holds no WAV file; name a folder with WAV files"):
        prepare_noise(tmp_path, tmp_path / "out.jsonl.gz", 1.0, FeatureSettings(), 1)


def test_damaged_file_is_named(tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    with pytest.raises(RecipeError, match=r"bad\.wav: cannot be read"):
        prepare_noise(tmp_path, tmp_path / "out.jsonl.gz", 1.0, FeatureSettings(), 1)
