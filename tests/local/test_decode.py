"""local/decode.py on a student with random weights."""

import json
import sys
from dataclasses import asdict

import pytest
import torch
from lhotse import CutSet

from local import decode
from mvqkd import cli
from mvqkd.data.features import FeatureSettings, compute_features
from mvqkd.students.transducer import TransducerSettings
from mvqkd.training.checkpoint import save_checkpoint
from tests.decoding.random_transducer import NUM_FEATURES, few_tokens, random_transducer


@pytest.mark.parametrize("causal", [False, True])
def test_a_checkpoint_of_icefall_as_a_student_of_our_own(plain_cuts, tmp_path, causal, monkeypatch):
    cuts, features = CutSet.from_cuts(list(plain_cuts)[:2]), FeatureSettings("fbank", NUM_FEATURES)
    manifest = tmp_path / "test-clean.jsonl.gz"
    compute_features(cuts, manifest, False, features, num_workers=1)
    tokens = few_tokens(tmp_path / "lang")
    model = random_transducer(vocab_size=len(tokens), causal=causal, sharpness=8.0)
    sizes = TransducerSettings(model.encoder.settings, 8, 8, len(tokens))
    (tmp_path / "student").mkdir()
    document = {"model": asdict(sizes), "training": {"num_epochs": 3}}
    (tmp_path / "student/settings.json").write_text(json.dumps(document))
    weights = model.state_dict()
    entries = {"model": weights, "model_avg": weights, "averaged_steps": 1}
    save_checkpoint(tmp_path / "student/epoch-3.pt", **entries)
    torch.save({"model": weights}, tmp_path / "pretrained.pt")

    def run(exp_dir, *options):
        options = [
            *("--exp_dir", str(tmp_path / exp_dir), "--tokens_dir", str(tmp_path / "lang")),
            *("--test_manifests", f"[{manifest}]", "--device", "cpu"),
            *("--decoding.method", "greedy_search", *options),
        ]
        monkeypatch.setattr(sys, "argv", ["decode.py", *options])
        cli.run(decode.main, decode.Settings)
        recogs, *_ = sorted((tmp_path / exp_dir / "greedy_search").glob("recogs-test-clean-*"))
        return recogs.name, recogs.read_text()

    own, expected = run("student")
    decoded = tmp_path / "student/decoded.json"
    alone = json.loads(decoded.read_text())
    assert "more" not in alone
    entry = alone["test_sets"]["test-clean"]
    for name, _, hyp in entry["results"]:
        of_tokens = entry["tokens"][name]
        pieces = of_tokens["text"].split()
        assert tokens.decode(pieces).split() == hyp
        assert len(of_tokens["times"]) == len(pieces) > 0
        assert entry["times"][name][0][0] <= of_tokens["times"][0] <= entry["times"][name][0][1]
        assert ("delays" in of_tokens) == causal
        assert not causal or len(of_tokens["delays"]) == len(pieces)
    checkpoint = ("--checkpoint", str(tmp_path / "pretrained.pt"), "--causal", str(causal).lower())
    name, found = run("results", *checkpoint)
    assert found == expected and "hyp=['" in found
    # Other weights stand beside the first, which stay what they were.
    more = ("--more", "[{epoch: 3, avg: 0}]")
    with pytest.raises(SystemExit):
        run("results", *checkpoint, *more)
    assert run("student", *more)[0].endswith("-epoch-3-avg-0.txt")
    both = json.loads(decoded.read_text())
    (other,) = both.pop("more")
    assert both["setting"] == alone["setting"] and both["decoding"] == alone["decoding"]
    assert (other["decoding"]["epoch"], other["decoding"]["avg"]) == (3, 0)
    assert other["setting"].endswith("-epoch-3-avg-0")
    assert other["test_sets"].keys() == both["test_sets"].keys() == {"test-clean"}
    assert own.endswith("-epoch-3-avg-10.txt") and name.endswith("-pretrained.txt")
