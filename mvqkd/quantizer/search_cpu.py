"""The search of ``mvqkd.quantizer.search``, compiled for the CPU, one frame at a time.

What a frame needs then stays in the first-level cache, but for the rows of the Gram matrix. The
rest is in two steps that a compiler does not find by itself:

- The best ``keep`` of many values are found by halving an interval around the limit between
  them and the rest. Each try compares 64 values at a time to a limit and counts bits.
- Candidates of a group share most of their entries. Only the entries in use are looked up in
  the Gram matrix, once, as moves from the current ones; all else are sums over short rows.

The machine code is kept, see ``mvqkd.compiled``. Threads are Python's: the code runs without the
interpreter lock, and may be called from any thread and after a fork.

Shapes: B frames, N codebooks, K entries each, M = N * K; of a group, L codebooks and A candidates;
J candidates per codebook, their *places* 0 to J - 1 and J for the current entry; R and C rows of
the Gram matrix in use by the first and the second group of a pair. An *entry* is a row of the
Gram matrix.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mvqkd.compiled import compiled as _compiled
from mvqkd.compiled import inlined as _inlined

# Frames that a thread takes at a time: a few milliseconds of work, so that threads end together.
_BLOCK_FRAMES = 32

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_LANES = 16  # of the rows below, which are padded to a multiple of it
_WIDTH = 64  # values per comparison: one bit each of a machine word


def _vector_pointer(context, builder, array_type, array, start, width):
    """Of ``width`` values from the ``start``-th of an array in memory order on."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [start]), ir.VectorType(_FLOAT, width).as_pointer())


def _load(builder, pointer):
    vector = builder.load(pointer)
    vector.align = 4
    return vector


def _repeat(builder, value, width):
    undefined = ir.Constant(ir.VectorType(_FLOAT, width), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INT, 0))
    everywhere = ir.Constant(ir.VectorType(_INT, width), [0] * width)
    return builder.shuffle_vector(first, undefined, everywhere)


def _row_operation(combine: Callable) -> Any:
    """``target[t : t + 16] = combine(target[t : t + 16], source[s : s + 16])``, for arrays of any
    shape indexed in memory order. Spelled out, as a compiler that cannot tell that the arrays are
    apart makes of such short rows more checks than sums."""

    @intrinsic
    def operation(typing_context, target, t, source, s):
        def codegen(context, builder, signature, args):
            pointers = [
                _vector_pointer(context, builder, signature.args[i], args[i], args[i + 1], _LANES)
                for i in (0, 2)
            ]
            result = combine(builder, *(_load(builder, pointer) for pointer in pointers))
            builder.store(result, pointers[0]).align = 4
            return context.get_dummy_value()

        return types.none(target, types.intp, source, types.intp), codegen

    return operation


_copy = _row_operation(lambda builder, target, source: source)
_add = _row_operation(lambda builder, target, source: builder.fadd(target, source))
_subtract = _row_operation(lambda builder, target, source: builder.fsub(target, source))


@intrinsic
def _copy_plus(typing_context, target, t, source, s, value):
    """``target[t : t + 16] = source[s : s + 16] + value``."""

    def codegen(context, builder, signature, args):
        into, of = (
            _vector_pointer(context, builder, signature.args[i], args[i], args[i + 1], _LANES)
            for i in (0, 2)
        )
        result = builder.fadd(_load(builder, of), _repeat(builder, args[4], _LANES))
        builder.store(result, into).align = 4
        return context.get_dummy_value()

    return types.none(target, types.intp, source, types.intp, types.float32), codegen


@intrinsic
def _bits_up_to(typing_context, array, start, limit):
    """Bit i of the result: ``array[start + i] <= limit``."""

    def codegen(context, builder, signature, args):
        pointer = _vector_pointer(context, builder, signature.args[0], args[0], args[1], _WIDTH)
        limits = _repeat(builder, args[2], _WIDTH)
        bits = builder.fcmp_ordered("<=", _load(builder, pointer), limits)
        return builder.bitcast(bits, ir.IntType(_WIDTH))

    return types.uint64(array, types.intp, types.float32), codegen


def _reduction(name: str) -> Any:
    @intrinsic
    def reduce(typing_context, array, start):
        def codegen(context, builder, signature, args):
            pointer = _vector_pointer(context, builder, signature.args[0], args[0], args[1], _WIDTH)
            function = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(_FLOAT, [ir.VectorType(_FLOAT, _WIDTH)]),
                f"llvm.vector.reduce.{name}.v{_WIDTH}f32",
            )
            return builder.call(function, [_load(builder, pointer)])

        return types.float32(array, types.intp), codegen

    return reduce


