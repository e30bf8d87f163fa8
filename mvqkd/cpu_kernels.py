"""Passes over activations and weights in training on a CPU, compiled: each reads and writes once.

A kernel is a C function that all threads call at the same time, with a *task*: an int64 array of
the next block to be done, their number, and the addresses and sizes that the kernel names. A
thread takes the next block until none is left. The threads are those of torch's own operations:
others would share the cores with them, as they keep spinning for a while after each operation.
What a kernel computes does not depend on how many they are.

What is dropped out is no mask in memory: whether an element is kept follows from its place and a
key, so that backward finds it again.

The machine code is kept, see ``mvqkd.compiled``.

All kernels are in this file, as Numba looks at no other to see whether what it has kept is old.

Shapes: B utterances, T frames, C channels, K kernel width; N rows of C channels; P parameters.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from mvqkd.compiled import compiled_for_c
from mvqkd.compiled import inlined_fused as _inlined

# Elements, or rows of so many elements, that a thread takes at a time: 64 KiB each of what a
# kernel reads and writes, so that the compiled loops run and the threads end together.
_BLOCK = 16384

_kernel = compiled_for_c("void(CPointer(int64))")


def _openmp_parallel():
    """OpenMP's function to call another one from all threads, of the library that torch uses."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


_PARALLEL = _openmp_parallel()


def _run(kernel, num_blocks: int, *arguments: Tensor | int) -> None:
    """Call ``kernel`` with tensors, as their addresses, and numbers, from as many threads as torch
    may use, or, where its OpenMP is not to be had, from this one."""
    task = [0, num_blocks]
    for argument in arguments:
        task.append(argument if isinstance(argument, int) else argument.data_ptr())
    task = (ctypes.c_int64 * len(task))(*task)
    num_threads = min(torch.get_num_threads(), num_blocks)
    if _PARALLEL is None or num_threads <= 1:
        kernel.ctypes(task)
    else:
        _PARALLEL(kernel.address, task, num_threads, 0)


