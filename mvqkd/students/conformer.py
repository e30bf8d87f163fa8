"""The reworked Conformer encoder, whole utterances and streams.

Gulati et al. 2020 (arXiv 2005.08100) with the relative positions of Transformer-XL (arXiv
1901.02860, appendix B) and the changes of the published recipe (icefall,
``pruned_transducer_stateless6``): learned scales instead of layer norm, whole residuals, a
layer-wise warm-up. Parameter names are the recipe's.

Shapes: B utterances, T output frames (25 Hz), S key frames (cached ones first), F feature bins,
C channels (``d_model``), H heads, D channels per head, P relative positions, K kernel width,
L cached frames, c queries of a block, N = H * B. Feature frames are those of 10 ms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvqkd.errors import RecipeError
from mvqkd.students.scaling import (
    ActivationBalancer,
    BasicNorm,
    DoubleSwish,
    Dropout,
    ScaledConv1d,
    ScaledConv2d,
    ScaledLinear,
)


@dataclass
class ConformerSettings:
    """Sizes of a :class:`Conformer`; the defaults are the published 960 h student's."""

    # Mel bins of a feature frame.
    num_features: int = 80
    # Feature frames per output frame; the two strided convolutions fix it.
    subsampling_factor: int = 4
    d_model: int = 512
    nhead: int = 8
    dim_feedforward: int = 2048
    num_encoder_layers: int = 12
    dropout: float = 0.1
    # Probability with which a layer is nearly bypassed in training.
    layer_dropout: float = 0.075
    cnn_module_kernel: int = 31
    # Layers, counted from 1, whose outputs `forward` returns beside the last one's.
    middle_output_layers: list[int] = field(default_factory=list)
    # Streaming: draw a chunk size per training batch; needs `causal`.
    dynamic_chunk_training: bool = False
    # A drawn chunk size above this share of the longest utterance means full context ...
    short_chunk_threshold: float = 0.75
    # ... and any other is taken modulo this many frames, plus 1.
    short_chunk_size: int = 25
    # Chunks to the left that attention sees in training; -1: all.
    num_left_chunks: int = -1
    # Convolutions that see no frame to the right.
    causal: bool = False
    # Channels of the three subsampling convolutions; smaller ones make small students cheaper.
    subsampling_channels: tuple[int, int, int] = (8, 32, 128)

    def __post_init__(self):
        self.subsampling_channels = tuple(self.subsampling_channels)
        if self.subsampling_factor != 4:
            raise RecipeError(
                f"subsampling_factor: {self.subsampling_factor} is not supported; set it to 4"
            )
        if self.d_model % self.nhead or self.d_model % 2:
            raise RecipeError(
                f"d_model: {self.d_model} is odd or no multiple of nhead {self.nhead}; change one"
            )
        if not self.causal and self.cnn_module_kernel % 2 == 0:
            raise RecipeError(
                f"cnn_module_kernel: {self.cnn_module_kernel} is even; set an odd number"
            )
        if self.dynamic_chunk_training and not self.causal:
            raise RecipeError("dynamic_chunk_training: needs causal convolutions; set causal: true")
        for layer in self.middle_output_layers:
            if not 1 <= layer <= self.num_encoder_layers:
                raise RecipeError(
                    f"middle_output_layers: {layer} is no layer; choose 1 to "
                    f"{self.num_encoder_layers}"
                )
        if self.num_features < 7:
            raise RecipeError(f"num_features: {self.num_features} is too few; set at least 7")


