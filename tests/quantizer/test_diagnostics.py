"""Diagnostics of a quantizer: figures with a known answer, and the errors."""

import copy
import json
import math

import pytest
import torch

from mvqkd.errors import RecipeError
from mvqkd.quantizer.diagnostics import check_diagnostics, diagnose, plot_diagnostics
from mvqkd.quantizer.quantizer import Quantizer


def _quantizer_of_two_axes(entries=16):
    """Codebook 0 has steps along one axis, codebook 1 along the other: orthogonal."""
    quantizer = Quantizer(2, entries, 2, torch.Generator().manual_seed(0))
    steps = torch.arange(entries).float()
    with torch.no_grad():
        quantizer.centers.zero_()
        quantizer.centers[0, :, 0] = steps
        quantizer.centers[1, :, 1] = steps
        quantizer.to_logits.weight.copy_(quantizer.centers.view(-1, 2))
        quantizer.to_logits.bias.copy_(-0.5 * quantizer.centers.view(-1, 2).square().sum(dim=1))
    return quantizer


def _grid(entries=16):
    return torch.cartesian_prod(torch.arange(entries), torch.arange(entries)).float()


def test_figures_with_a_known_answer(tmp_path):
    quantizer, frames = _quantizer_of_two_axes(), _grid()
    found = diagnose(quantizer, frames + 0.1, mean=torch.zeros(2), rounds=(0, 2))
    expected = 256 * 2 * 0.1**2 / (frames + 0.1).square().sum().item()
    assert found["rrl"] == pytest.approx({"0": expected, "2": expected}, rel=1e-4)
    assert found["entropy_bits"] == pytest.approx([4.0, 4.0])
    assert found["index_counts"] == [[16] * 16] * 2
    assert found["entropy_bits_max"] == 4.0 and found["dead_entries"] == [0, 0]
    assert found["correlation"][0] == pytest.approx([1.0, 0.0])
    assert found["index_mutual_information_bits"][0] == pytest.approx([4.0, 0.0], abs=1e-9)
    assert json.loads(json.dumps(found)) == found
    check_diagnostics(found)
    plot_diagnostics(found, tmp_path / "plots" / "quantizer.png")
    assert (tmp_path / "plots" / "quantizer.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("beam", "restarts"), [(0, 0), (4, 0), (0, 3), (4, 3)])
def test_rounds_are_those_of_encode(beam, restarts):
    quantizer = Quantizer(6, 16, 4, torch.Generator().manual_seed(1))
    plain = copy.deepcopy(quantizer)
    quantizer.beam, quantizer.restarts = beam, restarts
    frames = torch.randn(300, 6, generator=torch.Generator().manual_seed(2))
    mean = frames.mean(dim=0)
    found = diagnose(quantizer, frames, mean, rounds=(3, 0, 1))
    for rounds in (0, 1, 3):
        indexes = quantizer.encode(frames, rounds)
        error = quantizer.decode(indexes) - frames
        expected = error.square().sum() / (frames - mean).square().sum()
        assert found["rrl"][str(rounds)] == pytest.approx(expected.item(), rel=1e-4)
    assert (
        found["index_counts"] == quantizer.count_indexes(quantizer._unpack(indexes.long())).tolist()
    )
    if beam or restarts:
        found_of_plain = diagnose(plain, frames, mean, rounds=(3,))
        assert found["rrl"]["3"] < found_of_plain["rrl"]["3"]


def test_equal_codebooks_show():
    quantizer, frames = _quantizer_of_two_axes(), _grid()
    with torch.no_grad():
        quantizer.centers[1] = quantizer.centers[0]
    assert diagnose(quantizer, frames, torch.zeros(2))["correlation"][0] == pytest.approx([1, 1])
    # Two indexes that always agree tell all of each other.
    line = torch.arange(16).float()[:, None].expand(16, 2).repeat(4, 1)
    found = diagnose(_quantizer_of_two_axes(), line, torch.zeros(2))
    assert found["index_mutual_information_bits"][0] == pytest.approx([4.0, 4.0])


def test_one_codebook(tmp_path):
    quantizer = Quantizer(3, 16, 1, torch.Generator().manual_seed(0))
    frames = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    plot_diagnostics(diagnose(quantizer, frames, torch.zeros(3)), tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 0


def test_unused_codebooks_are_an_error_with_its_cause():
    frames = _grid()
    frames[:, 1] = 3.0
    found = diagnose(_quantizer_of_two_axes(), frames, torch.zeros(2))
    assert found["dead_entries"] == [0, 15]
    with pytest.raises(RecipeError, match="codebooks 1 are not used; likely"):
        check_diagnostics(found)


@pytest.mark.parametrize("rrl", [1.4, math.nan])
def test_worse_than_the_mean_is_an_error_with_its_cause(rrl):
    found = diagnose(_quantizer_of_two_axes(), _grid(), torch.zeros(2))
    found["rrl"]["5"] = rrl
    with pytest.raises(RecipeError, match="worse than the mean alone; likely") as caught:
        check_diagnostics(found)
    for cause in ("too few frames", "not normalized (set standardize: true)", "too few training"):
        assert cause in str(caught.value)


def test_bad_frames_are_named():
    frames = _grid()
    frames[7, 1] = float("nan")
    with pytest.raises(RecipeError, match=r"1 frames with NaN or infinity \(7\)"):
        diagnose(_quantizer_of_two_axes(), frames, torch.zeros(2))
    with pytest.raises(RecipeError, match="15 frames, at least 16"):
        diagnose(_quantizer_of_two_axes(), _grid()[:15], torch.zeros(2))
