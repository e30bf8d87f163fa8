"""Distillation from stored indexes: pairing in time, losses by hand, gradients."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lhotse import Fbank, FbankConfig
from torch.nn import functional as F

from mvqkd.data.datamodule import SpecAugmentSettings
from mvqkd.data.labels import IGNORED
from mvqkd.errors import RecipeError
from mvqkd.losses.distillation import Codebooks, Distillation, DistillationSettings, Pairing
from mvqkd.quantizer import Quantizer
from mvqkd.students.conformer import Conformer, ConformerSettings
from mvqkd.students.task import StudentTask
from mvqkd.students.transducer import TransducerSettings
from mvqkd.teachers.hubert import HubertTeacher
from tests.conftest import tiny_hubert

N, K, D, C = 4, 16, 6, 10


def published(extra_shift=0):
    return Pairing(0.04, 0.035, 0.02, 0.0125, extra_shift)


def frame_numbers(num_frames):
    """Labels that hold their own frame's number: (1, U, 1)."""
    return torch.arange(num_frames)[None, :, None]


@pytest.mark.parametrize("shift, first", [(0, 0), (1, 1), (-1, -1), (3, 3)])
def test_published_pairs_and_their_shift(shift, first):
    pairing = published(shift)
    assert pairing.group_size == 2 and pairing.first_frame() == first
    pairs_TR = pairing.pair(frame_numbers(20), 8)[0, :, :, 0]
    for j, (a, b) in enumerate(pairs_TR.tolist()):
        assert a == (2 * j + first if 2 * j + first >= 0 else IGNORED)
        assert b == 2 * j + 1 + first


def test_pairs_outside_of_the_labels_are_ignored():
    pairs_TR = published().pair(frame_numbers(5), 4)[0, :, :, 0]
    assert pairs_TR.tolist() == [[0, 1], [2, 3], [4, IGNORED], [IGNORED, IGNORED]]
    labels_BUN = torch.randint(0, 256, (3, 11, N))
    labels_BUN[1, 7:] = IGNORED
    paired_BTRN = published().pair(labels_BUN, 5)
    assert paired_BTRN.shape == (3, 5, 2, N)
    assert torch.equal(paired_BTRN.flatten(1, 2), labels_BUN[:, :10])


def test_other_frame_rates():
    # As many frames: the latest that is not after the student's.
    assert published().pair(frame_numbers(3), 1).shape == (1, 1, 2, 1)
    same = Pairing(0.02, 0.0125, 0.02, 0.0125)
    assert (same.group_size, same.first_frame()) == (1, 0)
    assert Pairing(0.02, 0.045, 0.02, 0.0125).first_frame() == 1
    assert Pairing(0.08, 0.04, 0.02, 0.01).group_size == 4
    for teacher_shift in (0.03, 0.06):
        with pytest.raises(RecipeError, match="a student frame of 40 ms is no multiple of"):
            Pairing(0.04, 0.035, teacher_shift, 0.0125)


def centres_heard(respond, num_samples=8000, step=40):
    """Middle, in seconds, of the clicks that each frame responds to; frames (T,) and centres (T,).

    ``respond`` gives frames (1, T, *) for waveforms (1, L).
    """
    silence_TC = respond(torch.zeros(1, num_samples))[0]
    places = range(0, num_samples, step)
    heard = []
    for place in places:
        click_1L = torch.zeros(1, num_samples)
        click_1L[0, place] = 0.9
        heard.append(((respond(click_1L)[0] - silence_TC).abs() > 1e-5).any(-1).numpy())
    heard_PT = np.stack(heard)
    # Frames at the edges hear less than a whole receptive field.
    whole = np.flatnonzero(heard_PT.any(0) & ~heard_PT[0] & ~heard_PT[-1])
    times = np.array(places) / 16000
    return whole, np.array([times[heard_PT[:, t]].mean() for t in whole])


@pytest.fixture(scope="module")
def heard():
    """Where frames of student and teacher are, as clicks at known samples show it."""
    torch.manual_seed(1)
    settings = ConformerSettings(
        d_model=16, nhead=2, num_encoder_layers=1, subsampling_channels=(2, 3, 4)
    )
    student = Conformer(settings).eval()
    teacher = HubertTeacher(
        tiny_hubert(
            conv_dim=[8] * 7,
            conv_kernel=[10, 3, 3, 3, 3, 2, 2],
            conv_stride=[5, 2, 2, 2, 2, 2, 2],
        ),
        do_normalize=False,
    ).eval()
    fbank = Fbank(FbankConfig(num_mel_bins=80))

    @torch.inference_mode()
    def hear(waveforms_1L):
        features_TF = torch.from_numpy(fbank.extract(waveforms_1L.numpy(), 16000))
        return student.encoder_embed(features_TF[None])

    @torch.inference_mode()
    def see(waveforms_1L):
        return teacher._features(waveforms_1L, torch.tensor([waveforms_1L.shape[1]]))

    return student, centres_heard(hear), teacher, centres_heard(see)


