"""local/pretrain_teacher.py: two rounds on a dozen utterances, then CTC from what they made."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from lhotse import CutSet

from local.pretrain_teacher import Settings, main
from local.train_teacher import Settings as CtcSettings
from local.train_teacher import main as train_ctc
from mvqkd.data.labels import LabelSettings
from mvqkd.data.manifests import write_cuts
from mvqkd.errors import RecipeError
from mvqkd.teachers import load_teacher
from mvqkd.teachers.ctc import SYMBOLS, HubertSettings
from mvqkd.teachers.units import KMeansSettings, UnitSettings
from mvqkd.training.loop import TrainingSettings
from tests.conftest import ROOT, tiny_hubert

TRAINING = TrainingSettings(num_epochs=1, optimizer="adamw", lr=1e-3, log_every_steps=1)


@pytest.fixture(scope="module")
def manifests(plain_cuts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifests")
    cuts = list(plain_cuts)[:12]
    for name, part in (("train", cuts[2:]), ("dev", cuts[:2])):
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
        LabelSettings(20, 4),
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
    assert tuned.vocabulary == SYMBOLS
    for key, value in tuned.state_dict().items():
        if "lm_head" not in key:  # half precision is stored, and a rate of 0 still decays nothing
            torch.testing.assert_close(value, loaded[key], rtol=1e-3, atol=1e-3)
    made = json.loads((tmp_path / "ctc/origin.json").read_text())
    assert made["init"]["units"]["number"] == 7


def test_a_run_of_other_units_is_refused(manifests, tmp_path):
    main(settings_of(manifests, tmp_path, "first"))
    with pytest.raises(RecipeError, match=r"its units are of num_units 6, and this run's of 7"):
        main(settings_of(manifests, tmp_path, "first", num_units=7))


def test_two_processes_from_the_command_line(manifests, tmp_path):
    conf = {key: [str(path) for path in paths] for key, paths in manifests.items()} | {
        "work_dir": str(tmp_path / "training"),
        "out_dir": str(tmp_path / "first"),
        "device": "cpu",
        "max_duration": 10,
        "hubert": {"config": hubert().config},
        "unit_labels": {"kmeans": {"num_units": 5}, "labels": {"shard_size": 2}},
        "training": {"num_epochs": 1, "optimizer": "adamw"},
    }
    (tmp_path / "conf.yaml").write_text(yaml.safe_dump(conf))
    command = [sys.executable, "-m", "mvqkd.launch", "--standalone", "--nproc-per-node", "2"]
    command += ["local/pretrain_teacher.py", "--config", str(tmp_path / "conf.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    origin = json.loads((tmp_path / "first/origin.json").read_text())
    assert origin["num_processes"] == 2 and origin["units"]["number"] == 5
