"""The lattice recursion of the transducer loss on a GPU: one Triton kernel per direction.

An utterance is one program and the symbol axis its block. It walks over the anti-diagonals of the
regular lattice, or the frames of the others (see `mvqkd.losses.rnnt`), with the last step in
registers and the edges of the next ones on their way (Graves, arXiv 1211.3711, section 2.4).

Bytes for each of the B·(S+1)·T cells of the lattice, in float32: any implementation reads the two
edges that leave a cell, 8, and where gradients are asked for writes their two occupations, 8. That
is the floor. These kernels move 8 more: one number that the first writes and the second reads.
Each step of a walk waits for the one before, so that the latency of S + T (regular) or T steps is
what takes the time, however few the bytes are.

Shapes: B utterances, T frames, S tokens, S1 = S + 1, T1 = T + 1 for regular and T otherwise,
K steps of the walk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

if not hasattr(tl, "gather"):
    raise ImportError(f"Triton {triton.__version__} has no gather; 3.3 has")

MAX_TOKENS = 2047
# Iterations of a loop whose loads are under way at once, to hide the latency of memory.
_STAGES = tl.constexpr(5)


@triton.jit
def _edges_into(px_ptr, py_ptr, k, s, s_end, t_end, px_s, px_t, py_s, py_t, SKEW: tl.constexpr):
    """The token edge and the blank edge on which step k enters s; -inf where there is none."""
    t = k - SKEW * s
    inside = (s <= s_end) & (t < t_end)
    token = tl.load(
        px_ptr + (s - 1) * px_s + (t + SKEW) * px_t,
        mask=inside & (s >= 1) & (t + SKEW >= 0),
        other=-float("inf"),
    )
    blank = tl.load(py_ptr + s * py_s + t * py_t, mask=inside & (t >= 0), other=-float("inf"))
    return token, blank


# Sizes are not specialized: batches differ in them, and each kind would be compiled.
@triton.jit(do_not_specialize=["S1", "K", "px_b", "px_s", "px_t", "py_b", "py_s", "py_t"])
def _score_kernel(
    px_ptr,
    py_ptr,
    end_ptr,
    score_ptr,
    share_ptr,
    S1,
    K,
    px_b,
    px_s,
    px_t,
    py_b,
    py_s,
    py_t,
    SKEW: tl.constexpr,
    NEED_SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``score`` (B,) of all paths to ``end`` (B, 2), and with NEED_SHARE ``share`` (B, K, S1): of
    the probability that comes to the node that step k enters at s, the part by the token edge."""
    b = tl.program_id(0).to(tl.int64)
    px_ptr += b * px_b
    py_ptr += b * py_b
    share_ptr += b * K * S1
    s_end = tl.load(end_ptr + 2 * b).to(tl.int32)
    t_end = tl.load(end_ptr + 2 * b + 1).to(tl.int32)
    s = tl.arange(0, BLOCK)
    one_less = tl.maximum(s - 1, 0)
    alpha = tl.where(s == 0, 0.0, -float("inf"))
    for k in tl.range(0, SKEW * s_end + t_end, num_stages=_STAGES):
        token, blank = _edges_into(px_ptr, py_ptr, k, s, s_end, t_end, px_s, px_t, py_s, py_t, SKEW)
        token += tl.gather(alpha, one_less, 0)
        blank += alpha
        # NaN where neither comes from anywhere (-inf both), and where an edge is NaN.
        difference = token - blank
        smaller = tl.exp(-tl.abs(difference))
        sum_of_both = tl.maximum(token, blank) + 0.6931471805599453 * tl.log2(1 + smaller)
        nothing = (token == -float("inf")) & (blank == -float("inf"))
        alpha = tl.where(nothing, -float("inf"), sum_of_both)
        if NEED_SHARE:
            share = tl.where(difference >= 0, 1.0, smaller) / (1 + smaller)
            share = tl.where(difference == difference, share, 0.0)
            tl.store(share_ptr + k * S1 + s, share, mask=s < S1)
    tl.store(score_ptr + b, tl.sum(tl.where(s == s_end, alpha, 0.0), 0))