def subsampled_lengths(lengths: Tensor | int) -> Tensor | int:
    """Output frames for a number of feature frames: ((T - 1) // 2 - 1) // 2."""
    return ((lengths - 1) // 2 - 1) // 2


def padding_mask(lengths_B: Tensor, size: int) -> Tensor:
    """(B, size), true where a frame lies beyond its utterance."""
    return torch.arange(size, device=lengths_B.device) >= lengths_B.unsqueeze(1)


def chunk_mask(size: int, chunk_size: int, num_left_chunks: int, device=None) -> Tensor:
    """(size, size), true where query frame i (row) may not see key frame j (column).

    A frame sees its own chunk of ``chunk_size`` frames and ``num_left_chunks`` chunks to the
    left (-1: all).
    """
    chunk = torch.arange(size, device=device) // chunk_size
    ahead = chunk.unsqueeze(0) - chunk.unsqueeze(1)
    mask = ahead > 0
    if num_left_chunks >= 0:
        mask |= ahead < -num_left_chunks
    return mask


class _AttentionMask:
    """What the keys of each query are: an additive bias, shared by all layers.

    ``masked`` is true where a key may not be seen, broadcastable to (B, T, S), or None.
    """

    def __init__(self, masked: Tensor | None, dtype: torch.dtype):
        self.bias = None
        self.empty_rows = None
        if masked is not None:
            # A padded query may see padding only. Softmax over no key is NaN, in its gradient
            # too, so such a row is opened here and its weights are set to 0 afterwards. Key
            # padding alone (one row for all queries) always leaves a frame.
            if masked.shape[-2] > 1:
                self.empty_rows = masked.all(dim=-1, keepdim=True)
                masked = masked & ~self.empty_rows
            self.bias = torch.zeros(masked.shape, dtype=dtype, device=masked.device)
            self.bias.masked_fill_(masked, float("-inf"))

    def softmax_(self, scores_HBTS: Tensor, rows: slice) -> Tensor:
        """Attention weights of the queries ``rows``, in place of ``scores_HBTS``."""
        if self.bias is not None:
            scores_HBTS += self.bias if self.bias.size(-2) == 1 else self.bias[..., rows, :]
        weights = torch.softmax(scores_HBTS, dim=-1, out=scores_HBTS)
        if self.empty_rows is not None:
            weights.masked_fill_(self.empty_rows[..., rows, :], 0.0)
        return weights

    def softmax(self, scores_HBTS: Tensor) -> Tensor:
        """Attention weights of all queries."""
        if self.bias is not None:
            scores_HBTS = scores_HBTS + self.bias
        weights = scores_HBTS.softmax(dim=-1)
        if self.empty_rows is not None:
            weights = weights.masked_fill(self.empty_rows, 0.0)
        return weights


class RelPositionalEncoding(nn.Module):
    """Sinusoids of the distance between query and key, and the dropout of encoder inputs."""

    def __init__(self, d_model: int, dropout: float):
        super().__init__()
        self.d_model = d_model
        self.dropout = Dropout(dropout)
        self.cached_PC = torch.empty(0, d_model)

    def forward(self, num_queries: int, num_keys: int, like: Tensor) -> Tensor:
        """(P, C) for distances num_keys - 1 down to -(num_queries - 1), P their number.

        The last query is taken to be at the last key's position; the distance is positive where
        the key lies to the left.
        """
        # The table runs from a distance of half - 1 down to 1 - half.
        half = (self.cached_PC.size(0) + 1) // 2
        if half < num_keys or self.cached_PC.device != like.device:
            half = max(num_keys, 2 * half)
            distance = torch.arange(half - 1, -half, -1, dtype=torch.float32).unsqueeze(1)
            rate = torch.exp(
                torch.arange(0, self.d_model, 2, dtype=torch.float32)
                * -(math.log(10000.0) / self.d_model)
            )
            table = torch.stack([(distance * rate).sin(), (distance * rate).cos()], dim=2)
            self.cached_PC = table.flatten(1).to(like.device)
        window = self.cached_PC[half - num_keys : half + num_queries - 1]
        return self.dropout(window.to(like.dtype))


def _shift_to_keys(scores: Tensor, num_keys: int) -> Tensor:
    """(N, T, P) scores by distance -> (N, T, S) scores by key, a view.

    Column m of ``scores`` is the distance S - 1 - m; for query i (at position S - T + i) and key
    j that is m = j + T - 1 - i, so each row of the view starts one column further left.
    """
    n, t, p = scores.shape
    return scores.as_strided((n, t, num_keys), (t * p, p - 1, 1), scores.storage_offset() + t - 1)


class _AttentionFunction(torch.autograd.Function):
    """What :class:`RelPositionMultiheadAttention` does between its projections, on a CPU.

    A query needs S of the S + T - 1 distances. A block of c queries is scored for S + c - 1 of
    them, and its scores are still in the cache when they become weights. Each step writes where
    the one before it has written; of the steps the weights alone are kept for backward. torch's
    own fused attention takes the position scores as a bias for all pairs of frames; on a CPU it
    gives no gradient for it, and falls back to products that write all pairs out several times:
    1.19 times the processor time of this, for 5 utterances of 299 frames and 8 heads of 64.
    """

    # Queries in a block.
    block = 64

    @staticmethod
    def forward(
        ctx,
        q_BTC: Tensor,
        k_BSC: Tensor,
        v_BSC: Tensor,
        p_HPD: Tensor,
        u_HD: Tensor,
        w_HD: Tensor,
        mask: _AttentionMask,
    ) -> Tensor:
        (B, T, C), S, (H, _, D) = q_BTC.shape, k_BSC.size(1), p_HPD.shape
        q, k, v = (_by_head(x, H) for x in (q_BTC, k_BSC, v_BSC))
        q *= D**-0.5
        q_content, q_position = q + u_HD.view(H, 1, 1, D), q + w_HD.view(H, 1, 1, D)
        k_NSD, v_NSD = k.flatten(0, 1), v.flatten(0, 1)
        out_NTD = torch.empty_like(q).flatten(0, 1)
        kept = []
        for rows, scores, by_distance in _AttentionFunction._blocks(q, S):
            c, distances = by_distance.size(2), _distances(rows, T, S)
            torch.bmm(
                q_position[:, :, rows].reshape(H, B * c, D),
                p_HPD[:, distances].transpose(1, 2),
                out=by_distance.view(H, B * c, -1),
            )
            scores_NcS = scores.flatten(0, 1)
            torch.bmm(q_content.flatten(0, 1)[:, rows], k_NSD.transpose(1, 2), out=scores_NcS)
            scores_NcS += _shift_to_keys(by_distance.flatten(0, 1), S)
            weights = mask.softmax_(scores, rows)
            torch.bmm(weights.flatten(0, 1), v_NSD, out=out_NTD[:, rows])
            if any(ctx.needs_input_grad):
                kept.append(weights)
        ctx.save_for_backward(q, k_NSD, v_NSD, p_HPD, u_HD, w_HD, *kept)
        return out_NTD.view(H, B, T, D).permute(1, 2, 0, 3).reshape(B, T, C)

    @staticmethod
    def _blocks(q_HBTD: Tensor, S: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Each block's queries, memory for its scores, and for those by distance: zeros, which
        all blocks share."""
        H, B, T, _ = q_HBTD.shape
        by_distance = None
        for start in range(0, T, _AttentionFunction.block):
            rows = slice(start, min(start + _AttentionFunction.block, T))
            c = rows.stop - rows.start
            if by_distance is None or by_distance.size(2) != c:
                by_distance = q_HBTD.new_zeros(H, B, c, S + c - 1)
            yield rows, q_HBTD.new_empty(H, B, c, S), by_distance

    @staticmethod
    def backward(ctx, grad_BTC: Tensor):
        q, k_NSD, v_NSD, p_HPD, u_HD, w_HD, *kept = ctx.saved_tensors
        (H, B, T, D), S = q.shape, k_NSD.size(1)
        q_content, q_position = q + u_HD.view(H, 1, 1, D), q + w_HD.view(H, 1, 1, D)
        grad_NTD = _by_head(grad_BTC, H).flatten(0, 1)
        grad_content, grad_position = torch.empty_like(q), torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k_NSD), torch.zeros_like(v_NSD)
        grad_p = torch.zeros_like(p_HPD)
        for weights, (rows, grad_scores, by_distance) in zip(
            kept, _AttentionFunction._blocks(q, S)
        ):
            c, distances = by_distance.size(2), _distances(rows, T, S)
            weights_NcS, grad_NcS = weights.flatten(0, 1), grad_scores.flatten(0, 1)
            grad_v.baddbmm_(weights_NcS.transpose(1, 2), grad_NTD[:, rows])
            # Of the weights w: that of a score is w (g - sum(w g)), g being that of its weight.
            torch.bmm(grad_NTD[:, rows], v_NSD.transpose(1, 2), out=grad_NcS)
            torch._softmax_backward_data(
                grad_scores, weights, -1, weights.dtype, grad_input=grad_scores
            )
            torch.bmm(grad_NcS, k_NSD, out=grad_content.flatten(0, 1)[:, rows])
            grad_k.baddbmm_(grad_NcS.transpose(1, 2), q_content.flatten(0, 1)[:, rows])
            # What lies outside of the view is a distance that no key is at.
            _shift_to_keys(by_distance.flatten(0, 1), S).copy_(grad_NcS)
            grad_distance = by_distance.view(H, B * c, -1)
            grad_position[:, :, rows] = torch.bmm(grad_distance, p_HPD[:, distances]).view(
                H, B, c, D
            )
            grad_p[:, distances].baddbmm_(
                grad_distance.transpose(1, 2), q_position[:, :, rows].reshape(H, B * c, D)
            )
        grad_u, grad_w = grad_content.sum(dim=(1, 2)), grad_position.sum(dim=(1, 2))
        grad_q = grad_content.add_(grad_position).mul_(D**-0.5)
        grads = (x.view(H, B, -1, D) for x in (grad_q, grad_k, grad_v))
        return *(x.permute(1, 2, 0, 3).flatten(2) for x in grads), grad_p, grad_u, grad_w, None


def _by_head(x_BTC: Tensor, H: int) -> Tensor:
    """A copy (H, B, T, D): heads come first, so that the position scores of all utterances, which
    share their keys, are one matrix product per head."""
    return (
        x_BTC.unflatten(-1, (H, -1))
        .permute(2, 0, 1, 3)
        .clone(memory_format=torch.contiguous_format)
    )


def _distances(rows: slice, T: int, S: int) -> slice:
    """Of the S + T - 1 distances those of the queries ``rows``."""
    return slice(T - rows.stop, T - rows.start + S - 1)


class RelPositionMultiheadAttention(nn.Module):
    """Multi-head attention with relative positions (arXiv 1901.02860, appendix B).

    The score of query i and key j is ``(q_i + u) . k_j + (q_i + v) . W_p e(i - j)``, where q is
    divided by sqrt(D) before the position biases u and v are added.
    """

    def __init__(self, d_model: int, nhead: int):
        super().__init__()
        self.d_model = d_model
        self.nhead = nhead
        self.head_dim = d_model // nhead
        self.in_proj = ScaledLinear(d_model, 3 * d_model)
        self.out_proj = ScaledLinear(d_model, d_model, initial_scale=0.25)
        self.linear_pos = ScaledLinear(d_model, d_model, bias=False)
        self.pos_bias_u = nn.Parameter(torch.randn(nhead, self.head_dim) * 0.01)
        self.pos_bias_v = nn.Parameter(torch.randn(nhead, self.head_dim) * 0.01)
        self.pos_bias_u_scale = nn.Parameter(torch.zeros(()))
        self.pos_bias_v_scale = nn.Parameter(torch.zeros(()))

    def forward(
        self,
        x_BTC: Tensor,
        pos_PC: Tensor,
        mask: _AttentionMask,
        cache_BLC: Tensor | None = None,
    ) -> Tensor:
        """Attention of the frames ``x_BTC`` to themselves and to the ``cache_BLC`` before them.

        ``pos_PC`` comes from :class:`RelPositionalEncoding` for T queries and L + T keys.
        """
        C, H, D = self.d_model, self.nhead, self.head_dim
        if cache_BLC is None:
            q, k, v = self.in_proj(x_BTC).chunk(3, dim=-1)
        else:
            weight, bias = self.in_proj.scaled_weight(), self.in_proj.scaled_bias()
            q = F.linear(x_BTC, weight[:C], bias[:C])
            keys_from = torch.cat([cache_BLC, x_BTC], dim=1)
            k, v = F.linear(keys_from, weight[C:], bias[C:]).chunk(2, dim=-1)

        u = self.pos_bias_u * self.pos_bias_u_scale.exp()
        w = self.pos_bias_v * self.pos_bias_v_scale.exp()
        p = self.linear_pos(pos_PC).view(-1, H, D).transpose(0, 1)
        if x_BTC.device.type == "cpu" and not torch.jit.is_tracing():
            # Under autocast q is in half precision, and a function of our own is not cast for.
            u, w = u.to(q.dtype), w.to(q.dtype)
            out = _AttentionFunction.apply(q, k, v, p, u, w, mask)
        else:
            out = self._attend(q, k, v, p, u, w, mask)
        return self.out_proj(out)

    @staticmethod
    def _attend(
        q_BTC: Tensor,
        k_BSC: Tensor,
        v_BSC: Tensor,
        p_HPD: Tensor,
        u_HD: Tensor,
        w_HD: Tensor,
        mask: _AttentionMask,
    ) -> Tensor:
        (B, T, _), S, (H, _, D) = q_BTC.shape, k_BSC.size(1), p_HPD.shape
        q, k, v = (x.unflatten(-1, (H, D)).permute(2, 0, 1, 3) for x in (q_BTC, k_BSC, v_BSC))
        q = q * D**-0.5
        by_distance = torch.bmm(
            (q + w_HD.view(H, 1, 1, D)).reshape(H, B * T, D), p_HPD.transpose(1, 2)
        )
        scores = torch.baddbmm(
            _shift_to_keys(by_distance.view(H * B, T, -1), S),
            (q + u_HD.view(H, 1, 1, D)).reshape(H * B, T, D),
            k.reshape(H * B, S, D).transpose(1, 2),
        )
        weights = mask.softmax(scores.view(H, B, T, S)).view(H * B, T, S)
        out = torch.bmm(weights, v.reshape(H * B, S, D))
        return out.view(H, B, T, D).permute(1, 2, 0, 3).flatten(2)


class _DepthwiseConvFunction(torch.autograd.Function):
    """Depthwise convolution of (B, T', C) frames on a CPU; T' holds the padding already.

    torch's own backward of a depthwise convolution takes 4 to 10 times as long as its
    channels-last forward, which serves for the input's gradient as well: a convolution with the
    kernel reversed. The weight's gradient is compiled.
    """

    @staticmethod
    def convolve(x: Tensor, weight_CK: Tensor, bias: Tensor | None = None) -> Tensor:
        C, K = weight_CK.shape
        y = F.conv2d(x.transpose(1, 2).unsqueeze(2), weight_CK.view(C, 1, 1, K), bias, groups=C)
        return y.squeeze(2).transpose(1, 2)

    @staticmethod
    def forward(ctx, x: Tensor, weight_CK: Tensor, bias_C: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_CK)
        return _DepthwiseConvFunction.convolve(x, weight_CK, bias_C)

    @staticmethod
    def backward(ctx, grad: Tensor):
        from mvqkd.cpu_kernels import depthwise_weight_gradient

        x, weight_CK = ctx.saved_tensors
        K = weight_CK.size(1)
        grad_x = _DepthwiseConvFunction.convolve(
            F.pad(grad, (0, 0, K - 1, K - 1)), weight_CK.flip(1).contiguous()
        )
        grad_weight_KC = depthwise_weight_gradient(x, grad, K).to(x.dtype)
        return grad_x, grad_weight_KC.t(), grad.sum(dim=(0, 1))


class ConvolutionModule(nn.Module):
    """Pointwise convolution and GLU, depthwise convolution, DoubleSwish, pointwise convolution."""

    def __init__(self, channels: int, kernel_size: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.kernel_size = kernel_size
        self.pointwise_conv1 = ScaledConv1d(channels, 2 * channels, kernel_size=1)
        self.deriv_balancer1 = ActivationBalancer(channel_dim=-1, max_positive=1.0, max_abs=10.0)
        self.depthwise_conv = ScaledConv1d(channels, channels, kernel_size, groups=channels)
        self.deriv_balancer2 = ActivationBalancer(channel_dim=-1, max_positive=1.0)
        self.activation = DoubleSwish()
        self.pointwise_conv2 = ScaledConv1d(channels, channels, 1, initial_scale=0.25)

    def forward(
        self,
        x_BTC: Tensor,
        padding_BT: Tensor | None,
        cache_BLC: Tensor | None = None,
        num_cached: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the output and, where a cache of the K - 1 frames before is given, the new one.

        ``padding_BT`` is true at frames to be taken as 0. The new cache ends after
        ``num_cached`` frames of ``x_BTC``.
        """
        # A convolution of width 1 is a linear layer: no exchange of time and channels is needed.
        x = F.glu(self.deriv_balancer1(self.pointwise_conv1.linear(x_BTC)), dim=-1)
        if padding_BT is not None:
            x = x.masked_fill(padding_BT.unsqueeze(-1), 0.0)
        left = self.kernel_size - 1 if self.causal else self.kernel_size // 2
        right = self.kernel_size - 1 - left
        if cache_BLC is None:
            x = F.pad(x, (0, 0, left, right))
        else:
            x = torch.cat([cache_BLC, x], dim=1)
            cache_BLC = x[:, num_cached : num_cached + left]
        x = self._depthwise(x)
        x = self.activation(self.deriv_balancer2(x))
        return self.pointwise_conv2.linear(x), cache_BLC

    def _depthwise(self, x: Tensor) -> Tensor:
        conv = self.depthwise_conv
        if x.is_cuda or torch.jit.is_tracing():
            return conv(x.transpose(1, 2)).transpose(1, 2)
        # Under autocast x is in half precision, and a function of our own is not cast for.
        weight_CK, bias_C = conv.scaled_weight().squeeze(1), conv.scaled_bias()
        return _DepthwiseConvFunction.apply(x, weight_CK.to(x.dtype), bias_C.to(x.dtype))


def _feed_forward(d_model: int, dim_feedforward: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        ScaledLinear(d_model, dim_feedforward),
        ActivationBalancer(channel_dim=-1),
        DoubleSwish(dropout),
        # Where the published model has the dropout: parameters are named by their places.
        nn.Identity(),
        ScaledLinear(dim_feedforward, d_model, initial_scale=0.25),
    )


class ConformerEncoderLayer(nn.Module):
    """Feed-forward, attention, convolution, feed-forward, each added whole; then BasicNorm."""

    # Weight of a layer's output that is left when the layer is dropped, and at warm-up's start.
    bypass_scale = 0.1

    def __init__(self, settings: ConformerSettings):
        super().__init__()
        d_model = settings.d_model
        self.layer_dropout = settings.layer_dropout
        self.feed_forward_macaron = _feed_forward(
            d_model, settings.dim_feedforward, settings.dropout
        )
        self.self_attn = RelPositionMultiheadAttention(d_model, settings.nhead)
        self.conv_module = ConvolutionModule(d_model, settings.cnn_module_kernel, settings.causal)
        self.feed_forward = _feed_forward(d_model, settings.dim_feedforward, settings.dropout)
        self.balancer = ActivationBalancer(
            channel_dim=-1, min_positive=0.45, max_positive=0.55, max_abs=6.0
        )
        self.norm_final = BasicNorm()
        self.dropout = Dropout(settings.dropout)

    def forward(
        self,
        x_BTC: Tensor,
        pos_PC: Tensor,
        mask: _AttentionMask,
        padding_BT: Tensor | None,
        warmup: float = 1.0,
    ) -> Tensor:
        alpha = 1.0
        if self.training:
            alpha = min(self.bypass_scale + warmup, 1.0)
            if self.layer_dropout > 0.0 and torch.rand(()).item() > 1.0 - self.layer_dropout:
                alpha = self.bypass_scale
        x = self.dropout(self.feed_forward_macaron(x_BTC), x_BTC)
        x = self.dropout(self.self_attn(x, pos_PC, mask), x)
        x = self.dropout(self.conv_module(x, padding_BT)[0], x)
        x = self.dropout(self.feed_forward(x), x)
        x = self.norm_final(self.balancer(x))
        return x if alpha == 1.0 else torch.lerp(x_BTC, x, alpha)

    def stream(
        self,
        x_BTC: Tensor,
        pos_PC: Tensor,
        mask: _AttentionMask,
        padding_BT: Tensor | None,
        attn_cache_BLC: Tensor,
        conv_cache_BLC: Tensor,
        num_cached: int,
        left_context: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A chunk after its caches; returns the output and the caches for the next chunk.

        The first ``num_cached`` frames of ``x_BTC`` enter the caches, the rest is look-ahead.
        ``left_context`` frames are kept for attention (-1: all).
        """
        x = x_BTC + self.feed_forward_macaron(x_BTC)
        attended = self.self_attn(x, pos_PC, mask, attn_cache_BLC)
        attn_cache_BLC = torch.cat([attn_cache_BLC, x[:, :num_cached]], dim=1)
        if left_context >= 0:
            attn_cache_BLC = attn_cache_BLC[:, attn_cache_BLC.size(1) - left_context :]
        x = x + attended
        convolved, conv_cache_BLC = self.conv_module(x, padding_BT, conv_cache_BLC, num_cached)
        x = x + convolved
        x = x + self.feed_forward(x)
        return self.norm_final(x), attn_cache_BLC, conv_cache_BLC


class ConformerEncoder(nn.Module):
    """The stack of layers (icefall's name for it, hence ``encoder.layers.N`` in checkpoints)."""

    def __init__(self, settings: ConformerSettings):
        super().__init__()
        self.layers = nn.ModuleList(
            ConformerEncoderLayer(settings) for _ in range(settings.num_encoder_layers)
        )


class Conv2dSubsampling(nn.Module):
    """Three 3x3 convolutions, the last two of stride 2: T feature frames -> ((T-1)//2 - 1)//2.

    Works in channels-last order throughout, several times as fast on a CPU as the default one.
    """

    # Stride and padding, in time, of each convolution; all are 3 wide.
    strides = (1, 2, 2)
    paddings = (1, 0, 0)

    def __init__(self, num_features: int, d_model: int, channels: tuple[int, int, int]):
        super().__init__()
        c1, c2, c3 = channels
        self.conv = nn.Sequential(
            ScaledConv2d(1, c1, kernel_size=3, padding=1),
            ActivationBalancer(channel_dim=1),
            DoubleSwish(),
            ScaledConv2d(c1, c2, kernel_size=3, stride=2),
            ActivationBalancer(channel_dim=1),
            DoubleSwish(),
            ScaledConv2d(c2, c3, kernel_size=3, stride=2),
            ActivationBalancer(channel_dim=1),
            DoubleSwish(),
        )
        self.num_bins = subsampled_lengths(num_features)
        self.out = ScaledLinear(c3 * self.num_bins, d_model)
        self.out_norm = BasicNorm(learn_eps=False)
        self.out_balancer = ActivationBalancer(channel_dim=-1, min_positive=0.45, max_positive=0.55)

    def forward(self, x_BTF: Tensor, pad_time: bool = True) -> Tensor:
        """(B, T, F) -> (B, T', C). Without ``pad_time`` the frames at both ends are context."""
        # (B, 1, T, F) with the strides of channels-last order, which torch does not infer for a
        # single channel.
        B, T, n_bins = x_BTF.shape
        x = x_BTF.unsqueeze(1).as_strided(
            (B, 1, T, n_bins), (x_BTF.stride(0), 1, x_BTF.stride(1), x_BTF.stride(2))
        )
        first, *rest = self.conv
        x = F.conv2d(
            x, first.scaled_weight(), first.scaled_bias(), padding=(1 if pad_time else 0, 1)
        )
        for module in rest:
            x = module(x)
        # In memory a frame is (bins, channels); the weight is for (channels, bins), and smaller.
        c3 = x.size(1)
        x = self.out.linear(
            x.permute(0, 2, 3, 1).flatten(2),
            lambda weight: weight.unflatten(1, (c3, self.num_bins)).transpose(1, 2).flatten(1),
        )
        return self.out_balancer(self.out_norm(x))


class Conformer(nn.Module):
    """The encoder. Features (B, T, F) at 100 Hz -> (B, T', C) at 25 Hz.

    Attributes:
      frame_shift: seconds between output frames.
      frame_offset: seconds from the start of the audio to the centre of output frame 0; that of
        frame j is ``frame_offset + j * frame_shift``. Feature frame i is taken to be centred at
        10 i + 5 ms, as lhotse's and Kaldi's are without ``snip_edges``.
      receptive_field: feature frames that the subsampling makes one output frame of.
    """

    feature_frame_shift = 0.01

    def __init__(self, settings: ConformerSettings):
        super().__init__()
        self.settings = settings
        self.encoder_embed = Conv2dSubsampling(
            settings.num_features, settings.d_model, settings.subsampling_channels
        )
        self.encoder_pos = RelPositionalEncoding(settings.d_model, settings.dropout)
        self.encoder = ConformerEncoder(settings)

        jump, centre, width = 1, 0, 1
        for stride, padding in zip(Conv2dSubsampling.strides, Conv2dSubsampling.paddings):
            centre += (1 - padding) * jump
            width += 2 * jump
            jump *= stride
        self.frame_shift = jump * self.feature_frame_shift
        self.frame_offset = (centre + 0.5) * self.feature_frame_shift
        self.receptive_field = width

    def forward(
        self,
        x_BTF: Tensor,
        x_lens_B: Tensor,
        warmup: float = 1.0,
        chunk_size: int | None = None,
        left_context: int = -1,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Encode whole utterances.

        Args:
          x_BTF: features; frames beyond ``x_lens_B`` are padding.
          x_lens_B: feature frames of each utterance; the longest should be T.
          warmup: in training, below 1 while layers are still mixed with their inputs.
          chunk_size: attend as a stream does that sees ``chunk_size`` output frames at once and
            ``left_context`` frames, a multiple of it, to the left (-1: all). None or -1: all
            frames, or in dynamic chunk training a size drawn from torch's CPU generator.

        Returns:
          the output (B, T', C), its lengths (B,), and the outputs of ``middle_output_layers``.

        Raises:
          RecipeError: an utterance is too short for one output frame, or the left context is no
            multiple of the chunk size.
        """
        lens_B = subsampled_lengths(x_lens_B)
        if int(lens_B.min()) < 1:
            raise RecipeError(
                f"features: an utterance of {int(x_lens_B.min())} frames is too short; leave out "
                f"those of less than 7"
            )
        x = self.encoder_pos.dropout(self.encoder_embed(x_BTF))
        T = x.size(1)

        masked, padding_BT = None, None
        if int(lens_B.min()) < T:
            padding_BT = padding_mask(lens_B, T)
            masked = padding_BT.unsqueeze(1)
        chunk_size, num_left_chunks = self._chunks(T, chunk_size, left_context)
        if 0 < chunk_size < T:
            chunks = chunk_mask(T, chunk_size, num_left_chunks, x.device)
            masked = chunks.unsqueeze(0) if masked is None else masked | chunks

        mask = _AttentionMask(masked, x.dtype)
        pos_PC = self.encoder_pos(T, T, x)
        middle_outputs = []
        for number, layer in enumerate(self.encoder.layers, start=1):
            x = layer(x, pos_PC, mask, padding_BT, warmup)
            if number in self.settings.middle_output_layers:
                middle_outputs.append(x)
        return x, lens_B, middle_outputs

    def _chunks(self, T: int, chunk_size: int | None, left_context: int) -> tuple[int, int]:
        """Chunk size (-1: all frames) and number of left chunks of a whole-utterance pass."""
        if chunk_size is not None:
            if left_context < 0 or chunk_size < 0:
                return chunk_size, -1
            if left_context % chunk_size:
                raise RecipeError(
                    f"left_context: {left_context} is no multiple of the chunk size {chunk_size}; "
                    f"change one"
                )
            return chunk_size, left_context // chunk_size
        settings = self.settings
        if not (self.training and settings.dynamic_chunk_training):
            return -1, -1
        drawn = torch.randint(1, max(T, 2), (1,)).item()
        if drawn > T * settings.short_chunk_threshold:
            return -1, settings.num_left_chunks
        return drawn % settings.short_chunk_size + 1, settings.num_left_chunks

    def get_init_state(self, batch_size: int, left_context: int) -> list[Tensor]:
        """Empty caches for :meth:`streaming_forward`.

        Returns [attention (layers, left_context, B, C), convolution (layers, K - 1, B, C)].
        """
        settings = self.settings
        p = self.encoder_embed.out.weight
        shape = (settings.num_encoder_layers, left_context, batch_size, settings.d_model)
        conv_shape = (shape[0], settings.cnn_module_kernel - 1, *shape[2:])
        return [p.new_zeros(shape), p.new_zeros(conv_shape)]

    @torch.no_grad()
    def streaming_forward(
        self,
        x_BTF: Tensor,
        x_lens_B: Tensor,
        states: list[Tensor],
        processed_lens_B: Tensor,
        left_context: int,
        right_context: int,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """One call of the published recipe's streaming interface, which sherpa-onnx drives.

        Each call gets ``(chunk_size + 2 + right_context) * 4 + 3`` feature frames, 4 *
        ``chunk_size`` after the call before. The first and the last frame of the subsampling see
        padding and are cut off, so the very first output frame of a stream is lost; decoding
        uses :class:`StreamingEncoder`, which loses none.

        Args:
          states: from :meth:`get_init_state` or the call before.
          processed_lens_B: output frames of each stream so far.
          right_context: output frames of look-ahead; their output is cut off again.

        Returns:
          the output (B, chunk_size, C), its lengths (B,), the new states.
        """
        lens_B = subsampled_lengths(x_lens_B) - 2
        x = self.encoder_embed(x_BTF)[:, 1:-1]
        x, states = self._stream_layers(
            x,
            lens_B,
            [s.transpose(1, 2) for s in states],
            processed_lens_B,
            left_context,
            x.size(1) - right_context,
        )
        return x[:, :chunk_size], lens_B - right_context, [s.transpose(1, 2) for s in states]

    def _stream_layers(
        self,
        x_BTC: Tensor,
        lens_B: Tensor,
        caches: list[Tensor],
        processed_lens_B: Tensor,
        left_context: int,
        num_cached: int,
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers over a chunk; ``caches`` are (layers, B, L, C) for attention, convolution."""
        T = x_BTC.size(1)
        L = caches[0].size(2)
        padding_BT = padding_mask(lens_B, T)
        # The cache is filled from its end; its first slots are empty until L frames have passed.
        empty_BL = torch.arange(L, device=x_BTC.device) < L - processed_lens_B.unsqueeze(1)
        masked_BS = torch.cat([empty_BL, padding_BT], dim=1)
        # A stream that has ended may have no key left: its frames are never read, but they must
        # not become NaN in the caches of a batch that goes on.
        masked_BS = masked_BS & ~masked_BS.all(dim=1, keepdim=True)
        mask = _AttentionMask(masked_BS.unsqueeze(1), x_BTC.dtype)
        pos_PC = self.encoder_pos(T, L + T, x_BTC)
        attn_caches, conv_caches = [], []
        x = x_BTC
        for layer, attn_cache, conv_cache in zip(self.encoder.layers, *caches):
            x, attn_cache, conv_cache = layer.stream(
                x, pos_PC, mask, padding_BT, attn_cache, conv_cache, num_cached, left_context
            )
            attn_caches.append(attn_cache)
            conv_caches.append(conv_cache)
        return x, [torch.stack(attn_caches), torch.stack(conv_caches)]


@dataclass
class StreamingState:
    """Where B streams are. All tensors have a batch dimension, so streams can be regrouped."""

    # Last feature frames (B, up to 5, F) that the next chunk's subsampling needs too.
    features_BTF: Tensor
    # (layers, B, L, C): inputs of each layer's attention and of its depthwise convolution.
    attn_cache: Tensor
    conv_cache: Tensor
    # Feature frames received, output frames emitted.
    num_features_B: Tensor
    num_outputs_B: Tensor


class StreamingEncoder:
    """Chunk-by-chunk encoding that equals the whole-utterance pass with a chunk mask.

    The output of a stream, cut anywhere into chunks of a batch of streams, is that of
    ``encoder(x, x_lens, chunk_size=chunk_size, left_context=left_context)`` on the utterance
    alone where ``right_context`` is 0. No frame is lost and features are subsampled once.

    ``step`` takes exactly ``first_chunk_frames`` feature frames at first, ``chunk_frames`` in
    each later call, and ``flush`` takes what is left:

        stream = StreamingEncoder(encoder, chunk_size=16, left_context=64)
        state = stream.init_state(batch_size)
        out_BTC, lens_B, state = stream.step(features[:, : stream.first_chunk_frames], state)
        out_BTC, lens_B, state = stream.step(next_chunk_BTF, state)
        out_BTC, lens_B, state = stream.flush(rest_BTF, rest_lens_B, state)

    Streams of different lengths: pass ``lens_B``, the valid frames of this call's features; a
    stream ends where it is less than the full number, and gets 0 afterwards.

    Args:
      encoder: a causal :class:`Conformer`; it is used in evaluation mode.
      chunk_size: output frames (40 ms each) per call.
      left_context: output frames before the chunk that attention sees (-1: all so far).
      right_context: output frames after the chunk that are computed with it and thrown away;
        each costs 40 ms of delay.

    Raises:
      RecipeError: the encoder is not causal, or the chunk size is not positive.
    """

    # Feature frames that one chunk shares with the next: receptive field 9, shift 4.
    overlap = 5

    def __init__(
        self, encoder: Conformer, chunk_size: int, left_context: int, right_context: int = 0
    ):
        if not encoder.settings.causal:
            raise RecipeError(
                "causal: the encoder's convolutions look ahead; train with causal: true to stream"
            )
        if chunk_size < 1 or right_context < 0:
            raise RecipeError(
                f"chunk_size: {chunk_size} with right_context {right_context} is no chunk; set a "
                f"positive chunk_size and a right_context of 0 or more"
            )
        self.encoder = encoder
        self.chunk_size = chunk_size
        self.left_context = left_context
        self.right_context = right_context
        self.chunk_frames = 4 * chunk_size
        # 4 (c + r) - 4 shifts of a receptive field of 9, less the padding frame before the first.
        self.first_chunk_frames = 4 * (chunk_size + right_context) + self.overlap - 1

    def init_state(self, batch_size: int) -> StreamingState:
        settings = self.encoder.settings
        p = self.encoder.encoder_embed.out.weight
        attn_cache, conv_cache = self.encoder.get_init_state(batch_size, max(self.left_context, 0))
        zeros_B = torch.zeros(batch_size, dtype=torch.int64, device=p.device)
        return StreamingState(
            # The first convolution's padding.
            features_BTF=p.new_zeros(batch_size, 1, settings.num_features),
            attn_cache=attn_cache.transpose(1, 2),
            conv_cache=conv_cache.transpose(1, 2),
            num_features_B=zeros_B,
            num_outputs_B=zeros_B,
        )

    def num_frames(self, state: StreamingState) -> int:
        """Feature frames that the next :meth:`step` takes."""
        is_first = state.features_BTF.size(1) == 1
        return self.first_chunk_frames if is_first else self.chunk_frames

    @torch.no_grad()
    def step(
        self, features_BTF: Tensor, state: StreamingState, lens_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor, StreamingState]:
        """Encode one chunk.

        Args:
          features_BTF: :meth:`num_frames` feature frames, or fewer if all streams end here.
          lens_B: valid frames of each stream; fewer than :meth:`num_frames` end it.

        Returns:
          output (B, chunk_size, C), valid output frames of each stream (B,), the new state.
        """
        B, given, _ = features_BTF.shape
        wanted = self.num_frames(state)
        if given > wanted:
            raise ValueError(f"step takes {wanted} feature frames, not {given}")
        if lens_B is None:
            lens_B = torch.full((B,), given, device=features_BTF.device)
        # What follows the end is 0, as the first convolution pads.
        features_BTF = F.pad(features_BTF, (0, 0, 0, wanted - given))
        features_BTF = features_BTF.masked_fill(padding_mask(lens_B, wanted).unsqueeze(-1), 0.0)
        window_BTF = torch.cat([state.features_BTF, features_BTF], dim=1)

        num_features_B = state.num_features_B + lens_B
        ended_B = lens_B < wanted
        remaining_B = subsampled_lengths(num_features_B) - state.num_outputs_B
        # A stream that goes on has a whole window of frames, look-ahead included.
        window = self.chunk_size + self.right_context
        valid_B = torch.where(ended_B, remaining_B.clamp(min=0, max=window), window)

        training = self.encoder.training
        self.encoder.eval()
        try:
            x = self.encoder.encoder_embed(window_BTF, pad_time=False)
            x, caches = self.encoder._stream_layers(
                x,
                valid_B,
                [state.attn_cache, state.conv_cache],
                state.num_outputs_B,
                self.left_context,
                self.chunk_size,
            )
        finally:
            self.encoder.train(training)
        out_lens_B = valid_B.clamp(max=self.chunk_size)
        # The next window starts chunk_size output frames after this one.
        state = StreamingState(
            window_BTF[:, self.chunk_frames :],
            *caches,
            num_features_B,
            state.num_outputs_B + out_lens_B,
        )
        return x[:, : self.chunk_size], out_lens_B, state

    def flush(
        self, features_BTF: Tensor, lens_B: Tensor | None, state: StreamingState
    ) -> tuple[Tensor, Tensor, StreamingState]:
        """End all streams after their last, fewer than :meth:`num_frames`, feature frames.

        ``features_BTF`` may have no frame (B, 0, F). Returns as :meth:`step` does; the output
        has as many frames as are left.
        """
        outputs, output_lens = [], []
        while True:
            out, out_lens_B, state = self.step(features_BTF, state, lens_B)
            outputs.append(out)
            output_lens.append(out_lens_B)
            if bool((state.num_outputs_B >= subsampled_lengths(state.num_features_B)).all()):
                break
            features_BTF, lens_B = features_BTF[:, :0], None
        total_B = torch.stack(output_lens).sum(dim=0)
        out_BTC = torch.cat(outputs, dim=1)[:, : int(total_B.max())]
        return out_BTC, total_B, state
