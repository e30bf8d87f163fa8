"""fairseq's checkpoints against fairseq's own outputs, and files that are not to be trusted."""

import collections
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mvqkd.errors import RecipeError
from mvqkd.teachers import load_teacher
from mvqkd.teachers.fairseq import read_checkpoint

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
    assert loaded.do_normalize == teacher.do_normalize == ("large" in name)
    assert loaded.vocabulary == teacher.vocabulary
    weights = loaded.state_dict()
    for key, value in teacher.state_dict().items():
        if "lm_head" not in key or teacher.vocabulary:
            assert torch.equal(weights[key], value)


def test_plain_data():
    checkpoint = read_checkpoint(GOLDEN / "hubert_large_tiny_ctc.pt")
    assert checkpoint["cfg"]["model"]["_name"] == "hubert_ctc"
    assert checkpoint["cfg"]["model"]["w2v_args"]["task"]["normalize"] is True
    assert checkpoint["cfg"]["model"]["w2v_args"]["model"]["latent_temp"] == [2.0, 0.5, 0.999995]
    pretrained = read_checkpoint(GOLDEN / "hubert_base_tiny.pt")
    assert pretrained["task_state"]["dictionaries"][0]["symbols"][3:5] == ["<unk>", "0"]

    def kinds(value):
        parts = value.values() if isinstance(value, dict) else value
        inner = (
            [k for part in parts for k in kinds(part)] if isinstance(value, (dict, list)) else []
        )
        return {type(value).__name__, *inner}

    plain = {"dict", "list", "str", "int", "float", "bool", "NoneType", "Tensor"}
    assert kinds(checkpoint) <= plain and kinds(pretrained) <= plain


def planted(path, value, protocol=2):
    """A checkpoint with ``value`` in its extra state, as torch writes it."""
    buffer = io.BytesIO()
    pickle.Pickler(buffer, protocol).dump({"cfg": {}, "model": {}, "extra_state": value})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("planted/data.pkl", buffer.getvalue())
        archive.writestr("planted/version", "3\n")


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_planted_code_is_refused_and_not_run(tmp_path):
    prey = tmp_path / "made-by-the-pickle"
    code = f"open({str(prey)!r}, 'w')"
    calls = {
        f"{os.system.__module__}.system": Call(os.system, f"touch {prey}"),
        "builtins.eval": Call(eval, code),
        "builtins.exec": Call(exec, code),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(prey)]),
        "io.open": Call(io.open, str(prey), "w"),
        "builtins.getattr": Call(getattr, collections.OrderedDict, "clear"),
        "shutil.rmtree": Call(shutil.rmtree, str(tmp_path)),
        "torch.storage._load_from_bytes": Call(torch.storage._load_from_bytes, b""),
    }
    path = tmp_path / "planted.pt"
    for name, call in calls.items():
        for protocol in (2, 4):
            planted(path, [call], protocol)
            with pytest.raises(RecipeError, match="and is refused") as caught:
                load_teacher(path)
            # Protocol 2 has the names of Python 2.
            assert protocol == 2 or f"holds {name}," in str(caught.value)
            assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
            assert not prey.exists()
    # That it would have run elsewhere.
    planted(path, calls["io.open"])
    with zipfile.ZipFile(path) as archive:
        pickle.loads(archive.read("planted/data.pkl"))
    assert prey.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"\x80\x04\x8c\x0bcollections\x8c\x19OrderedDict.__init__.x\x93.",  # a path of attributes
        b"\x80\x02\x82\x01.",  # copyreg's extensions
        b"\x80\x02cbuiltins\nopen\n.",
        b"\x80\x02(iposix\nsystem\n.",
        b"\x80\x02]" * 3000 + b".",
        b"",
        b"not a pickle",
    ],
)
def test_pickle_that_is_made_by_hand(tmp_path, opcodes):
    path = tmp_path / "planted.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("planted/data.pkl", opcodes)
    with pytest.raises(RecipeError) as caught:
        load_teacher(path)
    assert "\n" not in str(caught.value)


def test_stand_ins_of_one_file_are_not_those_of_the_next(tmp_path):
    """A pickle may set attributes of a class that it names."""
    state = b"(N}\x8c\x05dtypeK\x01stb"
    path = tmp_path / "planted.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("planted/data.pkl", b"\x80\x04ctorch\nFloatStorage\n" + state + b".")
    with pytest.raises(RecipeError):
        read_checkpoint(path)
    assert load_teacher(GOLDEN / "hubert_base_tiny.pt").dim == 32


def changed(path, change, name="hubert_base_tiny_ctc"):
    """A golden checkpoint with another cfg or other weights."""
    checkpoint = read_checkpoint(GOLDEN / f"{name}.pt")
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


def test_damaged_file(tmp_path):
    whole = (GOLDEN / "hubert_base_tiny.pt").read_bytes()
    path = tmp_path / "a.pt"
    for damaged in (whole[:9000], whole[:-200], b"", pickle.dumps({"model": 1})):
        path.write_bytes(damaged)
        with pytest.raises(RecipeError, match="is no whole file in torch's zip format"):
            load_teacher(path)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    path.write_bytes(flipped)
    with pytest.raises(RecipeError, match=r"is no whole file.* CRC"):
        load_teacher(path)
    torch.save({"model": torch.zeros(1)}, path)
    with pytest.raises(RecipeError, match="cannot be read as a fairseq checkpoint"):
        load_teacher(path)
