"""Both trainers: steps equal to the authors' package, resumed runs, files as frames, bad input."""

import dataclasses
import random

import h5py
import numpy as np
import pytest
import torch
from multi_quantization import QuantizerTrainer as PeerTrainer

from mvqkd.errors import RecipeError
from mvqkd.quantizer import frames as frames_module
from mvqkd.quantizer import trainer as trainer_module
from mvqkd.quantizer.frames import frame_statistics
from mvqkd.quantizer.quantizer import Quantizer
from mvqkd.quantizer.trainer import (
    LeastSquaresTrainer,
    QuantizerSettings,
    QuantizerTrainer,
    fold_normalization,
    train_quantizer,
)

DIM = 10

PAPER = QuantizerSettings(
    num_codebooks=2,
    codebook_size=16,
    trainer="paper",
    phase_one_iters=8,
    phase_two_iters=8,
    batch_size=64,
    lr=0.02,
)
LSQ = QuantizerSettings(
    num_codebooks=2,
    codebook_size=16,
    trainer="lsq",
    batch_size=64,
    lsq_iters=3,
    logits_iters=5,
    lsq_frames=500,
)
BEAM = dataclasses.replace(LSQ, beam=4)
ANNEALED = dataclasses.replace(LSQ, beam=4, lsq_noise=1.0, restarts=2, lsq_iters=8)


