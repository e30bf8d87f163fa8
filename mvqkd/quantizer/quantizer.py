"""Multi-codebook vector quantizer: a vector is the sum of one center of each codebook.

Source: Guo, Yang et al., "Predicting Multi-Codebook Vector Quantization Indexes for Knowledge
Distillation", ICASSP 2023 (arXiv 2211.00508), section 3. Interface, file format and the result of
the search are those of the authors' package ``multi_quantization``.

Shapes: B frames (any leading dimensions flattened), D dimension of a frame, N codebooks,
K entries per codebook, M = N * K centers of all codebooks together. In the search: P pairs of
groups, L codebooks per group, J candidates per codebook (and J1 = J + 1 with the current entry),
A candidates per group (and A1 = A + 1 with the current one).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvqkd.errors import RecipeError
from mvqkd.files import written_aside

# Bytes that the search may hold beside its input, output and tables. On the CPU about what the
# caches hold; a GPU needs more frames at once to be busy.
_SEARCH_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}

# The scales are learned as scale = exp(10 * parameter): a higher learning rate for them.
_SCALE_SPEED = 10.0

_STATE_KEYS = (
    "to_logits.weight",
    "to_logits.bias",
    "centers",
    "logits_scale",
    "centers_scale",
    "id_buf",
)


def _require_power_of_two(**values: int) -> None:
    for name, value in values.items():
        if value < 1 or value & (value - 1):
            raise RecipeError(
                f"{name}: {value} is not a power of two; use 1, 2, 4, 8, 16, 32 codebooks "
                "of 16 or 256 entries"
            )


def num_candidates(num_combined: int, codebook_size: int) -> int:
    """Candidates kept per group of ``num_combined`` codebooks: doubled for each factor of 4,
    so that the work per level of the search stays about the same."""
    base = 8 if codebook_size <= 16 else 16
    return min(base << (int(math.log2(num_combined)) // 2), 128)


class SearchTables:
    """What the search needs to know of the centers, and the search itself.

    The squared error of a choice of one center per codebook is a sum of inner products between
    chosen centers, and between them and the frame. Both are looked up: the first in the Gram
    matrix of all centers, the second in one product of the frame with all centers. No vector of
    dimension D is touched after that product.

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
        self.offset_D = means_ND.sum(dim=0)
        self.centers_MD = (centers_NKD - means_ND[:, None]).reshape(N * K, D)
        gram_MM = self.centers_MD @ self.centers_MD.t()
        self.half_sumsq_M = 0.5 * gram_MM.diagonal().clone()
        # An entry replaces the one of its own codebook, so they never meet in a sum: with these
        # blocks zero, a sum over all codebooks is one over the other codebooks.
        blocks = gram_MM.view(N, K, N, K)
        each = torch.arange(N, device=gram_MM.device)
        blocks[each, :, each] = 0.0
        self.gram_MM = gram_MM
        self.first_N = torch.arange(0, N * K, K, device=gram_MM.device, dtype=torch.int32)

    def chunk_frames(self) -> int:
        """How many frames fit the search's share of memory."""
        N, K = self.num_codebooks, self.codebook_size
        J1 = min(K, num_candidates(1, K)) + 1
        pairs_per_frame = N // 2 * J1 * J1 * max(N // 2, 1)
        bytes_per_frame = 16 * N * K + 12 * pairs_per_frame + 4 * self.centers_MD.shape[1]
        budget = _SEARCH_BYTES.get(self.gram_MM.device.type, _SEARCH_BYTES["cuda"])
        return max(1, budget // bytes_per_frame)

    def refine(self, x_BD: Tensor, indexes_BN: Tensor, rounds: int) -> Tensor:
        """``rounds`` rounds of the search from ``indexes_BN`` (int64); returns int64 (B, N)."""
        if rounds <= 0 or x_BD.shape[0] == 0:
            return indexes_BN
        refined = []
        size = self.chunk_frames()
        for x_bD, indexes_bN in zip(x_BD.split(size), indexes_BN.split(size)):
            product_bM = (x_bD - self.offset_D) @ self.centers_MD.t()
            alone_bM = self.half_sumsq_M - product_bM
            entries_bN = indexes_bN.int() + self.first_N
            for _ in range(rounds):
                entries_bN = self._round(alone_bM, entries_bN)
            refined.append(entries_bN - self.first_N)
        return torch.cat(refined).long()

    def _round(self, alone_BM: Tensor, entries_BN: Tensor) -> Tensor:
        """One round: the best candidates of each codebook with the others held, then of pairs of
        codebooks, of fours, and so on until one choice for all of them is left.

        Args:
          alone_BM: half the squared length of every center less its product with the frame.
          entries_BN: rows of the tables in use now (int32).
        """
        B, N = entries_BN.shape
        K, M = self.codebook_size, N * self.codebook_size
        # Half the squared error with one entry replaced, up to a constant per codebook.
        error_BNK = (F.embedding_bag(entries_BN, self.gram_MM, mode="sum") + alone_BM).view(B, N, K)
        if N == 1:
            return error_BNK.argmin(dim=2).int()
        J = min(K, num_candidates(1, K))
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
            kept = 1 if P == 1 else min(A * A, num_candidates(2 * L, K))
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


class Quantizer(nn.Module):
    """Encodes a vector as N integers below K, and decodes them as the sum of N centers.

    Args:
      dim: D, dimension of the vectors.
      codebook_size: K, a power of two; 256 for a quantizer in use.
      num_codebooks: N, a power of two.
      generator: draws the initial weights (by default torch's global one).
    Raises:
      RecipeError: K or N is not a power of two.

    >>> quantizer = Quantizer(dim=192, codebook_size=256, num_codebooks=8)
    >>> indexes = quantizer.encode(torch.randn(100, 192))  # uint8, (100, 8)
    >>> approximation = quantizer.decode(indexes)  # (100, 192)
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        _require_power_of_two(codebook_size=codebook_size, num_codebooks=num_codebooks)
        self.dim, self.codebook_size, self.num_codebooks = dim, codebook_size, num_codebooks
        self.scale_speed = _SCALE_SPEED
        self.to_logits = nn.Linear(dim, codebook_size * num_codebooks)
        if generator is not None:
            bound = dim**-0.5
            for parameter in (self.to_logits.weight, self.to_logits.bias):
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        self.centers = nn.Parameter(
            self.to_logits.weight.detach().clone().view(num_codebooks, codebook_size, dim)
        )
        self.logits_scale = nn.Parameter(torch.zeros(()))
        self.centers_scale = nn.Parameter(torch.zeros(()))
        # Eight hex digits, so that indexes of one quantizer are not taken for another's.
        self.register_buffer(
            "id_buf", torch.tensor(list(os.urandom(4).hex().encode()), dtype=torch.uint8)
        )
        self._tables: SearchTables | None = None
        self._tables_key: tuple | None = None

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}, N={self.num_codebooks}"

    def get_id(self) -> str:
        """Eight hex digits that name this quantizer."""
        return bytes(self.id_buf.tolist()).decode()

    def set_id_from_weights(self) -> None:
        """Name the quantizer by its weights, so that equal training gives an equal name."""
        name = self.weights_sha256()[:8].encode()
        self.id_buf.copy_(torch.tensor(list(name), dtype=torch.uint8))

    def weights_sha256(self) -> str:
        """SHA-256 of all weights (name, shape and float32 bytes), the id left out."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            if name != "id_buf":
                values = tensor.detach().to("cpu", torch.float32).contiguous()
                digest.update(f"{name} {tuple(values.shape)}\n".encode())
                digest.update(values.numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def get_centers(self) -> Tensor:
        """The centers in use, (N, K, D): the parameter times its scale."""
        return (self.centers_scale * self.scale_speed).exp() * self.centers

    def get_data_mean(self) -> Tensor:
        """Mean of the training frames (D,) as the centers give it, if all entries are equally
        frequent. Without gradient."""
        return self.get_centers().detach().mean(dim=1).sum(dim=0)

    @torch.no_grad()
    def get_product_quantizer(self) -> Quantizer:
        """A quantizer of N/2 codebooks of K² entries that equals this one: entry k1 * K + k2 is
        the sum of entries k1 and k2 of two neighbouring codebooks (arXiv 2211.00508, the step
        between the two phases of training)."""
        N, K, D = self.centers.shape
        product = Quantizer(D, K * K, N // 2).to(self.centers.device)

        def pair_sums(per_entry: Tensor) -> Tensor:
            pairs = per_entry.view(N // 2, 2, K, -1)
            return pairs[:, 0, :, None] + pairs[:, 1, None, :]

        product.centers.copy_(pair_sums(self.centers).view(N // 2, K * K, D))
        product.to_logits.weight.copy_(pair_sums(self.to_logits.weight).view(-1, D))
        product.to_logits.bias.copy_(pair_sums(self.to_logits.bias).view(-1))
        product.logits_scale.copy_(self.logits_scale)
        product.centers_scale.copy_(self.centers_scale)
        return product

    def search_tables(self) -> SearchTables:
        """The tables of the present centers, made again when the centers have changed."""
        key = tuple(
            (p.data_ptr(), p._version, p.device, p.dtype)
            for p in (self.centers, self.centers_scale)
        )
        if self._tables is None or self._tables_key != key:
            with torch.no_grad(), torch.autocast(self.centers.device.type, enabled=False):
                self._tables = SearchTables(self.get_centers().float())
            self._tables_key = key
        return self._tables

    def __getstate__(self) -> dict[str, Any]:
        # Tables are large and quickly made: not copied, pickled or sent to other processes.
        return {**super().__getstate__(), "_tables": None, "_tables_key": None}

    def _flatten(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.dim:
            raise RecipeError(
                f"frames of dimension {x.shape[-1]}: the quantizer was made for {self.dim}; take "
                "the teacher and layer that it was trained on, or train another"
            )
        return x.reshape(-1, self.dim)

    def _logits(self, x_BD: Tensor) -> Tensor:
        # The scale goes onto the smaller of the two factors; the product is the same.
        return self.to_logits((self.logits_scale * self.scale_speed).exp() * x_BD)

    @torch.no_grad()
    def compute_indexes(self, x_BD: Tensor, refine_indexes_iters: int = 5) -> Tensor:
        """Codebook indexes, int64 (B, N), of frames (B, D)."""
        with torch.autocast(x_BD.device.type, enabled=False):
            tables = self.search_tables()
            chunks = []
            for x_bD in x_BD.split(tables.chunk_frames()):
                x_bD = x_bD.to(self.centers.dtype)
                logits_bNK = self._logits(x_bD).unflatten(1, (self.num_codebooks, -1))
                first_bN = logits_bNK.argmax(dim=2)
                chunks.append(tables.refine(x_bD.float(), first_bN, refine_indexes_iters))
        return torch.cat(chunks)

    def encode(self, x: Tensor, refine_indexes_iters: int = 5, as_bytes: bool = True) -> Tensor:
        """Codebook indexes of frames.

        Args:
          x: (*, D) of any floating type; memory beyond input and output is bounded.
          refine_indexes_iters: rounds of refinement after the linear layer's first guess.
          as_bytes: put as many indexes into a byte as fit (one for K = 256, two for K = 16).
        Returns:
          int64 (*, N), or uint8 (*, bytes per frame) if ``as_bytes``.
        Raises:
          RecipeError: the last dimension is not D.
          ValueError: ``as_bytes`` with K above 256.
        """
        if as_bytes and self.codebook_size > 256:
            raise ValueError(f"an index below {self.codebook_size} does not fit a byte")
        indexes = self.compute_indexes(self._flatten(x), refine_indexes_iters)
        if as_bytes:
            size = self.codebook_size
            while size * size <= 256 and indexes.shape[1] > 1:
                indexes = indexes[:, ::2] + size * indexes[:, 1::2]
                size *= size
            indexes = indexes.to(torch.uint8)
        return indexes.view(*x.shape[:-1], indexes.shape[1])

    def decode(self, indexes: Tensor) -> Tensor:
        """Sum of the centers that the indexes name; differentiable in the centers.

        Args:
          indexes: integers (*, N), or (*, bytes per frame) as ``encode`` packs them.
        Returns:
          (*, D).
        Raises:
          ValueError: an index outside 0..K-1 (padding must be taken out first).
        """
        N, K = self.num_codebooks, self.codebook_size
        indexes_BN = self._unpack(indexes.reshape(-1, indexes.shape[-1]).long())
        if indexes_BN.numel() and not 0 <= int(indexes_BN.min()) <= int(indexes_BN.max()) < K:
            raise ValueError(
                f"codebook indexes from {int(indexes_BN.min())} to {int(indexes_BN.max())}: "
                f"the quantizer has entries 0 to {K - 1}"
            )
        entries_BN = indexes_BN + torch.arange(0, N * K, K, device=indexes.device)
        centers_MD = self.get_centers().view(N * K, self.dim)
        return F.embedding_bag(entries_BN, centers_MD, mode="sum").view(
            *indexes.shape[:-1], self.dim
        )

    def _unpack(self, indexes_Bn: Tensor) -> Tensor:
        N, n = self.num_codebooks, indexes_Bn.shape[1]
        if n == N:
            return indexes_Bn
        per_byte = N // n if n else 0
        if n == 0 or N % n or self.codebook_size**per_byte > 256:
            raise ValueError(f"{n} indexes per frame: the quantizer has {N} codebooks")
        divisors = self.codebook_size ** torch.arange(per_byte, device=indexes_Bn.device)
        return (indexes_Bn[:, :, None] // divisors % self.codebook_size).view(-1, N)

    def compute_loss(
        self, x: Tensor, refine_indexes_iters: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The parts of the training loss (arXiv 2211.00508, section 3).

        Args:
          x: frames (*, D).
          refine_indexes_iters: rounds of refinement behind the indexes that are used.
        Returns:
          four scalars: the relative reconstruction loss (against the mean of the centers;
          gradient for the centers), the log-probability loss (cross-entropy of the first guess
          against the refined indexes, gradient for ``to_logits``), and the share by which the
          entropy falls short of log K, for the mean probabilities of the first guess (gradient
          for ``to_logits``) and for the indexes (no gradient).
        """
        x_BD = self._flatten(x)
        indexes_BN = self.compute_indexes(x_BD, refine_indexes_iters)
        error_BD = self.decode(indexes_BN) - x_BD
        total = ((x_BD - self.get_data_mean()) ** 2).sum() + 1.0e-20
        reconstruction_loss = (error_BD**2).sum() / total

        logprobs_BNK = self._logits(x_BD).unflatten(1, (self.num_codebooks, -1)).log_softmax(dim=2)
        logprob_loss = -logprobs_BNK.gather(2, indexes_BN[:, :, None]).mean()

        logits_entropy_loss = _entropy_loss(logprobs_BNK.exp().mean(dim=0))
        index_entropy_loss = _entropy_loss(
            self.count_indexes(indexes_BN).to(logprobs_BNK.dtype) / max(1, x_BD.shape[0])
        )
        return reconstruction_loss, logprob_loss, logits_entropy_loss, index_entropy_loss

    def count_indexes(self, indexes_BN: Tensor) -> Tensor:
        """How often each entry was chosen, int64 (N, K)."""
        N, K = self.num_codebooks, self.codebook_size
        entries = indexes_BN + torch.arange(0, N * K, K, device=indexes_BN.device)
        return torch.bincount(entries.flatten(), minlength=N * K).view(N, K)

    @torch.no_grad()
    def compute_codebook_correlations(self) -> Tensor:
        """How much each two codebooks share a subspace: (N, N) in [0, 1], ones on the diagonal.

        With S_i the uncentered covariance of codebook i's entries less their mean:
        tr(S_i S_j) / sqrt(tr(S_i²) tr(S_j²)). tr(S_i S_j) is the sum of squares of the inner
        products between the entries of the two codebooks, which needs no D × D matrix.
        """
        centers_NKD = self.get_centers()
        centers_NKD = centers_NKD - centers_NKD.mean(dim=1, keepdim=True)
        gram = torch.einsum("nkd,mld->nmkl", centers_NKD, centers_NKD)
        traces_NN = gram.square_().sum(dim=(2, 3))
        norms_N = traces_NN.diagonal().clamp(min=1.0e-30) ** -0.5
        return traces_NN * norms_N[:, None] * norms_N[None, :]


def _entropy_loss(probs_NK: Tensor) -> Tensor:
    probs_NK = probs_NK + 1.0e-20
    entropy = -(probs_NK * probs_NK.log()).sum(dim=1).mean()
    reference = math.log(probs_NK.shape[1])
    return (reference - entropy) / reference


def save_quantizer(path: Path | str, quantizer: Quantizer, meta: dict[str, Any]) -> None:
    """Write the weights to ``path`` and what goes with them to ``path`` + ``.json``.

    ``path`` is a torch file that ``multi_quantization.Quantizer`` loads too. The sidecar holds
    ``meta`` (``teacher``, ``layer``, ``mean`` and ``std`` of the training frames ...: JSON values
    or 1-dim tensors), and the quantizer's id, weights' SHA-256, D, N and K.
    """
    path = Path(path)
    with written_aside(path) as aside:
        torch.save({k: v.detach().cpu() for k, v in quantizer.state_dict().items()}, aside)
    facts = {
        **{k: v.tolist() if isinstance(v, Tensor) else v for k, v in meta.items()},
        **_own_facts(quantizer),
    }
    with written_aside(_sidecar(path)) as aside:
        aside.write_text(json.dumps(facts, indent=1) + "\n")


def load_quantizer(path: Path | str) -> tuple[Quantizer, dict[str, Any]]:
    """Read what ``save_quantizer`` or ``multi_quantization`` wrote.

    Returns:
      the quantizer on the CPU in eval mode, and the sidecar's values, with ``mean`` and ``std``
      as float32 tensors (D,). A file without a sidecar, as ``multi_quantization`` leaves, gives
      only what the weights tell: ``quantizer_id``, ``sha256``, ``dim``, ``num_codebooks``,
      ``codebook_size``.
    Raises:
      RecipeError: a file that is missing, damaged, cut short or no quantizer, or a sidecar of
      other weights.
    """
    path = Path(path)
    remake = "train the quantizer again (stage 4) or copy the file again"
    if not path.is_file():
        raise RecipeError(f"{path}: no such file; train the quantizer first (stage 4)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # torch.load raises almost anything for a damaged file, by where the damage is.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"{path}: damaged or cut short ({reason}); {remake}") from error
    quantizer = _from_state(path, state, remake)
    facts = _own_facts(quantizer)
    sidecar = _sidecar(path)
    if not sidecar.exists():
        return quantizer, facts
    try:
        meta = json.loads(sidecar.read_text())
        sha256 = meta["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{sidecar}: damaged or cut short; {remake}") from error
    if sha256 != facts["sha256"]:
        raise RecipeError(
            f"{path}: weights hash to {facts['sha256'][:12]}, but {sidecar.name} was written for "
            f"{sha256[:12]}; {remake}, both files together"
        )
    for name in ("mean", "std"):
        if isinstance(meta.get(name), list):
            meta[name] = torch.tensor(meta[name], dtype=torch.float32)
    return quantizer, meta


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _own_facts(quantizer: Quantizer) -> dict[str, Any]:
    return {
        "quantizer_id": quantizer.get_id(),
        "sha256": quantizer.weights_sha256(),
        "dim": quantizer.dim,
        "num_codebooks": quantizer.num_codebooks,
        "codebook_size": quantizer.codebook_size,
    }


def _from_state(path: Path, state: Any, remake: str) -> Quantizer:
    missing = [k for k in _STATE_KEYS if not isinstance(state, dict) or k not in state]
    if missing:
        raise RecipeError(f"{path}: no quantizer, {', '.join(missing)} not in it; {remake}")
    if not all(isinstance(state[k], Tensor) for k in _STATE_KEYS) or state["centers"].ndim != 3:
        raise RecipeError(f"{path}: no quantizer, its entries are not the expected ones; {remake}")
    N, K, D = state["centers"].shape
    quantizer = Quantizer(D, K, N)
    try:
        quantizer.load_state_dict({k: state[k] for k in _STATE_KEYS})
    except RuntimeError as error:
        raise RecipeError(f"{path}: no quantizer, shapes do not fit together; {remake}") from error
    for name, tensor in quantizer.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise RecipeError(f"{path}: {name} has values that are not finite; {remake}")
    return quantizer.eval()
