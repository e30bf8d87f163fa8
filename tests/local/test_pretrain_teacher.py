"""local/pretrain_teacher.py: two rounds on a dozen utterances, then CTC from what they made."""

import hashlib
import json
import os
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from lhotse import CutSet
from safetensors.torch import load_file
from transformers import HubertConfig, HubertModel

from local.pretrain_teacher import Settings, main
from local.train_teacher import Settings as CtcSettings
from local.train_teacher import main as train_ctc
from mvqkd.cli import parse
from mvqkd.data.labels import LabelSettings, load_labels
from mvqkd.data.manifests import read_cuts, write_cuts
from mvqkd.errors import RecipeError
from mvqkd.teachers import load_teacher
from mvqkd.teachers.ctc import HubertSettings, symbols_of
from mvqkd.teachers.pretraining import PredictionSettings
from mvqkd.teachers.units import FIELD, KMeansSettings, UnitSettings
from mvqkd.training.loop import TrainingSettings
from tests.conftest import ROOT, tiny_hubert
from tests.recipe_copy import begun_steps, copy_checkout
from tests.training.test_processes import in_processes

NAMES = ("first", "alone")
TRAINING = TrainingSettings(num_epochs=1, optimizer="adamw", lr=1e-3, log_every_steps=1)


@pytest.fixture(scope="module")
def manifests(plain_cuts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifests")
    cuts = list(plain_cuts + plain_cuts.perturb_speed(0.9))[:12]
    assert len(cuts) == 12
    for name, part in (("train", cuts[3:]), ("dev", cuts[:3])):
        write_cuts(CutSet.from_cuts(part), folder / f"{name}.jsonl.gz")
    return {
        "train_manifests": [folder / "train.jsonl.gz"],
        "dev_manifests": [folder / "dev.jsonl.gz"],
    }


def hubert():
    names = (
        "hidden_size num_hidden_layers num_attention_heads intermediate_size conv_dim conv_kernel "
        "conv_stride conv_bias num_conv_pos_embeddings num_conv_pos_embedding_groups "
        "feat_extract_norm do_stable_layer_norm"
    )
    config = tiny_hubert().config
    return HubertSettings({name: getattr(config, name) for name in names.split()})


def settings_of(manifests, folder, name, **changes):
    unit_labels = UnitSettings(
        changes.pop("layer", 1),
        KMeansSettings(changes.pop("num_units", 6), batch_size=500, num_epochs=2, num_starts=1),
        LabelSettings(20, 4, num_threads=1),
    )
    return Settings(
        **manifests,
        work_dir=folder / f"{name}-training",
        out_dir=folder / name,
        device="cpu",
        max_duration=10,
        hubert=hubert(),
        unit_labels=unit_labels,
        training=TRAINING,
        **changes,
    )


def test_two_rounds_then_ctc(manifests, tmp_path):
    main(settings_of(manifests, tmp_path, "first"))
    first = load_teacher(tmp_path / "first")
    assert first.vocabulary is None and (first.dim, first.num_layers) == (32, 2)
    second = str(tmp_path / "first")
    main(settings_of(manifests, tmp_path, "second", units=second, layer=2, num_units=7))
    origin = json.loads((tmp_path / "second/origin.json").read_text())
    units = origin["units"]
    assert (units["of"], units["layer"], units["number"]) == (second, 2, 7)
    assert 1 <= units["perplexity"] <= 7 and units["origin"]["units"]["of"] == "mfcc"
    assert {"loss-dev", "masked-accuracy-dev", "unmasked-accuracy-dev"} == set(origin["dev"])
    # The weights are those of the last epoch.
    last = torch.load(tmp_path / "second-training/epoch-1.pt", weights_only=True)["model"]
    loaded = load_teacher(tmp_path / "second").state_dict()
    for key, value in loaded.items():
        if "lm_head" not in key:
            torch.testing.assert_close(value, last[f"teacher.{key}"])

    ctc = CtcSettings(
        **manifests,
        work_dir=tmp_path / "ctc-training",
        out_dir=tmp_path / "ctc",
        init=str(tmp_path / "second"),
        device="cpu",
        max_duration=10,
        training=TrainingSettings(num_epochs=1, optimizer="adamw", lr=0.0),
    )
    train_ctc(ctc)
    tuned = load_teacher(tmp_path / "ctc")
    assert tuned.vocabulary == symbols_of(read_cuts(manifests["train_manifests"][0]))
    for key, value in tuned.state_dict().items():
        if "lm_head" not in key:  # half precision is stored, and a rate of 0 still decays nothing
            torch.testing.assert_close(value, loaded[key], rtol=1e-3, atol=1e-3)
    made = json.loads((tmp_path / "ctc/origin.json").read_text())
    assert made["init"]["units"]["number"] == 7
    assert set(made["dev"]) == {"wer-dev"} and made["epochs"] == 1
    stored = load_file(tmp_path / "ctc/model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    # Of a teacher that says nothing of itself, nothing is said.
    (tmp_path / "second/origin.json").unlink()
    train_ctc(replace(ctc, out_dir=tmp_path / "again"))
    assert "init" not in json.loads((tmp_path / "again/origin.json").read_text())


def test_a_run_of_other_units_is_refused(manifests, tmp_path):
    main(settings_of(manifests, tmp_path, "first"))
    with pytest.raises(RecipeError, match=r"its units are of num_units 6, and this run's of 7"):
        main(settings_of(manifests, tmp_path, "first", num_units=7))


def test_a_broken_file_is_left_out(manifests, tmp_path):
    cuts = list(read_cuts(manifests["train_manifests"][0]))
    cuts[4] = cuts[4].truncate(duration=0.01, preserve_id=True)
    write_cuts(CutSet.from_cuts(cuts), tmp_path / "train.jsonl.gz")
    given = {**manifests, "train_manifests": [tmp_path / "train.jsonl.gz"]}
    settings = settings_of(given, tmp_path, "first")
    with pytest.raises(
        RecipeError, match=r"\(1 of 12 utterances are bad, .* of unit_labels.labels"
    ):
        main(settings)
    settings.unit_labels.labels.max_bad_share = 0.1
    main(settings)
    (line,) = (tmp_path / "first-training/units/bad-utterances.txt").read_text().splitlines()
    assert line.startswith(f"cut {cuts[4].id}: 160 samples are shorter than one frame")
    hours = sum(cut.duration for cut in cuts if cut.id != cuts[4].id) / 3600
    made = json.loads((tmp_path / "first/origin.json").read_text())
    assert made["speech_hours"] == pytest.approx(hours, abs=0.01)


def test_two_processes_share_the_work(manifests, tmp_path):
    in_processes(2, tmp_path, main, settings_of(manifests, tmp_path, "first"))
    main(settings_of(manifests, tmp_path, "alone"))
    shared, alone = (read_cuts(tmp_path / f"{n}-training/units/labels.jsonl.gz") for n in NAMES)
    for ours, theirs in zip(shared, alone):
        assert ours.id == theirs.id
        assert np.array_equal(load_labels(ours, FIELD), load_labels(theirs, FIELD))
    assert load_teacher(tmp_path / "first").dim == 32


# Notes its options, and leaves what they promise.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$@" >>"$SEEN"
while (($#)); do
    case $1 in --work_dir | --out_dir) mkdir -p "$2" ;; esac
    shift
done
"""


@pytest.fixture
def stage_one(tmp_path):
    """Runs stage 1 of run.sh with that for a Python; what began, and the options of each."""
    folder = copy_checkout(tmp_path / "recipe")
    (folder / ".venv").unlink()
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python3").write_text(FAKE_PYTHON)
    (folder / ".venv/bin/python3").chmod(0o755)
    digest = hashlib.sha256((folder / "requirements.lock").read_bytes()).hexdigest()
    (folder / ".venv/lock-hash").write_text(f"{digest}  -\n")
    seen = tmp_path / "seen"

    def run(*args):
        seen.write_text("")
        command = ["bash", "run.sh", "--stage", "1", "--stop-stage", "1", *args]
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "SEEN": str(seen)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        seen_words = [line.split() for line in seen.read_text().splitlines()]
        steps = [words for words in seen_words if words[0] != "local/check_plan.py"]
        return begun_steps(done), steps

    run.folder = folder
    return run


def value_of(option, words):
    return words[words.index(option) + 1]


def test_run_sh_pretrains_where_it_is_asked_to(stage_one):
    args = ("--size", "smoke", "--train-teacher", "true")
    assert stage_one(*args)[0] == ["teacher-first", "teacher"]
    steps = ["teacher-pretrained-first", "teacher-pretrained", "teacher"]
    begun, (first, second, ctc) = stage_one(*args, "--pretrain-teacher", "true")
    assert begun == steps
    assert [words[0] for words in (first, ctc)] == [
        "local/pretrain_teacher.py",
        "local/train_teacher.py",
    ]
    assert value_of("--units", first) == "mfcc"
    assert value_of("--units", second) == value_of("--out_dir", first)
    pretrained = "exp/mini-smoke/teacher-pretrained"
    assert value_of("--init", ctc) == value_of("--out_dir", second) == pretrained
    for words, settings_class in ((first, Settings), (second, Settings), (ctc, CtcSettings)):
        # The conf files of each suit it, and say what they are meant to.
        settings, _ = parse(settings_class, [*words[1:]])
        assert settings.hubert.config["hidden_size"] == 32 and settings.hubert.filterbank_init
    assert settings.training.num_epochs == 1 and settings.symbols.startswith("'ABC")
    assert settings.speed_factors
    assert stage_one(*args, "--pretrain-teacher", "true")[0] == []
    conf = stage_one.folder / "conf/laptop/teacher-pretraining-second.yaml"
    conf.write_text(conf.read_text() + "max_duration: 30\n")
    assert stage_one(*args, "--pretrain-teacher", "true")[0] == steps[1:]


def test_pretraining_goes_before_what_a_recipe_begins_with(stage_one):
    args = ("--corpus", "digits", "--train-teacher", "true", "--pretrain-teacher", "true")
    begun, (*_, ctc) = stage_one(*args)
    assert begun[2:] == ["teacher"]
    assert value_of("--init", ctc) == "exp/digits-take/teacher-pretrained"


def test_published_settings_are_hubert_bases(monkeypatch, manifests, tmp_path):
    monkeypatch.chdir(ROOT)
    paths = [f"--{key}=[{paths[0]}]" for key, paths in manifests.items()]
    paths += [f"--work_dir={tmp_path}/work", f"--out_dir={tmp_path}/out"]
    names = ("teacher-model", "teacher-pretraining", "teacher-pretraining-second")
    confs = [word for name in names for word in ("--config", f"conf/{name}.yaml")]
    first, _ = parse(Settings, [*confs[:4], *paths])
    second, _ = parse(Settings, [*confs, *paths])
    assert (first.unit_labels.layer, first.unit_labels.kmeans.num_units) == (1, 100)
    assert (second.unit_labels.layer, second.unit_labels.kmeans.num_units) == (6, 500)
    assert second.prediction == PredictionSettings(0.08, 10, 256, 0.1, 0.1, 10.0)
    with torch.device("meta"):
        model = HubertModel(HubertConfig(**first.hubert.config))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(94.4e6, rel=0.01)