_least = _reduction("fmin")  # of array[start : start + 64]
_largest = _reduction("fmax")


@intrinsic
def _lowest_bit(typing_context, word):
    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.intp(types.uint64), codegen


@intrinsic
def _count_bits(typing_context, word):
    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.intp(types.uint64), codegen


@_inlined
def _smallest(values, start, count, keep, padded, chosen):
    """Put the places of the ``keep`` smallest of ``values[start : start + count]`` into ``chosen``;
    False if there are not as many that are numbers. ``padded``: scratch of 64."""
    if count <= keep:
        for i in range(count):
            chosen[i] = i
        return True
    if count < 64:
        for i in range(64):
            padded[i] = np.nan  # below no limit, and passed over by least and largest
        for i in range(count):
            padded[i] = values[start + i]
        values, start, count = padded, 0, 64
    # At most ``keep`` values lie below ``low`` or at it, at least as many up to ``high``.
    low, high = _least(values, start), _largest(values, start)
    for i in range(start + 64, start + count, 64):
        least = _least(values, i)
        low = least if least < low else low
    for i in range(start + 64, start + keep, 64):
        largest = _largest(values, i)
        high = largest if largest > high else high
    if keep == 1:
        high = low
    for _ in range(60):
        limit = np.float32(0.5) * (low + high)
        if limit <= low or limit >= high:
            break
        below = 0
        for i in range(start, start + count, 64):
            below += _count_bits(_bits_up_to(values, i, limit))
        if below <= keep:
            low = limit
        if below >= keep:
            high = limit
    found = 0
    for i in range(0, count, 64):
        bits = _bits_up_to(values, start + i, low)
        while bits != 0 and found < keep:
            chosen[found] = i + _lowest_bit(bits)
            found += 1
            bits &= bits - np.uint64(1)
    # What is left between the two is a tie: any of them.
    if found < keep:
        for i in range(0, count, 64):
            bits = _bits_up_to(values, start + i, high) & ~_bits_up_to(values, start + i, low)
            while bits != 0 and found < keep:
                chosen[found] = i + _lowest_bit(bits)
                found += 1
                bits &= bits - np.uint64(1)
    return found == keep


@_inlined
def _entries_in_use(places_GAL, group, A, L, entries_NJ1, place_to_row, entries_R, row_AL, rows_L1):
    """List the entries that a group's candidates use: ``entries_R``, for each of its codebooks
    the current one and then the others; ``row_AL`` says where in it each candidate's are,
    ``rows_L1`` where the current ones and the end. Returns their number."""
    J = entries_NJ1.shape[1] - 1
    R = 0
    for l in range(L):
        n = group * L + l
        rows_L1[l] = R
        entries_R[R] = entries_NJ1[n, J]
        R += 1
        for j in range(J):
            place_to_row[j] = -1
        for a in range(A):
            # Without a branch: it would be guessed wrong as often as not.
            place = places_GAL[group, a, l]
            row = place_to_row[place]
            is_new = row < 0
            row = R if is_new else row
            entries_R[R] = entries_NJ1[n, place]
            place_to_row[place] = row
            row_AL[a, l] = row
            R += is_new
    rows_L1[L] = R
    return R


@_inlined
def _move_products(
    gram_MM, A, L, entries_R, row_AL, rows_L1, entries_C, C, columns_L1, gram_RC, sum_C, product_CA
):
    """``product_CA``: each candidate's move of the first group times the move to each entry of
    the second."""
    width_C, width_A = gram_RC.shape[1], product_CA.shape[1]
    for l in range(L):
        current = rows_L1[l]
        for r in range(current, rows_L1[l + 1]):
            entry = entries_R[r]
            for c in range(C):
                gram_RC[r, c] = gram_MM[entry, entries_C[c]]
        for r in range(current + 1, rows_L1[l + 1]):
            for c in range(0, C, _LANES):
                _subtract(gram_RC, r * width_C + c, gram_RC, current * width_C + c)
    for a in range(A):
        for c in range(0, C, _LANES):
            _copy(sum_C, c, gram_RC, row_AL[a, 0] * width_C + c)
            for l in range(1, L):
                _add(sum_C, c, gram_RC, row_AL[a, l] * width_C + c)
        for c in range(C):
            product_CA[c, a] = sum_C[c]
    for l in range(L):
        current = columns_L1[l]
        for c in range(current + 1, columns_L1[l + 1]):
            for a in range(0, A, _LANES):
                _subtract(product_CA, c * width_A + a, product_CA, current * width_A + a)


