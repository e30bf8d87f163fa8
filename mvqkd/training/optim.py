"""Eve and Eden: the optimizer and the schedule of the reworked Conformer.

Source: icefall, ``pruned_transducer_stateless6``; Adam is arXiv 1412.6980.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer


class Eve(Optimizer):
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

    All parameters of a group are updated in a few calls that each handle every tensor.
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
        if lr < 0.0 or eps < 0.0 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"Eve: lr {lr}, betas {betas} or eps {eps} is out of range")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "target_rms": target_rms,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None):
        """One update; parameters without a gradient are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Bias correction needs the tensor's own count of updates, which differs between
            # tensors where some batches give some of them no gradient.
            by_step: dict[int, list[torch.Tensor]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError("Eve takes no sparse gradients")
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                by_step.setdefault(state["step"], []).append(p)
            for step, params in by_step.items():
                self._update(params, step, group)
        return loss

    def _update(self, params: list[torch.Tensor], step: int, group: dict) -> None:
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in params]
        exp_avgs = [self.state[p]["exp_avg"] for p in params]
        exp_avg_sqs = [self.state[p]["exp_avg_sq"] for p in params]

        torch._foreach_mul_(exp_avgs, beta1)
        torch._foreach_add_(exp_avgs, grads, alpha=1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
        denoms = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_mul_(denoms, (1 - beta2**step) ** -0.5)
        torch._foreach_add_(denoms, group["eps"])

        tensors = [p for p in params if p.numel() > 1]
        if tensors:
            # On a GPU the comparison stays on the device, so that nothing waits for it.
            norms = torch.stack(torch._foreach_norm(tensors))
            limits = torch.tensor(
                [group["target_rms"] * math.sqrt(p.numel()) for p in tensors],
                dtype=norms.dtype,
            ).to(norms.device, non_blocking=True)
            if norms.is_cuda:
                factors = 1.0 - group["weight_decay"] * (norms > limits).to(norms.dtype)
                torch._foreach_mul_(tensors, list(factors.unbind()))
            else:
                decaying = [p for p, large in zip(tensors, (norms > limits).tolist()) if large]
                if decaying:
                    torch._foreach_mul_(decaying, 1.0 - group["weight_decay"])
        torch._foreach_addcdiv_(params, exp_avgs, denoms, value=-group["lr"] / (1 - beta1**step))
        scalars = [p for p in params if p.numel() == 1]
        if scalars:
            torch._foreach_clamp_min_(scalars, self.scalar_min)
            torch._foreach_clamp_max_(scalars, self.scalar_max)


class Eden:
    """Learning rates that fall with the batch and the epoch.

    ``lr = lr0 * ((b² + B²) / B²)^-0.25 * ((e² + E²) / E²)^-0.25`` for batch b (counted over the
    whole training), epoch e (from 0), ``lr_batches`` B and ``lr_epochs`` E. Call
    ``step_batch(b)`` once a batch and ``step_epoch(e)`` once an epoch; without an argument they
    count up by one.

    Args:
      optimizer: its groups' rates at this moment are lr0.
      lr_batches, lr_epochs: B and E, where the decline sets in.
    """

    def __init__(self, optimizer: Optimizer, lr_batches: float, lr_epochs: float):
        if lr_batches <= 0 or lr_epochs <= 0:
            raise ValueError(f"Eden: lr_batches {lr_batches}, lr_epochs {lr_epochs}: must be > 0")
        self.optimizer = optimizer
        self.lr_batches = lr_batches
        self.lr_epochs = lr_epochs
        self.batch = 0
        self.epoch = 0
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]

    def step_batch(self, batch: int | None = None) -> None:
        self.batch = self.batch + 1 if batch is None else batch
        self._set_lrs()

    def step_epoch(self, epoch: int | None = None) -> None:
        self.epoch = self.epoch + 1 if epoch is None else epoch
        self._set_lrs()

    def get_last_lr(self) -> list[float]:
        """The rate of each parameter group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict:
        return {"batch": self.batch, "epoch": self.epoch, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state: dict) -> None:
        self.batch = state["batch"]
        self.epoch = state["epoch"]
        self.base_lrs = list(state["base_lrs"])
        self._set_lrs()

    def _set_lrs(self) -> None:
        by_batch = (1 + (self.batch / self.lr_batches) ** 2) ** -0.25
        by_epoch = (1 + (self.epoch / self.lr_epochs) ** 2) ** -0.25
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs):
            group["lr"] = base_lr * by_batch * by_epoch
