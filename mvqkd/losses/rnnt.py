"""The pruned transducer (RNN-T) loss, with k2's functions, argument names, shapes and meaning.

Source: Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training", Interspeech 2022
(arXiv 2206.13236), on the transducer of Graves (arXiv 1211.3711). A training step calls, in order:

>>> simple_loss, (px_grad, py_grad) = rnnt_loss_smoothed(
...     lm, am, symbols, 0, lm_only_scale=0.25, boundary=boundary, return_grad=True)
>>> ranges = get_rnnt_prune_ranges(px_grad, py_grad, boundary, s_range=5)
>>> am_pruned, lm_pruned = do_rnnt_pruning(encoder_out, decoder_out, ranges)
>>> loss = rnnt_loss_pruned(joiner(am_pruned, lm_pruned), symbols, ranges, 0, boundary)

A path through the lattice starts at (0 tokens, 0 frames) and ends at (s_end, t_end).
``px[b, s, t]`` is the log-probability of emitting token s on frame t, ``py[b, s, t]`` that of blank
after s tokens on frame t, which goes to the next frame. ``rnnt_type`` says what a token does:

- ``regular``: stays on the frame; any number of tokens a frame.
- ``modified``: goes to the next frame; at most one token a frame.
- ``constrained``: as modified, and the blank that leaves the frame, given the token, is paid for.

Arguments that several functions share:

- ``boundary``: (B, 4) int64, rows [s_begin, t_begin, s_end, t_end]; None means [0, 0, S, T].
- ``termination_symbol``: the blank, in 0..V-1.
- ``delay_penalty``: adds ``delay_penalty * ((t_end - 1) / 2 - t)`` to the score of a token on frame
  t, so that late tokens cost more (Kang et al., arXiv 2211.00490). Not negative.
- ``reduction``: ``none`` gives (B,), ``mean`` and ``sum`` a scalar over the batch.
- ``return_grad``: also return ``(px_grad, py_grad)``, the probability that a path takes each edge
  of the lattice; they carry no gradient.
- ``backend``: ``native`` is this file, ``k2`` is k2, ``auto`` (the default) is k2 where it imports.
  What k2 1.23.4 asserts against, an utterance without tokens or more tokens than frames say, is
  computed here with any of them.

An utterance for which no path exists (fewer frames than tokens with ``modified``, say) has loss
+inf and no gradient. Half-precision inputs are computed in float32, with k2 too. Wrong shapes and
values raise ValueError.

Shapes: B utterances, T frames, S tokens, S1 = S + 1, V vocabulary with blank, D model dimension,
R prune range, T1 = T + 1 for regular and T otherwise, K steps of the lattice recursion.
"""

import contextlib
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

RNNT_TYPES = ("regular", "modified", "constrained")
BACKENDS = ("auto", "native", "k2")


@functools.cache
def import_k2():
    """k2, or None where it is missing or was built for another torch (tried once)."""
    try:
        return importlib.import_module("k2")
    except (ImportError, OSError):
        return None


def _with_backend(is_of_k2: Callable[..., bool], any_float: bool = False) -> Callable:
    """Give a function of this file the keyword ``backend``, which may hand the call to k2.

    Args:
      is_of_k2: whether k2 takes a call, by the arguments; what it cannot read, it may raise of.
      any_float: whether k2's function takes half precision too; others get it as float32.
    """

    def decorate(native: Callable) -> Callable:
        signature = inspect.signature(native)

        @functools.wraps(native)
        def dispatch(*args, backend: str = "auto", **kwargs):
            if backend not in BACKENDS:
                raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
            k2 = None if backend == "native" else import_k2()
            if backend == "k2" and k2 is None:
                raise ValueError("backend 'k2' was asked for, but k2 does not import; use 'native'")
            function = native
            if k2 is not None:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                # Of wrong shapes the native function says what is wrong.
                with contextlib.suppress(AttributeError, IndexError, RuntimeError):
                    if is_of_k2(**bound.arguments):
                        function = getattr(k2, native.__name__)
                        if not any_float:
                            args = [_at_least_float32(value) for value in args]
                            kwargs = {k: _at_least_float32(value) for k, value in kwargs.items()}
            return function(*args, **kwargs)

        keyword = inspect.Parameter(
            "backend", inspect.Parameter.KEYWORD_ONLY, default="auto", annotation=str
        )
        parameters = [*signature.parameters.values(), keyword]
        dispatch.__signature__ = signature.replace(parameters=parameters)
        return dispatch

    return decorate


