"""Students that icefall has trained: transducers with the reworked Conformer, from its checkpoints.

    model, name = load_icefall(Path("exp/epoch-30.pt"), avg=10)

The files are read as plain data (`mvqkd.inert`): those of training hold objects. Sizes are those of
the weights, which have this recipe's names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from mvqkd.errors import RecipeError, reason_of
from mvqkd.files import require
from mvqkd.inert import read_inert
from mvqkd.students.conformer import ConformerSettings
from mvqkd.students.scaling import fold_scales
from mvqkd.students.transducer import Transducer, TransducerSettings, build_transducer
from mvqkd.training.checkpoint import mean_between


def load_icefall(path: Path, avg: int = 0, causal: bool | None = None) -> tuple[Transducer, str]:
    """A student without its distillation head, ready to decode, and what its weights are called.

    Args:
      path: ``pretrained.pt``, ``epoch-N.pt``, ``checkpoint-N.pt`` or a copy of one of them.
      avg: of an ``epoch-N.pt`` that holds the running average of its training, the mean over the
        last ``avg`` epochs, for which ``epoch-(N - avg).pt`` is read too; 0, or any other file:
        the weights as they are.
      causal: whether the convolutions see no frame to the right, as those of a streaming student.
        None: as the file says; ``pretrained.pt`` says nothing, which is taken for no.

    Raises:
      RecipeError: a file is missing, cannot be read, or is of another kind of model.
    """
    checkpoint = _read(path)
    weights, name = _averaged(path, checkpoint, avg)
    prefix = "module." if next(iter(weights), "").startswith("module.") else ""  # of DDP
    weights = {
        key.removeprefix(prefix): value.float()
        for key, value in weights.items()
        if not key.removeprefix(prefix).startswith("codebook_loss_net.")
    }
    if causal is None:
        causal = bool(checkpoint.get("causal_convolution", False))
    try:
        model = build_transducer(_settings(weights, checkpoint.get("feature_dim"), causal))
        model.load_state_dict(weights)
    except (KeyError, ValueError, TypeError, RuntimeError, RecipeError) as error:
        raise RecipeError(
            f"{path}: its weights are not those of a transducer with the reworked Conformer "
            f"({reason_of(error)}); take a checkpoint of pruned_transducer_stateless6, or of a "
            "recipe with its model"
        ) from error
    return fold_scales(model).eval(), name


def _read(path: Path) -> dict[str, Any]:
    return read_inert(require(path, "name a checkpoint of icefall's"))


def _averaged(path: Path, last: dict[str, Any], avg: int) -> tuple[dict[str, Tensor], str]:
    """The weights, and as what icefall's result files name them."""
    found = re.fullmatch(r"epoch-(\d+)\.pt", path.name)
    if not found:
        return last["model"], path.stem
    epoch = int(found[1])
    end = _averaged_steps(last)
    if avg == 0 or end == 0:
        return last["model"], f"epoch-{epoch}-avg-1"
    name = f"epoch-{epoch}-avg-{avg}"
    if avg >= epoch:
        return last["model_avg"], name
    before = path.with_name(f"epoch-{epoch - avg}.pt")
    require(before, f"the mean over {avg} epochs needs it: fetch it, or give decoding.avg 0")
    first = _read(before)
    begin = _averaged_steps(first)
    if begin == end:
        return last["model"], name
    if begin == 0:
        return last["model_avg"], name
    return mean_between(first["model_avg"], begin, last["model_avg"], end), name


def _averaged_steps(checkpoint: dict[str, Any]) -> int:
    """Steps whose mean ``model_avg`` is: it takes the weights once every ``average_period``."""
    period = checkpoint.get("average_period")
    if not checkpoint.get("model_avg") or not period:
        return 0
    return checkpoint.get("batch_idx_train", 0) // period * period


def _settings(
    weights: dict[str, Tensor], num_features: int | None, causal: bool
) -> TransducerSettings:
    """The sizes that the shapes of the weights tell."""
    shapes = {key: list(value.shape) for key, value in weights.items()}
    layer = "encoder.encoder.layers.0."
    channels = [shapes[f"encoder.encoder_embed.conv.{n}.weight"][0] for n in (0, 3, 6)]
    d_model, embedded = shapes["encoder.encoder_embed.out.weight"]
    if num_features is None:
        # The subsampling leaves b of 4b + 3 to 4b + 6 bins; 80, and what else is used, is 4b + 4.
        num_features = 4 * (embedded // channels[2]) + 4
    vocab_size, joiner_dim = shapes["joiner.output_linear.weight"]
    return TransducerSettings(
        ConformerSettings(
            num_features=num_features,
            d_model=d_model,
            nhead=shapes[layer + "self_attn.pos_bias_u"][0],
            dim_feedforward=shapes[layer + "feed_forward.0.weight"][0],
            num_encoder_layers=sum(key.endswith("self_attn.pos_bias_u") for key in shapes),
            cnn_module_kernel=shapes[layer + "conv_module.depthwise_conv.weight"][2],
            causal=causal,
            subsampling_channels=tuple(channels),
        ),
        decoder_dim=shapes["decoder.embedding.weight"][1],
        joiner_dim=joiner_dim,
        vocab_size=vocab_size,
        context_size=shapes.get("decoder.conv.weight", [0, 0, 1])[2],
    )
