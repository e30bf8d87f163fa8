"""Layers of the reworked Conformer: learned scales instead of layer norm.

The published recipe (icefall, ``pruned_transducer_stateless6``) multiplies every weight and bias
by the exponential of a learned scalar, so that the optimizer moves the scale of a matrix as fast
as its direction, and keeps activations in range with :class:`ActivationBalancer`. Parameter names
are the recipe's, so that its checkpoints load by name.

Shapes: B utterances, T frames, C channels, F feature bins; N rows of I inputs and O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvqkd.errors import RecipeError


def _init_scaled(module: nn.Module, initial_scale: float, initial_speed: float) -> None:
    """Draw ``module.weight`` and set its scales so that the layer starts at ``initial_scale``.

    The weight is uniform with standard deviation 0.1 / initial_speed: a smaller stored weight
    learns faster under Eve, whose steps do not depend on the size of the weight.
    """
    std = 0.1 / initial_speed
    bound = 3**0.5 * std
    weight = module.weight
    with torch.no_grad():
        weight.uniform_(-bound, bound)
        fan_in = weight[0].numel()
        scale = math.log(initial_scale) + math.log(fan_in**-0.5 / std)
        module.weight_scale = nn.Parameter(torch.tensor(scale))
        if module.bias is not None:
            module.bias.zero_()
            module.bias_scale = nn.Parameter(torch.tensor(math.log(initial_scale)))
        else:
            module.register_parameter("bias_scale", None)


def on_plain_cpu(x: Tensor) -> bool:
    """Whether ``x`` is for the functions of our own below: on a CPU, nothing cast by autocast."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
    )