def test_clicks_are_heard_where_the_frames_say_that_they_are(heard):
    student, student_heard, teacher, teacher_heard = heard
    for model, (frames, centres) in ((student, student_heard), (teacher, teacher_heard)):
        assert len(frames) >= 8
        stated = model.frame_offset + frames * model.frame_shift
        # Clicks are 2.5 ms apart.
        np.testing.assert_allclose(centres, stated, atol=0.0025)


@pytest.mark.parametrize("shift, late", [(0, 0.0125), (1, -0.0075), (2, -0.0275)])
def test_paired_frames_hear_the_same_click(heard, shift, late):
    student, student_heard, teacher, teacher_heard = heard
    pairing = Pairing(
        student.frame_shift, student.frame_offset, teacher.frame_shift, teacher.frame_offset, shift
    )
    teacher_centres = dict(zip(*teacher_heard))
    pairs_TR = pairing.pair(frame_numbers(24), 12)[0, :, :, 0].tolist()
    compared = 0
    for frame, centre in zip(*student_heard):
        group = [teacher_centres.get(u) for u in pairs_TR[frame]]
        if None not in group:
            assert centre - np.mean(group) == pytest.approx(late, abs=0.004)
            compared += 1
    assert compared >= 6


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(1)
    quantizer = Quantizer(D, K, N, generator=generator).eval()
    with torch.no_grad():
        quantizer.centers_scale.fill_(0.02)
    meta = {
        "mean": torch.randn(D, generator=generator),
        "std": torch.rand(D, generator=generator) + 0.5,
    }
    middle_BTC = torch.randn(3, 6, C, generator=generator).requires_grad_()
    lens_B = torch.tensor([6, 4, 5])
    # As HuBERT gives them: 25 ms of context at the ends.
    num_labels = (12, 9, 9)
    labels_BUN = torch.randint(0, K, (3, 12, N), generator=generator)
    for row, count in zip(labels_BUN, num_labels):
        row[count:] = IGNORED
    return quantizer, meta, middle_BTC, lens_B, labels_BUN


def distillation(kind, quantizer, meta, scale=0.3):
    torch.manual_seed(2)
    settings = DistillationSettings(kind=kind, scale=scale)
    return Distillation(settings, C, published(), quantizer, meta)


def pairs_that_count(lens_B, labels_BUN):
    """(b, t, r, labels of teacher frame 2 t + r)."""
    for b, length in enumerate(lens_B.tolist()):
        for t in range(length):
            for r in range(2):
                if labels_BUN[b, 2 * t + r, 0] != IGNORED:
                    yield b, t, r, labels_BUN[b, 2 * t + r]


def test_mvq_is_cross_entropy_per_codebook(parts):
    quantizer, meta, middle_BTC, lens_B, labels_BUN = parts
    distilled = distillation("mvq", quantizer, meta)
    head = distilled.head
    # The entries of the peer's module, N of each of the two teacher frames.
    assert head.linear2b_weight.shape == (2 * N, K, C)
    expected, hits_RN, counts_R1 = 0, torch.zeros(2, N), torch.zeros(2, 1)
    for b, t, r, indexes_N in pairs_that_count(lens_B, labels_BUN):
        own = slice(r * N, r * N + N)
        logits_NK = head.linear2b_weight[own] @ middle_BTC[b, t] + head.linear2_bias[own]
        expected += F.cross_entropy(logits_NK, indexes_N, reduction="sum")
        hits_RN[r] += logits_NK.argmax(dim=1) == indexes_N
        counts_R1[r] += 1
    loss, accuracy_N = distilled.loss(middle_BTC, lens_B, labels_BUN)
    torch.testing.assert_close(loss, 0.3 * expected)
    assert hits_RN.sum() > 0
    torch.testing.assert_close(accuracy_N, (hits_RN / counts_R1).mean(dim=0))
    wanted, found = (torch.autograd.grad(x, middle_BTC)[0] for x in (0.3 * expected, loss))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["mvq-l1", "mvq-l2"])