def _enough_for_k2(S: int, T: int) -> bool:
    return 1 <= S <= T


def _simple_of_k2(lm: Tensor, am: Tensor, **_) -> bool:
    return _enough_for_k2(lm.shape[1] - 1, am.shape[1])


def _pruned_of_k2(logits: Tensor, symbols: Tensor, **_) -> bool:
    return _enough_for_k2(symbols.shape[1], logits.shape[1])


def _ranges_of_k2(px_grad: Tensor, py_grad: Tensor, boundary: Tensor, s_range: int) -> bool:
    (_, S, T1), T = px_grad.shape, py_grad.shape[2]
    return _enough_for_k2(S, T) and s_range == _range_with_paths(s_range, S, T1 == T + 1, boundary)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_type(rnnt_type: str) -> None:
    _check(rnnt_type in RNNT_TYPES, f"rnnt_type must be one of {RNNT_TYPES}, got {rnnt_type!r}")


def _check_boundary(boundary: Tensor | None, B: int) -> None:
    _check(
        boundary is None or (boundary.shape == (B, 4) and boundary.dtype == torch.int64),
        f"boundary must be ({B}, 4) int64 [s_begin, t_begin, s_end, t_end], got "
        + (f"{tuple(boundary.shape)} {boundary.dtype}" if boundary is not None else "None"),
    )


def _at_least_float32(x: Any) -> Any:
    """A tensor of half precision as float32; anything else as it is."""
    return x.float() if getattr(x, "dtype", None) in (torch.bfloat16, torch.float16) else x


