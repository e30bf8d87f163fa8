"""Training of a student with all that is drawn at random switched on."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from mvqkd.data.datamodule import DataSettings, NoiseSettings, SpecAugmentSettings, StudentData
from mvqkd.data.labels import FIELD
from mvqkd.losses.distillation import Distillation, Pairing, Term, TermSettings
from mvqkd.students.conformer import ConformerSettings
from mvqkd.students.task import StudentTask
from mvqkd.students.transducer import TransducerSettings, build_transducer
from mvqkd.training.loop import TrainingSettings, train
from tests.conftest import CPU
from tests.training.test_loop import Killed, log_of, same, state_of

SETTINGS = TrainingSettings(
    num_epochs=2,
    lr=1e-3,
    lr_batches=20,
    warmup_steps=3,
    average_period=2,
    log_every_steps=1,
    checkpoint_seconds=0,
)


class Letters:
    """Tokens: the letters."""

    def encode(self, text):
        return [1 + letter % 28 for letter in text.encode()]


class Task(StudentTask):
    """Remembers what it was given, and dies at a step."""

    kill_at = None

    def loss(self, batch, step, warmup):
        if step == self.kill_at:
            raise Killed
        return super().loss(batch, step, warmup)


@pytest.fixture
def make_task(labelled_cuts, feature_cuts, quantizer):
    def make(prefetch=0, kinds=("mvq",), random_parts=True):
        encoder = ConformerSettings(
            d_model=16,
            nhead=2,
            dim_feedforward=24,
            num_encoder_layers=3,
            cnn_module_kernel=5,
            subsampling_channels=(2, 3, 4),
            middle_output_layers=[2],
            causal=True,
            dynamic_chunk_training=random_parts,
            short_chunk_size=8,
            dropout=0.2 if random_parts else 0.0,
            layer_dropout=0.3 if random_parts else 0.0,
        )
        settings = TransducerSettings(encoder, decoder_dim=8, joiner_dim=8, vocab_size=30)
        torch.manual_seed(1)
        model = build_transducer(settings)
        pairing = Pairing(model.encoder.frame_shift, model.encoder.frame_offset, 0.02, 0.0125)
        statistics = torch.zeros(32), torch.ones(32)
        terms = [TermSettings(kind, scale=0.1, layer=2, field=FIELD) for kind in kinds]
        distillation = Distillation([Term(t, 16, pairing, quantizer, *statistics) for t in terms])
        model.codebook_loss_net = distillation.head
        noise = list(feature_cuts)[:4]
        conf = DataSettings(
            max_duration=9, num_buckets=2, prefetch=prefetch, noise=NoiseSettings(p=0.7)
        )
        data = StudentData(labelled_cuts, Letters(), conf, 1, [FIELD], noise=noise)
        warp = SpecAugmentSettings(time_warp_factor=20)
        return Task(model, settings, data, {}, distillation, warp, None, CPU)

    return make


def test_killed_and_resumed_bit_for_bit(make_task, tmp_path):
    train(make_task(), SETTINGS, tmp_path / "whole", CPU)
    whole = log_of(tmp_path / "whole")
    steps = max(entry["step"] for entry in whole)
    assert steps >= 8
    for kill_at, prefetch in ((2, 0), (steps // 2 + 2, 3)):
        folder = tmp_path / f"killed-{kill_at}"
        task = make_task(prefetch)
        task.kill_at = kill_at
        with pytest.raises(Killed):
            train(task, SETTINGS, folder, CPU)
        # What else the process draws does not matter, nor does what it has drawn.
        random.seed(kill_at)
        np.random.seed(kill_at)
        torch.manual_seed(kill_at)
        train(make_task(prefetch), SETTINGS, folder, CPU)
        for name in ("epoch-1.pt", "epoch-2.pt", "checkpoint.pt"):
            ours, theirs = (state_of(f / name) for f in (folder, tmp_path / "whole"))
            assert same(ours, theirs), (kill_at, name)
        assert log_of(folder) == whole


def test_everything_at_random_is_on(make_task, monkeypatch):
    """That the test above would see a draw that is not repeated."""
    task = make_task()
    task.model.train()
    seen = {"warps": 0, "chunks": set(), "noise": 0}
    clean = make_task()
    clean._train._noise = None
    for (batch, _), (without, _) in zip(task.batches(1, 0), clean.batches(1, 0), strict=True):
        seen["noise"] += not torch.equal(batch.features_BTF, without.features_BTF)
        _, warps = task._augment(batch.features_BTF, batch.lengths_B)
        seen["warps"] += sum(warp is not None for warp in warps)
        seen["chunks"].add(task.model.encoder._chunks(60, None, -1)[0])
    assert seen["noise"] > 0 and seen["warps"] > 0 and len(seen["chunks"]) > 1


def test_every_parameter_gets_a_gradient_from_two_kinds_together(make_task):
    task = make_task(kinds=("mvq", "mvq-l2"), random_parts=False)
    task.model.train()
    batch, _ = next(iter(task.batches(1, 0)))
    for warmup in (0.5, 3.0):
        task.model.zero_grad()
        loss, figures = task.loss(batch, 1, warmup)
        loss.backward()
        assert figures["1-mvq-distillation"] > 0 and figures["2-mvq-l2-distillation"] > 0
        gradients = {name: p.grad for name, p in task.model.named_parameters()}
        # Before the pruned loss counts the training loop gives the joiner gradients of 0.
        left_out = {name for name in gradients if name.startswith("joiner.") and warmup < 1}
        assert {name for name, gradient in gradients.items() if gradient is None} == left_out
        assert all(gradients[name].isfinite().all() for name in gradients.keys() - left_out)
        for parameter in task.model.codebook_loss_net.parameters():
            assert parameter.grad.count_nonzero() > 0
    # Of one term alone they are other ones.
    both = [p.grad.clone() for p in task.model.encoder.encoder.layers[0].parameters()]
    for kind in ("mvq", "mvq-l2"):
        alone = make_task(kinds=(kind,), random_parts=False)
        alone.model.train()
        alone.loss(batch, 1, 3.0)[0].backward()
        single = [p.grad for p in alone.model.encoder.encoder.layers[0].parameters()]
        assert not all(map(torch.equal, both, single))


def test_bf16_trains_and_resumes(make_task, tmp_path):
    settings = replace(SETTINGS, precision="bf16", num_epochs=1)
    train(make_task(), settings, tmp_path / "whole", CPU)
    task = make_task()
    task.kill_at = 3
    with pytest.raises(Killed):
        train(task, settings, tmp_path / "killed", CPU)
    train(make_task(), settings, tmp_path / "killed", CPU)
    ours, theirs = (state_of(tmp_path / f / "epoch-1.pt") for f in ("killed", "whole"))
    assert same(ours, theirs)
    assert all(value.dtype == torch.float32 for value in ours["model"].values())
    # Near what float32 gives, and not it.
    train(make_task(), replace(settings, precision="float32"), tmp_path / "float32", CPU)
    pruned, exact = (
        [entry["pruned"] for entry in log_of(tmp_path / name) if entry["kind"] == "train"]
        for name in ("whole", "float32")
    )
    assert pruned != exact and pruned == pytest.approx(exact, rel=0.05)
