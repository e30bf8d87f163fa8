"""HuBERT checkpoints as fairseq saves them, read without fairseq.

Such a file is a zip of a pickle and of one file a tensor. A pickle is a program, so it is not
run as one: each name in it that is on the list below becomes inert data, and any other ends the
reading. The weights then go into transformers' HuBERT under its names.

    teacher = load_fairseq(Path("hubert_base_ls960.pt"), "hubert-base")
"""

from __future__ import annotations

import ast
import io
import logging
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import HubertConfig, HubertForCTC

from mvqkd.errors import RecipeError, reason_of
from mvqkd.teachers.hubert import HubertTeacher

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Objects with attributes. omegaconf's containers are resolved afterwards, the others not used.
OBJECTS = {
    ("fairseq.data.dictionary", "Dictionary"),
    ("omegaconf.dictconfig", "DictConfig"),
    ("omegaconf.listconfig", "ListConfig"),
    ("omegaconf.base", "ContainerMetadata"),
    ("omegaconf.base", "Metadata"),
    *(("omegaconf.nodes", f"{kind}Node") for kind in ("Any", "Boolean", "Float", "Integer")),
    ("omegaconf.nodes", "StringNode"),
}
# Types that stand for themselves in omegaconf's metadata.
TYPES = {
    ("typing", "Any"),
    *(("__builtin__", kind) for kind in ("bool", "dict", "float", "int", "list", "long", "str")),
    *(("builtins", kind) for kind in ("bool", "dict", "float", "int", "list", "str")),
}
TABLES = {("collections", "OrderedDict"), ("collections", "defaultdict")}
PATHS = {("pathlib", kind) for kind in ("PosixPath", "PurePosixPath", "WindowsPath", "Path")}


class _RefusedError(Exception):
    """Something in the pickle that is not on the list."""


class _Object:
    """What stands for an object of a class that is not here."""

    def __new__(cls, *args: Any) -> _Object:
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass


class _Table(dict):
    """What stands for an OrderedDict or a defaultdict; it may carry attributes."""

    def __init__(self, *args: Any) -> None:
        # A defaultdict is given what makes its values first.
        super().__init__(*(a for a in args if isinstance(a, (dict, list, tuple))))


@dataclass
class _Storage:
    dtype: torch.dtype
    key: str


@dataclass
class _Tensor:
    """A view of a storage that is not read yet."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Reader(pickle.Unpickler):
    """Builds plain data. Its stand-ins are made anew for each file, so that none can leave
    anything behind in them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._found: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key not in self._found:
            self._found[key] = self._stand_in(*key)
        return self._found[key]

    def _stand_in(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in OBJECTS or key in TYPES:
            return type(name, (_Object,), {})
        if key in TABLES:
            return type(name, (_Table,), {})
        if key in PATHS:
            return lambda *parts: "/".join(map(str, parts))
        if module == "torch" and name in STORAGES:
            return type(name, (_Object,), {"dtype": STORAGES[name]})
        if key == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _Tensor(storage, offset, size, stride)
        if key == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        raise _RefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        # ("storage", its class, key, device, number of elements)
        _, storage_class, key, *_ = pid
        return _Storage(storage_class.dtype, key)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Plain data: tables, lists, strings, numbers; tensors under ``model`` only.

    Raises:
      RecipeError: damaged, not in torch's zip format, or it holds what is not on the list.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
            prefix = pickled[: -len("data.pkl")]
            order = prefix + "byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise ValueError("its bytes are not in little-endian order")
            found = _plain(_Reader(io.BytesIO(archive.read(pickled))).load())
            weights = found["model"].items()
            found["model"] = {name: _read_tensor(archive, prefix, t) for name, t in weights}
            return found
    except _RefusedError as error:
        raise RecipeError(
            f"{path}: holds {error}, which no HuBERT checkpoint needs, and is refused; take the "
            "file from its authors, or transformers' form of it"
        ) from error
    except zipfile.BadZipFile as error:
        raise RecipeError(
            f"{path}: is no whole file in torch's zip format ({error}); fetch it again, or if it "
            "was saved before torch 1.6, load and save it with a newer one where you trust it"
        ) from error
    except Exception as error:  # a damaged pickle raises anything
        raise RecipeError(
            f"{path}: cannot be read as a fairseq checkpoint ({reason_of(error)}); fetch it again"
        ) from error


def _read_tensor(archive: zipfile.ZipFile, prefix: str, tensor: _Tensor) -> torch.Tensor:
    storage, size, stride = tensor.storage, tuple(tensor.size), tuple(tensor.stride)
    data = bytearray(archive.read(f"{prefix}data/{storage.key}"))
    if not data:
        return torch.empty(size, dtype=storage.dtype)
    flat = torch.frombuffer(data, dtype=storage.dtype)
    return flat.as_strided(size, stride, tensor.offset)


def _plain(value: Any) -> Any:
    """``value`` with omegaconf's containers, and everything else that stands for an object, as
    tables, lists and values."""
    if isinstance(value, _Object):
        attributes = vars(value)
        for content in ("_content", "_val"):
            if content in attributes:
                return _plain(attributes[content])
        return {name: _plain(v) for name, v in attributes.items()}
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, type):
        return value.__name__
    return value


