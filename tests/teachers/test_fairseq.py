"""fairseq's checkpoints against fairseq's own outputs, and those of other models."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mvqkd.errors import RecipeError
from mvqkd.inert import read_inert
from mvqkd.teachers import load_teacher

GOLDEN = Path(__file__).parents[1] / "golden" / "fairseq"
NAMES = [f"hubert_{size}_tiny{head}" for size in ("base", "large") for head in ("", "_ctc")]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_fairseq_for_each_utterance_alone(name):
    teacher = load_teacher(GOLDEN / f"{name}.pt")
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = dict(file)
    assert json.loads(str(golden["meta"]))["fairseq"] == "0.12.2"
    assert (teacher.dim, teacher.num_layers) == (golden["utt0/final"].shape[1], 3)
    waveforms_BL = torch.from_numpy(golden["waveform"])
    lengths_B = torch.from_numpy(golden["lengths"])
    waveforms_BL[1, lengths_B[1] :] = 7.0  # padding may hold anything
    for utterances in ([0, 1], [1, 0], [0], [1]):
        batch = waveforms_BL[utterances][:, : lengths_B[utterances].max()], lengths_B[utterances]
        with torch.no_grad():
            layers, final_BTD, frames_B = teacher.hidden_states(*batch, [1, 2, 3])
            outputs = {f"layer{i}": x_BTD for i, x_BTD in enumerate(layers, 1)}
            outputs["final"] = final_BTD
            if name.endswith("ctc"):
                outputs["ctc_logits"], _ = teacher.ctc_logits(*batch)
                texts = [str(golden[f"utt{u}/ctc_greedy"]) for u in utterances]
                assert teacher.transcribe(*batch) == texts
        for row, utterance in enumerate(utterances):
            for output, x_BTD in outputs.items():
                expected = torch.from_numpy(golden[f"utt{utterance}/{output}"])
                found = x_BTD[row, : frames_B[row]]
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    for layer, x_BTD in enumerate(layers, 1):
        assert torch.allclose(teacher.embed(*batch, layer)[0], x_BTD, atol=1e-5)
    assert not {"fairseq", "omegaconf"} & set(sys.modules)


@pytest.mark.parametrize("name", NAMES)
def test_kept_in_the_layout_of_transformers(name, tmp_path):
    teacher = load_teacher(GOLDEN / f"{name}.pt")
    teacher.save(tmp_path)
    loaded = load_teacher(tmp_path)
    assert loaded.sha256() != teacher.sha256() == load_teacher(GOLDEN / f"{name}.pt").sha256()
    assert loaded.do_normalize == teacher.do_normalize == ("large" in name)
    assert loaded.vocabulary == teacher.vocabulary
    weights = loaded.state_dict()
    for key, value in teacher.state_dict().items():
        if "lm_head" not in key or teacher.vocabulary:
            assert torch.equal(weights[key], value)


def changed(path, change, name="hubert_base_tiny_ctc"):
    """A golden checkpoint with another cfg or other weights."""
    checkpoint = read_inert(GOLDEN / f"{name}.pt")
    change(checkpoint)
    torch.save(checkpoint, path)


def no_dictionary(checkpoint):
    del checkpoint["task_state"]


def own_dictionary(checkpoint):
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *map(chr, range(97, 125))]
    checkpoint["task_state"] = {"target_dictionary": {"symbols": symbols}}


def test_symbols_of_the_ctc_head(tmp_path, caplog):
    path = tmp_path / "a.pt"
    changed(path, no_dictionary)
    assert load_teacher(path).vocabulary is None
    assert "put fairseq's dict.ltr.txt beside it" in caplog.text
    shutil.copy(GOLDEN / "dict.ltr.txt", tmp_path)
    assert load_teacher(path).vocabulary[:6] == ["<s>", "<pad>", "</s>", "<unk>", "|", "E"]
    changed(path, own_dictionary)
    assert load_teacher(path).vocabulary[4:6] == ["a", "b"]
    (tmp_path / "dict.ltr.txt").write_text("| 1\nE 1\n")
    changed(path, no_dictionary)
    with pytest.raises(RecipeError, match=r"dict\.ltr\.txt: 6 symbols do not fit the 32 outputs"):
        load_teacher(path)


def _model(**values):
    return lambda c: c["cfg"]["model"]["w2v_args"]["model"].update(values)


DAMAGES = {
    "another model": (lambda c: c["cfg"]["model"].update(_name="wav2vec_ctc"), "is a wav2vec_ctc"),
    "no cfg": (lambda c: c.pop("cfg"), "KeyError: 'cfg'"),
    "no model": (lambda c: c.pop("model"), "KeyError: 'model'"),
    "lacks a weight": (
        lambda c: c["model"].pop("w2v_encoder.w2v_model.encoder.layers.1.fc2.bias"),
        "not those of a HuBERT",
    ),
    "another weight": (lambda c: c["model"].update(extra=torch.zeros(1)), "has a weight extra"),
    "more layers": (_model(encoder_layers=4), "not those of a HuBERT"),
    "other sizes": (_model(encoder_ffn_embed_dim=12), "not those of a HuBERT"),
    "conformer": (_model(layer_type="conformer"), "layer_type is conformer, not transformer"),
    "relu": (_model(activation_fn="relu"), "activation_fn is relu"),
    "code as layers": (_model(conv_feature_layers="__import__('os').getpid()"), "not those of"),
    "huge layers": (_model(conv_feature_layers="[(16,10,5)] * 10**9"), "not those of a HuBERT"),
    "no layers": (_model(conv_feature_layers=3), "not those of a HuBERT"),
}


@pytest.mark.parametrize("change, cause", DAMAGES.values(), ids=DAMAGES.keys())
def test_checkpoint_of_another_model(tmp_path, change, cause):
    path = tmp_path / "a.pt"
    changed(path, change)
    with pytest.raises(RecipeError) as caught:
        load_teacher(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and cause in message and "\n" not in message
