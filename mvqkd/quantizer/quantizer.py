"""Multi-codebook vector quantizer: a vector is the sum of one center of each codebook.

Source: Guo, Yang et al., "Predicting Multi-Codebook Vector Quantization Indexes for Knowledge
Distillation", ICASSP 2023 (arXiv 2211.00508), section 3. Interface, file format and the result of
the search are those of the authors' package ``multi_quantization``.

Shapes: B frames (any leading dimensions flattened), D dimension of a frame, N codebooks,
K entries per codebook.
"""

from __future__ import annotations

import hashlib
import itertools
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
from mvqkd.quantizer.search import SearchTables

# The scales are learned as scale = exp(10 * parameter): a higher learning rate for them.
_SCALE_SPEED = 10.0

# Of the hypotheses of a beam search, and of restarts.
MAX_BEAM, MAX_RESTARTS = 256, 64

_STATE_KEYS = (
    "to_logits.weight",
    "to_logits.bias",
    "centers",
    "logits_scale",
    "centers_scale",
    "id_buf",
)


def require_power_of_two(**values: int) -> None:
    """
    Raises:
      RecipeError: a number of codebooks or entries, given by its name in the conf, is none.
    """
    for name, value in values.items():
        if value < 1 or value & (value - 1):
            raise RecipeError(
                f"{name}: {value} is not a power of two; use 1, 2, 4, 8, 16, 32 codebooks "
                "of 16 or 256 entries"
            )


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
        require_power_of_two(codebook_size=codebook_size, num_codebooks=num_codebooks)
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
        # Hypotheses of the beam search that finds the first indexes; 0: the linear layer does. It
        # is no weight, as the authors' package would not load a file that has it.
        self.beam = 0
        # Restarts of the search after its rounds (`mvqkd.quantizer.search`).
        self.restarts = 0
        self._tables: SearchTables | None = None
        self._tables_key: tuple | None = None

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}, N={self.num_codebooks}"

    def get_id(self) -> str:
        """Eight hex digits that name this quantizer."""
        return bytes(self.id_buf.tolist()).decode()

    def set_id_from_weights(self) -> None:
        """Name the quantizer by its weights, `beam` and `restarts`, so that equal training gives an
        equal name."""
        name = self.weights_sha256()[:8].encode()
        self.id_buf.copy_(torch.tensor(list(name), dtype=torch.uint8))

    def weights_sha256(self) -> str:
        """SHA-256 of all weights (name, shape and float32 bytes), the id left out, and of `beam`
        and `restarts` unless they are 0: all that the indexes of a frame depend on."""
        return self._sha256_with(self.beam, self.restarts, self._weights_digest())

    @staticmethod
    def _sha256_with(beam: int, restarts: int, digest: hashlib._Hash) -> str:
        digest = digest.copy()
        for name, value in (("beam", beam), ("restarts", restarts)):
            if value:
                digest.update(f"{name} {value}\n".encode())
        return digest.hexdigest()

    def set_search_from_id(self) -> None:
        """Take the `beam` and `restarts` for which `set_id_from_weights` gave the quantizer its id;
        0 where it was named otherwise, as the authors' package does."""
        digest = self._weights_digest()
        named = (
            search
            for search in itertools.product(range(MAX_BEAM + 1), range(MAX_RESTARTS + 1))
            if self._sha256_with(*search, digest)[:8] == self.get_id()
        )
        self.beam, self.restarts = next(named, (0, 0))

    def _weights_digest(self) -> hashlib._Hash:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            if name != "id_buf":
                values = tensor.detach().to("cpu", torch.float32).contiguous()
                digest.update(f"{name} {tuple(values.shape)}\n".encode())
                digest.update(values.numpy().astype("<f4").tobytes())
        return digest

    def get_centers(self) -> Tensor:
        """The centers in use, (N, K, D): the parameter times its scale."""
        if torch.is_grad_enabled() and self.centers.requires_grad:
            # A step of training may follow, and fused optimizers change the centers without a
            # new version number.
            self._tables = None
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
            self._tables, self._tables_key = self._make_tables(), key
        return self._tables

    @torch.no_grad()
    def _make_tables(self) -> SearchTables:
        with torch.autocast(self.centers.device.type, enabled=False):
            return SearchTables(self.get_centers().float())

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

    def compute_indexes(self, x_BD: Tensor, refine_indexes_iters: int = 5) -> Tensor:
        """Codebook indexes, int64 (B, N), of frames (B, D)."""
        indexes_BN = x_BD.new_empty((len(x_BD), self.num_codebooks), dtype=torch.int64)
        return self._search_into(indexes_BN, x_BD, refine_indexes_iters)

    @torch.no_grad()
    def _search_into(self, codes_Bn: Tensor, x_BD: Tensor, rounds: int) -> Tensor:
        tables = self.search_tables()
        size = tables.chunk_frames()
        with torch.autocast(x_BD.device.type, enabled=False):
            # Into a tensor made before: small results kept from each chunk would lie between the
            # freed large ones, and the heap would grow with the number of chunks.
            for x_bD, codes_bn in zip(x_BD.split(size), codes_Bn.split(size)):
                if self.beam > 0:
                    indexes_bN = tables.beam(x_bD.float(), self.beam, rounds, self.restarts)
                    codes_bn.copy_(self._pack(indexes_bN, codes_bn.shape[1]))
                    continue
                logits_bNK = self._logits(x_bD.to(self.centers.dtype)).unflatten(
                    1, (self.num_codebooks, -1)
                )
                first_bN = logits_bNK.argmax(dim=2)
                del logits_bNK
                indexes_bN = tables.refine(x_bD.float(), first_bN, rounds, self.restarts)
                codes_bn.copy_(self._pack(indexes_bN, codes_bn.shape[1]))
        return codes_Bn

    def encode(self, x: Tensor, refine_indexes_iters: int = 5, as_bytes: bool = True) -> Tensor:
        """Codebook indexes of frames.

        Args:
          x: (*, D) of any floating type; memory beyond input and output is bounded.
          refine_indexes_iters: rounds of refinement after the first guess, which is the linear
            layer's, or that of a beam search (``beam``); restarts follow (``restarts``).
          as_bytes: put as many indexes into a byte as fit (one for K = 256, two for K = 16).
        Returns:
          int64 (*, N), or uint8 (*, bytes per frame) if ``as_bytes``.
        Raises:
          RecipeError: the last dimension is not D.
          ValueError: ``as_bytes`` with K above 256.
        """
        if x.ndim > 2 and not _is_viewable(x):
            # A part of longer utterances, say: as one block of frames it would be a copy.
            parts = (self.encode(part, refine_indexes_iters, as_bytes) for part in x)
            return torch.stack(list(parts))
        x_BD = self._flatten(x)
        per_code, dtype = 1, torch.int64
        if as_bytes:
            if self.codebook_size > 256:
                raise ValueError(f"an index below {self.codebook_size} does not fit a byte")
            while self.codebook_size ** (2 * per_code) <= 256 and per_code < self.num_codebooks:
                per_code *= 2
            dtype = torch.uint8
        codes_Bn = x_BD.new_empty((len(x_BD), self.num_codebooks // per_code), dtype=dtype)
        self._search_into(codes_Bn, x_BD, refine_indexes_iters)
        return codes_Bn.view(*x.shape[:-1], codes_Bn.shape[1])

    def _pack(self, indexes_BN: Tensor, num_codes: int) -> Tensor:
        size = self.codebook_size
        while indexes_BN.shape[1] > num_codes:
            indexes_BN = indexes_BN[:, ::2] + size * indexes_BN[:, 1::2]
            size *= size
        return indexes_BN

    def decode(self, indexes: Tensor) -> Tensor:
        """Sum of the centers that the indexes name; differentiable in the centers.

        Args:
          indexes: integers (*, N), or (*, bytes per frame) as ``encode`` packs them.
        Returns:
          (*, D).
        Raises:
          ValueError: an index outside 0..K-1 (padding must be taken out first).
        """
        K = self.codebook_size
        indexes_BN = self._unpack(indexes.reshape(-1, indexes.shape[-1]).long())
        if indexes_BN.numel() and not 0 <= int(indexes_BN.min()) <= int(indexes_BN.max()) < K:
            raise ValueError(
                f"codebook indexes from {int(indexes_BN.min())} to {int(indexes_BN.max())}: "
                f"the quantizer has entries 0 to {K - 1}"
            )
        return self._sum_of_centers(indexes_BN).view(*indexes.shape[:-1], self.dim)

    def _sum_of_centers(self, indexes_BN: Tensor) -> Tensor:
        N, K = self.num_codebooks, self.codebook_size
        entries_BN = indexes_BN + torch.arange(0, N * K, K, device=indexes_BN.device)
        return F.embedding_bag(entries_BN, self.get_centers().view(N * K, self.dim), mode="sum")

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
        logits_BNK = self._logits(x_BD).unflatten(1, (self.num_codebooks, -1))
        indexes_BN = logits_BNK.detach().argmax(dim=2)
        if refine_indexes_iters > 0 or self.beam > 0:
            # New ones in training: a step may have been made since the last were (`get_centers`).
            in_training = torch.is_grad_enabled() and self.centers.requires_grad
            tables = self._make_tables() if in_training else self.search_tables()
            with torch.autocast(x_BD.device.type, enabled=False):
                x_BD_float = x_BD.detach().float()
                search = refine_indexes_iters, self.restarts
                if self.beam > 0:
                    indexes_BN = tables.beam(x_BD_float, self.beam, *search)
                else:
                    indexes_BN = tables.refine(x_BD_float, indexes_BN, *search)
        error_BD = self._sum_of_centers(indexes_BN) - x_BD
        total = ((x_BD - self.get_data_mean()) ** 2).sum() + 1.0e-20
        reconstruction_loss = (error_BD**2).sum() / total

        logprobs_BNK = logits_BNK.log_softmax(dim=2)
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


def _is_viewable(x: Tensor) -> bool:
    try:
        x.view(-1, x.shape[-1])
    except RuntimeError:
        return False
    return True


def _entropy_loss(probs_NK: Tensor) -> Tensor:
    probs_NK = probs_NK + 1.0e-20
    entropy = -(probs_NK * probs_NK.log()).sum(dim=1).mean()
    reference = math.log(probs_NK.shape[1])
    return (reference - entropy) / reference


def save_quantizer(path: Path | str, quantizer: Quantizer, meta: dict[str, Any]) -> None:
    """Write the weights to ``path`` and what goes with them to ``path`` + ``.json``.

    ``path`` is a torch file that ``multi_quantization.Quantizer`` loads too, where it encodes the
    same unless ``beam`` or ``restarts`` is set, which that package has not. The sidecar holds
    ``meta`` (``teacher``, ``layer``, ``mean`` and ``std`` of the training frames ...: JSON values
    or 1-dim tensors), and the quantizer's id, SHA-256, D, N, K, beam and restarts.
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
      only what the weights and the id tell: ``quantizer_id``, ``sha256``, ``dim``,
      ``num_codebooks``, ``codebook_size``, ``beam``, ``restarts``.
    Raises:
      RecipeError: a file that is missing, damaged, cut short or no quantizer, or a sidecar of
      other weights or another search.
    """
    path = Path(path)
    remake = f"remove {path.name} and run stage 4, or copy it again"
    if not path.is_file():
        raise RecipeError(f"{path}: no such file; train the quantizer first (stage 4)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # torch.load raises almost anything for a damaged file, by where the damage is.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"{path}: damaged or cut short ({reason}); {remake}") from error
    quantizer = _from_state(path, state, remake)
    sidecar = _sidecar(path)
    if not sidecar.exists():
        quantizer.set_search_from_id()
        return quantizer, _own_facts(quantizer)
    try:
        meta = json.loads(sidecar.read_text())
        sha256 = str(meta["sha256"])
        quantizer.beam = int(meta.get("beam", 0))
        quantizer.restarts = int(meta.get("restarts", 0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{sidecar}: damaged or cut short; {remake}, both files") from error
    facts = _own_facts(quantizer)
    if sha256 != facts["sha256"]:
        raise RecipeError(
            f"{path}: weights and search hash to {facts['sha256'][:12]}, but {sidecar.name} was "
            f"written for {sha256[:12]}; {remake}, both files"
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
        "beam": quantizer.beam,
        "restarts": quantizer.restarts,
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
