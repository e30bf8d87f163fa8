"""Checkpoints as plain data, and files that are not to be trusted."""

import collections
import io
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import zipfile

import pytest
import torch
from transformers import (
    HubertForCTC,
    Wav2Vec2ForCTC,
    WavLMForCTC,
    WhisperFeatureExtractor,
    WhisperModel,
)

from mvqkd.errors import RecipeError
from mvqkd.inert import read_inert
from mvqkd.teachers import load_teacher
from tests.conftest import ROOT

GOLDEN = ROOT / "tests/golden/fairseq"
# By model_type.
FOLDERS = {
    "hubert": HubertForCTC,
    "wav2vec2": Wav2Vec2ForCTC,
    "wavlm": WavLMForCTC,
    "whisper": WhisperModel,
}


def test_plain_data():
    checkpoint = read_inert(GOLDEN / "hubert_large_tiny_ctc.pt")
    assert checkpoint["cfg"]["model"]["_name"] == "hubert_ctc"
    assert checkpoint["cfg"]["model"]["w2v_args"]["task"]["normalize"] is True
    assert checkpoint["cfg"]["model"]["w2v_args"]["model"]["latent_temp"] == [2.0, 0.5, 0.999995]
    pretrained = read_inert(GOLDEN / "hubert_base_tiny.pt")
    assert pretrained["task_state"]["dictionaries"][0]["symbols"][3:5] == ["<unk>", "0"]

    def kinds(value):
        parts = value.values() if isinstance(value, dict) else value
        inner = (
            [k for part in parts for k in kinds(part)] if isinstance(value, (dict, list)) else []
        )
        return {type(value).__name__, *inner}

    plain = {"dict", "list", "str", "int", "float", "bool", "NoneType", "Tensor"}
    assert kinds(checkpoint) <= plain and kinds(pretrained) <= plain


def test_all_that_is_on_the_list(tmp_path):
    linear = torch.nn.Linear(3, 2)
    model = linear.state_dict()  # an OrderedDict with an attribute
    model["parameter"] = linear.weight
    model["view"] = torch.arange(24).view(2, 3, 4).transpose(0, 2)[1:]
    model["empty"] = torch.zeros(0, 3)
    kinds = ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    for kind in kinds:
        model[kind] = torch.tensor([0, 1, 1], dtype=getattr(torch, kind))
    others = collections.defaultdict(list, a=[pathlib.Path("b/c")], d=collections.OrderedDict(e=1))
    torch.save({"model": model, "others": others}, tmp_path / "a.pt")
    found = read_inert(tmp_path / "a.pt")
    assert found["others"] == {"a": ["b/c"], "d": {"e": 1}}
    assert type(found["others"]) is dict and list(found["model"]) == list(model)
    for key, value in model.items():
        assert (
            found["model"][key].dtype == value.dtype and type(found["model"][key]) is torch.Tensor
        )
        assert torch.equal(found["model"][key], value)


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


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("in_parts", [True, False])
@pytest.mark.parametrize("name, model_class", FOLDERS.items(), ids=FOLDERS)
def test_planted_code_in_a_folder_is_refused_and_not_run(
    tmp_path, name, model_class, in_parts, as_zip
):
    """In transformers' layout, of which no pickle is read by the recipe itself."""
    prey, weights = tmp_path / "made-by-the-pickle", tmp_path / "pytorch_model.bin"
    config = model_class.config_class(vocab_size=5, num_hidden_layers=1, encoder_layers=1)
    config.save_pretrained(tmp_path)
    assert f'"model_type": "{name}"' in (tmp_path / "config.json").read_text()
    if in_parts:
        index = {"metadata": {}, "weight_map": {"lm_head.bias": "pytorch_model-00001-of-00001.bin"}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        weights = tmp_path / index["weight_map"]["lm_head.bias"]
    planted = {"lm_head.bias": torch.zeros(5), "more": Call(io.open, str(prey), "w")}
    torch.save(planted, weights, _use_new_zipfile_serialization=as_zip)
    if name == "whisper":
        WhisperFeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_teacher(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: its pickled weights are refused and not run: ")
    assert " the file holds io.open, which is no weight; fetch it again" in message
    assert "\n" not in message and not prey.exists()
    # That it would have run elsewhere.
    torch.load(weights, weights_only=False)
    assert prey.exists()


def test_folder_with_a_damaged_pickle(tmp_path):
    HubertForCTC.config_class(num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(
        RecipeError, match=r"the file is damaged, or no weights; fetch it"
    ) as caught:
        load_teacher(tmp_path)
    assert "\n" not in str(caught.value)


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
        read_inert(path)
    assert load_teacher(GOLDEN / "hubert_base_tiny.pt").dim == 32


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
    torch.save({"model": {"a": torch.ones(3), "b": torch.zeros(0, 3)}}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, b"" if "/data/" in name else data)
    with pytest.raises(RecipeError, match=r"as a checkpoint .*the storage of a tensor of \[3\] is"):
        read_inert(path)
    torch.save({"model": torch.zeros(1)}, path)
    with pytest.raises(RecipeError, match="cannot be read as a checkpoint"):
        load_teacher(path)