def _frames(num_frames=600, dim=DIM, seed=0):
    """Correlated frames of uneven variance and a mean far from 0."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99))
    return torch.randn(num_frames, dim, generator=generator) @ mix + 3.0


def _rrl(quantizer, frames, mean):
    error = quantizer.decode(quantizer.encode(frames)) - frames
    return (error.square().sum() / (frames - mean).square().sum()).item()


def _weights(quantizer):
    return {n: t for n, t in quantizer.state_dict().items() if n != "id_buf"}


def test_steps_are_the_peers(monkeypatch):
    ours = QuantizerTrainer(DIM, 2, "cpu", phase_one_iters=4, phase_two_iters=4, lr=0.01)
    peer = PeerTrainer(DIM, 2, torch.device("cpu"), phase_one_iters=4, phase_two_iters=4, lr=0.01)
    peer.quantizer.load_state_dict(ours.quantizer.state_dict())
    draws = torch.rand(20, generator=torch.Generator().manual_seed(0)).tolist()
    peers_draws, our_draws = iter(draws), iter(draws)
    monkeypatch.setattr(random, "random", lambda: next(peers_draws))
    monkeypatch.setattr(trainer_module, "_draw", lambda generator: next(our_draws))
    steps = 0
    while not ours.done():
        x = _frames(64, seed=steps)
        assert not peer.done()
        peer.step(x)
        ours.step(x)
        steps += 1
    assert steps == 9 and peer.done()
    expected = peer.get_quantizer().state_dict()
    for name, found in _weights(ours.get_quantizer()).items():
        limit = 1e-3 * expected[name].abs().max().item() + 1e-6
        torch.testing.assert_close(found, expected[name], rtol=0.0, atol=limit)


@pytest.mark.parametrize("settings", [PAPER, LSQ], ids=["paper", "lsq"])
def test_the_seed_decides(settings):
    frames = _frames()
    torch.manual_seed(1)
    first = train_quantizer(frames, settings, progress=None)
    torch.manual_seed(2)
    second = train_quantizer(frames, settings, progress=None)
    other = train_quantizer(frames, dataclasses.replace(settings, seed=1), progress=None)
    assert first.get_id() == second.get_id()
    assert first.weights_sha256() == second.weights_sha256() != other.weights_sha256()
    assert not first.training


class _KilledError(Exception):
    pass


@pytest.mark.parametrize(
    "settings", [PAPER, LSQ, BEAM, ANNEALED], ids=["paper", "lsq", "beam", "annealed"]
)
@pytest.mark.parametrize("kill_at", [2, 6])
@pytest.mark.parametrize("pool_frames", [128, 65536])
def test_a_killed_run_ends_the_same(settings, kill_at, pool_frames, tmp_path, monkeypatch):
    monkeypatch.setattr(frames_module, "_POOL_FRAMES", pool_frames)
    frames = _frames()
    whole = train_quantizer(frames, settings, progress=None)
    monkeypatch.setattr(trainer_module, "_CHECKPOINT_SECONDS", -1.0)
    path = tmp_path / "quantizer.ckpt"
    kind = QuantizerTrainer if settings.trainer == "paper" else LeastSquaresTrainer
    real_step = kind.step

    def step(self, *batch):
        if self.cur_iter == kill_at:
            raise _KilledError
        real_step(self, *batch)

    monkeypatch.setattr(kind, "step", step)
    with pytest.raises(_KilledError):
        train_quantizer(frames, settings, checkpoint_path=path, progress=None)
    monkeypatch.setattr(kind, "step", real_step)
    lines = []
    resumed = train_quantizer(frames, settings, checkpoint_path=path, progress=lines.append)
    assert f"at step {kill_at}" in lines[0]
    assert resumed.weights_sha256() == whole.weights_sha256()
    assert resumed.beam == whole.beam == settings.beam
    assert resumed.restarts == whole.restarts == settings.restarts


def test_least_squares_reconstructs_unseen_frames():
    settings = dataclasses.replace(
        LSQ, num_codebooks=4, lsq_frames=2000, lsq_iters=4, logits_iters=0
    )
    frames = _frames(2000)
    mean, _ = frame_statistics(frames)
    start = train_quantizer(frames, dataclasses.replace(settings, lsq_iters=0), progress=None)
    trained = train_quantizer(frames, settings, progress=None)
    unseen = _frames(500, seed=7)
    before, after = _rrl(start, unseen, mean), _rrl(trained, unseen, mean)
    assert after < 0.95 * before < 0.4


def test_alternations_improve_residual_codebooks():
    frames, mean = _frames(), _frames().mean(dim=0)
    started = train_quantizer(frames, dataclasses.replace(BEAM, lsq_iters=0), progress=None)
    finished = train_quantizer(frames, BEAM, progress=None)
    assert finished.beam == 4
    assert _rrl(finished, frames, mean) < 0.99 * _rrl(started, frames, mean) < 0.5


def test_annealing_leads_from_random_indexes_to_good_codebooks():
    settings = dataclasses.replace(ANNEALED, num_codebooks=4, lsq_frames=3000, logits_iters=0)
    frames, unseen = _frames(3000, dim=16), _frames(500, dim=16, seed=7)
    start, end = (
        _rrl(train_quantizer(frames, kind, progress=None), unseen, frames.mean(dim=0))
        for kind in (
            dataclasses.replace(settings, lsq_iters=0),
            dataclasses.replace(settings, lsq_iters=25),
        )
    )
    assert end < 0.5 * start


def test_fitting_the_first_guess_improves_it():
    frames = _frames(2000)
    settings = dataclasses.replace(LSQ, lsq_frames=2000, batch_size=256)
    losses = [
        train_quantizer(
            frames, dataclasses.replace(settings, logits_iters=n), progress=None
        ).compute_loss(frames, 1)[1]
        for n in (0, 60)
    ]
    assert losses[1] < losses[0]


def test_more_codebooks_than_dimensions():
    settings = dataclasses.replace(LSQ, num_codebooks=8, lsq_frames=400)
    frames = _frames(400, dim=5)
    quantizer = train_quantizer(frames, settings, progress=None)
    assert _rrl(quantizer, frames, frames.mean(dim=0)) < 0.1


def test_paper_trainer_learns():
    settings = dataclasses.replace(PAPER, phase_one_iters=120, phase_two_iters=40)
    frames = _frames(1500)
    frames = frames / frames.std()
    unseen = _frames(400, seed=7) / _frames(1500).std()
    quantizer = train_quantizer(frames, settings, progress=None)
    assert _rrl(quantizer, unseen, frames.mean(dim=0)) < 0.6


def test_progress_tells_rate_losses_and_rrl():
    lines = []
    train_quantizer(_frames(), PAPER, progress=lines.append)
    for part in ("steps/s", "s left", "RRL by rounds", "logprob_loss", "logits_entropy_loss"):
        assert part in lines[-1]


@pytest.mark.parametrize("trainer", ["paper", "lsq"])
def test_standardized_training_does_not_see_the_scale(trainer):
    settings = dataclasses.replace(PAPER if trainer == "paper" else LSQ, standardize=True)
    frames = _frames()
    plain = train_quantizer(frames, settings, progress=None)
    # A power of two scales floating-point numbers exactly.
    scaled = train_quantizer(1024.0 * frames, settings, progress=None)
    assert (plain.encode(frames) == scaled.encode(1024.0 * frames)).float().mean() > 0.99


def test_folding_gives_the_same_indexes():
    quantizer = Quantizer(DIM, 16, 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        quantizer.logits_scale.fill_(0.1)
        quantizer.centers_scale.fill_(-0.05)
    x = _frames(200)
    mean = x.mean(dim=0)
    folded = fold_normalization(quantizer, mean, 2.5)
    normalized = (x - mean) / 2.5
    assert (quantizer.encode(normalized) == folded.encode(x)).float().mean() > 0.99
    codes = quantizer.encode(normalized)
    torch.testing.assert_close(folded.decode(codes), 2.5 * quantizer.decode(codes) + mean)


@pytest.mark.parametrize("settings", [PAPER, LSQ], ids=["paper", "lsq"])
def test_files_give_what_a_tensor_gives(settings, tmp_path):
    frames = _frames()
    expected = train_quantizer(frames, settings, progress=None)
    np.save(tmp_path / "frames.npy", frames.numpy())
    mapped = np.load(tmp_path / "frames.npy", mmap_mode="r")
    assert train_quantizer(mapped, settings, progress=None).get_id() == expected.get_id()
    with h5py.File(tmp_path / "frames.h5", "w") as file:
        file["frames"] = frames.numpy()
    with h5py.File(tmp_path / "frames.h5") as file:
        dataset = file["frames"]
        assert train_quantizer(dataset, settings, progress=None).get_id() == expected.get_id()


def test_bad_frames_are_named(monkeypatch):
    monkeypatch.setattr(frames_module, "_BLOCK_FRAMES", 100)
    frames = _frames()
    frames[417, 3] = float("inf")
    frames[230, 0] = float("nan")
    with pytest.raises(RecipeError, match=r"sample\.h5: 1 frames with NaN or infinity \(230\)"):
        train_quantizer(frames, LSQ, progress=None, name="sample.h5")
    with pytest.raises(RecipeError, match="15 frames, at least 16"):
        train_quantizer(_frames(15), LSQ, progress=None)


@pytest.mark.parametrize(
    "settings,values,cause",
    [
        (PAPER, {"num_codebooks": 3}, "num_codebooks: 3 is not a power of two"),
        (LSQ, {"num_codebooks": 0}, "num_codebooks: 0 is not a power of two"),
        (LSQ, {"codebook_size": 100}, "codebook_size: 100 is not a power of two"),
        (PAPER, {"codebook_size": 32}, "codebook_size: 32 is not a square"),
        (LSQ, {"lsq_frames": 4}, "lsq_frames: 4 frames for 16 entries; set it higher"),
        (LSQ, {"beam": 257}, "beam: 257 is not in 0..256"),
        (LSQ, {"restarts": 65}, "restarts: 65 is not in 0..64"),
        (LSQ, {"lsq_noise": -1.0}, "lsq_noise: -1.0 is below 0"),
        (PAPER, {"restarts": 1}, "restarts, lsq_noise: are of trainer: lsq"),
        (PAPER, {"beam": 16}, "beam: 16 with trainer: paper, .*; set trainer: lsq, or beam: 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_frame(settings, values, cause):
    with pytest.raises(RecipeError, match=cause):
        dataclasses.replace(settings, **values)


def test_the_paper_trainer_names_the_number_it_was_given():
    with pytest.raises(RecipeError, match="bytes_per_frame: 3 is not a power of two"):
        QuantizerTrainer(DIM, 3, "cpu")


def test_checkpoints_of_other_runs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "_CHECKPOINT_SECONDS", -1.0)
    path = tmp_path / "quantizer.ckpt"
    frames = _frames()
    train_quantizer(frames, LSQ, checkpoint_path=path, progress=None)
    with pytest.raises(RecipeError, match="other settings; delete it"):
        train_quantizer(frames, dataclasses.replace(LSQ, seed=5), "cpu", path, None)
    with pytest.raises(RecipeError, match="other frames; delete it"):
        train_quantizer(frames + 1.0, LSQ, "cpu", path, None)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RecipeError, match=r"quantizer\.ckpt: damaged or cut short"):
        train_quantizer(frames, LSQ, "cpu", path, None)


def test_an_unfinished_trainer_gives_no_quantizer():
    with pytest.raises(RuntimeError, match="steps are left"):
        QuantizerTrainer(DIM, 2, "cpu").get_quantizer()
