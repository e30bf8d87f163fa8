"""Eve and Eden, the optimizer and the schedule of the reworked Conformer, and ScaledAdam.

Sources: icefall, ``pruned_transducer_stateless6``; ScaledAdam, and Eden's warm-up: Zipformer, arXiv
2310.11230, section 3.5. Adam is arXiv 1412.6980.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer


class _OfAdamsKind(Optimizer):
    """What the optimizers below have in common; a subclass has ``_update_group``."""

    def __init__(self, params: Iterable, lr: float, betas: tuple[float, float], eps: float, **rest):
        if lr < 0.0 or eps < 0.0 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(
                f"{type(self).__name__}: lr {lr}, betas {betas} or eps {eps} is out of range"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, **rest})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None):
        """One update; parameters without a gradient are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError(f"{type(self).__name__} takes no sparse gradients")
            if params:
                self._update_group(params, group)
        return loss

    def _update_group(self, params: list[torch.Tensor], group: dict) -> None:
        raise NotImplementedError


class Eve(_OfAdamsKind):
    """Adam with a decay that only acts on large tensors, and bounded scalars.

    A tensor of more than one element is multiplied by ``1 - weight_decay`` while its root mean
    square exceeds ``target_rms`` (so that Adam's steps, which do not depend on the size of the
    weight, keep their effect: the true scale of a matrix lies in a learned scalar). A tensor of
    one element is a log scale and is clamped to [-10, 2] after the step.

    Args:
      params: parameters or parameter groups.
      lr: the learning rate, usually set by :class:`Eden`.
      betas, eps: as in Adam.
      weight_decay: the share of a large tensor that one step takes away, whatever the rate.
      target_rms: the root mean square above which a tensor decays.

    All parameters of a group are updated in a few calls that each handle every tensor; on a CPU
    all of it but the norms is one pass over memory.
    """

    scalar_min = -10.0
    scalar_max = 2.0

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 1e-3,
        target_rms: float = 0.1,
    ):
        super().__init__(params, lr, betas, eps, weight_decay=weight_decay, target_rms=target_rms)

    def _update_group(self, params: list[torch.Tensor], group: dict) -> None:
        # Bias correction needs the tensor's own count of updates, which differs between
        # tensors where some batches give some of them no gradient.
        by_step: dict[int, list[torch.Tensor]] = {}
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["step"] += 1
            by_step.setdefault(state["step"], []).append(p)
        for step, of_step in by_step.items():
            self._update(of_step, step, group)

    def _update(self, params: list[torch.Tensor], step: int, group: dict) -> None:
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in params]
        exp_avgs = [self.state[p]["exp_avg"] for p in params]
        exp_avg_sqs = [self.state[p]["exp_avg_sq"] for p in params]

        kept = self._kept(params, group)
        root_factor, rate = (1 - beta2**step) ** -0.5, group["lr"] / (1 - beta1**step)
        if all(p.is_cpu and p.dtype == torch.float32 and p.is_contiguous() for p in params):
            from mvqkd.cpu_kernels import eve

            betas, eps = group["betas"], group["eps"]
            eve(params, grads, exp_avgs, exp_avg_sqs, kept, betas, root_factor, eps, rate)
        else:
            torch._foreach_mul_(exp_avgs, beta1)
            torch._foreach_add_(exp_avgs, grads, alpha=1 - beta1)
            torch._foreach_mul_(exp_avg_sqs, beta2)
            torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
            denoms = torch._foreach_sqrt(exp_avg_sqs)
            torch._foreach_mul_(denoms, root_factor)
            torch._foreach_add_(denoms, group["eps"])
            torch._foreach_mul_(params, list(kept.unbind()))
            torch._foreach_addcdiv_(params, exp_avgs, denoms, value=-rate)
        scalars = [p for p in params if p.numel() == 1]
        if scalars:
            torch._foreach_clamp_min_(scalars, self.scalar_min)
            torch._foreach_clamp_max_(scalars, self.scalar_max)

    @staticmethod
    def _kept(params: list[torch.Tensor], group: dict) -> torch.Tensor:
        """What is left of each parameter after the decay: 1 where there is none."""
        # The norm of a scalar exceeds no limit; on a GPU nothing waits for the comparison.
        norms = torch.stack(torch._foreach_norm(params))
        limits = torch.tensor(
            [
                group["target_rms"] * math.sqrt(p.numel()) if p.numel() > 1 else math.inf
                for p in params
            ],
            dtype=norms.dtype,
        ).to(norms.device, non_blocking=True)
        return 1.0 - group["weight_decay"] * (norms > limits).to(norms.dtype)


