"""The study of layers and numbers of codebooks."""

import json

import pytest

from local import study_quantizer
from mvqkd.errors import RecipeError
from mvqkd.quantizer import QuantizerSettings
from mvqkd.quantizer import study as study_module
from mvqkd.quantizer.study import StudySettings
from mvqkd.teachers.embeddings import SampleSettings


@pytest.fixture
def settings(plain_cuts, corpus, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(study_quantizer, "load_teacher", lambda name, revision: teacher)
    return study_quantizer.Settings(
        teacher="tiny",
        layer=2,
        train_manifest=corpus.parent / "manifests/train.jsonl.gz",
        out_dir=tmp_path,
        device="cpu",
        sample=SampleSettings(num_utterances=5, num_unseen=1),
        quantizer=QuantizerSettings(2, 16, lsq_iters=1, logits_iters=2),
        study=StudySettings(num_codebooks=[1, 4]),
    )


def test_each_layer_and_each_number_of_codebooks_once(settings, tmp_path):
    study_quantizer.main(settings)
    found = json.loads((tmp_path / "study.json").read_text())
    rows = [(q["layer"], q["num_codebooks"]) for q in found["quantizers"]]
    assert rows == [(1, 2), (2, 1), (2, 2), (2, 4)]
    kept = {row: q["variance_kept"] for row, q in zip(rows, found["quantizers"])}
    assert kept[2, 1] < kept[2, 4] < 1
    assert kept[1, 2] == 1 - found["quantizers"][0]["rrl"]["5"]
    assert [q["problem"] for q in found["quantizers"]] == [None] * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["study.json", "study.png"]


def test_a_quantizer_that_stage_4_would_refuse_is_reported(settings, tmp_path, monkeypatch, caplog):
    settings.study = StudySettings(num_codebooks=[2], layers=[2])
    real = study_module.diagnose
    monkeypatch.setattr(
        study_module, "diagnose", lambda *a, **k: {**real(*a, **k), "entropy_bits": [3.0, 0.1]}
    )
    study_quantizer.main(settings)
    (found,) = json.loads((tmp_path / "study.json").read_text())["quantizers"]
    assert "codebooks 1 are not used; likely" in found["problem"]
    assert f"layer 2, N = 2: {found['problem']}" in caplog.text


def test_sizes_that_no_quantizer_can_have_are_refused_first(settings, tmp_path):
    settings.study = StudySettings(num_codebooks=[2, 3])
    with pytest.raises(RecipeError, match="num_codebooks: 3 is not a power of two"):
        study_quantizer.main(settings)
    assert not list(tmp_path.iterdir())


def test_goes_on_where_it_was(settings, tmp_path, monkeypatch):
    settings.study = StudySettings(num_codebooks=[1, 2], layers=[2])
    study_quantizer.main(settings)
    before = json.loads((tmp_path / "study.json").read_text())["quantizers"]
    sampled = []
    real = study_quantizer.sample_embeddings
    monkeypatch.setattr(
        study_quantizer,
        "sample_embeddings",
        lambda cuts, teacher, layer, *rest: (
            sampled.append(layer),
            real(cuts, teacher, layer, *rest),
        ),
    )
    settings.study = StudySettings(num_codebooks=[1, 2], layers=[1, 2])
    study_quantizer.main(settings)
    after = json.loads((tmp_path / "study.json").read_text())["quantizers"]
    assert sampled == [1] and after[:2] == before and len(after) == 3

    settings.quantizer.seed = 9
    with pytest.raises(RecipeError, match="made with other settings; delete it"):
        study_quantizer.main(settings)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(RecipeError, match=r"study\.json: damaged"):
        study_quantizer.main(settings)
    settings.study.layers = [3]
    with pytest.raises(RecipeError, match=r"study\.layers: 3 is not in 1\.\.2"):
        study_quantizer.main(settings)
