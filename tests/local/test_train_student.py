"""The confs of distillation, and a student trained by several terms on speech of two kinds."""

import json
from pathlib import Path

import pytest
import torch
from lhotse import CutSet

from local.train_student import Settings, main
from mvqkd import cli
from mvqkd.data.manifests import write_cuts
from mvqkd.data.tokens import TokenSettings, train_tokens
from mvqkd.decoding.decode import DecodingSettings, load_student
from mvqkd.errors import RecipeError
from mvqkd.quantizer import save_quantizer
from mvqkd.training.checkpoint import load_checkpoint
from tests.conftest import ROOT

CONFS = sorted(path.name for path in (ROOT / "conf/distillation").glob("*.yaml"))


def parsed(*args):
    paths = ["--train_manifest", "train", "--dev_manifests", "[dev]"]
    paths += ["--tokens_dir", "tokens", "--exp_dir", "exp"]
    return cli.parse(Settings, [*args, *paths])[0]


def configs(name, *folders):
    words = []
    for folder in folders:
        if (ROOT / folder / name).exists():
            words += ["--config", str(ROOT / folder / name)]
    return words


@pytest.mark.parametrize("name", CONFS)
def test_each_kind_is_one_conf(name):
    published = parsed(*configs(f"distillation/{name}", "conf")).distillation
    folders = ("conf", "conf/laptop", "egs/mini/conf/smoke")
    words = configs(f"distillation/{name}", *folders)
    small = parsed(*words, "--distillation.quantizer", "quantizer.pt").distillation
    live = parsed(*words, *configs("in-loop.yaml", "conf")).distillation
    kinds = [term.kind for term in published.terms()]
    wanted = {"none": [], "mvq+l2": ["mvq", "mvq-l2"]}
    assert kinds == wanted.get(name[: -len(".yaml")], [name[: -len(".yaml")]])
    assert kinds == [term.kind for term in small.terms()] == [term.kind for term in live.terms()]
    assert {term.layer for term in published.terms()} <= {6}
    assert {term.layer for term in small.terms()} <= {2}
    assert {term.quantizer for term in small.terms()} <= {Path("quantizer.pt")}
    assert all(term.in_loop for term in live.terms())
    assert not any(term.in_loop for term in published.terms())


def test_several_terms_with_and_without_transcripts(
    labelled_cuts, teacher, quantizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    cuts = [cut.truncate(duration=1.2) for cut in labelled_cuts]
    train_tokens(CutSet.from_cuts(labelled_cuts), Path("tokens"), TokenSettings(40))
    # One of each is too long to be trained on.
    train, more = [*cuts[:4], labelled_cuts[4]], [*cuts[4:6], labelled_cuts[6]]
    for name, part in (("train", train), ("more", more), ("dev", cuts[6:7])):
        write_cuts(CutSet.from_cuts(part), Path(f"{name}.jsonl.gz"))
    meta = {"teacher": "tiny", "layer": 2, "frame_offset": teacher.frame_offset}
    save_quantizer(
        "quantizer.pt", quantizer, {**meta, "mean": torch.zeros(32), "std": torch.ones(32)}
    )
    Path("conf.yaml").write_text(
        json.dumps(
            {
                "model": {
                    "decoder_dim": 8,
                    "joiner_dim": 8,
                    "encoder": {
                        "d_model": 16,
                        "nhead": 2,
                        "dim_feedforward": 24,
                        "num_encoder_layers": 2,
                        "cnn_module_kernel": 5,
                        "subsampling_channels": [2, 3, 4],
                    },
                },
                "data": {
                    "max_duration": 3,
                    "max_seconds": 1.2,
                    "spec_augment": {"time_warp_factor": 10},
                },
                "distillation": {
                    "kind": "mvq",
                    "layer": 2,
                    "quantizer": "quantizer.pt",
                    "more": [{"kind": "mvq-l2", "layer": 1, "scale": 2.0}],
                },
                "training": {"num_epochs": 1, "warmup_steps": 2, "log_every_steps": 1},
            }
        )
    )
    words = ["--config", "conf.yaml", "--train_manifest", "train.jsonl.gz", "--device", "cpu"]
    words += ["--untranscribed_manifests", "[more.jsonl.gz]", "--dev_manifests", "[dev.jsonl.gz]"]
    words += ["--tokens_dir", "tokens", "--exp_dir", "exp"]
    both = cli.parse(Settings, [*words, "--data.max_untranscribed", "2"])[0]
    both.untranscribed_manifests = []
    with pytest.raises(RecipeError, match="max_untranscribed: every training utterance has a tra"):
        main(both)
    main(cli.parse(Settings, words)[0])
    assert json.loads(Path("exp/settings.json").read_text())["longest_utterances"] == 1.2
    log = [json.loads(line) for line in Path("exp/log.jsonl").read_text().splitlines()]
    figures = {name for entry in log if entry["kind"] == "train" for name in entry}
    assert {"1-mvq-distillation", "1-mvq-accuracy-3", "2-mvq-l2-distillation"} <= figures
    weights = load_checkpoint(Path("exp/epoch-1.pt"))["model"]
    heads = {name for name in weights if name.startswith("codebook_loss_net.")}
    assert heads == {
        "codebook_loss_net.0.linear2b_weight",
        "codebook_loss_net.0.linear2_bias",
        "codebook_loss_net.1.linear.weight",
        "codebook_loss_net.1.linear.bias",
    }
    student, _ = load_student(Path("exp"), DecodingSettings(avg=1))
    assert student.codebook_loss_net is None
