"""The compiled kernels: the same with any number of threads, and for sizes that are no blocks."""

import pytest
import torch

from mvqkd import cpu_kernels
from mvqkd.cpu_kernels import (
    DropKey,
    channel_statistics,
    depthwise_weight_gradient,
    double_swish,
    drop,
    push,
)


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results():
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 333, 130, generator=generator).unbind()
    torch.manual_seed(1)
    key = DropKey(0.3)
    positive, share, mean_abs = channel_statistics(x)
    frames = torch.randn(3, 47, 130, generator=generator)
    return [
        *double_swish(x, key),
        drop(x, key),
        drop(x, key, grad),
        positive,
        share,
        mean_abs,
        push(grad, positive, share, mean_abs),
        depthwise_weight_gradient(frames, frames[:, 2:40], 10),
    ]


def test_threads_do_not_change_the_result(threads, monkeypatch):
    threads(1)
    alone = results()
    threads(3)
    assert all(map(torch.equal, results(), alone))
    # Where torch's threads are not to be had.
    monkeypatch.setattr(cpu_kernels, "_PARALLEL", None)
    assert all(map(torch.equal, results(), alone))


@pytest.mark.parametrize("B, T, C, K", [(1, 1, 1, 1), (2, 3, 5, 4), (2, 9, 130, 31)])
def test_depthwise_weight_gradient(B, T, C, K):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T + K - 1, C, generator=generator)
    grad = torch.randn(B, T, C, generator=generator)
    expected = torch.stack([(grad * x[:, k : k + T]).sum(dim=(0, 1)) for k in range(K)])
    assert torch.allclose(depthwise_weight_gradient(x, grad, K), expected, atol=1e-5)


@pytest.mark.parametrize("size", [0, 1, 7, 16384, 16385])
def test_sizes(size):
    x = torch.linspace(-100, 100, size)
    y, derivative = double_swish(x, DropKey(0.0))
    s = torch.sigmoid(x - 1)
    assert torch.allclose(y, x * s, atol=1e-6)
    assert torch.allclose(derivative, s + x * s * (1 - s), atol=1e-6)
    assert torch.equal(drop(x, DropKey(0.0), x), 2 * x)
