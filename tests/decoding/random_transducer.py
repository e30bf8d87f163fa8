"""A small transducer with random weights whose searches have something to decide."""

from pathlib import Path
from types import SimpleNamespace

import torch

from mvqkd.data.tokens import TokenSettings, load_tokens, train_tokens
from mvqkd.students.conformer import ConformerSettings
from mvqkd.students.transducer import BLANK, Transducer, TransducerSettings, build_transducer

ENCODER_DIM, NUM_FEATURES, CONTEXT = 24, 20, 2


def random_transducer(
    seed: int = 0,
    vocab_size: int = 7,
    causal: bool = True,
    sharpness: float = 6.0,
    blank_logit: float = 1.0,
    context_size: int = CONTEXT,
) -> Transducer:
    """``sharpness`` scales the logits, ``blank_logit`` is added to that of blank.

    A new model's symbols are nearly all alike; these are neither that nor certain.
    """
    torch.manual_seed(seed)
    model = build_transducer(
        TransducerSettings(
            encoder=ConformerSettings(
                num_features=NUM_FEATURES,
                d_model=ENCODER_DIM,
                nhead=4,
                dim_feedforward=48,
                num_encoder_layers=3,
                cnn_module_kernel=7,
                causal=causal,
            ),
            decoder_dim=8,
            joiner_dim=8,
            vocab_size=vocab_size,
            context_size=context_size,
        )
    )
    output = model.joiner.output_linear
    with torch.no_grad():
        output.weight *= sharpness
        output.bias[BLANK] += blank_logit / output.bias_scale.exp()
    return model.eval()


SENTENCES = [
    "THE OLD DOCTOR WALKED TO THE HARBOUR ON MONDAY",
    "PLEASE BRING TWELVE LITTLE TICKETS TO HECTOR",
    "ANNA LOST THE BROKEN HAMMER AND THE TABLE",
]


def few_tokens(folder: Path):
    """Word pieces of a few sentences, written to ``folder``."""
    cuts = [SimpleNamespace(supervisions=[SimpleNamespace(text=text)]) for text in SENTENCES]
    train_tokens(cuts, folder, TokenSettings(vocab_size=40))
    return load_tokens(folder)
