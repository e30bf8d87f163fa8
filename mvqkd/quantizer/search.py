"""The search for codebook indexes, by tables.

Source of the search: Guo, Yang et al., "Predicting Multi-Codebook Vector Quantization Indexes for
Knowledge Distillation", ICASSP 2023 (arXiv 2211.00508), section 3.2, with the constants of the
authors' package ``multi_quantization``. The tables are ours: the same decisions without vectors.

A round takes a frame's current entry of each codebook and:

1. scores each entry of a codebook by the squared error that it gives with the other codebooks
   held, and keeps the ``num_candidates(1)`` best (16 of 256);
2. joins codebooks to pairs: all combinations of two candidates, scored with the others held, the
   ``num_candidates(2)`` best kept; then pairs to fours, and so on;
3. when one group is left, takes its best candidate.

The result depends on the current entries alone, so a frame that a round leaves as it was is done.

**Restarts**, ours: a round moves each codebook to one of its 16 best entries, and may end where
only worse ones lead on. A restart replaces the entries of two codebooks, searches on from there,
and keeps what it finds if the error is lower (iterated local search, as in Martinez et al.,
"LSQ++", ECCV 2018). Which two, and by which entries, is the same for every frame, so that the
indexes of a frame depend on nothing else. A quantizer has none unless it was trained for them.

**Tables.** With e_n the chosen center of codebook n, half the squared error is, up to a constant,
sum_n (|e_n|²/2 - x·e_n) + sum_{n<m} e_n·e_m: entries of the vector x·centers and of the Gram matrix
of all centers. A score of step 1 is the first of these terms plus N entries of the Gram matrix. A
score of step 2 is the scores of the two parts plus the product of the two moves (candidate less
current entries), a sum of Gram entries again.

**Floor**, per frame at D = 1280, N = 8, K = 256 (M = N·K = 2048): the product with ``to_logits``
and the product with the centers, 2 · 2·D·M = 10.5 MFLOP; 4·D bytes in, N out. A round adds N rows
of the Gram matrix (N·M = 16 k additions, 64 KB) and at most (17·N)²/2 = 9 k look-ups and some
20 k additions, well under 1 % of those operations; its cost is memory access. The Gram matrix has
4·M² = 16 MB, which a third-level cache or a GPU's second-level cache holds. Making it takes
M²·D·(N-1)/N = 4.7 GFLOP, once per set of centers: nothing in encoding, but in training once a step.

Two forms: ``mvqkd.quantizer.search_cpu`` for the CPU, torch operations here for all other devices.

Shapes: B frames, D dimension of a frame, N codebooks, K entries per codebook, M = N * K centers of
all codebooks together. In a round: P pairs of groups, L codebooks per group, J candidates per
codebook (and J1 = J + 1 with the current entry), A candidates per group (and A1 = A + 1 with the
current one).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# Bytes that the search may hold beside its input, output and tables. On the CPU about what the
# caches hold; a GPU needs more frames at once to be busy.
_SEARCH_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
_RESTART_ROUNDS = 2


def num_candidates(num_combined: int, codebook_size: int) -> int:
    """Candidates kept per group of ``num_combined`` codebooks: doubled for each factor of 4,
    so that the work per level of the search stays about the same."""
    base = 8 if codebook_size <= 16 else 16
    return min(base << (int(math.log2(num_combined)) // 2), 128)


class SearchTables:
    """What the search needs to know of the centers, and the search itself.

    Each codebook is made zero-mean first (the frame is moved by the sum of the means), which
    changes no difference between entries of a codebook, hence no decision, and keeps the table
    entries small against float32 rounding.

    Args:
      centers_NKD: the centers in use, their scale applied.
    """

    def __init__(self, centers_NKD: Tensor):
        N, K, D = centers_NKD.shape
        means_ND = centers_NKD.mean(dim=1)
        self.num_codebooks, self.codebook_size = N, K
        # Candidates kept per group of 1, 2, 4, ... codebooks; of the last group, the best one.
        self.kept = [min(K, num_candidates(1, K))]
        while 2 ** len(self.kept) < N:
            self.kept.append(min(self.kept[-1] ** 2, num_candidates(2 ** len(self.kept), K)))
        self.kept.append(1)
        self.offset_D = means_ND.sum(dim=0)
        self.centers_MD = (centers_NKD - means_ND[:, None]).reshape(N * K, D)
        self.half_sumsq_M = 0.5 * self.centers_MD.square().sum(dim=1)
        # An entry replaces the one of its own codebook, so they never meet in a sum: with these
        # blocks zero, a sum over all codebooks is one over the other codebooks. Of the other
        # blocks half are computed, the largest products first, and half are their mirror images.
        self.gram_MM = self.centers_MD.new_zeros(N * K, N * K)
        size = N * K // 2
        while size >= K:
            for start in range(0, N * K, 2 * size):
                first = slice(start, start + size)
                second = slice(start + size, start + 2 * size)
                block = self.centers_MD[first] @ self.centers_MD[second].t()
                self.gram_MM[first, second] = block
                self.gram_MM[second, first] = block.t()
            size //= 2
        self.first_N = torch.arange(0, N * K, K, device=centers_NKD.device, dtype=torch.int32)

    def chunk_frames(self, width: int = 0) -> int:
        """How many frames fit the search's share of memory, the first guess included."""
        N, K = self.num_codebooks, self.codebook_size
        # The logits, the products with the centers, and the frame: as it is, in float32, moved.
        bytes_per_frame = 8 * N * K + 12 * self.centers_MD.shape[1]
        if self.gram_MM.device.type != "cpu":
            J1 = min(K, num_candidates(1, K)) + 1
            bytes_per_frame += 8 * N * K + 12 * (N // 2 * J1) ** 2 + 16 * width * K
        budget = _SEARCH_BYTES.get(self.gram_MM.device.type, _SEARCH_BYTES["cuda"])
        return max(1, budget // bytes_per_frame)

    @torch.no_grad()
    def refine(self, x_BD: Tensor, indexes_BN: Tensor, rounds: int, restarts: int = 0) -> Tensor:
        """``rounds`` rounds of the search from ``indexes_BN`` (int64), and then, unless there are
        none, ``restarts``; returns int64 (B, N)."""
        if rounds <= 0:
            return indexes_BN
        return self._search(x_BD, indexes_BN, rounds, 0, range(restarts))

    @torch.no_grad()
    def restart(self, x_BD: Tensor, indexes_BN: Tensor, number: int, rounds: int) -> Tensor:
        """A restart from ``indexes_BN``, of ``rounds`` rounds; its number says what it replaces."""
        return self._search(x_BD, indexes_BN, 0, 0, range(number, number + 1), rounds)

    @torch.no_grad()
    def beam(self, x_BD: Tensor, width: int, rounds: int, restarts: int = 0) -> Tensor:
        """``rounds`` rounds of the search and, unless there are none, ``restarts``, from what a
        beam search finds; int64 (B, N).

        The beam search takes the codebooks one after the other and keeps the ``width`` best ways
        to choose entries of those so far. It suits codebooks of which each quantizes what those
        before it left (Chen et al., "Approximate nearest neighbor search by residual vector
        quantization", Sensors 2010), and needs no linear layer.
        """
        return self._search(x_BD, None, rounds, width, range(restarts if rounds > 0 else 0))

    def _search(
        self,
        x_BD: Tensor,
        first_BN: Tensor | None,
        rounds: int,
        width: int,
        restarts: range,
        restart_rounds: int = _RESTART_ROUNDS,
    ) -> Tensor:
        on_cpu = x_BD.device.type == "cpu"
        found_BN = torch.empty(len(x_BD), self.num_codebooks, dtype=torch.int64, device=x_BD.device)
        size = self.chunk_frames(width)
        for start in range(0, len(x_BD), size):
            chunk = slice(start, start + size)
            # Half the squared length of each center less its product with the frame.
            alone_bM = torch.addmm(
                self.half_sumsq_M, x_BD[chunk] - self.offset_D, self.centers_MD.t(), alpha=-1
            )
            if self.num_codebooks == 1:
                found_BN[chunk, 0] = alone_bM.argmin(dim=1)
                continue
            if first_BN is not None:
                entries_bN = first_BN[chunk] + self.first_N
            else:
                entries_bN = (self._beam_compiled if on_cpu else self._beam_torch)(alone_bM, width)
            refine = self._refine_compiled if on_cpu else self._refine_torch
            if rounds > 0:
                entries_bN = refine(alone_bM, entries_bN, rounds)
            error_b = self._errors(alone_bM, entries_bN) if restarts else None
            for number in restarts:
                changed_bN = refine(alone_bM, self._replaced(entries_bN, number), restart_rounds)
                changed_error_b = self._errors(alone_bM, changed_bN)
                better_b1 = (changed_error_b < error_b)[:, None]
                entries_bN = torch.where(better_b1, changed_bN, entries_bN)
                error_b = torch.minimum(changed_error_b, error_b)
            found_BN[chunk] = entries_bN - self.first_N
        return found_BN

    def _replaced(self, entries_BN: Tensor, number: int) -> Tensor:
        """Rows of the tables with those of two codebooks replaced, as restart ``number`` does."""
        N, K = self.num_codebooks, self.codebook_size
        # A multiplicative generator (Park and Miller, 1988): in time all pairs of codebooks and all
        # entries, in an order without pattern that is the same everywhere.
        draw = pow(7, number + 1, 2**31 - 1)
        pairs = [(i, j) for i in range(N) for j in range(i + 1, N)]
        changed_BN = entries_BN.clone()
        for n in pairs[draw % len(pairs)]:
            draw = draw * 16807 % (2**31 - 1)
            changed_BN[:, n] = n * K + draw % K
        return changed_BN

    def _errors(self, alone_BM: Tensor, entries_BN: Tensor) -> Tensor:
        """Half the squared error (B,) of rows of the tables, up to a constant of the frame."""
        error_B = alone_BM.gather(1, entries_BN).sum(dim=1)
        for n in range(1, self.num_codebooks):
            where_Bn = entries_BN[:, n : n + 1] * len(self.gram_MM) + entries_BN[:, :n]
            error_B += self.gram_MM.view(-1)[where_Bn].sum(dim=1)
        return error_B

    def _beam_compiled(self, alone_BM: Tensor, width: int) -> Tensor:
        from mvqkd.quantizer.search_cpu import beam_entries

        entries_BN = self.first_N.long().repeat(len(alone_BM), 1)
        beam_entries(
            self.gram_MM.numpy(),
            alone_BM.contiguous().numpy(),
            width,
            entries_BN.numpy(),
            torch.get_num_threads(),
        )
        return entries_BN

    def _beam_torch(self, alone_BM: Tensor, width: int) -> Tensor:
        B, (N, K) = len(alone_BM), (self.num_codebooks, self.codebook_size)
        error_BH = alone_BM.new_zeros(B, 1)
        entries_BHn = self.first_N.new_empty(B, 1, 0)
        for n in range(N):
            own = slice(n * K, (n + 1) * K)
            error_BHK = error_BH[:, :, None] + alone_BM[:, None, own]
            if n > 0:
                others = F.embedding_bag(
                    entries_BHn.flatten(0, 1), self.gram_MM[:, own].contiguous(), mode="sum"
                )
                error_BHK = error_BHK + others.view_as(error_BHK)
            keep = min(1 if n == N - 1 else width, error_BHK[0].numel())
            error_BH, chosen_BH = error_BHK.flatten(1).topk(keep, dim=1, largest=False)
            entries_BHn = torch.cat(
                (
                    entries_BHn.gather(1, (chosen_BH // K)[:, :, None].expand(-1, -1, n)),
                    (n * K + chosen_BH % K).int()[:, :, None],
                ),
                dim=2,
            )
        return entries_BHn[:, 0].long()

    def _refine_compiled(self, alone_BM: Tensor, entries_BN: Tensor, rounds: int) -> Tensor:
        # Imported here: it costs half a second, which who only trains a student need not pay.
        from mvqkd.quantizer.search_cpu import refine_entries

        entries_BN = entries_BN.contiguous()
        refine_entries(
            self.gram_MM.numpy(),
            alone_BM.contiguous().numpy(),
            entries_BN.numpy(),
            rounds,
            np.array(self.kept, dtype=np.intp),
            torch.get_num_threads(),
        )
        return entries_BN

    def _refine_torch(self, alone_BM: Tensor, entries_BN: Tensor, rounds: int) -> Tensor:
        refined_BN = entries_BN.clone()
        frames_B = torch.arange(len(entries_BN), device=entries_BN.device)
        entries_BN = entries_BN.int()
        for left in range(rounds - 1, -1, -1):
            before_BN, entries_BN = entries_BN, self._round(alone_BM, entries_BN)
            refined_BN[frames_B] = entries_BN.long()
            if left:
                moved = (entries_BN != before_BN).any(dim=1).nonzero()[:, 0]
                if not len(moved):
                    break
                frames_B, alone_BM = frames_B[moved], alone_BM[moved]
                entries_BN = entries_BN[moved]
        return refined_BN

    def _round(self, alone_BM: Tensor, entries_BN: Tensor) -> Tensor:
        """One round from the rows of the tables in use now (int32)."""
        B, N = entries_BN.shape
        K, M = self.codebook_size, N * self.codebook_size
        # Half the squared error with one entry replaced, up to a constant per codebook.
        error_BNK = (F.embedding_bag(entries_BN, self.gram_MM, mode="sum") + alone_BM).view(B, N, K)
        J = self.kept[0]
        if K > J:
            error_BNA, chosen_BNJ = error_BNK.topk(J, dim=2, largest=False, sorted=False)
            chosen_BNJ = chosen_BNJ.int()
        else:
            error_BNA = error_BNK
            chosen_BNJ = torch.arange(K, device=error_BNK.device, dtype=torch.int32).expand(B, N, K)
        # The current entry goes last. Codebook first, so that the look-ups below stay within a
        # few blocks of the Gram matrix at a time, which then stay in the cache.
        J1 = J + 1
        entries_NBJ1 = torch.cat(
            (chosen_BNJ + self.first_N[:, None], entries_BN[:, :, None]), dim=2
        ).transpose(0, 1)
        entries_NBJ1 = entries_NBJ1.contiguous()

        # Candidates of a group: for each of its L codebooks, a place among that codebook's J1.
        error_GBA = error_BNA.transpose(0, 1)
        places_GBA1L = torch.arange(J1, device=error_BNK.device, dtype=torch.int32)
        places_GBA1L = places_GBA1L[:, None].expand(N, B, J1, 1)
        L, P = 1, N // 2
        while True:
            A = error_GBA.shape[2]
            error_PXBA = error_GBA.unflatten(0, (P, 2))
            places_PXBA1L = places_GBA1L.unflatten(0, (P, 2))
            entries_PXLBJ1 = entries_NBJ1.view(P, 2, L, B, J1)
            rows_PLBJ1 = entries_PXLBJ1[:, 0] * M
            columns_PBLJ1 = entries_PXLBJ1[:, 1].transpose(1, 2)
            where = rows_PLBJ1[..., None, None] + columns_PBLJ1[:, None, :, None]
            gram = self.gram_MM.view(-1).index_select(0, where.view(-1)).view(P, L, B, J1, L * J1)
            product_PBAA = self._group_products(gram, places_PXBA1L)
            # Moving both groups at once: what moving each gives, and the product of the moves
            # (candidate less current entry, which is the last row and column).
            product_PBAA = (
                product_PBAA[:, :, :A, :A] - product_PBAA[:, :, A:, :A] - product_PBAA[:, :, :A, A:]
            )
            error_PBC = (
                product_PBAA + error_PXBA[:, 0, :, :, None] + error_PXBA[:, 1, :, None, :]
            ).flatten(2)
            kept = self.kept[int(math.log2(2 * L))]
            if kept == 1:
                error_GBA, chosen_PBA = error_PBC.min(dim=2, keepdim=True)
            elif kept < A * A:
                error_GBA, chosen_PBA = error_PBC.topk(kept, dim=2, largest=False, sorted=False)
            else:
                error_GBA = error_PBC
                chosen_PBA = torch.arange(kept, device=where.device).expand(P, B, kept)
            # The current one stays last: candidate A of both groups.
            first = F.pad(chosen_PBA // A, (0, 1), value=A)[..., None].expand(-1, -1, -1, L)
            second = F.pad(chosen_PBA % A, (0, 1), value=A)[..., None].expand(-1, -1, -1, L)
            places_GBA1L = torch.cat(
                (places_PXBA1L[:, 0].gather(2, first), places_PXBA1L[:, 1].gather(2, second)), dim=3
            )
            if P == 1:
                return entries_NBJ1.permute(1, 0, 2).gather(2, places_GBA1L[0, :, :1].mT.long())[
                    :, :, 0
                ]
            L, P = 2 * L, P // 2

    @staticmethod
    def _group_products(gram: Tensor, places_PXBA1L: Tensor) -> Tensor:
        """Inner products (P, B, A1, A1) of the sums of centers that two groups' candidates stand
        for, from those of single entries (P, L, B, J1, L * J1)."""
        P, L, B, J1, LJ1 = gram.shape
        if L == 1:
            return gram.view(P, B, J1, J1)
        A1 = places_PXBA1L.shape[3]

        def numbers(*shape: int, step: int) -> Tensor:
            count = math.prod(shape)
            return torch.arange(0, count * step, step, device=gram.device, dtype=torch.int32).view(
                shape
            )

        # Sum over the first group's codebooks, then over the second's.
        rows = places_PXBA1L[:, 0] + numbers(P, L, B, step=J1).permute(0, 2, 1)[:, :, None]
        half = F.embedding_bag(rows.view(-1, L), gram.view(-1, LJ1), mode="sum")
        half = half.view(P, B, A1, LJ1).mT.contiguous()
        rows = places_PXBA1L[:, 1] + numbers(P, B, 1, L, step=J1)
        whole = F.embedding_bag(rows.view(-1, L), half.view(-1, A1), mode="sum")
        return whole.view(P, B, A1, A1).mT