@_inlined
def _scratch(N, J, A, wide):
    """Arrays of one group of a pair; A: the most candidates, ``wide`` with padding."""
    return (
        np.empty((N, A, N), np.int32),  # places by group
        np.zeros((N, wide), np.float32),  # errors by group
        np.empty(N * (J + 1) + 1, np.int32),  # entries in use
        np.empty((A, N), np.int32),  # where a candidate's are among them
        np.empty(N + 1, np.intp),  # where a codebook's are among them
    )


@_compiled("void(float32[:, ::1], float32[:, ::1], int64[:, ::1], intp, intp[::1])")
def _refine_block(gram_MM, alone_BM, entries_BN, rounds, kept):
    B, M = alone_BM.shape
    N = entries_BN.shape[1]
    K = M // N
    J, most = kept[0], kept.max()
    wide = -(-most // _LANES) * _LANES  # of rows with a column per candidate
    most_in_use = N // 2 * (J + 1)
    wide_in_use = -(-most_in_use // _LANES) * _LANES
    places_GAL, error_GA, entries_R, row_AL, rows_L1 = _scratch(N, J, most, wide)
    next_places_GAL, next_error_GA, entries_C, column_AL, columns_L1 = _scratch(N, J, most, wide)
    error_M = np.empty(M, np.float32)
    entries_NJ1 = np.empty((N, J + 1), np.int32)
    gram_RC = np.zeros((most_in_use, wide_in_use), np.float32)
    product_CA = np.zeros((most_in_use, wide), np.float32)
    sum_C = np.zeros(wide_in_use, np.float32)
    error_AA = np.zeros(most * most + _LANES, np.float32)
    padded = np.empty(64, np.float32)
    place_to_row = np.empty(J, np.int32)
    chosen = np.empty(most, np.intp)

    for frame in range(B):
        moved, whole = True, True
        for _ in range(rounds):
            # A round that changed nothing would be repeated.
            if not (moved and whole):
                break
            moved = False

            for m in range(M):
                error_M[m] = alone_BM[frame, m]
            for n in range(N):
                entry = entries_BN[frame, n]
                for m in range(M):
                    error_M[m] += gram_MM[entry, m]
            for n in range(N):
                whole &= _smallest(error_M, n * K, K, J, padded, chosen)
                if not whole:
                    break
                current = entries_BN[frame, n]
                for j in range(J):
                    entry = n * K + chosen[j]
                    entries_NJ1[n, j] = entry
                    error_GA[n, j] = error_M[entry] - error_M[current]
                    places_GAL[n, j, 0] = j
                entries_NJ1[n, J] = current

            L, P = 1, N // 2
            for level in range(len(kept) - 1):
                if not whole:
                    break
                A, keep = kept[level], kept[level + 1]
                for p in range(P):
                    first, second = 2 * p, 2 * p + 1
                    _entries_in_use(
                        places_GAL,
                        first,
                        A,
                        L,
                        entries_NJ1,
                        place_to_row,
                        entries_R,
                        row_AL,
                        rows_L1,
                    )
                    C = _entries_in_use(
                        places_GAL,
                        second,
                        A,
                        L,
                        entries_NJ1,
                        place_to_row,
                        entries_C,
                        column_AL,
                        columns_L1,
                    )
                    _move_products(
                        gram_MM,
                        A,
                        L,
                        entries_R,
                        row_AL,
                        rows_L1,
                        entries_C,
                        C,
                        columns_L1,
                        gram_RC,
                        sum_C,
                        product_CA,
                    )
                    # Where A is no multiple of 16, the next row overwrites what is too much.
                    for b in range(A):
                        for a in range(0, A, _LANES):
                            here = b * A + a
                            _copy_plus(
                                error_AA, here, error_GA, first * wide + a, error_GA[second, b]
                            )
                            for l in range(L):
                                _add(error_AA, here, product_CA, column_AL[b, l] * wide + a)
                    whole &= _smallest(error_AA, 0, A * A, keep, padded, chosen)
                    if not whole:
                        break
                    for i in range(keep):
                        a, b = chosen[i] % A, chosen[i] // A
                        next_error_GA[p, i] = error_AA[chosen[i]]
                        for l in range(L):
                            next_places_GAL[p, i, l] = places_GAL[first, a, l]
                            next_places_GAL[p, i, L + l] = places_GAL[second, b, l]
                places_GAL, next_places_GAL = next_places_GAL, places_GAL
                error_GA, next_error_GA = next_error_GA, error_GA
                L, P = 2 * L, P // 2

            # A frame that is not made of numbers keeps what it has.
            if whole:
                for n in range(N):
                    entry = entries_NJ1[n, places_GAL[0, 0, n]]
                    moved |= entry != entries_BN[frame, n]
                    entries_BN[frame, n] = entry


@_compiled("void(float32[:, ::1], float32[:, ::1], intp, int64[:, ::1])")
def _beam_block(gram_MM, alone_BM, width, entries_BN):
    B, M = alone_BM.shape
    N = entries_BN.shape[1]
    K = M // N
    entries_HN, next_entries_HN = np.empty((width, N), np.int32), np.empty((width, N), np.int32)
    error_H = np.empty(width, np.float32)
    error_HK = np.empty(-(-width * K // _WIDTH) * _WIDTH, np.float32)
    padded = np.empty(_WIDTH, np.float32)
    chosen = np.empty(width, np.intp)

    for frame in range(B):
        H, whole = 1, True
        error_H[0] = 0.0
        for n in range(N):
            first = n * K
            for h in range(H):
                here = h * K
                for k in range(K):
                    error_HK[here + k] = alone_BM[frame, first + k] + error_H[h]
                for m in range(n):
                    entry = entries_HN[h, m]
                    for k in range(K):
                        error_HK[here + k] += gram_MM[entry, first + k]
            count = H * K
            keep = min(1 if n == N - 1 else width, count)
            end = -(-count // _WIDTH) * _WIDTH
            if count > _WIDTH:
                for i in range(count, end):
                    error_HK[i] = np.nan  # below no limit, and passed over by least and largest
                whole = _smallest(error_HK, 0, end, keep, padded, chosen)
            else:
                whole = _smallest(error_HK, 0, count, keep, padded, chosen)
            if not whole:
                break
            for i in range(keep):
                h = chosen[i] // K
                error_H[i] = error_HK[chosen[i]]
                for m in range(n):
                    next_entries_HN[i, m] = entries_HN[h, m]
                next_entries_HN[i, n] = first + chosen[i] % K
            entries_HN, next_entries_HN = next_entries_HN, entries_HN
            H = keep
        # A frame that is not made of numbers keeps what it has.
        if whole:
            for n in range(N):
                entries_BN[frame, n] = entries_HN[0, n]


def beam_entries(
    gram_MM: np.ndarray,
    alone_BM: np.ndarray,
    width: int,
    entries_BN: np.ndarray,
    num_threads: int,
) -> None:
    """Beam search through the codebooks into ``entries_BN``; arguments as of `refine_entries`."""
    _in_blocks(
        lambda block: _beam_block(gram_MM, alone_BM[block], width, entries_BN[block]),
        len(entries_BN),
        num_threads,
    )


def refine_entries(
    gram_MM: np.ndarray,
    alone_BM: np.ndarray,
    entries_BN: np.ndarray,
    rounds: int,
    kept: np.ndarray,
    num_threads: int,
) -> None:
    """Refine ``entries_BN`` (int64) in place; see ``mvqkd.quantizer.search``.

    Args:
      gram_MM: float32, zero between entries of one codebook.
      alone_BM: float32, half the squared length of each center less its product with the frame.
      kept: intp, candidates per group of 1, 2, 4 ... codebooks; 1 for all of them.
    """
    _in_blocks(
        lambda block: _refine_block(gram_MM, alone_BM[block], entries_BN[block], rounds, kept),
        len(entries_BN),
        num_threads,
    )


def _in_blocks(work: Callable[[slice], None], num_frames: int, num_threads: int) -> None:
    blocks = [slice(b, b + _BLOCK_FRAMES) for b in range(0, num_frames, _BLOCK_FRAMES)]
    num_threads = min(num_threads, len(blocks))
    if num_threads <= 1:
        for block in blocks:
            work(block)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(work, blocks):
            pass