def load_fairseq(path: Path, name: str) -> HubertTeacher:
    """A teacher from fairseq's checkpoint of a HuBERT, pre-trained or fine-tuned for CTC.

    The symbols of a CTC head are those of the checkpoint's dictionary, else of ``dict.ltr.txt``
    beside it; where there is neither, the head is left out.

    Raises:
      RecipeError: it cannot be read, or is another kind of model.
    """
    checkpoint = read_checkpoint(path)
    try:
        model_conf = checkpoint["cfg"]["model"]
        kind, task = model_conf["_name"], checkpoint["cfg"]["task"]
        is_fine_tuned = kind == "hubert_ctc"
        if is_fine_tuned:
            model_conf = model_conf["w2v_args"]["model"]
        if kind not in ("hubert", "hubert_ctc"):
            raise RecipeError(
                f"{path}: is a {kind} of fairseq, and only its HuBERT is read; give transformers' "
                "form of it"
            )
        weights = _renamed(checkpoint["model"])
        size = len(weights["lm_head.bias"]) if is_fine_tuned else 1
        model = HubertForCTC(_hubert_config(model_conf, size))
        if not is_fine_tuned:
            weights |= {k: v for k, v in model.state_dict().items() if k.startswith("lm_head")}
        model.load_state_dict({key: value.float() for key, value in weights.items()})
        do_normalize = bool(task["normalize"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise RecipeError(
            f"{path}: its weights and settings are not those of a HuBERT ({reason_of(error)}); "
            "fetch it again"
        ) from error
    vocabulary = _vocabulary(path, checkpoint, size) if is_fine_tuned else None
    return HubertTeacher(model, do_normalize, vocabulary, name).eval()


def _hubert_config(conf: dict[str, Any], vocab_size: int) -> HubertConfig:
    """transformers' settings for those of fairseq; what only training uses keeps its default."""
    expected = {"activation_fn": "gelu", "layer_type": "transformer", "pos_enc_type": "abs"}
    for key, value in expected.items():
        # Checkpoints older than the setting do not have it.
        if conf.get(key, value) != value:
            raise ValueError(f"{key} is {conf[key]}, not {value}")
    dims, kernels, strides = zip(*_conv_layers(conf["conv_feature_layers"]))
    return HubertConfig(
        vocab_size=vocab_size,
        # The blank. Of the others transformers would complain where the vocabulary is smaller.
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        hidden_size=conf["encoder_embed_dim"],
        num_hidden_layers=conf["encoder_layers"],
        num_attention_heads=conf["encoder_attention_heads"],
        intermediate_size=conf["encoder_ffn_embed_dim"],
        do_stable_layer_norm=conf["layer_norm_first"],
        feat_extract_norm={"default": "group", "layer_norm": "layer"}[conf["extractor_mode"]],
        conv_dim=dims,
        conv_kernel=kernels,
        conv_stride=strides,
        conv_bias=conf["conv_bias"],
        num_conv_pos_embeddings=conf["conv_pos"],
        num_conv_pos_embedding_groups=conf["conv_pos_groups"],
    )


def _conv_layers(text: str) -> list[tuple[int, int, int]]:
    """``"[(512,10,5)] + [(512,3,2)] * 4"`` as a list, by its syntax tree."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            layers, times = value(node.left), value(node.right)
            if isinstance(layers, list) and isinstance(times, int) and times < 100:
                return layers * times
            raise ValueError(f"cannot read {text}")
        return ast.literal_eval(node)

    return value(ast.parse(text, mode="eval").body)


# fairseq's names as transformers has them; what training alone uses is dropped.
RENAMES = [
    (r"^(label_embs_concat|final_proj\..*)$", None),
    (r"^proj\.", "lm_head."),
    (r"^mask_emb$", "hubert.masked_spec_embed"),
    (
        r"^feature_extractor\.conv_layers\.(\d+)\.0\.",
        r"hubert.feature_extractor.conv_layers.\1.conv.",
    ),
    (
        r"^feature_extractor\.conv_layers\.(\d+)\.2\.(?:1\.)?",
        r"hubert.feature_extractor.conv_layers.\1.layer_norm.",
    ),
    (r"^post_extract_proj\.", "hubert.feature_projection.projection."),
    (r"^layer_norm\.", "hubert.feature_projection.layer_norm."),
    (r"^encoder\.pos_conv\.0\.bias$", "hubert.encoder.pos_conv_embed.conv.bias"),
    (
        r"^encoder\.pos_conv\.0\.weight_g$",
        "hubert.encoder.pos_conv_embed.conv.parametrizations.weight.original0",
    ),
    (
        r"^encoder\.pos_conv\.0\.weight_v$",
        "hubert.encoder.pos_conv_embed.conv.parametrizations.weight.original1",
    ),
    (r"^encoder\.layer_norm\.", "hubert.encoder.layer_norm."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.", r"hubert.encoder.layers.\1.attention."),
    (r"^encoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"hubert.encoder.layers.\1.layer_norm."),
    (
        r"^encoder\.layers\.(\d+)\.fc1\.",
        r"hubert.encoder.layers.\1.feed_forward.intermediate_dense.",
    ),
    (r"^encoder\.layers\.(\d+)\.fc2\.", r"hubert.encoder.layers.\1.feed_forward.output_dense."),
    (
        r"^encoder\.layers\.(\d+)\.final_layer_norm\.",
        r"hubert.encoder.layers.\1.final_layer_norm.",
    ),
]


def _renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for key, tensor in weights.items():
        short = re.sub(r"^w2v_encoder\.(w2v_model\.)?", "", key)
        for pattern, name in RENAMES:
            if re.match(pattern, short):
                if name is not None:
                    renamed[re.sub(pattern, name, short)] = tensor
                break
        else:
            raise ValueError(f"it has a weight {key}")
    return renamed


def _vocabulary(path: Path, checkpoint: dict[str, Any], size: int) -> list[str] | None:
    """Symbols by index. fairseq's blank is its first, ``<s>``."""
    dictionary = (checkpoint.get("task_state") or {}).get("target_dictionary")
    dictionary = dictionary[0] if isinstance(dictionary, list) and dictionary else dictionary
    beside = path.with_name("dict.ltr.txt")
    if isinstance(dictionary, dict) and "symbols" in dictionary:
        source, symbols = path, dictionary["symbols"]
    elif beside.exists():
        source = beside
        lines = beside.read_text(encoding="utf-8").splitlines()
        # A symbol and how often it occurs.
        symbols = [line.rsplit(" ", 1)[0] for line in lines if line.strip()]
        symbols = ["<s>", "<pad>", "</s>", "<unk>", *symbols]
    else:
        logging.warning(
            f"{path}: does not name the symbols of its CTC head, which is left out; to verify the "
            "teacher, put fairseq's dict.ltr.txt beside it"
        )
        return None
    if len(set(symbols)) != size:
        raise RecipeError(
            f"{source}: {len(set(symbols))} symbols do not fit the {size} outputs of the CTC head; "
            "put the checkpoint's own dict.ltr.txt beside it"
        )
    return list(symbols)
