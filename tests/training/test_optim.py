"""Eve and Eden against their definitions, one tensor at a time."""

import copy

import pytest
import torch
from torch import nn

from mvqkd.training.optim import Eden, Eve


def eve_by_definition(p, grads, lr=0.01, betas=(0.9, 0.98), eps=1e-8):
    p, m, v = p.clone(), torch.zeros_like(p), torch.zeros_like(p)
    for step, grad in enumerate(grads, start=1):
        m = betas[0] * m + (1 - betas[0]) * grad
        v = betas[1] * v + (1 - betas[1]) * grad**2
        if p.numel() > 1 and p.norm() / p.numel() ** 0.5 > 0.1:
            p = p * (1 - 1e-3)
        m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
        p = p - lr * m_hat / (v_hat.sqrt() + eps)
        if p.numel() == 1:
            p = p.clamp(-10, 2)
    return p


def test_eve_large_small_and_scalar_tensors():
    torch.manual_seed(0)
    # Above the target, below it, a scalar at its bound, and one that has no gradient at first.
    starts = [torch.randn(5, 7), 0.01 * torch.randn(6), torch.tensor(1.99), torch.randn(3)]
    starts = [start.double() for start in starts]
    params = [nn.Parameter(start.clone()) for start in starts]
    optimizer = Eve(params, lr=0.01)
    grads = [[torch.randn_like(p) for p in params] for _ in range(6)]
    for row in grads:
        row[2] = -row[2].abs()
    for step, row in enumerate(grads):
        for i, (p, grad) in enumerate(zip(params, row)):
            p.grad = None if i == 3 and step < 2 else grad
        optimizer.step()
    for i, (p, start) in enumerate(zip(params, starts)):
        seen = [row[i] for row in grads[2 if i == 3 else 0 :]]
        assert torch.allclose(p, eve_by_definition(start, seen), atol=1e-12)
    assert params[2].item() == 2.0


def test_eve_resumes_bit_for_bit():
    torch.manual_seed(0)
    grads = [torch.randn(4, 4) for _ in range(6)]
    p = nn.Parameter(torch.randn(4, 4))
    optimizer = Eve([p], lr=0.01)
    for grad in grads[:3]:
        p.grad = grad
        optimizer.step()
    q = nn.Parameter(p.detach().clone())
    resumed = Eve([q], lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for grad in grads[3:]:
        p.grad, q.grad = grad, grad
        optimizer.step()
        resumed.step()
    assert torch.equal(p, q)


def test_eve_refuses_bad_settings():
    with pytest.raises(ValueError, match="Eve"):
        Eve([nn.Parameter(torch.zeros(2))], betas=(0.9, 1.0))


def test_eden_follows_its_formula_and_resumes():
    optimizer = Eve([nn.Parameter(torch.zeros(2))], lr=0.003)
    eden = Eden(optimizer, lr_batches=5000, lr_epochs=6)
    eden.step_epoch(3)
    for _ in range(4):
        eden.step_batch()
    eden.step_batch(700)
    by_batch = ((700**2 + 5000**2) / 5000**2) ** -0.25
    by_epoch = ((3**2 + 6**2) / 6**2) ** -0.25
    assert eden.get_last_lr() == [pytest.approx(0.003 * by_batch * by_epoch)]

    other = Eve([nn.Parameter(torch.zeros(2))], lr=1.0)
    resumed = Eden(other, lr_batches=5000, lr_epochs=6)
    resumed.load_state_dict(eden.state_dict())
    assert resumed.get_last_lr() == eden.get_last_lr()
    eden.step_batch()
    eden.step_epoch()
    resumed.step_batch()
    resumed.step_epoch()
    assert resumed.get_last_lr() == eden.get_last_lr()
    with pytest.raises(ValueError, match="lr_epochs"):
        Eden(optimizer, lr_batches=1, lr_epochs=0)