def _reduce(loss_B: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss_B
    if reduction == "mean":
        return loss_B.mean()
    if reduction == "sum":
        return loss_B.sum()
    raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")


# ---- the lattice ---------------------------------------------------------------------------------


def _edge_view(edges_KSB: Tensor, num_s: int, num_t: int, s_offset: int, skew: int) -> Tensor:
    """A view (num_s, num_t, B) of the edges that leave node (s, t), which lie at step
    ``skew * s + t`` and row ``s + s_offset``."""
    k_stride, s_stride, b_stride = edges_KSB.stride()
    return edges_KSB.as_strided(
        (num_s, num_t, edges_KSB.shape[2]),
        (skew * k_stride + s_stride, k_stride, b_stride),
        edges_KSB.storage_offset() + s_offset * s_stride,
    )


def _shift(x_BST: Tensor, shift_B2: Tensor, fill: float) -> Tensor:
    """``y[b, s, t] = x[b, s + shift[b, 0], t + shift[b, 1]]``, and ``fill`` outside of x."""
    B, num_s, num_t = x_BST.shape
    s_BS1 = torch.arange(num_s, device=x_BST.device)[None, :, None] + shift_B2[:, 0, None, None]
    t_B1T = torch.arange(num_t, device=x_BST.device)[None, None, :] + shift_B2[:, 1, None, None]
    inside = (s_BS1 >= 0) & (s_BS1 < num_s) & (t_B1T >= 0) & (t_B1T < num_t)
    b_B11 = torch.arange(B, device=x_BST.device)[:, None, None]
    values = x_BST[b_B11, s_BS1.clamp(0, max(num_s - 1, 0)), t_B1T.clamp(0, max(num_t - 1, 0))]
    return values.masked_fill(~inside, fill)


def _walk_lattice(
    px_BST1: Tensor, py_BS1T: Tensor, end_B2: Tensor, need_occupation: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Score (B,) of all paths from (0, 0) to ``end``; optionally each edge's occupation.

    The nodes that do not depend on each other (an anti-diagonal of the regular lattice, a frame of
    the others) are one step, two kernels over all s and b. The rows of a step are laid out (s, b)
    flat, so that "one token less" is an offset of B elements, not a copy.
    """
    B, S1, T = py_BS1T.shape
    S = S1 - 1
    skew = int(px_BST1.shape[2] == T + 1)
    K, N = skew * S + T, S1 * B
    new = functools.partial(px_BST1.new_full, fill_value=-torch.inf)

    # edges[k, 0, s] enters s from s - 1 (a token), edges[k, 1, s] enters s from s (a blank).
    edges_K2SB = new((K, 2, S1, B))
    _edge_view(edges_K2SB[:, 0], S, px_BST1.shape[2], 1, skew).copy_(px_BST1.permute(1, 2, 0))
    _edge_view(edges_K2SB[:, 1], S1, T, 0, skew).copy_(py_BS1T.permute(1, 2, 0))

    # Row 0 is a place that nothing reaches: where tokens "enter" s = 0 from.
    alpha_KSB = new((K + 1, S1 + 1, B))
    alpha_KSB[0, 1] = 0
    sources_K2N = alpha_KSB.as_strided((K, 2, N), ((S1 + 1) * B, B, 1))
    edges_K2N = edges_K2SB.view(K, 2, N)
    for source, edge, token, blank, target in zip(
        sources_K2N.unbind(),
        edges_K2N.unbind(),
        edges_K2N[:, 0].unbind(),
        edges_K2N[:, 1].unbind(),
        alpha_KSB[1:, 1:].flatten(1).unbind(),
    ):
        edge += source
        torch.logaddexp(token, blank, out=target)

    end_k_B = skew * end_B2[:, 0] + end_B2[:, 1]
    b = torch.arange(B, device=px_BST1.device)
    score_B = alpha_KSB[end_k_B, end_B2[:, 0] + 1, b]
    if not need_occupation:
        return score_B, None, None

    # edges now holds the scores of the two ways into each node. Their shares follow from the
    # difference of the two, so what flows back from the end is a probability whatever the scale
    # of the scores; exp(alpha + edge + beta - score) loses it to rounding when they are large.
    # NaN is -inf against -inf: no path comes here, and none of the flow does.
    token_KN = torch.sub(edges_K2N[:, 0], edges_K2N[:, 1]).sigmoid_().nan_to_num_(0.0)
    blank_KN = 1 - token_KN
    flow_KSB = torch.zeros_like(alpha_KSB[:, 1:])
    flow_KSB[end_k_B, end_B2[:, 0], b] = (score_B > -torch.inf).to(score_B.dtype)
    flow_KN = flow_KSB.view(K + 1, N)
    for into, into_fewer, out, out_more, blank, token in zip(
        reversed(flow_KN[:-1].unbind()),
        reversed(flow_KN[:-1, : N - B].unbind()),
        reversed(flow_KN[1:].unbind()),
        reversed(flow_KN[1:, B:].unbind()),
        reversed(blank_KN.unbind()),
        reversed(token_KN[:, B:].unbind()),
    ):
        into.addcmul_(out, blank)
        into_fewer.addcmul_(out_more, token)
    token_KSB = token_KN.mul_(flow_KN[1:]).view(K, S1, B)
    blank_KSB = blank_KN.mul_(flow_KN[1:]).view(K, S1, B)
    px_grad = _edge_view(token_KSB, S, px_BST1.shape[2], 1, skew).permute(2, 0, 1).contiguous()
    py_grad = _edge_view(blank_KSB, S1, T, 0, skew).permute(2, 0, 1).contiguous()
    return score_B, px_grad, py_grad


def _warn_of_no_triton(device: torch.device, error: Exception) -> None:
    warnings.warn(f"no Triton on {device}: slower transducer loss: {error}", stacklevel=3)


@functools.cache
def _triton_kernels(device: torch.device):
    """The module `mvqkd.losses.rnnt_triton`, or None where its kernels do not run on the device.

    Tried once: Triton, and the compiler and Python's headers that it needs, need not be where
    torch is.
    """
    try:
        kernels = importlib.import_module("mvqkd.losses.rnnt_triton")
    except ImportError as error:
        _warn_of_no_triton(device, error)
        return None
    cell = torch.zeros(1, 1, 1, device=device)
    try:
        kernels.walk_lattice(cell[:, 1:], cell, torch.tensor([[0, 1]], device=device), True)
    except Exception as error:
        _warn_of_no_triton(device, error)
        return None
    return kernels


def _choose_walk(px_BST1: Tensor) -> Callable:
    kernels = _triton_kernels(px_BST1.device) if px_BST1.is_cuda else None
    return kernels.walk_lattice if kernels and kernels.takes(px_BST1) else _walk_lattice


class _LatticeScore(torch.autograd.Function):
    """Scores of the lattice and, as further outputs, the occupations, which are its gradient."""

    @staticmethod
    def forward(ctx, px, py, boundary, shifted, need_occupation):
        begin, end = boundary[:, :2], boundary[:, 2:]
        if shifted:
            px, py = (_shift(x, begin, -torch.inf) for x in (px, py))
        score, px_grad, py_grad = _choose_walk(px)(px, py, end - begin, need_occupation)
        if need_occupation:
            if shifted:
                px_grad, py_grad = (_shift(x, -begin, 0.0) for x in (px_grad, py_grad))
            ctx.save_for_backward(px_grad, py_grad)
            ctx.mark_non_differentiable(px_grad, py_grad)
        return score, px_grad, py_grad

    @staticmethod
    @once_differentiable
    def backward(ctx, score_grad, _px_grad_grad, _py_grad_grad):
        px_grad, py_grad = ctx.saved_tensors
        scale = score_grad[:, None, None]
        return px_grad * scale, py_grad * scale, None, None, None


@_with_backend(lambda px, **_: px.shape[1] >= 1)
def mutual_information_recursion(
    px: Tensor, py: Tensor, boundary: Tensor | None = None, return_grad: bool = False
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Log of the summed probability of all paths through a lattice (arXiv 1211.3711).

    ``p[0, 0] = 0``; ``p[s, t] = logaddexp(p[s-1, t'] + px[s-1, t'], p[s, t-1] + py[s, t-1])`` with
    t' = t for the regular lattice and t - 1 for the others; the result is ``p[s_end, t_end]``.

    Args:
      px: (B, S, T+1) for the regular lattice, where ``px[b, :, t_end]`` is -inf for no token may
        follow the last blank, or (B, S, T) for modified and constrained.
      py: (B, S+1, T).

    Returns:
      scores (B,), or ``(scores, (px_grad, py_grad))`` with ``return_grad``.

    Raises:
      ValueError: shapes do not match, or a boundary lies outside of them.
    """
    _check(px.dim() == 3 and py.dim() == 3, "px and py must have 3 dimensions")
    (B, S, T1), T = px.shape, py.shape[2]
    _check(
        py.shape == (B, S + 1, T) and T1 in (T, T + 1),
        f"px must be (B, S, T) or (B, S, T+1) and py (B, S+1, T), got {tuple(px.shape)} and "
        f"{tuple(py.shape)}",
    )
    _check_boundary(boundary, B)
    # Whether any utterance begins later than at (0, 0).
    shifted = False
    if boundary is None:
        boundary = torch.tensor([0, 0, S, T], device=px.device).expand(B, 4)
    else:
        begin, end = boundary[:, :2], boundary[:, 2:]
        inside_B2 = (begin >= 0) & (begin <= end)
        within_B = (end[:, 0] <= S) & (end[:, 1] <= T)
        # Both at once: each look at a value waits for the GPU.
        facts = torch.stack((inside_B2.all() & within_B.all(), (begin != 0).any()))
        valid, shifted = facts.tolist()
        if not valid:
            raise ValueError(
                f"boundary must satisfy 0 <= begin <= end <= (S={S}, T={T}), got "
                f"{boundary.tolist()}"
            )
    dtype = torch.promote_types(torch.promote_types(px.dtype, py.dtype), torch.float32)
    need_occupation = return_grad or (
        torch.is_grad_enabled() and (px.requires_grad or py.requires_grad)
    )
    score, px_grad, py_grad = _LatticeScore.apply(
        px.to(dtype), py.to(dtype), boundary, shifted, need_occupation
    )
    return (score, (px_grad, py_grad)) if return_grad else score


def _forbid_tokens_after_end(px_BST1: Tensor, boundary: Tensor | None) -> Tensor:
    """-inf for tokens on "frame" t_end of the regular lattice, which only pads the tensor."""
    if boundary is None:
        return px_BST1
    t_T1 = torch.arange(px_BST1.shape[2], device=px_BST1.device)
    return px_BST1.masked_fill(t_T1 == boundary[:, 3, None, None], -torch.inf)


def _loss(
    px: Tensor,
    py: Tensor,
    boundary: Tensor | None,
    delay_penalty: float,
    reduction: str,
    return_grad: bool,
):
    _check(delay_penalty >= 0, f"delay_penalty must not be negative, got {delay_penalty}")
    if delay_penalty > 0:
        t_end = py.shape[2] if boundary is None else boundary[:, 3, None, None]
        t_T1 = torch.arange(px.shape[2], device=px.device)
        px = px + (delay_penalty * ((t_end - 1) / 2 - t_T1)).to(px.dtype)
    if not return_grad:
        return _reduce(-mutual_information_recursion(px, py, boundary, backend="native"), reduction)
    score, grads = mutual_information_recursion(px, py, boundary, True, backend="native")
    return _reduce(-score, reduction), grads


# ---- the simple loss: the joiner is an addition --------------------------------------------------


@_with_backend(_simple_of_k2)
def get_rnnt_logprobs_smoothed(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    lm_only_scale: float = 0.1,
    am_only_scale: float = 0.1,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
) -> tuple[Tensor, Tensor]:
    """Edges of the lattice whose joiner is ``lm + am``, smoothed (arXiv 2206.13236).

    Each log-probability is ``(1 - lm_only_scale - am_only_scale)`` times that of softmax(lm + am),
    plus ``lm_only_scale`` times that of softmax(lm), plus ``am_only_scale`` times that of
    softmax(am + u), u being the log of softmax(lm) averaged over all positions of the batch.

    Args:
      lm: (B, S+1, V) logits given the tokens so far.
      am: (B, T, V) logits given a frame.
      symbols: (B, S) int64, each in 0..V-1.

    Returns:
      px, (B, S, T+1) for regular and (B, S, T) otherwise, and py, (B, S+1, T).
    """
    _check_type(rnnt_type)
    _check(
        lm.dim() == 3 and am.dim() == 3 and lm.shape[::2] == am.shape[::2] and lm.shape[1] >= 1,
        f"lm must be (B, S+1, V) and am (B, T, V), got {tuple(lm.shape)} and {tuple(am.shape)}",
    )
    (B, T, V), S = am.shape, lm.shape[1] - 1
    _check(symbols.shape == (B, S), f"symbols must be ({B}, {S}), got {tuple(symbols.shape)}")
    _check(0 <= termination_symbol < V, f"termination_symbol must be in 0..{V - 1}")
    _check_boundary(boundary, B)
    joint_scale = 1.0 - lm_only_scale - am_only_scale

    # All three terms are unchanged by adding a constant to a row of lm or am, so both are first
    # brought to a range in which exp() is safe.
    am_BTV = _at_least_float32(am)
    am_BTV = am_BTV - am_BTV.amax(2, keepdim=True).detach()
    lm_BSV = F.log_softmax(_at_least_float32(lm), dim=2)
    histories_BSV = lm_BSV
    finfo = torch.finfo(am_BTV.dtype)
    if am_only_scale != 0:
        # The unigram u is one more history to be joined with the frames: the last row.
        mean_V = lm_BSV.flatten(0, 1).logsumexp(0)
        # Made on the device, where a copy to it would wait for the device.
        mean_V = mean_V - mean_V.new_full((), B * (S + 1)).log()
        u_V = torch.logaddexp(mean_V, torch.full_like(mean_V, finfo.tiny).log())
        u_V = u_V - u_V.amax().detach()
        histories_BSV = torch.cat((lm_BSV, u_V.expand(B, 1, V)), dim=1)

    # The normalizers: a matrix product of exponentials, no (B, S, T, V) tensor. The floor
    # is what a history and a frame that exclude each other get; its inverse, times gradients of
    # any size, must stay finite. Automatic mixed precision would take the product in half.
    with torch.autocast(device_type=am.device.type, enabled=False):
        sum_BST = torch.matmul(histories_BSV.exp(), am_BTV.exp().transpose(1, 2))
    normalizer_BST = (sum_BST + finfo.tiny**0.8).log()

    # Tokens and blank are looked up together: each look-up costs a (B, T, V) gradient.
    lookup_BS1 = F.pad(symbols, (0, 1), value=termination_symbol)
    am_BST = am_BTV.gather(2, lookup_BS1[:, None, :].expand(B, T, S + 1)).transpose(1, 2)
    lm_token_BS1, lm_blank_BS1 = lm_BSV.gather(
        2, torch.stack((lookup_BS1, torch.full_like(lookup_BS1, termination_symbol)), dim=2)
    ).unbind(2)

    # What depends on s alone, on t alone and on both, weighted, is added up in that order.
    s_token_BS1 = (joint_scale + lm_only_scale) * lm_token_BS1
    s_blank_BS1 = (joint_scale + lm_only_scale) * lm_blank_BS1
    st_BST = (joint_scale + am_only_scale) * am_BST
    if am_only_scale != 0:
        u_BS1 = am_only_scale * u_V[lookup_BS1]
        s_token_BS1, s_blank_BS1 = s_token_BS1 + u_BS1, s_blank_BS1 + u_BS1[:, -1:]
        st_BST = st_BST - am_only_scale * normalizer_BST[:, S + 1 :]
    joint_BST = joint_scale * normalizer_BST[:, : S + 1]
    px = s_token_BS1[:, :S, None] + st_BST[:, :S] - joint_BST[:, :S]
    py = s_blank_BS1[:, :, None] + st_BST[:, S:] - joint_BST
    if rnnt_type == "regular":
        px = _forbid_tokens_after_end(F.pad(px, (0, 1), value=-torch.inf), boundary)
    elif rnnt_type == "constrained":
        px = px + py[:, 1:]
    return px, py


@_with_backend(_simple_of_k2)
def rnnt_loss_smoothed(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    lm_only_scale: float = 0.1,
    am_only_scale: float = 0.1,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """The simple loss with smoothing, from which the prune ranges come.

    Arguments and errors are those of `get_rnnt_logprobs_smoothed` and of the top of this file.
    """
    px, py = get_rnnt_logprobs_smoothed(
        lm,
        am,
        symbols,
        termination_symbol,
        lm_only_scale=lm_only_scale,
        am_only_scale=am_only_scale,
        boundary=boundary,
        rnnt_type=rnnt_type,
        backend="native",
    )
    return _loss(px, py, boundary, delay_penalty, reduction, return_grad)


@_with_backend(_simple_of_k2)
def rnnt_loss_simple(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """The transducer loss whose joiner is ``lm + am``: `rnnt_loss_smoothed` without smoothing."""
    return rnnt_loss_smoothed(
        lm,
        am,
        symbols,
        termination_symbol,
        lm_only_scale=0.0,
        am_only_scale=0.0,
        boundary=boundary,
        rnnt_type=rnnt_type,
        delay_penalty=delay_penalty,
        reduction=reduction,
        return_grad=return_grad,
        backend="native",
    )


# ---- pruning -------------------------------------------------------------------------------------


def _running_min_from_right(x_BT: Tensor) -> Tensor:
    return x_BT.flip(1).cummin(1).values.flip(1)


def _range_with_paths(s_range: int, S: int, regular: bool, boundary: Tensor) -> int:
    """The range nearest to ``s_range`` that leaves each utterance a path, of S + 1 at most."""
    smallest = 1
    if regular and S > 0:
        # A window begins up to R - 1 positions after the one before it, the first at 0: on t_end
        # frames they come to (R - 1) * t_end. Without a frame there is no path in any range.
        s_end_B, t_end_B = boundary[:, 2], boundary[:, 3]
        steps_B = (s_end_B + t_end_B - 1) // t_end_B.clamp_min(1)
        smallest = 1 + max(1, int((steps_B * (t_end_B > 0)).max()))
    return min(max(s_range, smallest), S + 1)


@_with_backend(_ranges_of_k2)
def get_rnnt_prune_ranges(
    px_grad: Tensor, py_grad: Tensor, boundary: Tensor, s_range: int
) -> Tensor:
    """The tokens that each frame keeps (arXiv 2206.13236, section 3.2).

    A frame's window of ``s_range`` positions is the one that holds the most occupation. Windows are
    then moved so that they start at 0, never go back, end at s_end, and neighbours overlap (or, for
    modified and constrained, move by at most one position a frame).

    Args:
      px_grad: (B, S, T+1) for regular or (B, S, T) otherwise, from ``return_grad``.
      py_grad: (B, S+1, T).
      boundary: (B, 4) int64.
      s_range: R, positions to keep a frame. Changed with a warning where it is above S + 1, or so
        small that an utterance is left without a path: below 2 and below ``ceil(s_end / t_end) +
        1`` of any of them for regular, below 1 otherwise (below 2 no path of the constrained type
        survives, which cannot be told from modified here).

    Returns:
      (B, T, R) int64, consecutive positions in 0..S.
    """
    _check(px_grad.dim() == 3 and py_grad.dim() == 3, "px_grad and py_grad must have 3 dimensions")
    (B, S, T1), T = px_grad.shape, py_grad.shape[2]
    _check(
        py_grad.shape == (B, S + 1, T) and T1 in (T, T + 1),
        f"px_grad must be (B, S, T) or (B, S, T+1) and py_grad (B, S+1, T), got "
        f"{tuple(px_grad.shape)} and {tuple(py_grad.shape)}",
    )
    _check(boundary is not None, "boundary is needed for the prune ranges")
    _check_boundary(boundary, B)
    regular = T1 == T + 1
    R = _range_with_paths(s_range, S, regular, boundary)
    if s_range < R:
        warnings.warn(
            f"s_range: {s_range} leaves an utterance without a path: raised to {R}", stacklevel=3
        )
    elif s_range > R:
        warnings.warn(
            f"s_range: {s_range} exceeds the tokens of the batch + 1: lowered to {R}", stacklevel=3
        )

    # A token that enters the window's first position was emitted from outside of it.
    window_BWT = py_grad.unfold(1, R, 1).sum(3)
    entered_BWT = F.pad(px_grad, (0, 0, 1, 0))[:, : S + 2 - R, :T]
    begin_BT = (window_BWT - entered_BWT).argmax(1)

    t_T = torch.arange(T, device=py_grad.device)
    last_B1 = (boundary[:, 2, None] - R + 1).clamp_min(0)
    begin_BT = torch.where(t_T < boundary[:, 3, None] - 1, begin_BT, last_B1)

    # Never back: the smallest of what follows. By at most `step` forward: the same for the distance
    # to the steepest line, which must not be negative, for at frame 0 that line is at 0.
    begin_BT = _running_min_from_right(begin_BT)
    steepest_T = (R - 1 if regular else 1) * t_T
    begin_BT = steepest_T - _running_min_from_right(steepest_T - begin_BT).clamp_min(0)
    return begin_BT[:, :, None] + torch.arange(R, device=py_grad.device)


@_with_backend(lambda **_: True, any_float=True)
def do_rnnt_pruning(am: Tensor, lm: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Encoder and predictor outputs, paired as the joiner needs them.

    Args:
      am: (B, T, D) encoder output.
      lm: (B, S+1, D') predictor output.
      ranges: (B, T, R) from `get_rnnt_prune_ranges`.

    Returns:
      am (B, T, R, D), a view, and lm (B, T, R, D').
    """
    _check(
        am.dim() == 3
        and lm.dim() == 3
        and ranges.dim() == 3
        and am.shape[:2] == ranges.shape[:2]
        and lm.shape[0] == ranges.shape[0],
        f"am must be (B, T, D), lm (B, S+1, D) and ranges (B, T, R), got {tuple(am.shape)}, "
        f"{tuple(lm.shape)} and {tuple(ranges.shape)}",
    )
    B, S1 = lm.shape[:2]
    # A look-up in a table of all rows of the batch: its gradient needs no (B, T, S+1, D) tensor.
    first_row_B = torch.arange(B, device=lm.device) * S1
    lm_pruned = F.embedding(ranges + first_row_B[:, None, None], lm.flatten(0, 1))
    return am[:, :, None, :].expand(-1, -1, ranges.shape[2], -1), lm_pruned


class _LogSoftmaxGather(torch.autograd.Function):
    """``log_softmax(logits).gather(-1, index)`` that keeps nothing but the logits."""

    @staticmethod
    def forward(ctx, logits, index):
        ctx.save_for_backward(logits, index)
        return F.log_softmax(_at_least_float32(logits), dim=-1).gather(-1, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, index = ctx.saved_tensors
        logits_grad = F.softmax(_at_least_float32(logits), dim=-1)
        logits_grad.mul_(-grad.sum(-1, keepdim=True)).scatter_add_(-1, index, grad)
        return logits_grad.to(logits.dtype), None


@_with_backend(_pruned_of_k2)
def get_rnnt_logprobs_pruned(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor,
    termination_symbol: int,
    boundary: Tensor | None,
    rnnt_type: str = "regular",
) -> tuple[Tensor, Tensor]:
    """Edges of the lattice from the pruned joiner; -inf outside of the ranges.

    Args:
      logits: (B, T, R, V) joiner output.
      symbols: (B, S) int64.
      ranges: (B, T, R) from `get_rnnt_prune_ranges`.

    Returns:
      px, (B, S, T+1) for regular and (B, S, T) otherwise, and py, (B, S+1, T).
    """
    _check_type(rnnt_type)
    _check(
        logits.dim() == 4 and ranges.shape == logits.shape[:3],
        f"logits must be (B, T, R, V) and ranges (B, T, R), got {tuple(logits.shape)} and "
        f"{tuple(ranges.shape)}",
    )
    B, T, R, V = logits.shape
    _check(
        symbols.dim() == 2 and symbols.shape[0] == B,
        f"symbols must be ({B}, S), got {tuple(symbols.shape)}",
    )
    S1 = symbols.shape[1] + 1
    _check(R <= S1, f"logits keep {R} positions a frame, but there are only S+1 = {S1}")
    if rnnt_type == "constrained" and R == 1 < S1:
        warnings.warn("ranges of 1 hold no constrained path: take an s_range of 2", stacklevel=3)
    _check(0 <= termination_symbol < V, f"termination_symbol must be in 0..{V - 1}")
    _check_boundary(boundary, B)

    # Position S has no token to emit; any index will do, for its row of px is cut off below.
    tokens_BS1 = F.pad(symbols, (0, 1), value=termination_symbol)
    tokens_BTR = tokens_BS1.gather(1, ranges.flatten(1)).view_as(ranges)
    index_BTR2 = torch.stack((tokens_BTR, torch.full_like(ranges, termination_symbol)), dim=-1)
    px_BTR, py_BTR = _LogSoftmaxGather.apply(logits, index_BTR2).unbind(-1)

    def unprune(x_BTR: Tensor, num_t: int) -> Tensor:
        return x_BTR.new_full((B, num_t, S1), -torch.inf).scatter(2, ranges, x_BTR).transpose(1, 2)

    regular = rnnt_type == "regular"
    px, py = unprune(px_BTR, T + 1 if regular else T)[:, :-1], unprune(py_BTR, T)
    if regular:
        px = _forbid_tokens_after_end(px, boundary)
    elif rnnt_type == "constrained":
        px = px + py[:, 1:]
    return px, py


@_with_backend(_pruned_of_k2)
def rnnt_loss_pruned(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The transducer loss over the paths inside the ranges (arXiv 2206.13236).

    Arguments and errors are those of `get_rnnt_logprobs_pruned` and of the top of this file.
    """
    px, py = get_rnnt_logprobs_pruned(
        logits, symbols, ranges, termination_symbol, boundary, rnnt_type=rnnt_type, backend="native"
    )
    return _loss(px, py, boundary, delay_penalty, reduction, return_grad=False)