@triton.jit(do_not_specialize=["S1", "K"])
def _occupation_kernel(
    score_ptr,
    end_ptr,
    token_ptr,
    blank_ptr,
    S1,
    K,
    SKEW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The probability that a path takes the edge into s of step k: ``token`` and ``blank``, both
    (B, K, S1). ``token`` comes with the shares, and each is replaced once it has been read."""
    b = tl.program_id(0).to(tl.int64)
    token_ptr += b * K * S1
    blank_ptr += b * K * S1
    s_end = tl.load(end_ptr + 2 * b).to(tl.int32)
    t_end = tl.load(end_ptr + 2 * b + 1).to(tl.int32)
    k_end = SKEW * s_end + t_end
    s = tl.arange(0, BLOCK)
    one_more = tl.minimum(s + 1, BLOCK - 1)
    exists = s < S1
    for k in range(k_end, K):
        tl.store(token_ptr + k * S1 + s, tl.zeros([BLOCK], tl.float32), mask=exists)
        tl.store(blank_ptr + k * S1 + s, tl.zeros([BLOCK], tl.float32), mask=exists)
    ends_at = tl.where(tl.load(score_ptr + b) > -float("inf"), s_end, -1)
    flow = tl.where(s == ends_at, 1.0, 0.0)
    for i in tl.range(0, k_end, num_stages=_STAGES):
        row = (k_end - 1 - i) * S1 + s
        token = flow * tl.load(token_ptr + row, mask=exists, other=0.0)
        blank = flow - token
        tl.store(token_ptr + row, token, mask=exists)
        tl.store(blank_ptr + row, blank, mask=exists)
        flow = blank + tl.where(s == BLOCK - 1, 0.0, tl.gather(token, one_more, 0))


def takes(px_BST1: Tensor) -> bool:
    """Whether `walk_lattice` is made for this size and type."""
    return px_BST1.dtype == torch.float32 and px_BST1.shape[1] <= MAX_TOKENS


def walk_lattice(
    px_BST1: Tensor, py_BS1T: Tensor, end_B2: Tensor, need_occupation: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Score (B,) of all paths from (0, 0) to ``end``; optionally each edge's occupation.

    Args:
      px_BST1: float32 of any strides, as py_BS1T.
      end_B2: int64, (s_end, t_end), within the lattice.

    Returns:
      score (B,), and the occupations (B, S, T1) and (B, S+1, T), or None for both. These are not
      contiguous: the kernels write a step in a row, and they are views of that.
    """
    B, S1, T = py_BS1T.shape
    T1 = px_BST1.shape[2]
    skew = T1 - T
    K = skew * (S1 - 1) + T
    BLOCK = max(32, triton.next_power_of_2(S1))
    shape = {"SKEW": skew, "BLOCK": BLOCK, "num_warps": min(BLOCK // 32, 16)}
    end_B2 = end_B2.contiguous()
    score_B = px_BST1.new_empty(B)
    token_BKS, blank_BKS = (
        px_BST1.new_empty((B, K, S1) if need_occupation else 0) for _ in range(2)
    )
    with torch.cuda.device_of(px_BST1):
        _score_kernel[(B,)](
            px_BST1,
            py_BS1T,
            end_B2,
            score_B,
            token_BKS,
            S1,
            K,
            *px_BST1.stride(),
            *py_BS1T.stride(),
            NEED_SHARE=need_occupation,
            **shape,
        )
        if not need_occupation:
            return score_B, None, None
        _occupation_kernel[(B,)](score_B, end_B2, token_BKS, blank_BKS, S1, K, **shape)
    # The token edge that leaves (s, t) enters s + 1 at step skew * s + t, the blank edge enters s.
    strides = (K * S1, skew * S1 + 1, S1)
    return (
        score_B,
        token_BKS.as_strided((B, S1 - 1, T1), strides, 1),
        blank_BKS.as_strided((B, S1, T), strides),
    )
