"""Checkpoints as icefall writes them, of the published recipe's weights."""

import os
import pathlib
import sys
import types
from collections import Counter

import pytest
import torch
from lhotse import CutSet
from lhotse.dataset import DynamicBucketingSampler, SimpleCutSampler
from lhotse.testing.dummies import DummyManifest

from mvqkd.errors import RecipeError
from mvqkd.inert import read_inert
from mvqkd.students.icefall import load_icefall
from mvqkd.training.optim import Eden, Eve
from tests.students.test_transducer import (
    CONFIG,
    GOLDEN,
    META,
    assert_near,
    compute_losses,
    golden,
    make_model,
)
from tests.test_inert import Call


def golden_weights():
    return {k.removeprefix("init/"): golden(k) for k in GOLDEN.files if k.startswith("init/")}


def shifted(weights, by):
    return {k: v + by if v.is_floating_point() else v for k, v in weights.items()}


def sampler_states():
    cuts = DummyManifest(CutSet, begin_id=0, end_id=40)
    for sampler in (
        SimpleCutSampler(cuts, max_duration=4.0, shuffle=True),
        DynamicBucketingSampler(cuts, max_duration=4.0, num_buckets=2, shuffle=True),
    ):
        for number, _ in enumerate(sampler):
            if number == 2:
                break
        yield sampler.state_dict()


@pytest.fixture
def in_training(monkeypatch):
    """What icefall's training saves beside the weights, some of it objects."""

    class AttributeDict(dict):
        __module__, __qualname__ = "icefall.utils", "AttributeDict"

    utils = types.ModuleType("icefall.utils")
    utils.AttributeDict = AttributeDict
    monkeypatch.setitem(sys.modules, "icefall", types.ModuleType("icefall"))
    monkeypatch.setitem(sys.modules, "icefall.utils", utils)
    model = make_model(0.0).train()
    optimizer = Eve(model.parameters(), lr=0.003)
    scheduler = Eden(optimizer, 5000, 6)
    compute_losses(model)[0].sum().backward()
    optimizer.step()
    bucketing, simple = sampler_states()
    return {
        "optimizer": optimizer.state_dict(),
        "scheduler": {k: v for k, v in vars(scheduler).items() if k != "optimizer"},
        "grad_scaler": torch.amp.GradScaler("cpu").state_dict(),
        "sampler": {"bucketing": bucketing, "simple": simple},
        "env_info": {
            "torch-version": torch.__version__,
            "k2-with-cuda": True,
            "icefall-path": pathlib.Path("/somewhere/icefall"),
        },
        "exp_dir": pathlib.Path("pruned_transducer_stateless6/exp"),
        "device": torch.device("cuda", 0),
        "dtype": torch.float16,
        "size": torch.Size([3, 2]),
        "seen": Counter("abb"),
        "params": AttributeDict(blank_id=0, exp_dir=pathlib.PurePosixPath("exp")),
        "feature_dim": CONFIG["num_features"],
        "best_train_loss": float("inf"),
        "average_period": 100,
    }


def check_equals_golden(model):
    with torch.no_grad():
        encoder_out, lengths, _ = model.encoder(golden("x"), golden("x_lens"))
        decoder_out = model.decoder(torch.tensor([[0, *META["tokens"][0]]]))
        joiner_out = model.joiner(encoder_out[:1, :3].unsqueeze(2), decoder_out[:, None, :1])
    assert lengths.tolist() == golden("eval/lengths").tolist()
    assert_near(encoder_out, golden("eval/encoder_out"), 1e-4)
    assert_near(decoder_out, golden("eval/decoder_out"), 1e-4)
    assert_near(joiner_out, golden("eval/joiner_out"), 1e-4)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_pretrained(tmp_path, prefix):
    weights = {prefix + name: value for name, value in golden_weights().items()}
    torch.save({"model": weights}, tmp_path / "pretrained.pt")
    model, name = load_icefall(tmp_path / "pretrained.pt", avg=10)
    assert name == "pretrained" and model.codebook_loss_net is None and not model.training
    assert not model.encoder.settings.causal
    check_equals_golden(model)
    assert load_icefall(tmp_path / "pretrained.pt", causal=True)[0].encoder.settings.causal


