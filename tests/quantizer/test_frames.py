"""Frames from tensors and files, in order and shuffled."""

import h5py
import numpy as np
import pytest
import torch

from mvqkd.errors import RecipeError
from mvqkd.quantizer import frames as frames_module
from mvqkd.quantizer.frames import ShuffledFrames, check_frames, frame_statistics, random_rows


def _numbered(count, dim=3):
    return torch.arange(count).float()[:, None].expand(count, dim)


def test_statistics_are_exact_over_blocks(monkeypatch):
    frames = 1e-3 * torch.randn(1000, 6, generator=torch.Generator().manual_seed(0)) + 50.0
    monkeypatch.setattr(frames_module, "_BLOCK_FRAMES", 300)
    mean, std = frame_statistics(frames.numpy())
    torch.testing.assert_close(mean, frames.double().mean(dim=0).float())
    expected = frames.double().std(dim=0, correction=0).float()
    torch.testing.assert_close(std, expected, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("pool_frames", [40, 80, 10_000])
def test_an_epoch_has_each_frame_once(monkeypatch, pool_frames):
    monkeypatch.setattr(frames_module, "_POOL_FRAMES", pool_frames)
    monkeypatch.setattr(frames_module, "_RUN_FRAMES", 8)
    shuffled = ShuffledFrames(_numbered(203).numpy(), batch_size=20, seed=3)
    batches = [shuffled.batch(step)[:, 0] for step in range(2 * shuffled.batches_per_epoch)]
    assert all(len(batch) == 20 for batch in batches)
    for epoch in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
        rows = torch.cat(epoch)
        assert len(rows.unique()) == len(rows) == 200
        # Not in order, within a batch or from one to the next.
        assert rows.diff().abs().median() > 8
    assert not torch.equal(batches[0], batches[shuffled.batches_per_epoch])


def test_a_batch_depends_on_seed_and_step_alone(monkeypatch):
    monkeypatch.setattr(frames_module, "_POOL_FRAMES", 64)
    monkeypatch.setattr(frames_module, "_RUN_FRAMES", 8)
    in_order = ShuffledFrames(_numbered(200), batch_size=16, seed=3)
    expected = [in_order.batch(step) for step in range(30)]
    for step in (29, 3, 17):
        again = ShuffledFrames(_numbered(200).numpy(), batch_size=16, seed=3)
        assert torch.equal(again.batch(step), expected[step])
    assert not torch.equal(ShuffledFrames(_numbered(200), 16, 4).batch(0), expected[0])


def test_a_file_is_never_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(frames_module, "_POOL_FRAMES", 256)
    monkeypatch.setattr(frames_module, "_BLOCK_FRAMES", 100)
    largest = 0

    class Watched:
        shape = (5000, 3)

        def __len__(self):
            return 5000

        def __getitem__(self, rows):
            nonlocal largest
            with h5py.File(tmp_path / "frames.h5") as file:
                found = file["frames"][rows]
            largest = max(largest, len(found))
            return found

    with h5py.File(tmp_path / "frames.h5", "w") as file:
        file["frames"] = _numbered(5000).numpy()
    shuffled = ShuffledFrames(Watched(), batch_size=50, seed=0)
    for step in range(shuffled.batches_per_epoch):
        shuffled.batch(step)
    frame_statistics(Watched())
    random_rows(Watched(), 20, 0, "frames")
    assert largest <= 100


def test_random_rows_are_rows_in_random_order(monkeypatch):
    monkeypatch.setattr(frames_module, "_BLOCK_FRAMES", 30)
    rows = random_rows(_numbered(100).numpy(), 50, 1, "frames")
    assert len(rows[:, 0].unique()) == 50 and rows[:, 0].diff().min() < 0
    assert torch.equal(rows, random_rows(_numbered(100), 50, 1, "frames"))


def test_bad_frames_are_named():
    frames = _numbered(20).clone()
    frames[4, 1], frames[9, 0] = float("nan"), float("inf")
    with pytest.raises(RecipeError, match=r"2 frames with NaN or infinity \(104, 109\)"):
        check_frames(frames, 20, first=100)
    with pytest.raises(RecipeError, match=r"\(cut-a frame 4, cut-a frame 9\)"):
        frame_statistics(frames, describe=lambda number: f"cut-a frame {number}")
    with pytest.raises(RecipeError, match="20 frames, at least 21"):
        check_frames(frames, 21)


def test_a_file_that_is_cut_short_is_named(tmp_path):
    path = tmp_path / "frames.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("frames", data=np.ones((4000, 8), np.float32), chunks=(50, 8))
    size = path.stat().st_size
    with h5py.File(path) as file:
        dataset = file["frames"]
        with path.open("r+b") as raw:
            raw.truncate(size // 2)
        with pytest.raises(RecipeError, match=r"frames\.h5: cannot be read, damaged or cut short"):
            frame_statistics(dataset, "frames.h5")
