import pytest
import torch

from mvqkd.errors import RecipeError
from mvqkd.training.checkpoint import averaged_weights, load_checkpoint, save_checkpoint


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, model={"w": torch.arange(3)}, progress={"step": 3})
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["model"]["w"], torch.arange(3))
    assert loaded["progress"] == {"step": 3}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_cut_short(tmp_path, share):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, model={"w": torch.arange(1000)})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(RecipeError) as raised:
        load_checkpoint(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [[1, 2], {"step": 1}])
def test_no_checkpoint(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    with pytest.raises(RecipeError, match="not a checkpoint"):
        load_checkpoint(path)


class Evil:
    def __reduce__(self):
        return (open, ("/dev/null",))


def test_pickled_code_is_not_run(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": Evil()}, path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_checkpoint(path)


def test_missing(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        load_checkpoint(tmp_path / "checkpoint.pt")


def test_averaged_weights(tmp_path):
    """Epochs of unequal length; model_avg of epoch e is the mean of all steps up to it."""
    steps = torch.randn(8, 3)
    ends = [0, 2, 3, 6, 8]
    for epoch in range(1, 5):
        save_checkpoint(
            tmp_path / f"epoch-{epoch}.pt",
            model={"w": steps[ends[epoch] - 1], "count": torch.tensor(epoch)},
            model_avg={"w": steps[: ends[epoch]].mean(0), "count": torch.tensor(epoch)},
            averaged_steps=ends[epoch],
        )
    for epoch in range(1, 5):
        assert torch.equal(averaged_weights(tmp_path, epoch, 0)["w"], steps[ends[epoch] - 1])
        for avg in range(1, 6):
            weights = averaged_weights(tmp_path, epoch, avg)
            expected = steps[ends[max(0, epoch - avg)] : ends[epoch]].mean(0)
            torch.testing.assert_close(weights["w"], expected)
            assert weights["w"].dtype == torch.float32 and weights["count"] == epoch


def test_averaged_weights_of_epochs_shorter_than_the_average(tmp_path):
    """No step was averaged: the running average still holds the weights at the start."""
    model, start = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    for epoch in (1, 2):
        path = tmp_path / f"epoch-{epoch}.pt"
        save_checkpoint(path, model=model, model_avg=start, averaged_steps=0)
    for avg in (1, 2):
        assert torch.equal(averaged_weights(tmp_path, 2, avg)["w"], model["w"])


def test_averaged_weights_of_an_epoch_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"epoch-3\.pt"):
        averaged_weights(tmp_path, 3, 1)
