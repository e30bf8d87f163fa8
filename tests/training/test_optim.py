"""Eve and Eden against their definitions, one tensor at a time."""

import copy

import pytest
import torch
from torch import nn

from mvqkd.training.optim import Eden, Eve, ScaledAdam


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


def test_compiled_eve_equals_torch():
    # More than one block, a scalar, a gradient in another order of memory, one that comes late.
    shapes = [(300, 400), (5,), (), (20, 30)]
    found = []
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        params = [torch.nn.Parameter(p) for p in params]
        optimizer = Eve(params, lr=0.01)
        for step in range(4):
            for p in params[: 3 if step == 0 else 4]:
                grad = torch.randn(p.shape[::-1], generator=generator).to(dtype)
                p.grad = grad.t() if p.dim() == 2 else grad
            optimizer.step()
        found.append([p.detach().double() for p in params])
    for compiled, by_torch in zip(*found):
        assert torch.allclose(compiled, by_torch, rtol=1e-5, atol=1e-6)


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


def test_eden_follows_its_formula():
    optimizer = Eve([nn.Parameter(torch.zeros(2))], lr=0.003)
    eden = Eden(optimizer, lr_batches=5000, lr_epochs=6)
    eden.step_epoch(3)
    eden.step_batch(4)
    eden.step_batch(700)
    by_batch = ((700**2 + 5000**2) / 5000**2) ** -0.25
    by_epoch = ((3**2 + 6**2) / 6**2) ** -0.25
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.003 * by_batch * by_epoch)
    with pytest.raises(ValueError, match="lr_epochs"):
        Eden(optimizer, lr_batches=1, lr_epochs=0)


def scaled_adam_by_definition(p, grads, lr, eta=0.1, betas=(0.9, 0.98), eps=1e-8):
    """Zipformer's equations, one element or tensor at a time."""
    moments = {"direction": [0.0, 0.0], "scale": [0.0, 0.0]}

    def step(name, grad, t):
        m = betas[0] * moments[name][0] + (1 - betas[0]) * grad
        v = betas[1] * moments[name][1] + (1 - betas[1]) * grad**2
        moments[name] = [m, v]
        return m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)) ** 0.5 + eps)

    for t, grad in enumerate(grads, start=1):
        if p.numel() == 1:
            p = (p - lr * eta * step("direction", grad, t)).clamp(-10, 10)
            continue
        r = (p**2).mean() ** 0.5
        unit = p / r
        direction = lr * r * step("direction", grad, t)
        scale = lr * eta * r * step("scale", (unit * grad).sum(), t)
        p = p - direction - scale * unit
    return p


def test_scaled_adam_follows_the_papers_equations():
    torch.manual_seed(0)
    starts = [torch.randn(5, 7), 0.01 * torch.randn(6), torch.tensor(9.999)]
    params = [nn.Parameter(start.double()) for start in starts]
    optimizer = ScaledAdam(params, lr=0.02, clipping_scale=0)
    grads = [[torch.randn_like(p) for p in params] for _ in range(6)]
    for row in grads:
        row[2] = -row[2].abs()
        for p, grad in zip(params, row):
            p.grad = grad
        optimizer.step()
    for i, (p, start) in enumerate(zip(params, starts)):
        expected = scaled_adam_by_definition(start.double(), [row[i] for row in grads], 0.02)
        torch.testing.assert_close(p.data, expected, rtol=1e-10, atol=1e-12)
    assert params[2].item() == 10.0


def test_scaled_adam_learns_whatever_the_scale():
    """The same relative path for a tensor and its thousandfold."""
    paths = []
    for scale in (1.0, 1000.0):
        p = nn.Parameter(torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.float64) * scale)
        optimizer = ScaledAdam([p], lr=0.01, eps=1e-20, max_rms=1e9, clipping_scale=0)
        for _ in range(30):
            optimizer.zero_grad()
            (p / scale - 1).square().sum().backward()
            optimizer.step()
        paths.append(p.data / scale)
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-6, atol=1e-8)


def test_scaled_adam_clips_at_twice_the_median_of_the_last_window():
    seen = []

    class Recorder(ScaledAdam):
        def _update(self, p, grad, rms, group):
            seen.append(grad.clone())

    p = nn.Parameter(torch.ones(4))
    optimizer = Recorder([p], clipping_window=5)
    for size in (1.0, 1.0, 2.0, 3.0, 9.0, 50.0, 1.0):
        p.grad = torch.tensor([size, 0.0, 0.0, 0.0])
        optimizer.step()
    # The median of the first five is 2.
    assert [grad[0].item() for grad in seen] == pytest.approx([1, 1, 2, 3, 9, 4, 1])


def test_scaled_adam_keeps_tensors_within_their_bounds():
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.full((3,), 4.0))
    optimizer = ScaledAdam([p, q], lr=0.1, clipping_scale=0)
    for _ in range(5):
        p.grad, q.grad = torch.ones(3), -torch.ones(3) * 1e-12
        optimizer.step()
    torch.testing.assert_close(p.data, torch.full((3,), -5 * 0.1 * 1e-5), rtol=0.05, atol=0)
    torch.testing.assert_close(q.data, torch.full((3,), 4 * 0.99**5), rtol=1e-3, atol=0)


def test_eden_warms_up():
    optimizer = Eve([nn.Parameter(torch.zeros(2))], lr=1.0)
    eden = Eden(optimizer, lr_batches=1e9, lr_epochs=1e9, warmup_batches=10)
    rates = []
    for batch in (0, 5, 10, 20):
        eden.step_batch(batch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.75, 1.0, 1.0])