def test_regression_on_the_decoded_and_normalized_embedding(parts, kind):
    quantizer, meta, middle_BTC, lens_B, labels_BUN = parts
    distilled = distillation(kind, quantizer, meta)
    predicted_BTRD = distilled.head.linear(middle_BTC).view(3, 6, 2, D)
    expected = 0
    for b, t, r, indexes_N in pairs_that_count(lens_B, labels_BUN):
        target_D = (quantizer.decode(indexes_N).detach() - meta["mean"]) / meta["std"]
        error_D = predicted_BTRD[b, t, r] - target_D
        expected += (error_D.abs() if kind == "mvq-l1" else error_D**2).mean() / 2
    loss, _ = distilled.loss(middle_BTC, lens_B, labels_BUN)
    torch.testing.assert_close(loss, 0.3 * expected)
    assert set(distilled.head.state_dict()) == {"linear.weight", "linear.bias"}


@pytest.mark.parametrize("kind", ["mvq", "mvq-l1", "mvq-l2"])
def test_gradient_reaches_the_head_and_the_frames_that_count(parts, kind):
    quantizer, meta, middle_BTC, lens_B, labels_BUN = parts
    distilled = distillation(kind, quantizer, meta)
    distilled.loss(middle_BTC, lens_B, labels_BUN)[0].backward()
    for name, parameter in distilled.head.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in quantizer.parameters())
    counts = {(b, t) for b, t, _, _ in pairs_that_count(lens_B, labels_BUN)}
    for b in range(3):
        for t in range(6):
            assert (middle_BTC.grad[b, t].abs().sum() > 0) == ((b, t) in counts)


@pytest.mark.parametrize("kind", ["mvq", "mvq-l2"])
def test_ignored_frames_count_nothing(parts, kind):
    quantizer, meta, middle_BTC, lens_B, labels_BUN = parts
    distilled = distillation(kind, quantizer, meta)
    with torch.no_grad():
        loss, _ = distilled.loss(middle_BTC, lens_B, labels_BUN)
        longer_BTC = F.pad(middle_BTC, (0, 0, 0, 3), value=7.0)
        longer_BUN = F.pad(labels_BUN, (0, 0, 0, 4), value=IGNORED)
        torch.testing.assert_close(distilled.loss(longer_BTC, lens_B, longer_BUN)[0], loss)
        # Valid labels past the student's length do not count either.
        beyond_BUN = labels_BUN.clone()
        beyond_BUN[1, 8:] = 3
        torch.testing.assert_close(distilled.loss(middle_BTC, lens_B, beyond_BUN)[0], loss)
        alone = [
            distilled.loss(middle_BTC[b : b + 1], lens_B[b : b + 1], labels_BUN[b : b + 1])[0]
            for b in range(3)
        ]
        torch.testing.assert_close(sum(alone), loss)
        nothing_BUN = torch.full_like(labels_BUN, IGNORED)
        assert distilled.loss(middle_BTC, lens_B, nothing_BUN)[0] == 0


def test_training_logs_the_accuracy_of_each_codebook(parts):
    quantizer, meta, middle_BTC, lens_B, labels_BUN = parts
    distilled = distillation("mvq", quantizer, meta)
    task = StudentTask(
        torch.nn.Identity(),
        TransducerSettings(),
        SimpleNamespace(seconds=1.0),
        {},
        distilled,
        SpecAugmentSettings(),
        None,
        torch.device("cpu"),
    )
    task._forward = lambda *args: SimpleNamespace(
        simple_loss_B=torch.ones(3),
        pruned_loss_B=torch.ones(3),
        middle_outputs=[middle_BTC],
        encoder_lens_B=lens_B,
    )
    batch = SimpleNamespace(features_BTF=torch.zeros(3, 30, 8), labels_BUN=labels_BUN)
    _, figures = task.loss(batch, 1, 0.5)
    _, accuracy_N = distilled.loss(middle_BTC, lens_B, labels_BUN)
    # The loop divides by the weight.
    logged = [figures[f"accuracy-{n}"] / figures["weight"] for n in range(N)]
    assert logged == pytest.approx(accuracy_N.tolist())


def test_indexes_without_their_quantizer():
    settings, sizes = DistillationSettings("mvq"), Codebooks(N, K)
    alone = Distillation(settings, C, published(), sizes, {})
    known = Distillation(settings, C, published(), Quantizer(D, K, N), {})
    shapes = [{n: p.shape for n, p in d.head.named_parameters()} for d in (alone, known)]
    assert shapes[0] == shapes[1]
    for kind in ("mvq-l1", "mvq-l2"):
        with pytest.raises(RecipeError, match=f"kind {kind} regresses on what the quantizer") as e:
            Distillation(DistillationSettings(kind), C, published(), sizes, {})
        assert "\n" not in str(e.value)
