"""Filterbanks and copies at other speeds."""

import builtins
import importlib.machinery
import sys
import types

import numpy as np
import pytest
import torch
from lhotse import CutSet, Fbank, FbankConfig

from mvqkd.data.datamodule import load_features
from mvqkd.data.features import FeatureSettings, compute_features, make_extractor, perturb_speed
from mvqkd.data.manifests import read_cuts
from mvqkd.errors import RecipeError


def test_three_speeds_in_shards(corpus, plain_cuts, feature_cuts):
    originals = list(plain_cuts)[: len(feature_cuts) // 3]
    assert len(feature_cuts) == 12
    assert sorted(p.name for p in (corpus.parent / "features/train").glob("*.h5")) == [
        f"0000{i}.h5" for i in range(3)
    ]
    written = read_cuts(corpus.parent / "features/train.jsonl.gz")
    assert [c.id for c in written] == [c.id for c in feature_cuts]
    for index, cut in enumerate(feature_cuts):
        original, factor = originals[index % 4], (1, 0.9, 1.1)[index // 4]
        assert cut.id.startswith(original.id)
        assert cut.duration == pytest.approx(original.duration / factor, abs=1e-3)
        assert cut.supervisions[0].text == original.supervisions[0].text
        matrix_TF = load_features(cut)
        assert matrix_TF.shape == (round(cut.num_samples / 160), 80) == cut.load_features().shape
        assert np.isfinite(matrix_TF).all()
    direct_TF = Fbank(FbankConfig(num_mel_bins=80)).extract(originals[0].load_audio(), 16000)
    np.testing.assert_allclose(load_features(feature_cuts[0]), direct_TF, atol=1e-4)


def test_test_parts_are_not_perturbed(plain_cuts, tmp_path):
    cuts = CutSet.from_cuts(list(plain_cuts)[:1])
    settings = FeatureSettings(num_mel_bins=23)
    done = compute_features(cuts, tmp_path / "test.jsonl.gz", False, settings, num_workers=1)
    assert [c.id for c in done] == [c.id for c in cuts]
    assert done[0].load_features().shape[1] == 23


def test_labelled_cuts_are_not_perturbed(labelled_cuts, tmp_path):
    with pytest.raises(RecipeError, match="carries codebook_indexes, which speed perturbation"):
        perturb_speed(labelled_cuts, 0.9)
    with pytest.raises(RecipeError, match="perturb first, then dump"):
        out = tmp_path / "train.jsonl.gz"
        compute_features(labelled_cuts, out, True, FeatureSettings(), num_workers=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [ModuleNotFoundError("No module named 'kaldifeat'"), ImportError("_k.so: undefined symbol: x")],
)
def test_kaldifeat_that_does_not_import(plain_cuts, tmp_path, monkeypatch, error):
    find = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "kaldifeat":
            raise error
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    settings = FeatureSettings(extractor="kaldifeat-fbank")
    with pytest.raises(
        RecipeError, match=r"features\.extractor: .* the package kaldifeat"
    ) as caught:
        compute_features(plain_cuts, tmp_path / "train.jsonl.gz", False, settings, num_workers=1)
    version = torch.__version__.split("+")[0]
    for part in (
        str(error),
        "pip install kaldifeat==VERSION -f https://",
        f"ends in torch{version};",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


class KaldifeatStandIn:
    """Answers as kaldifeat.Fbank does, by lhotse's own filterbank; cannot be pickled."""

    def __init__(self, options):
        assert (
            options["frame_opts"]["samp_freq"] == 16000 and not options["frame_opts"]["snip_edges"]
        )
        self._fbank = Fbank(FbankConfig(num_mel_bins=options["mel_opts"]["num_bins"]))
        self._cannot_be_pickled = lambda: None

    def __call__(self, waves, chunk_size):
        return [self._fbank.extract(wave_L, 16000) for wave_L in waves]


def test_kaldifeat_by_conf(plain_cuts, tmp_path, monkeypatch):
    module = types.ModuleType("kaldifeat")
    module.__spec__ = importlib.machinery.ModuleSpec("kaldifeat", None)
    module.Fbank = KaldifeatStandIn
    module.FbankOptions = types.SimpleNamespace(from_dict=lambda options: options)
    monkeypatch.setitem(sys.modules, "kaldifeat", module)
    cuts = CutSet.from_cuts(list(plain_cuts)[:1])
    settings = FeatureSettings(extractor="kaldifeat-fbank", num_mel_bins=23)
    assert make_extractor(settings).name == "kaldifeat-fbank"
    done = compute_features(cuts, tmp_path / "test.jsonl.gz", False, settings, num_workers=1)
    assert done[0].features.type == "kaldifeat-fbank" and done[0].features.frame_shift == 0.01
    expected_TF = Fbank(FbankConfig(num_mel_bins=23)).extract(cuts[0].load_audio(), 16000)
    np.testing.assert_allclose(load_features(done[0]), expected_TF, atol=1e-4)


def test_features_that_cannot_be_read(plain_cuts, tmp_path):
    plain = next(iter(plain_cuts))
    with pytest.raises(RecipeError, match=f"cut {plain.id}: has no features"):
        load_features(plain)
    cuts = CutSet.from_cuts([plain])
    out = tmp_path / "test.jsonl.gz"
    cut = compute_features(cuts, out, False, FeatureSettings(), num_workers=1)[0]
    path = tmp_path / "test/00000.h5"
    for content in (path.read_bytes()[:500], None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        for one in (cut, cut.pad(cut.duration + 1)):
            with pytest.raises(RecipeError, match=rf"^{path}: features of cut .* cannot be read"):
                load_features(one)
