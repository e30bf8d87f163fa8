"""Scaled layers, norm, DoubleSwish, dropout and the balancer against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from mvqkd.errors import RecipeError
from mvqkd.students.scaling import (
    ActivationBalancer,
    BasicNorm,
    DoubleSwish,
    Dropout,
    ScaledConv1d,
    ScaledConv2d,
    ScaledEmbedding,
    ScaledLinear,
    fold_scales,
)


def test_scaled_layers_start_as_published():
    torch.manual_seed(0)
    layer = ScaledLinear(64, 200, initial_scale=0.25, initial_speed=0.5)
    assert layer.weight.std().item() == pytest.approx(0.2, rel=0.02)
    assert layer.weight_scale.item() == pytest.approx(math.log(0.25 * 64**-0.5 / 0.2))
    assert layer.bias_scale.item() == pytest.approx(math.log(0.25))
    assert layer.bias.abs().max() == 0
    x = torch.randn(500, 64)
    assert layer(x).std().item() == pytest.approx(0.25, rel=0.05)
    assert ScaledConv1d(6, 6, 5, groups=6).weight_scale.item() == pytest.approx(
        math.log(5**-0.5 / 0.1)
    )
    assert ScaledConv2d(2, 6, 3, bias=False).bias_scale is None
    assert ScaledEmbedding(300, 20).weight.std().item() == pytest.approx(0.1, rel=0.05)


def test_scaled_layers_multiply_by_exp_of_scale():
    torch.manual_seed(0)
    layer = ScaledConv1d(3, 4, 3)
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.randn(2, 3, 9)
    expected = F.conv1d(x, layer.weight * layer.weight_scale.exp(), layer.bias)
    assert torch.allclose(layer(x), expected, atol=1e-6)


@torch.no_grad()
def test_folded_scales_give_the_same_bits():
    torch.manual_seed(0)
    layers = [
        (ScaledLinear(5, 3), torch.randn(2, 5)),
        (ScaledLinear(5, 3, bias=False), torch.randn(2, 5)),
        (ScaledConv1d(5, 3, 2), torch.randn(2, 5, 4)),
        (ScaledConv2d(5, 3, 2), torch.randn(2, 5, 4, 4)),
        (ScaledEmbedding(7, 3), torch.arange(7)),
    ]
    for layer, x in layers:
        if getattr(layer, "bias", None) is not None:
            torch.nn.init.normal_(layer.bias)
        before, weights = layer(x), {k: v.clone() for k, v in layer.state_dict().items()}
        assert fold_scales(layer) is layer
        assert torch.equal(layer(x), before)
        assert torch.equal(fold_scales(layer)(x), before)
        # The weights as they are now are still those of such a layer ...
        folded = {k: v.clone() for k, v in layer.state_dict().items()}
        layer.load_state_dict(folded)
        assert not layer.is_folded and torch.equal(layer(x), before)
        # ... and others may be loaded.
        fold_scales(layer).load_state_dict(weights)
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_a_scaled_linear_layer(bias):
    torch.manual_seed(0)
    layer = ScaledLinear(300, 500, bias=bias)
    if bias:
        torch.nn.init.normal_(layer.bias)
    x, grad = torch.randn(4, 7, 300, requires_grad=True), torch.randn(4, 7, 500)
    wanted = [x, *layer.parameters()]
    actual = layer(x)
    bias_in_use = layer.bias * layer.bias_scale.exp() if bias else None
    expected = F.linear(x, layer.weight * layer.weight_scale.exp(), bias_in_use)
    assert torch.allclose(actual, expected, atol=1e-5)
    for a, e in zip(
        torch.autograd.grad(actual, wanted, grad), torch.autograd.grad(expected, wanted, grad)
    ):
        assert (a - e).abs().max() <= 1e-5 * e.abs().max()


def test_basic_norm():
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 0.25).sqrt()
    assert torch.allclose(BasicNorm().double()(x), expected, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 70, 1000)])
def test_double_swish_and_gradient(shape, dtype):
    torch.manual_seed(0)
    x = (20 * torch.randn(shape, dtype=dtype)).requires_grad_()
    grad = torch.randn_like(x)
    y = DoubleSwish()(x)
    (actual,) = torch.autograd.grad(y, x, grad)
    expected = x * torch.sigmoid(x - 1)
    assert torch.allclose(y, expected, atol=1e-6)
    assert torch.allclose(actual, torch.autograd.grad(expected, x, grad)[0], atol=1e-6)


def test_double_swish_of_what_is_no_number_is_none():
    x = torch.tensor([math.nan, 1.0], requires_grad=True)
    y = DoubleSwish()(x)
    y.sum().backward()
    assert y.isnan().tolist() == x.grad.isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_double_swish_with_dropout(dtype):
    torch.manual_seed(0)
    x = (torch.rand(200, 333, dtype=dtype) + 0.5).requires_grad_()
    layer = DoubleSwish(dropout=0.25)
    y = layer(x)
    y.sum().backward()
    whole = layer.eval()(x)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.005)
    assert torch.allclose(y[kept], whole[kept] / 0.75)
    (grad,) = torch.autograd.grad(whole.sum(), x)
    assert torch.allclose(x.grad, grad * kept / 0.75, atol=1e-6)


def test_double_swish_keeps_channels_last_order():
    x = torch.randn(2, 40, 50, 60).to(memory_format=torch.channels_last).requires_grad_()
    y = DoubleSwish()(x)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y, x * torch.sigmoid(x - 1), atol=1e-6)


def test_dropout_share_scale_and_gradient():
    torch.manual_seed(0)
    x = torch.ones(301, 333, requires_grad=True)
    y = Dropout(0.1)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=0.004)
    assert y.max().item() == pytest.approx(1 / 0.9, rel=1e-4)
    assert y.detach().mean().item() == pytest.approx(1.0, abs=0.005)
    assert Dropout(0.1).eval()(x) is x
    with pytest.raises(RecipeError, match="dropout"):
        Dropout(1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_onto_a_residual(dtype):
    # In another order of memory, and with autocast of another type.
    x = torch.ones(2, 50, 100, dtype=dtype).transpose(1, 2).requires_grad_()
    residual = torch.full((2, 100, 50), 2.0, requires_grad=True)
    layer = Dropout(0.5)
    y = layer(x, residual)
    assert y.dtype == torch.float32 and set(y.unique().tolist()) == {2.0, 4.0}
    y.sum().backward()
    assert x.grad.dtype == dtype and torch.equal(x.grad.float(), y.detach() - 2)
    assert torch.equal(residual.grad, torch.ones_like(residual))
    assert torch.equal(layer.eval()(x, residual), x + residual)


def test_dropouts_differ():
    layer, x = Dropout(0.5), torch.ones(10000)
    torch.manual_seed(0)
    kept = [(layer(x) > 0).float() for _ in range(4)]
    together = torch.stack(kept).corrcoef() - torch.eye(4)
    assert together.abs().max() < 0.05
    # Neighbours, too, do not depend on each other.
    assert (kept[0][1:] * kept[0][:-1]).mean().item() == pytest.approx(0.25, abs=0.02)


def test_dropout_repeats_from_a_generator_state():
    state = torch.get_rng_state()
    first = Dropout(0.5)(torch.ones(50))
    torch.set_rng_state(state)
    assert torch.equal(first, Dropout(0.5)(torch.ones(50)))


def test_balancer_pushes_by_sign_share_and_size():
    balancer = ActivationBalancer(channel_dim=-1, max_abs=2.0, balance_prob=1.0)
    # Channels: all positive; all negative; balanced; too small; too large.
    up_and_down = torch.tensor([1.0, -1.0]).repeat(10)
    x = torch.stack(
        [torch.ones(20), -torch.ones(20), up_and_down, 0.1 * up_and_down, 3 * up_and_down], dim=1
    ).requires_grad_()
    balancer(x).backward(torch.full((20, 5), -2.0))
    added = x.grad + 2.0
    # |grad| = 2 and strength 0.01: all positive or all negative gets the full factor.
    assert torch.allclose(added[:, 0], torch.tensor(0.02), atol=1e-6)
    assert torch.allclose(added[:, 1], torch.tensor(-0.02), atol=1e-6)
    assert torch.equal(added[:, 2], torch.zeros(20))
    assert torch.allclose(added[:, 3], -0.02 * up_and_down, atol=1e-6)
    assert torch.allclose(added[:, 4], 0.02 * up_and_down, atol=1e-6)


def test_balancer_is_identity_where_off_and_applies_as_often_as_asked():
    torch.manual_seed(0)
    x = torch.ones(4, 3, requires_grad=True)
    balancer = ActivationBalancer(channel_dim=-1)
    assert balancer.eval()(x) is x
    balancer.train().balance_prob = 0.0
    assert balancer(x) is x
    balancer.balance_prob = 0.25
    applied = sum(balancer(x) is not x for _ in range(400))
    assert 70 < applied < 130


@pytest.mark.parametrize("shape, channel_dim", [((3, 70, 96), -1), ((2, 8, 30, 20), 1)])
def test_compiled_balancer_equals_torch(shape, channel_dim):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    # Channels of all kinds.
    sizes = torch.linspace(0.05, 3.0, shape[channel_dim])
    view = [-1 if d == channel_dim % x.dim() else 1 for d in range(x.dim())]
    x = (x + sizes.flip(0).sub(1.5).view(view)) * sizes.view(view)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    grad = torch.randn(shape, generator=generator)
    found = []
    for dtype in (torch.float32, torch.float64):
        x_of_type = x.detach().to(dtype, copy=True).requires_grad_()
        balancer = ActivationBalancer(channel_dim, 0.3, 0.6, max_abs=2.0, balance_prob=1.0)
        balancer(x_of_type).backward(grad.to(dtype))
        found.append(x_of_type.grad)
    compiled, by_torch = found
    assert not torch.equal(compiled, grad)
    assert torch.allclose(compiled.double(), by_torch, atol=1e-6)
