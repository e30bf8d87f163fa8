"""JointCodebookLoss against the authors' package: value, gradients, padding, memory."""

import pytest
import torch
from multi_quantization.prediction import JointCodebookLoss as PeerLoss
from torch.utils.flop_counter import FlopCounterMode

from mvqkd.losses.codebook import JointCodebookLoss

C, N, K, H = 12, 4, 16, 20


def _pair(is_joint, reduction="sum", checkpoint=True, **sizes):
    torch.manual_seed(1)
    sizes = {"num_codebooks": N, "codebook_size": K, **sizes}
    peer = PeerLoss(C, hidden_channels=H, is_joint=is_joint, reduction=reduction, **sizes)
    peer.checkpoint = False
    ours = JointCodebookLoss(
        C, hidden_channels=H, is_joint=is_joint, reduction=reduction, checkpoint=checkpoint, **sizes
    )
    torch.nn.init.normal_(peer.linear2_bias)
    ours.load_state_dict(peer.state_dict())
    return ours, peer


def _batch(padded=True, num_codebooks=N, codebook_size=K):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 9, C, generator=generator)
    indexes = torch.randint(0, codebook_size, (3, 9, num_codebooks), generator=generator)
    if padded:
        indexes[1, 5:] = -100
        indexes[2, 2:] = -100
    return x, indexes


def _close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("is_joint", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_value_and_gradients_are_the_peers(is_joint, reduction, checkpoint):
    ours, peer = _pair(is_joint, reduction, checkpoint)
    x, indexes = _batch()
    grads = []
    values = []
    for module in (ours, peer):
        x_leaf = x.clone().requires_grad_()
        value = module(x_leaf, indexes)
        (value * torch.linspace(0.5, 1.5, value.numel()).view(value.shape)).sum().backward()
        values.append(value.detach())
        grads.append({"x": x_leaf.grad, **{n: p.grad for n, p in module.named_parameters()}})
    _close(*values)
    # What has no gradient is not there in ours.
    expected_grads = {name: grad for name, grad in grads[1].items() if grad is not None}
    assert grads[0].keys() == expected_grads.keys()
    for name, expected in expected_grads.items():
        _close(grads[0][name], expected)


def test_state_dict_loads_both_ways():
    ours, peer = _pair(is_joint=True)
    peer.load_state_dict(ours.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in peer.named_parameters()]


def test_independent_form_has_only_what_it_uses():
    ours, peer = _pair(is_joint=False)
    assert set(ours.state_dict()) == {"linear2b_weight", "linear2_bias"}
    whole = torch.nn.Sequential(ours)
    whole.load_state_dict({f"0.{name}": value for name, value in peer.state_dict().items()})
    assert torch.equal(ours.linear2b_weight, peer.linear2b_weight)
    with pytest.raises(RuntimeError, match="linear3"):
        ours.load_state_dict({**peer.state_dict(), "linear3": torch.zeros(1)})
    incompatible = peer.load_state_dict(ours.state_dict(), strict=False)
    assert incompatible.unexpected_keys == []


@pytest.mark.parametrize("is_joint", [False, True])
def test_chunks_do_not_change_the_result(monkeypatch, is_joint):
    ours, peer = _pair(is_joint)
    x, indexes = _batch()
    monkeypatch.setattr("mvqkd.losses.codebook._CHUNK_LOGITS", {"cpu": 4 * N * K, "cuda": 1})
    x_leaf = x.clone().requires_grad_()
    ours(x_leaf, indexes).backward()
    peer(x, indexes).backward()
    of_peer = dict(peer.named_parameters())
    for name, parameter in ours.named_parameters():
        _close(parameter.grad, of_peer[name].grad)
    assert torch.equal(x_leaf.grad[1, 5:], torch.zeros(4, C))


def test_single_ignored_indexes_and_extreme_logits():
    ours, peer = _pair(is_joint=False)
    x, indexes = _batch(padded=False)
    indexes[0, 0, 1] = -100
    _close(ours(100 * x, indexes), peer(100 * x, indexes))


@pytest.mark.parametrize("is_joint, largest", [(False, 8 * 256 * C), (True, 8 * 256 * H)])
def test_no_logits_are_kept_for_backward(is_joint, largest):
    ours, _ = _pair(is_joint, num_codebooks=8, codebook_size=256)
    x, indexes = _batch(num_codebooks=8, codebook_size=256)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(t.numel()), t)[1], lambda t: t
    ):
        ours(x.requires_grad_(), indexes)
    # The gradients themselves: of the weights, the biases and the frames that count.
    assert max(saved) == largest


# Of the three products in training, one adds in place, which the counter does not see.
@pytest.mark.parametrize("grad_enabled, products", [(True, 2), (False, 1)])
def test_gradients_are_computed_only_where_they_are_enabled(grad_enabled, products):
    ours, _ = _pair(is_joint=False)
    x, indexes = _batch(padded=False)
    x = x.requires_grad_()
    with torch.set_grad_enabled(grad_enabled), FlopCounterMode(display=False) as counter:
        value = ours(x, indexes)
    assert counter.get_total_flops() == products * 2 * 27 * C * N * K
    assert value.requires_grad == grad_enabled
    _close(value, ours(x, indexes))


def test_one_codebook_and_no_frame_that_counts():
    loss = JointCodebookLoss(C, 1, is_joint=False, codebook_size=K)
    x = torch.randn(2, C, requires_grad=True)
    value = loss(x, torch.full((2, 1), -100))
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(x.grad, torch.zeros(2, C))


@pytest.mark.parametrize("is_joint", [False, True])
def test_autocast_gives_a_finite_float32_loss(is_joint):
    ours, _ = _pair(is_joint)
    x, indexes = _batch()
    full = ours(x, indexes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = ours(x, indexes)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.02, atol=0.0)
    grads = []
    for loss in (full, half):
        ours.zero_grad()
        loss.backward()
        grads.append({name: p.grad.clone() for name, p in ours.named_parameters()})
    for name, expected in grads[0].items():
        assert grads[1][name].dtype == torch.float32
        assert (grads[1][name] - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("is_joint", [False, True])
def test_accuracy_per_codebook(is_joint):
    ours, _ = _pair(is_joint)
    x, indexes = _batch()
    with torch.no_grad():
        best = ours._logits(x.view(-1, C), indexes.view(-1, N)).argmax(dim=2).view(3, 9, N)
    expected = torch.stack(
        [(best[..., n] == indexes[..., n])[indexes[..., n] >= 0].float().mean() for n in range(N)]
    )
    torch.testing.assert_close(ours.accuracy(x, indexes), expected)
    loss, accuracy = ours.loss_and_accuracy(x, indexes)
    torch.testing.assert_close(accuracy, expected)
    assert loss.requires_grad and not accuracy.requires_grad
    torch.testing.assert_close(loss, ours(x, indexes))


def test_bad_input_is_named():
    ours, _ = _pair(is_joint=False)
    x, indexes = _batch()
    with pytest.raises(ValueError, match="codebook index 16"):
        ours(x, indexes.clamp(min=0).index_fill(0, torch.tensor([0]), K))
    with pytest.raises(ValueError, match="do not belong together"):
        ours(x, indexes[:, :, :2])
    with pytest.raises(ValueError, match="reduction"):
        JointCodebookLoss(C, N, reduction="total")