class ScaledAdam(_OfAdamsKind):
    """Adam whose steps are relative to the size of a tensor, and which learns that size.

    A tensor is its root mean square r times a direction. Adam's step, times r, changes the
    direction at the same relative rate whatever r is; a second Adam, with ``scale_speed`` times
    the rate, on the gradient with respect to r (the product of gradient and tensor, over r), moves
    the tensor along itself. A tensor of one element has no direction: it takes Adam's steps at
    ``scale_speed`` times the rate, and stays within ``scalar_max``.

    Gradients are clipped where their norm, each tensor's times its r so that it is that of the
    change of the loss per relative change of the weights, exceeds ``clipping_scale`` times the
    median of the last full window of ``clipping_window`` steps.

    Args:
      params: parameters or parameter groups.
      lr: the learning rate, usually set by :class:`Eden`.
      betas, eps: as in Adam.
      scale_speed: eta in the paper.
      min_rms, max_rms: bounds of r. One that is at a bound moves back, as fast as it may.
      scalar_max: the largest size of a tensor of one element.
      clipping_scale: 0 for no clipping.
      clipping_window: steps.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.045,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        scale_speed: float = 0.1,
        min_rms: float = 1e-5,
        max_rms: float = 3.0,
        scalar_max: float = 10.0,
        clipping_scale: float = 2.0,
        clipping_window: int = 100,
    ):
        super().__init__(
            params,
            lr,
            betas,
            eps,
            scale_speed=scale_speed,
            min_rms=min_rms,
            max_rms=max_rms,
            scalar_max=scalar_max,
            clipping_scale=clipping_scale,
            clipping_window=clipping_window,
        )

    def _update_group(self, params: list[torch.Tensor], group: dict) -> None:
        rms = {p: (p.square().mean()).sqrt() for p in params if p.numel() > 1}
        clip = self._clip(group, params, rms)
        for p in params:
            self._update(p, p.grad if clip is None else p.grad * clip, rms.get(p), group)

    def _clip(
        self, group: dict, params: list[torch.Tensor], rms: dict[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor | None:
        """What the group's gradients are multiplied by."""
        if group["clipping_scale"] <= 0:
            return None
        window = group["clipping_window"]
        # Kept with the first parameter of the group, so that checkpoints have it.
        state = self.state[group["params"][0]]
        if "recent_norms" not in state:
            state["num_norms"] = 0
            state["recent_norms"] = torch.zeros(window, device=params[0].device)
            state["norm_limit"] = torch.full((), math.inf, device=params[0].device)
        norms = [p.grad.norm() * rms.get(p, 1.0) for p in params]
        norm = torch.stack(norms).norm().float()
        clip = (state["norm_limit"] / (norm + 1e-20)).clamp(max=1.0)
        state["recent_norms"][state["num_norms"] % window] = norm
        state["num_norms"] += 1
        if state["num_norms"] % window == 0:
            state["norm_limit"] = group["clipping_scale"] * state["recent_norms"].median()
        return clip

    def _update(
        self, p: torch.Tensor, grad: torch.Tensor, rms: torch.Tensor | None, group: dict
    ) -> None:
        state = self.state[p]
        if "step" not in state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
            if rms is not None:
                state["scale_exp_avg"] = torch.zeros_like(rms)
                state["scale_exp_avg_sq"] = torch.zeros_like(rms)
        state["step"] += 1
        lr, slow_lr = group["lr"], group["lr"] * group["scale_speed"]
        if rms is None:
            direction = self._direction(grad, state["exp_avg"], state["exp_avg_sq"], state, group)
            p.sub_(slow_lr * direction).clamp_(-group["scalar_max"], group["scalar_max"])
            return
        scale_grad = (p * grad).sum() / rms.clamp(min=group["min_rms"])
        scale_step = slow_lr * self._direction(
            scale_grad, state["scale_exp_avg"], state["scale_exp_avg_sq"], state, group
        )
        scale_step = torch.where(rms < group["min_rms"], -slow_lr, scale_step)
        scale_step = torch.where(rms > group["max_rms"], slow_lr, scale_step)
        direction = self._direction(grad, state["exp_avg"], state["exp_avg_sq"], state, group)
        # The tensor is r times its direction: both changes are of the tensor before the step.
        p.mul_(1 - scale_step).sub_(direction * (lr * rms.clamp(min=group["min_rms"])))

    @staticmethod
    def _direction(
        grad: torch.Tensor,
        average: torch.Tensor,
        average_sq: torch.Tensor,
        state: dict,
        group: dict,
    ) -> torch.Tensor:
        """Adam's step at rate 1, from moments that it brings up to date."""
        beta1, beta2 = group["betas"]
        average.lerp_(grad, 1 - beta1)
        average_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (average_sq / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        return average / denominator / (1 - beta1 ** state["step"])


class Eden:
    """Learning rates that fall with the batch and the epoch.

    ``lr = lr0 * ((b² + B²) / B²)^-0.25 * ((e² + E²) / E²)^-0.25`` for batch b (counted over the
    whole training), epoch e (from 0), ``lr_batches`` B and ``lr_epochs`` E. Call
    ``step_batch(b)`` once a batch and ``step_epoch(e)`` once an epoch.

    Args:
      optimizer: its groups' rates at this moment are lr0.
      lr_batches, lr_epochs: B and E, where the decline sets in.
      warmup_batches: over these the rate is multiplied by a factor that rises evenly to 1 ...
      warmup_start: ... from this.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_batches: float,
        lr_epochs: float,
        warmup_batches: int = 0,
        warmup_start: float = 0.5,
    ):
        if lr_batches <= 0 or lr_epochs <= 0:
            raise ValueError(f"Eden: lr_batches {lr_batches}, lr_epochs {lr_epochs}: must be > 0")
        self.optimizer = optimizer
        self.lr_batches = lr_batches
        self.lr_epochs = lr_epochs
        self.warmup_batches = warmup_batches
        self.warmup_start = warmup_start
        self.batch = 0
        self.epoch = 0
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]

    def step_batch(self, batch: int) -> None:
        self.batch = batch
        self._set_lrs()

    def step_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self._set_lrs()

    def _set_lrs(self) -> None:
        by_batch = (1 + (self.batch / self.lr_batches) ** 2) ** -0.25
        by_epoch = (1 + (self.epoch / self.lr_epochs) ** 2) ** -0.25
        warm = 1.0
        if self.batch < self.warmup_batches:
            share = self.batch / self.warmup_batches
            warm = self.warmup_start + (1 - self.warmup_start) * share
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs):
            group["lr"] = base_lr * by_batch * by_epoch * warm
