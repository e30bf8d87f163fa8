"""HuBERT checkpoints as fairseq saves them, read without fairseq.

The file is read as plain data (`mvqkd.inert`), and its weights go into transformers' HuBERT under
its names.

    teacher = load_fairseq(Path("hubert_base_ls960.pt"), "hubert-base")
"""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path
from typing import Any

import torch
from transformers import HubertConfig, HubertForCTC

from mvqkd.errors import RecipeError, reason_of
from mvqkd.inert import read_inert
from mvqkd.teachers.hubert import HubertTeacher


def load_fairseq(path: Path, name: str) -> HubertTeacher:
    """A teacher from fairseq's checkpoint of a HuBERT, pre-trained or fine-tuned for CTC.

    The symbols of a CTC head are those of the checkpoint's dictionary, else of ``dict.ltr.txt``
    beside it; where there is neither, the head is left out.

    Raises:
      RecipeError: it cannot be read, or is another kind of model.
    """
    checkpoint = read_inert(path)
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
