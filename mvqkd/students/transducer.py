"""The transducer: encoder, stateless predictor, joiner, and its pruned loss.

Predictor: Ghodsi et al. 2020 ("RNN-transducer with stateless prediction network"). Pruned loss:
Kuang et al. 2022 (arXiv 2206.13236). Parameter names are those of icefall's
``pruned_transducer_stateless6``.

Shapes: B utterances, T encoder frames, S tokens, U token positions (S + 1), R pruned positions,
C encoder channels, E predictor channels, J joiner channels, V tokens with blank 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvqkd.errors import RecipeError
from mvqkd.losses.rnnt import (
    do_rnnt_pruning,
    get_rnnt_prune_ranges,
    rnnt_loss_pruned,
    rnnt_loss_smoothed,
)
from mvqkd.students.conformer import Conformer, ConformerSettings
from mvqkd.students.scaling import ScaledConv1d, ScaledEmbedding, ScaledLinear

BLANK = 0


@dataclass
class TransducerSettings:
    """Sizes of a :class:`Transducer` and of its pruned loss; defaults as published."""

    encoder: ConformerSettings = field(default_factory=ConformerSettings)
    decoder_dim: int = 512
    joiner_dim: int = 512
    # Tokens, blank included.
    vocab_size: int = 500
    # Tokens that the predictor sees.
    context_size: int = 2
    # Token positions per frame that the pruned loss considers.
    prune_range: int = 5
    # Shares of an acoustic-only and of a language-only score in the simple loss.
    am_scale: float = 0.0
    lm_scale: float = 0.25

    def __post_init__(self):
        if self.vocab_size < 2:
            raise RecipeError(f"vocab_size: {self.vocab_size} is too few; blank needs company")
        if self.context_size < 1:
            raise RecipeError(f"context_size: {self.context_size} is too few; set at least 1")
        if self.prune_range < 2:
            raise RecipeError(f"prune_range: {self.prune_range} is too few; set at least 2")


class Decoder(nn.Module):
    """Stateless predictor: the embeddings of the last tokens, convolved per channel, and a ReLU."""

    def __init__(self, vocab_size: int, decoder_dim: int, context_size: int, blank_id: int = BLANK):
        super().__init__()
        self.vocab_size = vocab_size
        self.blank_id = blank_id
        self.context_size = context_size
        self.embedding = ScaledEmbedding(vocab_size, decoder_dim)
        # As published, one token of context needs no convolution.
        if context_size > 1:
            self.conv = ScaledConv1d(
                decoder_dim, decoder_dim, context_size, groups=decoder_dim, bias=False
            )

    def forward(self, tokens_BU: Tensor, need_pad: bool = True) -> Tensor:
        """(B, U) int64 tokens -> (B, U, E).

        With ``need_pad`` position u sees tokens up to u, zero vectors before the first.
        Without, the input holds the context too: (B, U + context_size - 1).
        """
        x = self.embedding(tokens_BU)
        if self.context_size > 1:
            if need_pad:
                x = F.pad(x, (0, 0, self.context_size - 1, 0))
            num_positions = x.size(1) - self.context_size + 1
            weight_EK = self.conv.scaled_weight().squeeze(1)
            # A sum of shifted frames: faster than a grouped convolution for two or three of them.
            x = sum(x[:, k : k + num_positions] * weight_EK[:, k] for k in range(self.context_size))
        return F.relu(x)


class Joiner(nn.Module):
    """Projects encoder and predictor output, adds them, tanh, projects to the vocabulary."""

    def __init__(self, encoder_dim: int, decoder_dim: int, joiner_dim: int, vocab_size: int):
        super().__init__()
        self.encoder_proj = ScaledLinear(encoder_dim, joiner_dim)
        self.decoder_proj = ScaledLinear(decoder_dim, joiner_dim)
        self.output_linear = ScaledLinear(joiner_dim, vocab_size)

    def forward(self, encoder_out: Tensor, decoder_out: Tensor, project_input: bool = True):
        """(..., C) and (..., E), or both (..., J) without ``project_input``, -> (..., V)."""
        if project_input:
            encoder_out = self.encoder_proj(encoder_out)
            decoder_out = self.decoder_proj(decoder_out)
        return self.output_linear(torch.tanh(encoder_out + decoder_out))


class TransducerOutput(NamedTuple):
    """What :meth:`Transducer.forward` returns; losses are per utterance, in nats."""

    simple_loss_B: Tensor
    pruned_loss_B: Tensor
    encoder_out_BTC: Tensor
    encoder_lens_B: Tensor
    middle_outputs: list[Tensor]


class Transducer(nn.Module):
    """Encoder, predictor and joiner with the two losses of pruned training.

    ``codebook_loss_net``, None at first, holds the head (or heads) that learns from a teacher
    where the caller sets one; it is not needed to decode.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: Decoder,
        joiner: Joiner,
        encoder_dim: int,
        decoder_dim: int,
        vocab_size: int,
    ):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.joiner = joiner
        self.simple_am_proj = ScaledLinear(encoder_dim, vocab_size, initial_speed=0.5)
        self.simple_lm_proj = ScaledLinear(decoder_dim, vocab_size)
        self.codebook_loss_net: nn.Module | None = None

    def forward(
        self,
        x_BTF: Tensor,
        x_lens_B: Tensor,
        y: Sequence[Sequence[int] | None],
        prune_range: int = 5,
        am_scale: float = 0.0,
        lm_scale: float = 0.25,
        warmup: float = 1.0,
    ) -> TransducerOutput:
        """Simple and pruned loss of each utterance.

        Args:
          x_BTF, x_lens_B: features and their lengths, see :class:`Conformer`.
          y: the tokens of each utterance, without blank; None: not known, its losses are 0.
          prune_range: token positions per frame in the pruned loss.
          am_scale, lm_scale: smoothing of the simple loss, by its acoustic and language part.
          warmup: passed to the encoder; the weights of the losses are the caller's.
        """
        encoder_out_BTC, lens_B, middle_outputs = self.encoder(x_BTF, x_lens_B, warmup=warmup)
        simple_loss_B, pruned_loss_B = self.losses(
            encoder_out_BTC, lens_B, y, prune_range, am_scale, lm_scale
        )
        return TransducerOutput(
            simple_loss_B, pruned_loss_B, encoder_out_BTC, lens_B, middle_outputs
        )

    def losses(
        self,
        encoder_out_BTC: Tensor,
        encoder_lens_B: Tensor,
        y: Sequence[Sequence[int] | None],
        prune_range: int = 5,
        am_scale: float = 0.0,
        lm_scale: float = 0.25,
    ) -> tuple[Tensor, Tensor]:
        """(simple, pruned) loss per utterance, (B,) each, of an encoder's output.

        An utterance whose tokens are None has losses of 0. Where that is each of them, the
        parameters that these losses use still get a gradient, of 0.
        """
        device = encoder_out_BTC.device
        known = [b for b, tokens in enumerate(y) if tokens is not None]
        if not known:
            projections = self.simple_am_proj, self.simple_lm_proj
            simple_zero = self._zero(self.encoder, self.decoder, *projections)
            return simple_zero.expand(len(y)), self._zero(self.joiner).expand(len(y))
        if len(known) < len(y):
            rows = torch.tensor(known, device=device)
            of_known = self.losses(
                encoder_out_BTC[rows],
                encoder_lens_B[rows],
                [y[b] for b in known],
                prune_range,
                am_scale,
                lm_scale,
            )
            simple_loss_B, pruned_loss_B = (
                loss.new_zeros(len(y)).index_copy(0, rows, loss) for loss in of_known
            )
            return simple_loss_B, pruned_loss_B
        y_lens_B = torch.tensor([len(tokens) for tokens in y], dtype=torch.int64)
        symbols_BS = torch.full((len(y), int(y_lens_B.max())), BLANK, dtype=torch.int64)
        for row, tokens in zip(symbols_BS, y):
            row[: len(tokens)] = torch.as_tensor(tokens, dtype=torch.int64)
        symbols_BS = symbols_BS.to(device)
        boundary_B4 = torch.zeros(len(y), 4, dtype=torch.int64, device=device)
        boundary_B4[:, 2] = y_lens_B.to(device)
        boundary_B4[:, 3] = encoder_lens_B.to(device)

        # The predictor starts from blank, as decoding does.
        decoder_out_BUE = self.decoder(F.pad(symbols_BS, (1, 0), value=BLANK))

        # The recursion adds up hundreds of log-probabilities: float32 whatever the autocast type.
        with torch.autocast(device.type, enabled=False):
            simple_loss_B, (px_grad, py_grad) = rnnt_loss_smoothed(
                lm=self.simple_lm_proj(decoder_out_BUE.float()),
                am=self.simple_am_proj(encoder_out_BTC.float()),
                symbols=symbols_BS,
                termination_symbol=BLANK,
                lm_only_scale=lm_scale,
                am_only_scale=am_scale,
                boundary=boundary_B4,
                reduction="none",
                return_grad=True,
            )
        # A batch of few tokens has no more positions than these.
        s_range = min(prune_range, symbols_BS.size(1) + 1)
        ranges_BTR = get_rnnt_prune_ranges(
            px_grad=px_grad, py_grad=py_grad, boundary=boundary_B4, s_range=s_range
        )
        am_BTRJ, lm_BTRJ = do_rnnt_pruning(
            am=self.joiner.encoder_proj(encoder_out_BTC),
            lm=self.joiner.decoder_proj(decoder_out_BUE),
            ranges=ranges_BTR,
        )
        logits_BTRV = self.joiner(am_BTRJ, lm_BTRJ, project_input=False)
        with torch.autocast(device.type, enabled=False):
            pruned_loss_B = rnnt_loss_pruned(
                logits=logits_BTRV.float(),
                symbols=symbols_BS,
                ranges=ranges_BTR,
                termination_symbol=BLANK,
                boundary=boundary_B4,
                reduction="none",
            )
        return simple_loss_B, pruned_loss_B

    @staticmethod
    def _zero(*modules: nn.Module) -> Tensor:
        """0, with a gradient of 0 for the parameters of ``modules``, for less than a backward
        pass."""
        return sum(0.0 * p.float().sum() for module in modules for p in module.parameters())


def build_transducer(settings: TransducerSettings) -> Transducer:
    """A transducer with a Conformer encoder, freshly initialised from torch's generator."""
    encoder_dim = settings.encoder.d_model
    return Transducer(
        encoder=Conformer(settings.encoder),
        decoder=Decoder(settings.vocab_size, settings.decoder_dim, settings.context_size),
        joiner=Joiner(encoder_dim, settings.decoder_dim, settings.joiner_dim, settings.vocab_size),
        encoder_dim=encoder_dim,
        decoder_dim=settings.decoder_dim,
        vocab_size=settings.vocab_size,
    )
