"""Masked prediction of units."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lhotse import CutSet
from torch.nn import functional as F

from mvqkd.data.labels import LabelSettings
from mvqkd.errors import RecipeError
from mvqkd.teachers.hubert import HubertTeacher
from mvqkd.teachers.mfcc import Mfcc
from mvqkd.teachers.pretraining import (
    MaskedPrediction,
    PredictionSettings,
    PretrainingTask,
    draw_mask,
)
from mvqkd.teachers.units import KMeansSettings, UnitSettings, label_units
from mvqkd.training.loop import TrainingSettings, train
from tests.conftest import CPU, tiny_hubert
from tests.training.test_loop import Killed, log_of, same, state_of

NUM_UNITS = 8
SETTINGS = PredictionSettings(projection_dim=16)
OFF = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout"), 0.0)
OFF.update(feat_proj_dropout=0.0, layerdrop=0.0, mask_time_prob=0.05)


@pytest.fixture(scope="module")
def unit_cuts(plain_cuts, tmp_path_factory):
    cuts = CutSet.from_cuts(list(plain_cuts)[:4])
    settings = UnitSettings(
        kmeans=KMeansSettings(NUM_UNITS, num_epochs=2, num_starts=1),
        labels=LabelSettings(20, 4, num_threads=1),
    )
    folder = tmp_path_factory.mktemp("units")
    return label_units(cuts, CutSet.from_cuts([]), Mfcc(), settings, folder, CPU)[0].to_eager()


@pytest.fixture
def make_task(unit_cuts):
    def make(settings=SETTINGS, max_duration=20, **config):
        teacher = HubertTeacher(tiny_hubert(**{**OFF, **config}), True)
        dev = {"dev": unit_cuts}
        return PretrainingTask(
            teacher, NUM_UNITS, Mfcc(), unit_cuts, dev, settings, max_duration, 1, CPU, cache=True
        )

    return make


def test_mask_is_of_spans():
    rng = np.random.default_rng(1)
    masks_BT = np.stack([draw_mask(500, SETTINGS, rng) for _ in range(200)])
    # A frame is left where no span begins at it or at the nine before it.
    assert masks_BT[:, 10:-10].mean() == pytest.approx(1 - 0.92**10, abs=0.02)
    for mask_T in masks_BT[:20]:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask_T, [0]])))
        assert (edges[1::2] - edges[::2]).min() >= 10
    for num_frames in (1, 5, 10, 11):
        mask_T = draw_mask(num_frames, SETTINGS, rng)
        assert mask_T.shape == (num_frames,) and mask_T.sum() == min(num_frames, 10)


def test_loss_is_cross_entropy_of_masked_frames_alone(make_task):
    task = make_task()
    task.model.eval()
    ((batch, _),) = task.batches(1, 0)
    loss, figures = task.loss(batch, 0, 1.0)
    logits_FK, inside_BT, _ = task.model(batch.waveforms_BL, batch.lengths_B, batch.mask_BT)
    assert logits_FK.abs().max() <= 10.001  # a cosine over 0.1
    masked_F, units_F = batch.mask_BT[inside_BT], batch.units_BT[inside_BT]
    assert not (batch.mask_BT & ~inside_BT).any() and 0 < masked_F.sum() < len(masked_F)
    expected = F.cross_entropy(logits_FK[masked_F], units_F[masked_F]).item()
    assert loss.item() / task.divisor(batch) == pytest.approx(expected, rel=1e-5)
    right_F = logits_FK.argmax(-1) == units_F
    for key, frames_F in (("masked", masked_F), ("unmasked", ~masked_F)):
        got = figures[f"{key}-accuracy"] / figures["weight"]
        assert got == pytest.approx(100 * right_F[frames_F].float().mean().item(), rel=1e-5)
    # Other units of the frames that are not masked change nothing.
    other_BT = torch.where(batch.mask_BT, batch.units_BT, (batch.units_BT + 1) % NUM_UNITS)
    assert task.loss(replace(batch, units_BT=other_BT), 0, 1.0)[0].item() == loss.item()
    # What the masked frames sound like is not seen: the transformer gets one vector for them.
    seen = []
    encoder = task.model.teacher.model.base_model.encoder
    hook = encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    task.loss(batch, 0, 1.0)
    hook.remove()
    masked_D = task.model.teacher.model.base_model.masked_spec_embed
    assert (seen[0][batch.mask_BT] == masked_D).all()
    assert not (seen[0][inside_BT & ~batch.mask_BT] == masked_D).all(-1).any()


@pytest.mark.parametrize(
    "layout", [{}, {"feat_extract_norm": "group", "do_stable_layer_norm": False}]
)
def test_loss_and_mask_are_those_of_each_utterance_alone(make_task, unit_cuts, layout):
    task = make_task(replace(SETTINGS, feature_penalty=10.0), **layout)
    task.model.eval()
    whole_batch = task.collate(unit_cuts, 1)
    whole = task.loss(whole_batch, 0, 1.0)[0].item()
    alone = 0.0
    for index, cut in enumerate(unit_cuts):
        batch = task.collate(CutSet.from_cuts([cut]), 1)
        frames = batch.mask_BT.shape[1]
        assert torch.equal(batch.mask_BT[0], whole_batch.mask_BT[index, :frames])
        assert torch.equal(batch.units_BT[0], whole_batch.units_BT[index, :frames])
        alone += task.loss(batch, 0, 1.0)[0].item()
    assert whole == pytest.approx(alone, rel=1e-4)
    assert not torch.equal(task.collate(unit_cuts, 2).mask_BT, whole_batch.mask_BT)


def test_gradients_reach_all_parameters_and_the_loss_falls(make_task):
    task = make_task()
    task.model.train()
    trained = {n: p for n, p in task.model.named_parameters() if p.requires_grad}
    assert {n for n, _ in task.model.named_parameters()} - set(trained) == {
        "teacher.model.lm_head.weight",
        "teacher.model.lm_head.bias",
    }
    optimizer = torch.optim.Adam(trained.values(), lr=3e-3)
    losses = []
    for step in range(20):
        ((batch, seconds),) = task.batches(step, 0)
        assert seconds == pytest.approx(task.epoch_seconds)
        loss = task.loss(batch, step, 1.0)[0] / task.divisor(batch)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name, parameter in trained.items():
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    figures = task.validate()
    assert set(figures) == {f"{k}-dev" for k in ("loss", "masked-accuracy", "unmasked-accuracy")}
    task._max_duration = 5
    assert task.validate() == pytest.approx(figures, rel=1e-4)  # in whatever batches


def test_cosines_are_in_float32_where_the_rest_is_not(make_task):
    task = make_task()
    task.model.eval()
    ((batch, _),) = task.batches(1, 0)
    loss, _ = task.loss(batch, 0, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = task.loss(batch, 0, 1.0)
        logits_FK = task.model(batch.waveforms_BL, batch.lengths_B, batch.mask_BT)[0]
    assert logits_FK.dtype == mixed.dtype == torch.float32
    assert mixed.item() == pytest.approx(loss.item(), rel=0.03)


@pytest.mark.parametrize("scale", [0.1, 0.0])
def test_convolutions_get_their_share_of_the_gradient(make_task, scale):
    def gradients(**changes):
        task = make_task(replace(SETTINGS, **changes))
        task.model.eval()
        ((batch, _),) = task.batches(1, 0)
        loss, _ = task.loss(batch, 0, 1.0)
        loss.backward()
        body = task.model.teacher.model.base_model
        convolution = body.feature_extractor.conv_layers[0].conv.weight.grad
        return loss.item(), convolution, body.feature_projection.projection.weight.grad

    whole, scaled = gradients(), gradients(feature_grad_scale=scale)
    assert scaled[0] == pytest.approx(whole[0], rel=1e-5)
    largest = whole[1].abs().max()
    torch.testing.assert_close(scaled[1], scale * whole[1], rtol=1e-3, atol=1e-4 * largest)
    torch.testing.assert_close(scaled[2], whole[2], rtol=1e-3, atol=1e-4 * whole[2].abs().max())


def test_killed_run_goes_on_bit_for_bit(make_task, tmp_path):
    settings = TrainingSettings(
        num_epochs=2, lr=0.01, optimizer="adamw", log_every_steps=1, checkpoint_seconds=0
    )
    dropout = {"hidden_dropout": 0.1}
    train(make_task(max_duration=5, **dropout), settings, tmp_path / "whole", CPU)
    steps = state_of(tmp_path / "whole/epoch-2.pt")["progress"]["step"]
    assert steps >= 4
    for kill_at in (2, steps):
        task, folder = make_task(max_duration=5, **dropout), tmp_path / f"killed-{kill_at}"
        compute = task.loss

        def killed(batch, step, warmup, compute=compute, kill_at=kill_at):
            if step == kill_at:
                raise Killed
            return compute(batch, step, warmup)

        task.loss = killed
        with pytest.raises(Killed):
            train(task, settings, folder, CPU)
        train(make_task(max_duration=5, **dropout), settings, folder, CPU)
        ours, theirs = (state_of(f / "epoch-2.pt") for f in (folder, tmp_path / "whole"))
        assert same(ours, theirs)
        assert log_of(folder) == log_of(tmp_path / "whole")


def test_model_without_embedding_of_masked_frames_is_refused():
    with pytest.raises(RecipeError, match=r"mask_time_prob: 0 leaves"):
        MaskedPrediction(HubertTeacher(tiny_hubert(), True), 4, SETTINGS, 1)
