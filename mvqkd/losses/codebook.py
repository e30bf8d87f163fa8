"""Cross-entropy on codebook indexes: the student predicts the teacher's quantized embedding.

Source: Guo, Yang et al., ICASSP 2023 (arXiv 2211.00508), section 4. Parameter names, values and
gradients are those of ``multi_quantization.prediction.JointCodebookLoss``.

Shapes: B frames (leading dimensions flattened), C predictor channels, H hidden channels,
N codebooks, K entries per codebook.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as checkpoint_activations

# Logits that the independent form holds at a time: about what the second-level cache holds on a
# CPU; a GPU needs more at once to be busy.
_CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**26}

_JOINT_ENTRIES = ("linear1.weight", "linear1.bias", "codebook_embedding.weight", "linear2_weight")


class _Joint:
    """What the codebooks before a codebook add to its logits, of some frames at a time.

    Frames come second in memory, so that what a codebook needs lies together.
    """

    def __init__(
        self,
        parameters: tuple[Tensor, Tensor, Tensor, Tensor],
        matmul_dtype: torch.dtype,
        needs_grad: bool,
    ) -> None:
        weight_HC, self._bias_H, self._embedding_EH, weight_NKH = map(Tensor.detach, parameters)
        self._weight_HC = weight_HC.to(matmul_dtype)
        self._weight_NKH = weight_NKH.to(matmul_dtype)
        self._dtype = matmul_dtype
        N, K, H = weight_NKH.shape
        self._scale = 0.5 * (H / N) ** 0.5
        self._first_entry_N = torch.arange(0, (N - 1) * K, K, device=weight_NKH.device)
        if needs_grad:
            self.grads = [torch.zeros_like(one, dtype=torch.float32) for one in parameters]

    def logits(self, x_BC: Tensor, indexes_BN: Tensor) -> Tensor:
        """(N, B, K)"""
        self._entries_NB = (indexes_BN[:, :-1] + self._first_entry_N).t()
        first_BH = torch.mm(x_BC, self._weight_HC.t()).float().add_(self._bias_H)
        hidden_NBH = first_BH.new_empty(indexes_BN.shape[1], *first_BH.shape)
        hidden_NBH[0] = first_BH
        for n, entries_B in enumerate(self._entries_NB, start=1):
            previous_BH = F.embedding(entries_B, self._embedding_EH)
            torch.add(hidden_NBH[n - 1], previous_BH, alpha=self._scale, out=hidden_NBH[n])
        self._hidden_NBH = hidden_NBH.relu_().to(self._dtype)
        return torch.bmm(self._hidden_NBH, self._weight_NKH.mT)

    def add_grads(self, x_BC: Tensor, grad_BNK: Tensor) -> Tensor:
        """Of the frames whose logits were asked for last; gives that of ``x_BC``."""
        grad_weight_HC, grad_bias_H, grad_embedding_EH, grad_weight_NKH = self.grads
        grad_NBK = grad_BNK.transpose(0, 1)
        grad_weight_NKH += torch.bmm(grad_NBK.mT, self._hidden_NBH)
        grad_NBH = torch.bmm(grad_NBK, self._weight_NKH).float()
        grad_NBH.mul_(self._hidden_NBH > 0)
        # A codebook's embedding is in the sums of all codebooks after it.
        for n in range(len(grad_NBH) - 1, 0, -1):
            grad_NBH[n - 1] += grad_NBH[n]
            grad_embedding_EH.index_add_(0, self._entries_NB[n - 1], grad_NBH[n], alpha=self._scale)
        grad_bias_H += grad_NBH[0].sum(dim=0)
        grad_BH = grad_NBH[0].to(self._dtype)
        grad_weight_HC += torch.mm(grad_BH.t(), x_BC)
        return torch.mm(grad_BH, self._weight_HC)


class _CodebookLoss(torch.autograd.Function):
    """Sum over frames and codebooks of the cross-entropy of a linear layer's logits, and how
    often each codebook's index was the most probable one, which costs nothing here.

    The gradients are made together with the loss, chunk by chunk, so that no logits are kept
    for backward, nor computed twice. An index out of range (``weight`` 0 there) has no part.

    ``joint`` is nothing, or the parameters of the joint form.
    """

    @staticmethod
    def forward(
        ctx,
        grad_enabled: bool,
        indexes_BN: Tensor,
        keep_BN: Tensor,
        x_BC: Tensor,
        weight_NKC: Tensor,
        bias_NK: Tensor,
        *joint: Tensor,
    ) -> tuple[Tensor, Tensor]:
        N, K, C = weight_NKC.shape
        weight = weight_NKC.detach().reshape(N * K, C)
        bias = bias_NK.detach().reshape(N * K)
        matmul_dtype = x_BC.dtype
        if torch.is_autocast_enabled(x_BC.device.type):
            matmul_dtype = torch.get_autocast_dtype(x_BC.device.type)
        # Gradients are off in here, and what the inputs need does not depend on the caller's.
        needs_grad = grad_enabled and any(ctx.needs_input_grad)
        loss = torch.zeros((), device=x_BC.device, dtype=torch.float32)
        hits_N = torch.zeros(N, device=x_BC.device, dtype=torch.float32)
        with torch.autocast(x_BC.device.type, enabled=False):
            before = _Joint(joint, matmul_dtype, needs_grad) if joint else None
            weight = weight.to(matmul_dtype)
            if needs_grad:
                grad_x = torch.empty_like(x_BC)
                grad_weight = torch.zeros(N * K, C, device=x_BC.device, dtype=torch.float32)
                grad_bias = torch.zeros(N * K, device=x_BC.device, dtype=torch.float32)
            budget = _CHUNK_LOGITS.get(x_BC.device.type, _CHUNK_LOGITS["cuda"])
            size = max(1, budget // (N * K))
            for start in range(0, x_BC.shape[0], size):
                part = slice(start, start + size)
                x = x_BC[part].detach().to(matmul_dtype)
                indexes, keep = indexes_BN[part].unsqueeze(2), keep_BN[part]
                logits = torch.mm(x, weight.t()).float().add_(bias).view(-1, N, K)
                if before:
                    logits += before.logits(x, indexes_BN[part]).transpose(0, 1)
                logits -= logits.amax(dim=2, keepdim=True)
                chosen = logits.gather(2, indexes).squeeze(2)
                hits_N += ((chosen == 0) * keep).sum(dim=0)
                probs = logits.exp_()
                total = probs.sum(dim=2)
                loss += ((total.log() - chosen) * keep).sum()
                if needs_grad:
                    grad = probs.mul_((keep / total).unsqueeze(2))
                    grad.scatter_add_(2, indexes, -keep.unsqueeze(2))
                    grad = grad.view(-1, N * K)
                    grad_bias += grad.sum(dim=0)
                    grad = grad.to(matmul_dtype)
                    grad_x[part] = torch.mm(grad, weight)
                    if before:
                        grad_x[part] += before.add_grads(x, grad.view(-1, N, K))
                    if matmul_dtype == torch.float32:
                        grad_weight.addmm_(grad.t(), x)
                    else:
                        grad_weight += torch.mm(grad.t(), x)
        if needs_grad:
            grads = [grad_x, grad_weight.view(N, K, C), grad_bias.view(N, K)]
            inputs = [x_BC, weight_NKC, bias_NK, *joint]
            grads += before.grads if before else []
            ctx.save_for_backward(*(grad.to(one.dtype) for grad, one in zip(grads, inputs)))
        ctx.mark_non_differentiable(hits_N)
        return loss, hits_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor, _: Tensor | None):
        return None, None, None, *(one * grad_loss.to(one.dtype) for one in ctx.saved_tensors)


class JointCodebookLoss(nn.Module):
    """Predicts the N codebook indexes of a frame from a vector, and gives their cross-entropy.

    Args:
      predictor_channels: C, dimension of the vector.
      num_codebooks: N, indexes per vector (of all teacher frames that it answers for).
      hidden_channels: H, of the joint form.
      codebook_size: K.
      reduction: "sum", "mean" (over the indexes that count) or "none".
      ignore_index: an index of this value has no part in the loss: padding.
      is_joint: whether a codebook's prediction also sees the true indexes of the codebooks before
        it, through an embedding, a running sum and a ReLU. The published results are with False,
        which leaves the parameters of that path out: without gradient they would only be decayed,
        saved and sent around. The peer's files load all the same.
      checkpoint: with reduction "none", compute the activations again in backward instead of
        keeping them. With another none are kept in any case.
    """

    def __init__(
        self,
        predictor_channels: int,
        num_codebooks: int,
        hidden_channels: int = 512,
        codebook_size: int = 256,
        reduction: str = "sum",
        ignore_index: int = -100,
        is_joint: bool = True,
        checkpoint: bool = True,
    ):
        super().__init__()
        if reduction not in ("sum", "mean", "none"):
            raise ValueError(f"reduction: {reduction!r} is none of sum, mean, none")
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.hidden_channels = hidden_channels
        self.reduction, self.ignore_index = reduction, ignore_index
        self.is_joint, self.checkpoint = is_joint, checkpoint

        N, K, H = num_codebooks, codebook_size, hidden_channels
        if is_joint:
            self.linear1 = nn.Linear(predictor_channels, H)
            self.codebook_embedding = nn.Embedding(
                (N - 1) * K, H, _weight=torch.randn((N - 1) * K, H) * H**-0.5
            )
            self.linear2_weight = nn.Parameter(torch.randn(N, K, H) * H**-0.5)
        self.linear2b_weight = nn.Parameter(
            torch.randn(N, K, predictor_channels) * predictor_channels**-0.5
        )
        self.linear2_bias = nn.Parameter(torch.zeros(N, K))

    def forward(self, predictor: Tensor, codebook_indexes: Tensor) -> Tensor:
        """The negative log-probability of the indexes.

        Args:
          predictor: (*, C).
          codebook_indexes: integers (*, N), in 0..K-1 or ``ignore_index``.
        Returns:
          a scalar; with reduction "none", one value per index, flat, 0 where ignored.
        Raises:
          ValueError: the shapes do not belong together, or an index is out of range (checked on
            the CPU).
        """
        x_BC, indexes_BN = self._flatten(predictor, codebook_indexes)
        if self.reduction == "none":
            if self.checkpoint and torch.is_grad_enabled():
                logits_BNK = checkpoint_activations(
                    self._logits, x_BC, indexes_BN, use_reentrant=False
                )
            else:
                logits_BNK = self._logits(x_BC, indexes_BN)
            return F.cross_entropy(
                logits_BNK.flatten(0, 1),
                indexes_BN.flatten(),
                ignore_index=self.ignore_index,
                reduction=self.reduction,
            )
        return self._loss_and_accuracy(x_BC, indexes_BN)[0]

    def loss_and_accuracy(
        self, predictor: Tensor, codebook_indexes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What ``forward`` and ``accuracy`` give; with a reduction, for the price of one."""
        if self.reduction == "none":
            return self(predictor, codebook_indexes), self.accuracy(predictor, codebook_indexes)
        return self._loss_and_accuracy(*self._flatten(predictor, codebook_indexes))

    def _loss_and_accuracy(self, x_BC: Tensor, indexes_BN: Tensor) -> tuple[Tensor, Tensor]:
        keep_BN = indexes_BN != self.ignore_index
        if not x_BC.is_cuda:
            # Frames that do not count cost nothing. On a GPU their number is not known without
            # waiting for it.
            frames = keep_BN.any(dim=1)
            if not bool(frames.all()):
                x_BC, indexes_BN, keep_BN = x_BC[frames], indexes_BN[frames], keep_BN[frames]
        joint = ()
        if self.is_joint:
            joint = (self.linear1.weight, self.linear1.bias)
            joint += (self.codebook_embedding.weight, self.linear2_weight)
        loss, hits_N = _CodebookLoss.apply(
            torch.is_grad_enabled(),
            indexes_BN.masked_fill(~keep_BN, 0),
            keep_BN.float(),
            x_BC,
            self.linear2b_weight,
            self.linear2_bias,
            *joint,
        )
        accuracy_N = hits_N / keep_BN.sum(dim=0).clamp(min=1)
        return (loss / keep_BN.sum() if self.reduction == "mean" else loss), accuracy_N

    @torch.no_grad()
    def accuracy(self, predictor: Tensor, codebook_indexes: Tensor) -> Tensor:
        """Share of frames whose index is the most probable one, per codebook: (N,).

        Ignored indexes do not count; a codebook with none that counts gets 0. In the joint form
        a codebook sees the true indexes before it, as in the loss. Arguments as in ``forward``.
        """
        x_BC, indexes_BN = self._flatten(predictor, codebook_indexes)
        N, K = self.num_codebooks, self.codebook_size
        hits_N = torch.zeros(N, device=x_BC.device)
        size = max(1, _CHUNK_LOGITS.get(x_BC.device.type, _CHUNK_LOGITS["cuda"]) // (N * K))
        for x_bC, indexes_bN in zip(x_BC.split(size), indexes_BN.split(size)):
            hits_N += (self._logits(x_bC, indexes_bN).argmax(dim=2) == indexes_bN).sum(dim=0)
        return hits_N / (indexes_BN != self.ignore_index).sum(dim=0).clamp(min=1)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # The authors' package has the joint form's entries in the independent form too.
        if not self.is_joint:
            for name in _JOINT_ENTRIES:
                state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _flatten(self, predictor: Tensor, codebook_indexes: Tensor) -> tuple[Tensor, Tensor]:
        N, K = self.num_codebooks, self.codebook_size
        if predictor.shape[:-1] != codebook_indexes.shape[:-1] or codebook_indexes.shape[-1] != N:
            raise ValueError(
                f"predictor {tuple(predictor.shape)} and indexes {tuple(codebook_indexes.shape)} "
                f"do not belong together (expected {tuple(predictor.shape[:-1])} + ({N},))"
            )
        indexes_BN = codebook_indexes.reshape(-1, N).long()
        if not indexes_BN.is_cuda:
            wrong = ((indexes_BN < 0) | (indexes_BN >= K)) & (indexes_BN != self.ignore_index)
            if bool(wrong.any()):
                raise ValueError(
                    f"codebook index {int(indexes_BN[wrong][0])} is neither in 0..{K - 1} nor "
                    f"the ignored {self.ignore_index}"
                )
        return predictor.reshape(-1, predictor.shape[-1]), indexes_BN

    def _logits(self, x_BC: Tensor, indexes_BN: Tensor) -> Tensor:
        N, K, C = self.linear2b_weight.shape
        logits_BNK = F.linear(
            x_BC, self.linear2b_weight.view(N * K, C), self.linear2_bias.view(N * K)
        ).unflatten(1, (N, K))
        if not self.is_joint:
            return logits_BNK
        # Ignored frames take any valid entry here; the loss leaves them out.
        entries = indexes_BN[:, :-1].clamp(min=0) + torch.arange(
            0, (N - 1) * K, K, device=indexes_BN.device
        )
        scale = 0.5 * (self.hidden_channels / N) ** 0.5
        previous_BNH = self.codebook_embedding(entries) * scale
        hidden_BNH = torch.cat((self.linear1(x_BC)[:, None], previous_BNH), dim=1)
        hidden_BNH = hidden_BNH.cumsum(dim=1).relu()
        joint_NBK = torch.bmm(hidden_BNH.transpose(0, 1), self.linear2_weight.mT)
        return logits_BNK + joint_NBK.transpose(0, 1)
