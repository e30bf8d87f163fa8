"""Training of the multi-codebook quantizer, by the paper's method or by least squares.

Source of the paper's method: Guo, Yang et al., ICASSP 2023 (arXiv 2211.00508), section 3, with
the constants of the authors' package ``multi_quantization``. The alternation of search and least
squares is that of direct-sum (additive) quantization: Babenko and Lempitsky, CVPR 2014; Martinez et
al., "LSQ++", ECCV 2018.

Shapes: F frames in all, B frames of a batch, D dimension, N codebooks, K entries per codebook,
M = N * K.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mvqkd.errors import RecipeError
from mvqkd.files import written_aside
from mvqkd.quantizer.frames import (
    ShuffledFrames,
    frame_statistics,
    random_rows,
    require_frames,
)
from mvqkd.quantizer.quantizer import MAX_BEAM, MAX_RESTARTS, Quantizer, require_power_of_two

_ENTROPY_SCALE = 0.01  # of the entropy term in the paper's loss
_REPORT_ROUNDS = 5  # the RRL is reported for 0 to this many rounds
_CHECKPOINT_SECONDS = 30.0


@dataclass
class QuantizerSettings:
    """How codebooks are trained.

    Attributes:
      num_codebooks: N, bytes per frame at 256 entries: 1, 2, 4, 8, 16 or 32.
      codebook_size: K, entries per codebook; the paper's trainer needs a square (16, 256).
      trainer: "lsq" alternates the search with the closed-form least-squares solution for all
        centers; "paper" is gradient descent in two phases, as published.
      phase_one_iters, phase_two_iters: steps of the paper's trainer.
      batch_size: frames per step of gradient descent (both trainers).
      lr: learning rate of the paper's trainer in phase one; half of it in phase two.
      seed: of the initial weights, the order of frames and all other draws.
      standardize: train on frames less their mean and divided by their overall deviation, and
        fold both into the finished quantizer, which takes plain frames. For layers whose
        values are very large or small; the least-squares trainer always does.
      lsq_frames: frames that the least-squares trainer uses and holds in memory, drawn at random.
      lsq_iters: its alternations.
      lsq_rounds: rounds of the search in each.
      lsq_pull: how strongly a center is held where it was, as a share of the frames of an average
        entry. Without it the codebooks soon overlap so much that the search no longer finds good
        indexes; the RRL then rises.
      beam: hypotheses of a beam search through the codebooks, with which the least-squares trainer
        and the finished quantizer begin, instead of the linear first guess (0). The codebooks then
        start as residual ones.
      restarts: of the search of the finished quantizer, after its rounds
        (`mvqkd.quantizer.search`).
      lsq_noise: for codebooks without order, of lowest RRL: they start from random indexes, and
        each alternation adds noise to the centers, of this many times an N-th of the deviation of
        the frames, which falls to nothing with the alternations (some 50). Each goes on from the
        indexes before by a restart, nothing holds the centers, and ``beam`` and ``restarts`` find
        their indexes later. 0: none of this; 1 is LSQ++'s.
      logits_iters: steps in which it fits the first guess, ``to_logits``, in the end.
    """

    num_codebooks: int = 8
    codebook_size: int = 256
    trainer: Literal["paper", "lsq"] = "lsq"
    phase_one_iters: int = 10000
    phase_two_iters: int = 10000
    batch_size: int = 512
    lr: float = 0.005
    seed: int = 0
    standardize: bool = False
    lsq_frames: int = 50_000
    lsq_iters: int = 5
    lsq_rounds: int = 1
    lsq_pull: float = 0.3
    beam: int = 0
    restarts: int = 0
    lsq_noise: float = 0.0
    logits_iters: int = 100

    def __post_init__(self) -> None:
        """
        Raises:
          RecipeError: sizes that no quantizer can have, or values that do not go together.
        """
        require_power_of_two(num_codebooks=self.num_codebooks, codebook_size=self.codebook_size)
        if not 0 <= self.beam <= MAX_BEAM:
            raise RecipeError(f"beam: {self.beam} is not in 0..{MAX_BEAM}; 0 is no beam search")
        if not 0 <= self.restarts <= MAX_RESTARTS:
            raise RecipeError(f"restarts: {self.restarts} is not in 0..{MAX_RESTARTS}; 0 is none")
        if self.lsq_noise < 0:
            raise RecipeError(f"lsq_noise: {self.lsq_noise} is below 0; 0 is none")
        if self.trainer == "paper":
            _sub_size(self.codebook_size)
            if self.beam:
                raise RecipeError(
                    f"beam: {self.beam} with trainer: paper, whose codebooks have no order for a "
                    "beam search; set trainer: lsq, or beam: 0"
                )
            if self.restarts or self.lsq_noise:
                raise RecipeError(
                    "restarts, lsq_noise: are of trainer: lsq; set it, or leave them out"
                )
        elif self.lsq_frames < self.codebook_size:
            raise RecipeError(
                f"lsq_frames: {self.lsq_frames} frames for {self.codebook_size} entries; set it "
                "higher"
            )


def _sub_size(codebook_size: int) -> int:
    root = math.isqrt(codebook_size)
    if root * root != codebook_size or root < 2:
        raise RecipeError(
            f"codebook_size: {codebook_size} is not a square, and codebooks start as products of "
            "two smaller ones; use 16 or 256"
        )
    return root


def _draw(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator).item()


class QuantizerTrainer:
    """The paper's trainer: codebooks of 16 entries first, twice as many, then their products.

    The loss is the relative reconstruction loss (for the centers) plus the cross-entropy of the
    linear first guess against the refined indexes, plus 0.01 times its entropy loss; Adam, the
    learning rate halved after each quarter of a phase. Indexes are refined 1 or 2 rounds, drawn
    anew for each step.

    Args:
      dim: D.
      bytes_per_frame: N.
      device: where to train.
      phase_one_iters, phase_two_iters: steps of the two phases. As in the authors' package, one
        more step than their sum is made.
      lr: learning rate of phase one; phase two starts with half of it.
      seed: of all draws; the same seed and frames give the same quantizer.
      codebook_size: K; phase one has codebooks of sqrt(K) entries.
    Raises:
      RecipeError: N is not a power of two, or K not the square of one.

    >>> trainer = QuantizerTrainer(dim=192, bytes_per_frame=8, device=torch.device("cpu"))
    >>> while not trainer.done():
    ...     trainer.step(next_batch())  # (*, 192)
    >>> quantizer = trainer.get_quantizer()
    """

    def __init__(
        self,
        dim: int,
        bytes_per_frame: int,
        device: torch.device | str,
        phase_one_iters: int = 10000,
        phase_two_iters: int = 10000,
        lr: float = 0.005,
        seed: int = 0,
        codebook_size: int = 256,
    ):
        require_power_of_two(bytes_per_frame=bytes_per_frame, codebook_size=codebook_size)
        self.dim, self.num_codebooks, self.codebook_size = dim, bytes_per_frame, codebook_size
        self.phase_one_iters, self.phase_two_iters = phase_one_iters, phase_two_iters
        self.lr, self.device = lr, torch.device(device)
        self.cur_iter = 0
        self._generator = torch.Generator().manual_seed(seed)
        self.quantizer = Quantizer(
            dim, _sub_size(codebook_size), 2 * bytes_per_frame, self._generator
        ).to(self.device)
        self._init_optimizer(phase=1)

    @property
    def num_steps(self) -> int:
        return self.phase_one_iters + self.phase_two_iters + 1

    def done(self) -> bool:
        """Whether all steps were made."""
        return self.cur_iter >= self.num_steps

    def step(self, x: Tensor) -> None:
        """One step on frames (*, D)."""
        x_BD = x.reshape(-1, self.dim).to(self.device, torch.float32)
        rounds = 2 if _draw(self._generator) < 0.5 else 1
        reconstruction, logprob, logits_entropy, index_entropy = self.quantizer.compute_loss(
            x_BD, rounds
        )
        loss = reconstruction + logprob + _ENTROPY_SCALE * logits_entropy
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self._last = torch.stack((reconstruction, logprob, logits_entropy, index_entropy)).detach()
        if self.cur_iter == self.phase_one_iters:
            self.quantizer = self.quantizer.get_product_quantizer()
            self._init_optimizer(phase=2)
        self.cur_iter += 1

    def last_losses(self) -> dict[str, float]:
        """Losses of the latest step."""
        names = ("rrl", "logprob_loss", "logits_entropy_loss", "index_entropy_loss")
        return dict(zip(names, self._last.tolist()))

    def get_quantizer(self) -> Quantizer:
        """The trained quantizer, named by its weights."""
        if not self.done():
            raise RuntimeError(f"{self.num_steps - self.cur_iter} training steps are left")
        self.quantizer.set_id_from_weights()
        return self.quantizer

    def _init_optimizer(self, phase: int) -> None:
        iters = self.phase_one_iters if phase == 1 else self.phase_two_iters
        self.optimizer = torch.optim.Adam(
            self.quantizer.parameters(),
            lr=self.lr if phase == 1 else 0.5 * self.lr,
            betas=(0.9, 0.98),
            eps=1.0e-9,
            weight_decay=1.0e-6,
            # One pass over the weights and their moments in place of a dozen.
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(
            self.optimizer, step_size=max(1, iters // 4), gamma=0.5
        )

    def state_dict(self) -> dict[str, Any]:
        """All that an unbroken run would have from here on."""
        return {
            "cur_iter": self.cur_iter,
            "generator": self._generator.get_state(),
            "quantizer": self.quantizer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, which a trainer made with the same arguments gave."""
        self.cur_iter = state["cur_iter"]
        self._generator.set_state(state["generator"])
        N, K, D = state["quantizer"]["centers"].shape
        self.quantizer = Quantizer(D, K, N).to(self.device)
        self.quantizer.load_state_dict(state["quantizer"])
        self._init_optimizer(phase=1 if self.cur_iter <= self.phase_one_iters else 2)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