def _contiguous(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _num_blocks(size: int, block: int = _BLOCK) -> int:
    return -(-size // block)


@intrinsic
def _take_block(typing_context, task):
    """Number of a block that no other thread has."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(task), codegen


@intrinsic
def _pointer(typing_context, address):
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), codegen


@intrinsic
def _bits(typing_context, value):
    """Of a float32, as int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(value), codegen


@intrinsic
def _from_bits(typing_context, value):
    """float32 of the bits of an int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(value), codegen


@_inlined
def _floats(address, first, size):
    """``size`` of the float32s at ``address``, from the ``first``; counted from 0 on in a loop, so
    that no index could be negative, it becomes vector instructions."""
    return numba.carray(_pointer(address + 4 * first), (size,), np.float32)


@_inlined
def _ints(address, first, size):
    return numba.carray(_pointer(address + 8 * first), (size,), np.int64)


@_inlined
def _bytes(address, first, size):
    return numba.carray(_pointer(address + first), (size,), np.uint8)


@_inlined
def _limits(block, size, total):
    """First element and number of elements of a block."""
    first = block * size
    return first, min(size, total - first)


# What the kernels compute with is float32, as a literal is not.
_0, _1, _LARGEST = np.float32(0), np.float32(1), np.float32(87)
_LOG2E, _LN2_HIGH, _LN2_LOW = (
    np.float32(1.44269504),
    np.float32(0.693359375),
    np.float32(-2.12194440e-4),
)
# Added to a float32 of at most 2^22, it leaves the nearest integer in the lowest bits.
_ROUNDING = np.float32(1.5 * 2**23)
_P0, _P1, _P2, _P3, _P4, _P5 = (np.float32(1 / f) for f in (5040, 720, 120, 24, 6, 2))
_MANTISSA, _BIAS = np.int32(23), np.int32(127 << 23)


@_inlined
def _exp(x):
    """e^x for x from -87 to 87, in operations that a compiler makes vector instructions of."""
    rounded = x * _LOG2E + _ROUNDING
    n = rounded - _ROUNDING
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    # |r| <= ln 2 / 2: the series up to r^7 / 7! is exact to float32's rounding.
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    p = p * (r * r) + r + _1
    return p * _from_bits(np.int32((_bits(rounded) << _MANTISSA) + _BIAS))


@_inlined
def _sigmoid(x):
    x = x if x < _LARGEST else _LARGEST
    x = x if x > -_LARGEST else -_LARGEST
    return _1 / (_1 + _exp(-x))


_SHIFT_A, _SHIFT_B = np.uint32(16), np.uint32(15)
_FACTOR_A, _FACTOR_B = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


@_inlined
def _draw(place, key_a, key_b):
    """32 random bits: a hash ("lowbias32" of C. Wellons' search) that takes a key at two points."""
    h = np.uint32(np.uint32(place) ^ key_a)
    h = np.uint32(np.uint32(h ^ (h >> _SHIFT_A)) * _FACTOR_A)
    h = np.uint32(h ^ key_b)
    h = np.uint32(np.uint32(h ^ (h >> _SHIFT_B)) * _FACTOR_B)
    return np.uint32(h ^ (h >> _SHIFT_A))


class DropKey:
    """What makes out which elements a dropout with probability ``p`` drops.

    Drawn from torch's default generator. p is rounded to a multiple of 2^-32.
    """

    def __init__(self, p: float):
        # A draw below the threshold is dropped.
        threshold = round(p * 2**32)
        low, high = torch.randint(2**32, (2,)).tolist() if p > 0.0 else (0, 0)
        self._arguments = np.array([low, high, threshold], dtype=np.uint32)
        self._scale = np.float32(2**32 / (2**32 - threshold))

    def arguments(self) -> tuple[int, int, int, int]:
        return *self._arguments.tolist(), int(self._scale.view(np.int32))


# task: ..., x, y, derivative, their size, and the arguments of a DropKey
@_kernel
def _double_swish(task):
    key_a, key_b, threshold = np.uint32(task[6]), np.uint32(task[7]), np.uint32(task[8])
    scale = _from_bits(np.int32(task[9]))
    block = _take_block(task)
    while block < task[1]:
        first, size = _limits(block, _BLOCK, task[5])
        x, y = _floats(task[2], first, size), _floats(task[3], first, size)
        derivative, place = _floats(task[4], first, size), np.uint32(first)
        for i in range(size):
            s = _sigmoid(x[i] - _1)
            value = x[i] * s
            factor = scale if _draw(place + np.uint32(i), key_a, key_b) >= threshold else _0
            y[i] = value * factor
            derivative[i] = (s + value * (_1 - s)) * factor
        block = _take_block(task)


def double_swish(x: Tensor, key: DropKey) -> tuple[Tensor, Tensor]:
    """DoubleSwish of ``x`` (dense in memory), dropped out, and its derivative; float32."""
    x, size = x.float(), x.numel()
    y, derivative = torch.empty_like(x), torch.empty_like(x)
    _run(_double_swish, _num_blocks(size), x, y, derivative, size, *key.arguments())
    return y, derivative


# task: ..., x, residual (0: none), y, their size, and the arguments of a DropKey
@_kernel
def _drop(task):
    key_a, key_b, threshold = np.uint32(task[6]), np.uint32(task[7]), np.uint32(task[8])
    scale = _from_bits(np.int32(task[9]))
    block = _take_block(task)
    while block < task[1]:
        first, size = _limits(block, _BLOCK, task[5])
        x, y = _floats(task[2], first, size), _floats(task[4], first, size)
        place = np.uint32(first)
        if task[3] == 0:
            for i in range(size):
                factor = scale if _draw(place + np.uint32(i), key_a, key_b) >= threshold else _0
                y[i] = x[i] * factor
        else:
            residual = _floats(task[3], first, size)
            for i in range(size):
                factor = scale if _draw(place + np.uint32(i), key_a, key_b) >= threshold else _0
                y[i] = residual[i] + x[i] * factor
        block = _take_block(task)


def drop(x: Tensor, key: DropKey, residual: Tensor | None = None) -> Tensor:
    """``x`` dropped out, plus ``residual``; of the type of a sum of the two."""
    values, size = _contiguous(x), x.numel()
    y, dtype, added = torch.empty_like(values), x.dtype, 0
    if residual is not None:
        dtype, added = torch.promote_types(dtype, residual.dtype), _contiguous(residual)
    _run(_drop, _num_blocks(size), values, added, y, size, *key.arguments())
    return y.to(dtype)


# task: ..., x (N, C), positive (N, C) uint8, sums (blocks, 2, C), N, C, rows of a block
@_kernel
def _channel_statistics(task):
    C = task[6]
    block = _take_block(task)
    while block < task[1]:
        first, rows = _limits(block, task[7], task[5])
        counted = _floats(task[4], 2 * block * C, C)
        added = _floats(task[4], (2 * block + 1) * C, C)
        for c in range(C):
            counted[c] = _0
            added[c] = _0
        for row in range(first, first + rows):
            x, positive = _floats(task[2], row * C, C), _bytes(task[3], row * C, C)
            for c in range(C):
                positive[c] = np.uint8(x[c] > _0)
                counted[c] += _1 if x[c] > _0 else _0
                added[c] += abs(x[c])
        block = _take_block(task)


def channel_statistics(x_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is positive, (N, C) uint8, and per channel its share and the mean absolute value."""
    (N, C), x_NC = x_NC.shape, _contiguous(x_NC)
    rows = max(_BLOCK // C, 1)
    blocks = _num_blocks(N, rows)
    positive_NC = torch.empty_like(x_NC, dtype=torch.uint8)
    sums = x_NC.new_empty(blocks, 2, C)
    _run(_channel_statistics, blocks, x_NC, positive_NC, sums, N, C, rows)
    share_C, mean_abs_C = sums.sum(dim=0) / N
    return positive_NC, share_C, mean_abs_C


# task: ..., grad (N, C), positive (N, C) uint8, up (C), down (C), pushed (N, C), N, C, rows
@_kernel
def _push(task):
    C = task[8]
    up, down = _floats(task[4], 0, C), _floats(task[5], 0, C)
    block = _take_block(task)
    while block < task[1]:
        first, rows = _limits(block, task[9], task[7])
        for row in range(first, first + rows):
            grad, positive = _floats(task[2], row * C, C), _bytes(task[3], row * C, C)
            pushed = _floats(task[6], row * C, C)
            for c in range(C):
                by = up[c] if positive[c] != 0 else down[c]
                pushed[c] = grad[c] - abs(grad[c]) * by
        block = _take_block(task)


def push(grad_NC: Tensor, positive_NC: Tensor, up_C: Tensor, down_C: Tensor) -> Tensor:
    """``grad - |grad| * (up where positive, else down)``, float32."""
    (N, C), grad_NC = grad_NC.shape, _contiguous(grad_NC)
    rows = max(_BLOCK // C, 1)
    pushed = torch.empty_like(grad_NC)
    blocks = _num_blocks(N, rows)
    _run(_push, blocks, grad_NC, positive_NC, up_C, down_C, pushed, N, C, rows)
    return pushed


# Channels whose sums, with the frames that they are of, fill half of a first-level cache.
_CHANNELS = 128


# task: ..., x (B, T + K - 1, C), grad (B, T, C), sums (B, K, C), T, C, K, blocks of an utterance
@_kernel
def _depthwise_weight(task):
    T, C, K, blocks = task[5], task[6], task[7], task[8]
    block = _take_block(task)
    while block < task[1]:
        b = block // blocks
        first, size = _limits(block % blocks, _CHANNELS, C)
        for k in range(K):
            total = _floats(task[4], (b * K + k) * C + first, size)
            for c in range(size):
                total[c] = _0
        # Four frames at a time: each sum is then read and written a fourth as often.
        for t in range(0, T - 3, 4):
            grads = (b * T + t) * C + first
            g0, g1 = _floats(task[3], grads, size), _floats(task[3], grads + C, size)
            g2, g3 = _floats(task[3], grads + 2 * C, size), _floats(task[3], grads + 3 * C, size)
            for k in range(K):
                frames = (b * (T + K - 1) + t + k) * C + first
                x0, x1 = _floats(task[2], frames, size), _floats(task[2], frames + C, size)
                x2 = _floats(task[2], frames + 2 * C, size)
                x3 = _floats(task[2], frames + 3 * C, size)
                total = _floats(task[4], (b * K + k) * C + first, size)
                for c in range(size):
                    total[c] += g0[c] * x0[c] + g1[c] * x1[c] + g2[c] * x2[c] + g3[c] * x3[c]
        for t in range(T - T % 4, T):
            g0 = _floats(task[3], (b * T + t) * C + first, size)
            for k in range(K):
                x0 = _floats(task[2], (b * (T + K - 1) + t + k) * C + first, size)
                total = _floats(task[4], (b * K + k) * C + first, size)
                for c in range(size):
                    total[c] += g0[c] * x0[c]
        block = _take_block(task)


def depthwise_weight_gradient(x: Tensor, grad: Tensor, K: int) -> Tensor:
    """(K, C) float32, of a depthwise convolution of (B, T + K - 1, C) frames to (B, T, C)."""
    (B, T, C), x, grad = grad.shape, _contiguous(x), _contiguous(grad)
    sums = x.new_empty(B, K, C)
    blocks = _num_blocks(C, _CHANNELS)
    _run(_depthwise_weight, B * blocks, x, grad, sums, T, C, K, blocks)
    return sums.sum(dim=0)


# Weights of a block.
_WEIGHTS = 65536


# task: ..., addresses (P, 4) of weight, gradient and moments; blocks (., 3): parameter, first
# element, size; kept (P); float32s: beta1, beta2, factor of the root, eps, rate
@_kernel
def _eve(task):
    numbers = _floats(task[5], 0, 5)
    beta1, beta2, factor, eps, rate = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    block = _take_block(task)
    while block < task[1]:
        of_block = _ints(task[3], 3 * block, 3)
        parameter, first, size = of_block[0], of_block[1], of_block[2]
        at = _ints(task[2], 4 * parameter, 4)
        p, g = _floats(at[0], first, size), _floats(at[1], first, size)
        m, v = _floats(at[2], first, size), _floats(at[3], first, size)
        kept = _floats(task[4], parameter, 1)[0]
        for i in range(size):
            m[i] = beta1 * m[i] + (_1 - beta1) * g[i]
            v[i] = beta2 * v[i] + (_1 - beta2) * (g[i] * g[i])
            p[i] = kept * p[i] - rate * m[i] / (factor * np.sqrt(v[i]) + eps)
        block = _take_block(task)


def eve(
    weights: list[Tensor],
    grads: list[Tensor],
    moments: list[Tensor],
    square_moments: list[Tensor],
    kept_P: Tensor,
    betas: tuple[float, float],
    root_factor: float,
    eps: float,
    rate: float,
) -> None:
    """Adam's moments brought up to date in place, and ``weight = kept * weight - rate * moment /
    (root_factor * sqrt(square_moment) + eps)``; weights and moments contiguous, all float32."""
    grads = [_contiguous(grad) for grad in grads]
    tensors = zip(weights, grads, moments, square_moments)
    addresses_P4 = torch.tensor([[x.data_ptr() for x in of_one] for of_one in tensors])
    blocks = [
        (parameter, first, min(_WEIGHTS, weight.numel() - first))
        for parameter, weight in enumerate(weights)
        for first in range(0, weight.numel(), _WEIGHTS)
    ]
    numbers = torch.tensor([*betas, root_factor, eps, rate])
    _run(_eve, len(blocks), addresses_P4, torch.tensor(blocks), kept_P, numbers)