def test_epochs_with_all_that_training_holds(tmp_path, in_training):
    weights = golden_weights()
    # The mean over steps 201 to 500 is golden; the running average has seen 100, 200 ... of them.
    averages = {1: shifted(weights, 0.5), 2: shifted(weights, 0.2)}
    for epoch, steps in ((1, 250), (2, 520)):
        saved = {
            "model": weights if epoch == 2 else averages[1],
            "model_avg": averages[epoch],
            **in_training,
            "batch_idx_train": steps,
        }
        torch.save(saved, tmp_path / f"epoch-{epoch}.pt")
    for avg in (0, 1):
        model, name = load_icefall(tmp_path / "epoch-2.pt", avg)
        assert name == "epoch-2-avg-1"
        check_equals_golden(model)
    model, name = load_icefall(tmp_path / "epoch-2.pt", 10)
    assert name == "epoch-2-avg-10"
    assert torch.equal(model.decoder.embedding.scale, torch.zeros(()))  # folded
    scaled = averages[2]["decoder.embedding.weight"] * averages[2]["decoder.embedding.scale"].exp()
    torch.testing.assert_close(model.decoder.embedding.weight, scaled)

    found = read_inert(tmp_path / "epoch-2.pt")
    assert found["env_info"]["torch-version"] == str(torch.__version__)
    assert type(found["env_info"]["torch-version"]) is str
    assert found["env_info"]["icefall-path"] == "/somewhere/icefall"
    assert (found["device"], found["dtype"], found["size"]) == ("cuda:0", "float16", [3, 2])
    assert found["params"] == {"blank_id": 0, "exp_dir": "exp"} and found["seen"] == {
        "a": 1,
        "b": 2,
    }
    assert found["optimizer"]["param_groups"][0]["lr"] == 0.003
    assert found["sampler"]["simple"].keys() == in_training["sampler"]["simple"].keys()
    for name, value in averages[2].items():
        assert torch.equal(found["model_avg"][name], value)

    (tmp_path / "epoch-1.pt").unlink()
    with pytest.raises(RecipeError, match=r"epoch-1\.pt: no such file.*give decoding\.avg 0"):
        load_icefall(tmp_path / "epoch-2.pt", 1)
    # Without a running average, as the first of icefall's had none, and not an epoch's.
    torch.save({"model": weights, "batch_idx_train": 520}, tmp_path / "epoch-2.pt")
    assert load_icefall(tmp_path / "epoch-2.pt", 1)[1] == "epoch-2-avg-1"
    (tmp_path / "epoch-2.pt").rename(tmp_path / "best-valid-loss.pt")
    assert load_icefall(tmp_path / "best-valid-loss.pt", 1)[1] == "best-valid-loss"


def test_streaming_student_says_so(tmp_path):
    saved = {"model": golden_weights(), "causal_convolution": True, "feature_dim": 20}
    torch.save(saved, tmp_path / "epoch-9.pt")
    assert load_icefall(tmp_path / "epoch-9.pt")[0].encoder.settings.causal
    assert not load_icefall(tmp_path / "epoch-9.pt", causal=False)[0].encoder.settings.causal


def test_planted_code_is_refused_and_not_run(tmp_path, in_training):
    prey = tmp_path / "made-by-the-pickle"
    harm = Call(os.system, f"touch {prey}")
    for place in ("sampler", "env_info", "model_avg", "optimizer"):
        path = tmp_path / f"{place}.pt"
        torch.save({"model": golden_weights(), **in_training, place: {"a": harm}}, path)
        with pytest.raises(RecipeError, match=r"\.pt: holds \w+\.system, .* is refused") as caught:
            load_icefall(path)
        assert "\n" not in str(caught.value) and not prey.exists()
    torch.load(path, weights_only=False)  # that it would have run elsewhere
    assert prey.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("joiner.output_linear.bias"), "RuntimeError"),
        (lambda weights: weights.pop("encoder.encoder_embed.out.weight"), "KeyError"),
        (lambda weights: weights.update(more=torch.zeros(1)), "RuntimeError"),
        (lambda weights: weights.clear(), "KeyError"),
    ],
)
def test_other_models_are_refused(tmp_path, change, message):
    weights = golden_weights()
    change(weights)
    torch.save({"model": weights}, tmp_path / "a.pt")
    with pytest.raises(
        RecipeError, match=rf"a\.pt: its weights are not those.*\({message}"
    ) as caught:
        load_icefall(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=r"b\.pt: no such file"):
        load_icefall(tmp_path / "b.pt")
