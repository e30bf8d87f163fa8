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
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mvqkd.errors import RecipeError
from mvqkd.files import written_aside
from mvqkd.quantizer.quantizer import Quantizer

_ENTROPY_SCALE = 0.01  # of the entropy term in the paper's loss
_REPORT_ROUNDS = 5  # the RRL is reported for 0 to this many rounds
_CHECKPOINT_SECONDS = 30.0


@dataclass
class QuantizerSettings:
    """How codebooks are trained.

    Attributes:
      num_codebooks: N, bytes per frame at 256 entries: 1, 2, 4, 8, 16 or 32.
      codebook_size: K, entries per codebook; the paper's trainer needs a square (16, 256).
      refine_iters: rounds of the search in encoding with the finished quantizer.
      trainer: "lsq" alternates the search with the closed-form least-squares solution for all
        centers; "paper" is gradient descent in two phases, as published.
      phase_one_iters, phase_two_iters: steps of the paper's trainer.
      batch_size: frames per step of gradient descent (both trainers).
      lr: learning rate of the paper's trainer in phase one; half of it in phase two.
      seed: of the initial weights, the order of frames and all other draws.
      standardize: train on frames less their mean and divided by their overall deviation, and
        fold both into the finished quantizer, which takes plain frames. For layers whose
        values are very large or small; the least-squares trainer always does.
      lsq_frames: frames that the least-squares trainer holds in memory, drawn at random.
      lsq_iters: its alternations.
      lsq_ridge: weight of the penalty on squared centers, per frame of an average entry.
      logits_iters: steps in which it fits the first guess, ``to_logits``.
    """

    num_codebooks: int = 8
    codebook_size: int = 256
    refine_iters: int = 5
    trainer: Literal["paper", "lsq"] = "lsq"
    phase_one_iters: int = 10000
    phase_two_iters: int = 10000
    batch_size: int = 512
    lr: float = 0.005
    seed: int = 0
    standardize: bool = False
    lsq_frames: int = 100_000
    lsq_iters: int = 20
    lsq_ridge: float = 0.01
    logits_iters: int = 100


def _sub_size(codebook_size: int) -> int:
    root = math.isqrt(codebook_size)
    if root * root != codebook_size or root < 2:
        raise RecipeError(
            f"codebook_size: {codebook_size} is not a square, and codebooks start as products of "
            "two smaller ones; use 16 or 256"
        )
    return root


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
        self.dim, self.num_codebooks, self.codebook_size = dim, bytes_per_frame, codebook_size
        self.phase_one_iters, self.phase_two_iters = phase_one_iters, phase_two_iters
        self.lr, self.device = lr, torch.device(device)
        self.cur_iter = 0
        self.losses: dict[str, float] = {}
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
        """One step on frames (*, D); ``losses`` holds its losses afterwards."""
        x_BD = x.reshape(-1, self.dim).to(self.device, torch.float32)
        rounds = 1 + int(torch.rand((), generator=self._generator) < 0.5)
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
