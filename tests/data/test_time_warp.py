"""The time warp: where frames go, and that the times it tells are theirs."""

import random

import pytest
import torch

from mvqkd.data.time_warp import TimeWarp


@pytest.mark.parametrize(("center", "moved"), [(40, 60), (60, 40), (25, 60), (80, 50)])
def test_features_are_those_of_the_source_time(center, moved):
    warp = TimeWarp(100, center, moved)
    centres_T = (torch.arange(130, dtype=torch.float64) + 0.5) * 0.01
    # Each frame holds its own time.
    warped_T = warp.features(centres_T[:, None].expand(-1, 3))[:, 1]
    source_T = warp.source(centres_T)
    assert torch.equal(warped_T[100:], centres_T[100:]) and torch.equal(
        source_T[100:], warped_T[100:]
    )
    # Within two frames of an edge, bicubic interpolation has no neighbours to go by.
    stretch = max(1.0, moved / center, (100 - moved) / (100 - center))
    near = torch.zeros(130, dtype=torch.bool)
    for edge in (0, moved, 100):
        near |= (centres_T / 0.01 - edge).abs() <= 2 * stretch
    assert (~near[:100]).sum() > 10
    torch.testing.assert_close(warped_T[~near], source_T[~near], rtol=0, atol=1e-3)
    assert (warped_T - source_T).abs().max() < 0.02
    # Edges go to edges, and time never runs backwards.
    edges = warp.source(torch.tensor([0.0, moved / 100, 1.0], dtype=torch.float64))
    torch.testing.assert_close(edges, torch.tensor([0.0, center / 100, 1.0], dtype=torch.float64))
    assert (source_T.diff() > 0).all()


def test_draws():
    random.seed(1)
    drawn = [TimeWarp.drawn(100, 30) for _ in range(2000)]
    found = [warp for warp in drawn if warp is not None]
    assert 0.95 * len(drawn) < len(found) < len(drawn)
    assert {warp.center for warp in found} == set(range(31, 70))
    assert {warp.moved - warp.center for warp in found} == set(range(-30, 31)) - {0}
    assert TimeWarp.drawn(61, 30) is None