# Elements of a product of two vectors that are added up one after the other.
_DOT_BLOCK = 65536


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The sum of ``x * y``; each may have any shape, and is read once."""
    blocks = zip(x.flatten().split(_DOT_BLOCK), y.flatten().split(_DOT_BLOCK))
    return torch.stack([torch.dot(x_block, y_block) for x_block, y_block in blocks]).sum()


class _ScaledLinearFunction(torch.autograd.Function):
    # exp(scale) is the factor that a matrix product takes anyway: no scaled weight is made, kept
    # for backward, or multiplied again there. As d exp(s) W / ds is exp(s) W, the gradient of the
    # scale is the product of the weight and its gradient.
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.factor = weight_scale.exp().item()
        ctx.save_for_backward(x, weight)
        x_NI, weight_IO = x.reshape(-1, x.size(-1)), weight.t()
        if bias is None:
            y_NO = x.new_empty(len(x_NI), len(weight))
            y_NO.addmm_(x_NI, weight_IO, beta=0, alpha=ctx.factor)
        else:
            y_NO = torch.addmm(bias, x_NI, weight_IO, alpha=ctx.factor)
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        x_NI, grad_NO = x.reshape(-1, x.size(-1)), grad.reshape(-1, grad.size(-1))
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x_NI).addmm_(grad_NO, weight, beta=0, alpha=ctx.factor)
            grad_x = grad_x.view(x.shape)
        grad_weight = torch.empty_like(weight)
        grad_weight.addmm_(grad_NO.t(), x_NI, beta=0, alpha=ctx.factor)
        if ctx.needs_input_grad[3]:
            grad_bias = grad_NO.sum(dim=0)
        return grad_x, grad_weight, _dot(grad_weight, weight), grad_bias


class _Foldable:
    """Mix-in: scales that `fold_scales` has multiplied into what they scale need not be again."""

    is_folded = False

    def _load_from_state_dict(self, *args, **kwargs):
        self.is_folded = False
        super()._load_from_state_dict(*args, **kwargs)


def _as_matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1)


class _Scaled(_Foldable):
    """Mix-in: the weight and bias in use, of a module with ``weight_scale`` and ``bias_scale``."""

    def scaled_weight(self) -> Tensor:
        return self.weight if self.is_folded else self.weight * self.weight_scale.exp()

    def scaled_bias(self) -> Tensor | None:
        if self.bias is None or self.is_folded:
            return self.bias
        return self.bias * self.bias_scale.exp()

    def linear(self, x: Tensor, arrange: Callable[[Tensor], Tensor] = _as_matrix) -> Tensor:
        """This layer, or convolution of width 1, on the last dimension of ``x``.

        ``arrange`` makes of the weight the matrix (C_out, C_in) that ``x`` is multiplied by.
        """
        if self.is_folded or not (torch.is_grad_enabled() and on_plain_cpu(x)):
            return F.linear(x, arrange(self.scaled_weight()), self.scaled_bias())
        return _ScaledLinearFunction.apply(
            x, arrange(self.weight), self.weight_scale, self.scaled_bias()
        )


class ScaledLinear(_Scaled, nn.Linear):
    """``nn.Linear`` with weight ``weight * exp(weight_scale)``, bias ``bias * exp(bias_scale)``.

    Args:
      initial_scale: factor on the usual initial output (0.25 for the last layer of a sub-module).
      initial_speed: above 1 the weight starts smaller and is learned faster, below 1 slower.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        initial_scale: float = 1.0,
        initial_speed: float = 1.0,
    ):
        super().__init__(in_features, out_features, bias=bias)
        _init_scaled(self, initial_scale, initial_speed)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class ScaledConv1d(_Scaled, nn.Conv1d):
    """``nn.Conv1d`` with scales, see :class:`ScaledLinear`; takes (B, C, T)."""

    def __init__(self, *args, initial_scale: float = 1.0, initial_speed: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        _init_scaled(self, initial_scale, initial_speed)

    def forward(self, x_BCT: Tensor) -> Tensor:
        return self._conv_forward(x_BCT, self.scaled_weight(), self.scaled_bias())


class ScaledConv2d(_Scaled, nn.Conv2d):
    """``nn.Conv2d`` with scales, see :class:`ScaledLinear`; takes (B, C, T, F)."""

    def __init__(self, *args, initial_scale: float = 1.0, initial_speed: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        _init_scaled(self, initial_scale, initial_speed)

    def forward(self, x_BCTF: Tensor) -> Tensor:
        return self._conv_forward(x_BCTF, self.scaled_weight(), self.scaled_bias())


class ScaledEmbedding(_Foldable, nn.Module):
    """``nn.Embedding`` whose rows are multiplied by ``exp(scale)``.

    The rows start normal with standard deviation 0.1 and the scale at log 10. Blank has a row
    like any other: as the start of every utterance it is learned too.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.weight = nn.Parameter(torch.randn(num_embeddings, embedding_dim) * 0.1)

    def forward(self, indexes: Tensor) -> Tensor:
        """int64 indexes of any shape -> the same shape with ``embedding_dim`` appended."""
        x = F.embedding(indexes, self.weight)
        return x if self.is_folded else x * self.scale.exp()


@torch.no_grad()
def fold_scales(model: nn.Module) -> nn.Module:
    """Multiply the learned scales into the weights of all layers of ``model``, in place.

    Outputs that need no gradient stay the same bits. For a model that is only used: short calls
    (a chunk of a stream, a frame of a search) spend more on scaling weights than on using them.
    The scales become 0, so that the weights are still those of such a model; loading others undoes
    it. Training must not go on: the scales are no longer looked at.

    Returns:
      ``model``.
    """
    for module in model.modules():
        if not isinstance(module, _Foldable) or module.is_folded:
            continue
        if isinstance(module, ScaledEmbedding):
            pairs = [(module.weight, module.scale)]
        else:
            pairs = [(module.weight, module.weight_scale), (module.bias, module.bias_scale)]
        for values, scale in pairs:
            if values is not None:
                values.mul_(scale.exp())
                scale.zero_()
        module.is_folded = True
    return model


class BasicNorm(nn.Module):
    """``x * (mean(x²) + exp(eps))^-0.5`` over the last dimension.

    Unlike layer norm it removes no mean and has no gain, and through the learned eps a small
    input stays small. ``eps`` starts at log ``initial_eps``; with ``learn_eps=False`` it is a
    buffer.
    """

    def __init__(self, initial_eps: float = 0.25, learn_eps: bool = True):
        super().__init__()
        eps = torch.tensor(math.log(initial_eps))
        if learn_eps:
            self.eps = nn.Parameter(eps)
        else:
            self.register_buffer("eps", eps)

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(dim=-1, keepdim=True) + self.eps.exp()).rsqrt()


def _has_kernels(x: Tensor) -> bool:
    """Whether the compiled kernels, which compute in float32, are for ``x``."""
    return x.device.type == "cpu" and x.dtype != torch.float64


class _DoubleSwishFunction(torch.autograd.Function):
    # Only the derivative is kept: with s = sigmoid(x - 1) and y = x s it is s + y (1 - s), cheap
    # while s is at hand, so that backward is a product. Autograd would keep three tensors. On a
    # CPU the dropout of the output is done in the same pass, and is part of the derivative.
    @staticmethod
    def forward(ctx, x: Tensor, dropout: float) -> Tensor:
        if _has_kernels(x):
            from mvqkd.cpu_kernels import DropKey, double_swish

            y, derivative = (result.to(x.dtype) for result in double_swish(x, DropKey(dropout)))
        else:
            s = (x - 1.0).sigmoid_()
            y = x * s
            derivative = torch.add(y, s).addcmul_(y, s, value=-1.0)
        ctx.save_for_backward(derivative)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        (derivative,) = ctx.saved_tensors
        return grad * derivative, None


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )


class DoubleSwish(nn.Module):
    """``x * sigmoid(x - 1)``, close to ``swish(swish(x))``; keeps one tensor for backward.

    ``dropout`` is the probability with which an element of the output is dropped in training, as
    by a :class:`Dropout` that follows.
    """

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.dropout(x * (x - 1.0).sigmoid())
        if not _is_dense(x):
            x = x.contiguous()
        if _has_kernels(x):
            return _DoubleSwishFunction.apply(x, self.dropout.p if self.training else 0.0)
        return self.dropout(_DoubleSwishFunction.apply(x, 0.0))


class _DropoutFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, p: float) -> Tensor:
        from mvqkd.cpu_kernels import DropKey, drop

        ctx.key, ctx.has_residual = DropKey(p), residual is not None
        return drop(x, ctx.key, residual)

    @staticmethod
    def backward(ctx, grad: Tensor):
        from mvqkd.cpu_kernels import drop

        return drop(grad, ctx.key), grad if ctx.has_residual else None, None


class Dropout(nn.Module):
    """``nn.Dropout``, faster on a CPU and without a mask in memory.

    There the probability is rounded to a multiple of 2^-32, and what is dropped depends on one
    draw from torch's default generator; elsewhere it is torch's own.
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise RecipeError(f"dropout: {p} is no probability below 1; set 0 to 0.99")
        self.p = p

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x`` of which some is dropped, plus ``residual``."""
        if self.training and self.p > 0.0:
            if _has_kernels(x):
                return _DropoutFunction.apply(x, residual, self.p)
            x = F.dropout(x, self.p, training=True)
        return x if residual is None else residual + x


class _BalancerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, balancer: ActivationBalancer, strength: float) -> Tensor:
        ctx.channel_dim = balancer.channel_dim
        positive, share_C, mean_abs_C = _BalancerFunction._statistics(x, ctx.channel_dim)
        low, high = balancer.min_positive, balancer.max_positive
        factor_C = torch.zeros_like(share_C)
        if low > 0.0:
            factor_C += (low - share_C).relu() * (strength / low)
        if high < 1.0:
            factor_C -= (share_C - high).relu() * (strength / (1.0 - high))
        scale_C = (mean_abs_C < balancer.min_abs).float() - (mean_abs_C > balancer.max_abs).float()
        scale_C *= strength
        # A positive value is pushed by factor + scale, a negative one by factor - scale.
        ctx.save_for_backward(positive, factor_C + scale_C, factor_C - scale_C)
        return x

    @staticmethod
    def _statistics(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """What is positive, and per channel its share and the mean absolute value."""
        if _has_kernels(x):
            from mvqkd.cpu_kernels import channel_statistics

            return channel_statistics(x.movedim(channel_dim, -1).flatten(0, -2))
        dims = [d for d in range(x.dim()) if d != channel_dim % x.dim()]
        positive = x > 0
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean_abs_C = torch.linalg.vector_norm(x, 1, dim=dims, dtype=dtype)
        mean_abs_C /= x.numel() // mean_abs_C.numel()
        return positive, positive.to(dtype).mean(dim=dims), mean_abs_C

    @staticmethod
    def backward(ctx, grad: Tensor):
        positive, up_C, down_C = ctx.saved_tensors
        if _has_kernels(grad):
            from mvqkd.cpu_kernels import push

            grad = grad.movedim(ctx.channel_dim, -1)
            pushed = push(grad.flatten(0, -2), positive, up_C, down_C).view(grad.shape)
            return pushed.movedim(-1, ctx.channel_dim).to(grad.dtype), None, None
        shape = [1] * grad.dim()
        shape[ctx.channel_dim] = -1
        up, down = (values_C.to(grad.dtype).view(shape) for values_C in (up_C, down_C))
        push_by = torch.where(positive, up, down)
        return torch.addcmul(grad, grad.abs(), push_by, value=-1.0), None, None


class ActivationBalancer(nn.Module):
    """Identity whose gradient pushes each channel towards a range of signs and sizes.

    In training the gradient becomes ``grad - |grad| * (factor + scale * sign(x))`` with, per
    channel, over all other dimensions (padding included): factor positive while the share of
    positive values is below ``min_positive``, negative while it is above ``max_positive``; scale
    positive while the mean absolute value is below ``min_abs``, negative above ``max_abs``.

    Args:
      channel_dim: the dimension that holds the channels.
      max_factor: the greatest expected strength of each push.
      balance_prob: the probability with which a call is balanced, with strength
        ``max_factor / balance_prob``. It may be changed at any time: 0 switches the balancer
        off, 1 has it always on. Drawn from torch's default CPU generator, so that a restored
        generator state repeats the run.
    """

    def __init__(
        self,
        channel_dim: int,
        min_positive: float = 0.05,
        max_positive: float = 0.95,
        max_factor: float = 0.01,
        min_abs: float = 0.2,
        max_abs: float = 100.0,
        balance_prob: float = 0.25,
    ):
        super().__init__()
        self.channel_dim = channel_dim
        self.min_positive = min_positive
        self.max_positive = max_positive
        self.max_factor = max_factor
        self.min_abs = min_abs
        self.max_abs = max_abs
        self.balance_prob = balance_prob

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.balance_prob > 0.0 and x.requires_grad):
            return x
        if self.balance_prob < 1.0 and torch.rand(()).item() >= self.balance_prob:
            return x
        return _BalancerFunction.apply(x, self, self.max_factor / self.balance_prob)