class LeastSquaresTrainer:
    """Alternates the search with the least-squares solution for all centers at once.

    Codebooks start as a product quantizer in the frames' principal axes, dealt out so that each
    codebook gets about the same product of variances (Ge et al., "Optimized product
    quantization", CVPR 2013): orthogonal codebooks are what the search is best at. Each step then
    searches from the linear first guess, as an encoder will, solves for the centers with the
    indexes held, each center pulled to where it was, and takes as the new first guess the linear
    discriminant of each codebook's entries, which has a closed form too. The last steps
    fit the first guess by cross-entropy.

    With ``beam`` hypotheses, codebooks start as residual ones instead, each found in principal axes
    that grow in number, as in FAISS (Douze et al., arXiv 2401.08281), and a beam search takes the
    place of the first guess.

    With ``lsq_noise`` they start from random indexes, and noise that falls with the alternations
    keeps them from what lies nearest (SR-D of Martinez et al., "LSQ++", ECCV 2018).

    Args:
      frames_FD: the frames to use, all of them in each step.
      settings: sizes, ``lsq_*``, ``logits_iters``, ``batch_size`` and ``seed`` are used.
      device: where to train.
    """

    def __init__(self, frames_FD: Tensor, settings: QuantizerSettings, device: torch.device | str):
        self.settings = settings
        self._generator = torch.Generator().manual_seed(settings.seed)
        frames_FD = frames_FD.to(device, torch.float32)
        self._mean_D = frames_FD.mean(dim=0)
        self._deviation = float((frames_FD - self._mean_D).square().mean().sqrt().clamp(min=1e-20))
        self._x_FD = (frames_FD - self._mean_D) / self._deviation
        self.quantizer = Quantizer(
            frames_FD.shape[1], settings.codebook_size, settings.num_codebooks, self._generator
        ).to(device)
        self.quantizer.beam, self.quantizer.restarts = settings.beam, settings.restarts
        # Of all frames, where an alternation goes on from those of the one before.
        self._indexes_FN: Tensor | None = None
        self.cur_iter = 0

    @property
    def num_steps(self) -> int:
        return 1 + self.settings.lsq_iters + self.settings.logits_iters

    def done(self) -> bool:
        """Whether all steps were made."""
        return self.cur_iter >= self.num_steps

    def step(self) -> None:
        """The start, an alternation, or a step of fitting the first guess."""
        if self.cur_iter == 0:
            self._start()
        elif self.cur_iter <= self.settings.lsq_iters:
            self._alternate()
        else:
            self._fit_logits()
        self.cur_iter += 1

    def losses(self, num_frames: int = 2048) -> dict[str, float]:
        """Losses on the first of the training frames, after one round."""
        with torch.no_grad():
            parts = self.quantizer.compute_loss(self._x_FD[:num_frames], 1)
        names = ("rrl", "logprob_loss", "logits_entropy_loss", "index_entropy_loss")
        return dict(zip(names, torch.stack(parts).tolist()))

    def get_quantizer(self) -> Quantizer:
        """The trained quantizer, named by its weights."""
        if not self.done():
            raise RuntimeError(f"{self.num_steps - self.cur_iter} training steps are left")
        return self.quantizer_so_far()

    def quantizer_so_far(self) -> Quantizer:
        """What the steps made so far give: at least the start."""
        quantizer = fold_normalization(self.quantizer, self._mean_D, self._deviation)
        quantizer.set_id_from_weights()
        return quantizer

    def state_dict(self) -> dict[str, Any]:
        """All that an unbroken run would have from here on, the frames apart."""
        return {
            "cur_iter": self.cur_iter,
            "generator": self._generator.get_state(),
            "quantizer": self.quantizer.state_dict(),
            "optimizer": self._optimizer.state_dict() if hasattr(self, "_optimizer") else None,
            "indexes": None if self._indexes_FN is None else self._indexes_FN.short(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, made with the same frames and settings."""
        self.cur_iter = state["cur_iter"]
        self._generator.set_state(state["generator"])
        self.quantizer.load_state_dict(state["quantizer"])
        if state["indexes"] is not None:
            self._indexes_FN = state["indexes"].long().to(self._x_FD.device)
        if state["optimizer"] is not None:
            self._init_optimizer()
            self._optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def _start(self) -> None:
        if self.settings.lsq_noise > 0:
            N, K = self.quantizer.centers.shape[:2]
            size = (len(self._x_FD), N)
            indexes_FN = torch.randint(K, size, generator=self._generator)
            self._indexes_FN = indexes_FN.to(self._x_FD.device)
            self.quantizer.centers_scale.zero_()
            self._solve(self._indexes_FN)
            return
        x_FD = self._x_FD[: max(80 * self.settings.codebook_size, 4096)]
        start = self._start_residual if self.settings.beam > 0 else self._start_product
        indexes_FN = start(x_FD)
        self.quantizer.centers_scale.zero_()
        self._set_discriminant(x_FD, indexes_FN)

    def _start_product(self, x_FD: Tensor) -> Tensor:
        """Codebooks of principal axes, the indexes of frames returned."""
        N, K, D = self.quantizer.centers.shape
        values, vectors = torch.linalg.eigh((x_FD.t() @ x_FD / len(x_FD)).double())
        values = values.flip(0).clamp(min=values.max().item() * 1e-9 + 1e-30).tolist()
        vectors = vectors.flip(1).float()
        axes: list[list[int]] = [[] for _ in range(N)]
        log_volume = [0.0] * N
        for axis, value in enumerate(values):
            free = [n for n in range(N) if len(axes[n]) < math.ceil(D / N)]
            least = min(free, key=lambda n: log_volume[n])
            axes[least].append(axis)
            log_volume[least] += math.log1p(value / values[-1])
        rest_FD = x_FD.clone()
        indexes = []
        for n in range(N):
            # With fewer dimensions than codebooks, some quantize what the others leave.
            basis = vectors[:, axes[n]] if axes[n] else vectors
            x_FP = (x_FD if axes[n] else rest_FD) @ basis
            first = torch.randperm(len(x_FP), generator=self._generator)[:K].to(x_FP.device)
            centers_KP = _kmeans(x_FP, x_FP[first])
            index_F = _nearest(x_FP, centers_KP)
            self.quantizer.centers[n] = centers_KP @ basis.t()
            rest_FD -= self.quantizer.centers[n][index_F]
            indexes.append(index_F)
        return torch.stack(indexes, dim=1)

    def _start_residual(self, x_FD: Tensor) -> Tensor:
        """Each codebook of what those before it leave, of all hypotheses of the beam: an entry
        is then made of more frames, and serves more ways to come to it. The indexes of frames
        returned."""
        N, K = self.quantizer.centers.shape[:2]
        indexes_FHn = torch.zeros(len(x_FD), 1, 0, dtype=torch.long, device=x_FD.device)

        def left_over(rows: Tensor, hypotheses: Tensor) -> Tensor:
            left = x_FD[rows].clone()
            for m in range(indexes_FHn.shape[2]):
                left -= self.quantizer.centers[m][indexes_FHn[rows, hypotheses, m]]
            return left

        for n in range(N):
            H = indexes_FHn.shape[1]
            order = torch.randperm(len(x_FD) * H, generator=self._generator)[: 256 * K]
            order = order.to(x_FD.device)
            self.quantizer.centers[n] = self._progressive_kmeans(
                left_over(order // H, order % H), K
            )
            keep = min(self.settings.beam, H * K)
            chunks = []
            for rows in torch.arange(len(x_FD), device=x_FD.device).split(1024):
                rows_R = rows.repeat_interleave(H)
                hypotheses_R = torch.arange(H, device=rows.device).repeat(len(rows))
                left_RD = left_over(rows_R, hypotheses_R)
                centers_KD = self.quantizer.centers[n]
                error_RK = left_RD.square().sum(1, keepdim=True) + centers_KD.square().sum(1)
                error_RK = error_RK.addmm(left_RD, centers_KD.t(), alpha=-2)
                chosen_FH = error_RK.view(len(rows), H * K).topk(keep, dim=1, largest=False).indices
                parents = indexes_FHn[rows[:, None], chosen_FH // K]
                chunks.append(torch.cat((parents, (chosen_FH % K)[:, :, None]), dim=2))
            indexes_FHn = torch.cat(chunks)
        return indexes_FHn[:, 0]

    def _progressive_kmeans(self, x_FD: Tensor, K: int, rounds: int = 6) -> Tensor:
        """Centers (K, D), found in the first few principal axes first and then in more and more of
        them, which ends in better ones."""
        D = x_FD.shape[1]
        vectors = torch.linalg.eigh((x_FD.t() @ x_FD / len(x_FD)).double())[1].flip(1).float()
        x_FD = x_FD @ vectors
        first = torch.randperm(len(x_FD), generator=self._generator)[:K].to(x_FD.device)
        centers_KD = x_FD[first]
        for number in range(1, rounds + 1):
            used = math.ceil(D ** (number / rounds))
            centers_KD = _kmeans(x_FD, centers_KD, used)
        return centers_KD @ vectors.t()

    @torch.no_grad()
    def _alternate(self) -> None:
        if self._indexes_FN is None:
            self._solve(self.quantizer.compute_indexes(self._x_FD, self.settings.lsq_rounds))
            return
        left = 1.0 - self.cur_iter / self.settings.lsq_iters
        deviation_D = self._x_FD.std(dim=0) * (
            self.settings.lsq_noise * left**0.5 / self.quantizer.num_codebooks
        )
        noise_NKD = torch.randn(self.quantizer.centers.shape, generator=self._generator)
        self.quantizer.centers += noise_NKD.to(deviation_D.device) * deviation_D
        # A better search would find indexes here that an encoder, which has no indexes to go on
        # from, does not find for other frames.
        self._indexes_FN = self.quantizer.search_tables().restart(
            self._x_FD, self._indexes_FN, self.cur_iter, self.settings.lsq_rounds
        )
        self._solve(self._indexes_FN)

    def _solve(self, indexes_FN: Tensor) -> None:
        """The centers of least squares for the indexes of all frames, and the first guess."""
        N, K, D = self.quantizer.centers.shape
        M, x_FD = N * K, self._x_FD
        held = self.settings.lsq_pull * len(x_FD) / K
        if self._indexes_FN is not None:
            # A frame's worth, at zero: only so that an entry without frames has a center.
            held = 1.0
            self.quantizer.centers.zero_()
        entries_FN = indexes_FN + torch.arange(0, M, K, device=x_FD.device)
        # Normal equations of the change of the centers: how often each two entries are chosen
        # together, and the sum of what is left of the frames of each.
        left_FD = x_FD - self.quantizer.decode(indexes_FN)
        counts_MM = torch.empty(M, M, dtype=torch.float64, device=x_FD.device)
        sums_MD = torch.empty(M, D, dtype=torch.float64, device=x_FD.device)
        for n in range(N):
            own = slice(n * K, (n + 1) * K)
            both = indexes_FN[:, n : n + 1] * M + entries_FN
            counts_MM[own] = torch.bincount(both.flatten(), minlength=K * M).view(K, M).double()
            sums_MD[own] = _sum_by_entry(indexes_FN[:, n], left_FD, K).double()
        counts_MM.diagonal().add_(held)
        change_MD = torch.cholesky_solve(sums_MD, torch.linalg.cholesky(counts_MM))
        self.quantizer.centers += change_MD.view(N, K, D).float()
        self._set_discriminant(x_FD, indexes_FN)

    def _set_discriminant(self, x_FD: Tensor, indexes_FN: Tensor) -> None:
        """First guess by linear discriminant analysis: entry k of a codebook has frames of mean
        m_k and, all alike, covariance W within; its logit is x' W⁻¹ m_k - m_k' W⁻¹ m_k / 2 +
        log p_k."""
        N, K = indexes_FN.shape[1], self.quantizer.codebook_size
        weights, biases = [], []
        total_DD = x_FD.t() @ x_FD / len(x_FD)
        for n in range(N):
            counts_K = torch.bincount(indexes_FN[:, n], minlength=K).float()
            # One frame's worth of the overall mean (0) keeps rare entries from the extremes.
            means_KD = _sum_by_entry(indexes_FN[:, n], x_FD, K) / (counts_K[:, None] + 1.0)
            probs_K = (counts_K + 0.5) / (len(x_FD) + 0.5 * K)
            within_DD = (total_DD - (means_KD * probs_K[:, None]).t() @ means_KD).double()
            values, vectors = torch.linalg.eigh(within_DD)
            floor = 1e-3 * total_DD.diagonal().mean().item()
            values = values.clamp(min=0.0) + floor
            weight_KD = (means_KD.double() @ vectors / values @ vectors.t()).float()
            weights.append(weight_KD)
            biases.append(probs_K.log() - 0.5 * (weight_KD * means_KD).sum(dim=1))
        self.quantizer.to_logits.weight.copy_(torch.cat(weights))
        self.quantizer.to_logits.bias.copy_(torch.cat(biases))
        self.quantizer.logits_scale.zero_()

    def _init_optimizer(self) -> None:
        linear = self.quantizer.to_logits
        scale = float(linear.weight.detach().square().mean().sqrt())
        self._optimizer = torch.optim.Adam(
            [{"params": list(linear.parameters()), "initial_lr": 0.02 * scale}],
            lr=0.02 * scale,
            betas=(0.9, 0.98),
        )

    def _fit_logits(self) -> None:
        if not hasattr(self, "_optimizer"):
            self._init_optimizer()
        done = (self.cur_iter - 1 - self.settings.lsq_iters) / self.settings.logits_iters
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1.0 - done)
        size = (self.settings.batch_size,)
        rows = torch.randint(len(self._x_FD), size, generator=self._generator)
        x_BD = self._x_FD[rows.to(self._x_FD.device)]
        indexes_BN = self.quantizer.compute_indexes(x_BD, self.settings.lsq_rounds)
        logits = self.quantizer._logits(x_BD).view(-1, self.quantizer.codebook_size)
        loss = F.cross_entropy(logits, indexes_BN.view(-1))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()


def _nearest(x_FP: Tensor, centers_KP: Tensor, used: int | None = None) -> Tensor:
    """The nearest center of each frame by the first ``used`` dimensions."""
    centers_KP = centers_KP[:, :used]
    half_K = 0.5 * centers_KP.square().sum(dim=1)
    return torch.addmm(half_K, x_FP[:, :used], centers_KP.t(), alpha=-1).argmin(dim=1)


def _kmeans(x_FP: Tensor, centers_KP: Tensor, used: int | None = None, iters: int = 8) -> Tensor:
    """Lloyd's iterations from ``centers_KP``; those of no frame stay."""
    K = len(centers_KP)
    for _ in range(iters):
        index_F = _nearest(x_FP, centers_KP, used)
        counts_K = torch.bincount(index_F, minlength=K)[:, None]
        means_KP = _sum_by_entry(index_F, x_FP, K) / counts_K.clamp(min=1)
        centers_KP = torch.where(counts_K > 0, means_KP, centers_KP)
    return centers_KP


def _sum_by_entry(index_F: Tensor, x_FD: Tensor, K: int) -> Tensor:
    """Sum of the frames of each entry (K, D), the same bits each time on every device."""
    sums_KD = x_FD.new_zeros(K, x_FD.shape[1])
    if x_FD.is_cuda:
        # Sorts first; index_add_ adds in whatever order the threads come.
        return sums_KD.index_put_((index_F,), x_FD, accumulate=True)
    return sums_KD.index_add_(0, index_F, x_FD)


@torch.no_grad()
def fold_normalization(quantizer: Quantizer, mean_D: Tensor, deviation: float) -> Quantizer:
    """The quantizer of plain frames x that equals ``quantizer`` on (x - mean) / deviation.

    One deviation for all dimensions keeps the order of distances, so the indexes are the same.
    """
    N = quantizer.num_codebooks
    folded = Quantizer(quantizer.dim, quantizer.codebook_size, N).to(mean_D.device)
    folded.centers.copy_(quantizer.get_centers() * deviation + mean_D / N)
    scale = (quantizer.logits_scale * quantizer.scale_speed).exp()
    weight = quantizer.to_logits.weight * scale / deviation
    folded.to_logits.weight.copy_(weight)
    folded.to_logits.bias.copy_(quantizer.to_logits.bias - weight @ mean_D)
    folded.beam, folded.restarts = quantizer.beam, quantizer.restarts
    return folded


def train_quantizer(
    frames: Any,
    settings: QuantizerSettings,
    device: torch.device | str = "cpu",
    checkpoint_path: Path | str | None = None,
    progress: Callable[[str], None] | None = print,
    name: str = "frames",
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Quantizer:
    """Train codebooks on frames; resumes from ``checkpoint_path`` if it is there.

    Args:
      frames: (F, D) tensor, NumPy or memory-mapped array, or HDF5 dataset; it may be larger than
        memory.
      settings: how.
      device: where.
      checkpoint_path: the state is written here every half minute; a run that was killed and
        is started again with the same frames and settings ends with the identical quantizer.
        The file may be deleted once the quantizer is saved.
      progress: called with a line of text now and then; None for silence.
      name: of the frames, for messages.
      statistics: what `frame_statistics` gave for them, where it was called already.
    Returns:
      the quantizer on the CPU in eval mode, named by its weights.
    Raises:
      RecipeError: fewer frames than entries, a frame that is not finite, a damaged file, or a
        checkpoint of other frames or settings.
    """
    require_frames(frames, settings.codebook_size, name)
    device = torch.device(device)
    mean_D, std_D = statistics or frame_statistics(frames, name)
    origin = {
        "settings": dataclasses.asdict(settings),
        "num_frames": frames.shape[0],
        "mean": mean_D,
        "std": std_D,
    }
    if settings.trainer == "lsq":
        run: _PaperRun | _LeastSquaresRun = _LeastSquaresRun(frames, settings, device, name)
    else:
        run = _PaperRun(frames, settings, device, name, mean_D, std_D)
    path = None if checkpoint_path is None else Path(checkpoint_path)
    if path is not None and path.exists():
        run.trainer.load_state_dict(_load_checkpoint(path, origin, device))
        if progress:
            progress(f"resumed from {path} at step {run.trainer.cur_iter}")

    started = saved = time.monotonic()
    first, first_work = run.trainer.cur_iter, run.work()
    while not run.trainer.done():
        run.step()
        now = time.monotonic()
        step, steps = run.trainer.cur_iter, run.trainer.num_steps
        if progress and (run.is_report_step() or run.trainer.done()):
            passed = max(now - started, 1e-9)
            left = passed * (1.0 - run.work()) / max(run.work() - first_work, 1e-9)
            progress(
                f"{settings.trainer} step {step}/{steps}, "
                f"{(step - first) / passed:.2f} steps/s, {left:.0f} s left, {run.report()}"
            )
        if path is not None and now - saved > _CHECKPOINT_SECONDS:
            with written_aside(path) as aside:
                torch.save({**origin, "trainer": run.trainer.state_dict()}, aside)
            saved = time.monotonic()
    return run.finish().cpu().eval()


def _load_checkpoint(path: Path, origin: dict[str, Any], device: torch.device) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint["trainer"]
    # torch.load raises almost anything for a damaged file, by where the damage is.
    except Exception as error:
        raise RecipeError(f"{path}: damaged or cut short; delete it to train anew") from error
    for key, value in origin.items():
        same = torch.equal(checkpoint[key], value) if key in ("mean", "std") else None
        if same is False or (same is None and checkpoint[key] != value):
            raise RecipeError(
                f"{path}: made with other {'settings' if key == 'settings' else 'frames'}; "
                "delete it to train anew"
            )
    return state


def _rrl_by_rounds(quantizer: Quantizer, x_BD: Tensor) -> str:
    with torch.no_grad():
        x_BD = x_BD.to(quantizer.centers.device)
        values = [quantizer.compute_loss(x_BD, r)[0].item() for r in range(_REPORT_ROUNDS + 1)]
    return " ".join(f"{value:.3f}" for value in values)


def _losses_text(losses: dict[str, float]) -> str:
    names = ("logprob_loss", "logits_entropy_loss", "index_entropy_loss")
    return ", ".join(f"{name} {losses[name]:.3f}" for name in names)


class _PaperRun:
    """The paper's trainer with its stream of batches."""

    def __init__(self, frames, settings, device, name, mean_D, std_D):
        self.device = device
        self.trainer = QuantizerTrainer(
            frames.shape[1],
            settings.num_codebooks,
            device,
            settings.phase_one_iters,
            settings.phase_two_iters,
            settings.lr,
            settings.seed,
            settings.codebook_size,
        )
        self._normalization = None
        if settings.standardize:
            deviation = float(std_D.square().mean().sqrt().clamp(min=1e-20))
            self._normalization = (mean_D, deviation)
        self._frames = ShuffledFrames(frames, settings.batch_size, settings.seed, name)

    def _batch(self, step: int) -> Tensor:
        x_BD = self._frames.batch(step)
        if self._normalization is not None:
            mean_D, deviation = self._normalization
            x_BD = (x_BD - mean_D.to(x_BD.device)) / deviation
        return x_BD

    def step(self) -> None:
        self._last = self._batch(self.trainer.cur_iter)
        self.trainer.step(self._last)

    def work(self) -> float:
        """Share of the work that is done."""
        return self.trainer.cur_iter / self.trainer.num_steps

    def is_report_step(self) -> bool:
        return self.trainer.cur_iter % 200 == 1

    def report(self) -> str:
        rrl = _rrl_by_rounds(self.trainer.quantizer, self._last)
        return f"RRL by rounds {rrl}, {_losses_text(self.trainer.last_losses())}"

    def finish(self) -> Quantizer:
        quantizer = self.trainer.get_quantizer()
        if self._normalization is not None:
            mean_D, deviation = self._normalization
            quantizer = fold_normalization(quantizer, mean_D.to(self.device), deviation)
            quantizer.set_id_from_weights()
        return quantizer


class _LeastSquaresRun:
    """The least-squares trainer with its sample of the frames."""

    def __init__(self, frames, settings, device, name):
        count = min(settings.lsq_frames, len(frames))
        sample = random_rows(frames, count, settings.seed, name)
        self.trainer = LeastSquaresTrainer(sample, settings, device)

    def step(self) -> None:
        self.trainer.step()

    def work(self) -> float:
        """Share of the frames that have been searched; most of the time goes there."""
        settings, done = self.trainer.settings, self.trainer.cur_iter
        whole, part = len(self.trainer._x_FD), settings.batch_size
        total = (1 + settings.lsq_iters) * whole + settings.logits_iters * part
        alternations = min(done, 1 + settings.lsq_iters)
        return (alternations * whole + (done - alternations) * part) / total

    def is_report_step(self) -> bool:
        return self.trainer.cur_iter <= self.trainer.settings.lsq_iters + 1

    def report(self) -> str:
        rrl = _rrl_by_rounds(self.trainer.quantizer, self.trainer._x_FD[:1024])
        return f"RRL by rounds {rrl}, {_losses_text(self.trainer.losses(1024))}"

    def finish(self) -> Quantizer:
        return self.trainer.get_quantizer()
