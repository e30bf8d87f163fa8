"""Distillation from stored indexes: pairing in time, losses by hand, gradients."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lhotse import Fbank, FbankConfig
from torch.nn import functional as F

from mvqkd.data.datamodule import SpecAugmentSettings
from mvqkd.data.labels import FIELD, IGNORED, no_label
from mvqkd.data.time_warp import TimeWarp
from mvqkd.errors import RecipeError
from mvqkd.losses.distillation import (
    Codebooks,
    Distillation,
    DistillationSettings,
    MoreSettings,
    Pairing,
    Term,
    TermSettings,
)
from mvqkd.quantizer import Quantizer
from mvqkd.students.conformer import Conformer, ConformerSettings
from mvqkd.students.task import StudentTask
from mvqkd.students.transducer import TransducerSettings
from mvqkd.teachers.hubert import HubertTeacher
from tests.conftest import tiny_hubert

N, K, D, C = 4, 16, 6, 10
KINDS = ["mvq", "mvq-joint", "mvq-l1", "mvq-l2", "l1", "l2"]


def published(extra_shift=0):
    return Pairing(0.04, 0.035, 0.02, 0.0125, extra_shift)


def frame_numbers(num_frames):
    """Labels that hold their own frame's number: (1, U, 1)."""
    return torch.arange(num_frames)[None, :, None]


@pytest.mark.parametrize("shift, first", [(0, 0), (1, 1), (-1, -1), (3, 3)])
def test_published_pairs_and_their_shift(shift, first):
    pairing = published(shift)
    assert pairing.group_size == 2
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
    assert same.group_size == 1 and same.pair(frame_numbers(3), 1).tolist() == [[[[0]]]]
    late = Pairing(0.02, 0.045, 0.02, 0.0125)
    assert late.pair(frame_numbers(3), 1).tolist() == [[[[1]]]]
    assert Pairing(0.08, 0.04, 0.02, 0.01).group_size == 4


@pytest.mark.parametrize("student_shift", [0.02, 0.04, 0.08])
@pytest.mark.parametrize("teacher_shift", [0.0125, 0.02, 0.025, 0.03, 0.04, 0.06, 0.1])
@pytest.mark.parametrize("teacher_offset", [0.0, 0.0125, 0.05])
def test_any_two_frame_rates_are_matched_by_time(student_shift, teacher_shift, teacher_offset):
    pairing = Pairing(student_shift, 0.035, teacher_shift, teacher_offset)
    pairs_TR = pairing.pair(frame_numbers(4000), 500)[0, :, :, 0]
    centres_T = 0.035 + student_shift * torch.arange(500)
    groups_TR = teacher_offset + teacher_shift * pairs_TR
    inside_T = (pairs_TR != IGNORED).all(1)
    late_T = (centres_T - groups_TR.mean(1))[inside_T]
    # Over 40 s no drift: the latest group that is not after the student frame.
    assert late_T.min() > -1e-3 and late_T.max() < teacher_shift + 1e-3
    assert inside_T.sum() > 490
    # No teacher frame is left out.
    if teacher_shift <= student_shift:
        assert (pairs_TR[inside_T].unique().diff() == 1).all()


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
    settings = TermSettings(kind, scale, field=FIELD)
    return Term(settings, C, published(), quantizer, meta["mean"], meta["std"])


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


def labels_of(kind, quantizer, labels_BUN):
    """The indexes, or as labels of l1 and l2 the embeddings that they stand for."""
    if kind.startswith("mvq"):
        return labels_BUN
    decoded_BUD = quantizer.decode(labels_BUN.clamp(min=0)).detach()
    return decoded_BUD.masked_fill(labels_BUN[..., :1] == IGNORED, torch.nan)


@pytest.mark.parametrize("kind", ["mvq-l1", "mvq-l2", "l1", "l2"])
def test_regression_on_the_normalized_embedding(parts, kind):
    quantizer, meta, middle_BTC, lens_B, labels_BUN = parts
    distilled = distillation(kind, quantizer, meta)
    predicted_BTRD = distilled.head.linear(middle_BTC).view(3, 6, 2, D)
    expected = 0
    for b, t, r, indexes_N in pairs_that_count(lens_B, labels_BUN):
        target_D = (quantizer.decode(indexes_N).detach() - meta["mean"]) / meta["std"]
        error_D = predicted_BTRD[b, t, r] - target_D
        expected += (error_D.abs() if kind.endswith("l1") else error_D**2).mean() / 2
    loss, _ = distilled.loss(middle_BTC, lens_B, labels_of(kind, quantizer, labels_BUN))
    torch.testing.assert_close(loss, 0.3 * expected)
    assert set(distilled.head.state_dict()) == {"linear.weight", "linear.bias"}


@pytest.mark.parametrize("kind", ["mvq-l1", "mvq-l2", "l1", "l2"])
def test_a_dimension_that_never_changes(parts, kind):
    quantizer, meta, middle_BTC, lens_B, labels_BUN = parts
    with torch.no_grad():
        quantizer.centers[..., 0] = 0.0
    meta["mean"][0] = 0.0
    # Its normalized value is 0, whatever it is divided by.
    losses = []
    for deviation in (0.0, 1.0):
        meta["std"][0] = deviation
        labels = labels_of(kind, quantizer, labels_BUN)
        distilled = distillation(kind, quantizer, meta)
        losses.append(distilled.loss(middle_BTC, lens_B, labels)[0])
    assert losses[0] > 0 and losses[0] == losses[1]


def test_joint_sees_the_codebooks_before(parts):
    quantizer, meta, middle_BTC, lens_B, labels_BUN = parts
    distilled = distillation("mvq-joint", quantizer, meta)
    _, accuracy_N = distilled.loss(middle_BTC, lens_B, labels_BUN)
    assert distilled.head.is_joint and accuracy_N.shape == (N,)
    # The first frame of the pair comes before the second: its indexes tell of those.
    other_BUN = labels_BUN.clone()
    other_BUN[0, 0, 0] = (other_BUN[0, 0, 0] + 1) % K
    with torch.no_grad():
        paired = [published().pair(x, 6)[0, 0].flatten() for x in (labels_BUN, other_BUN)]
        logits = [distilled.head._logits(middle_BTC[0, :1], x[None])[0] for x in paired]
    assert torch.equal(logits[0][0], logits[1][0])
    assert not torch.allclose(logits[0][1], logits[1][1])
    assert not torch.allclose(logits[0][-1], logits[1][-1])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_the_head_and_the_frames_that_count(parts, kind):
    quantizer, meta, middle_BTC, lens_B, labels_BUN = parts
    distilled = distillation(kind, quantizer, meta)
    labels_BUX = labels_of(kind, quantizer, labels_BUN)
    distilled.loss(middle_BTC, lens_B, labels_BUX)[0].backward()
    for name, parameter in distilled.head.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in quantizer.parameters())
    counts = {(b, t) for b, t, _, _ in pairs_that_count(lens_B, labels_BUN)}
    for b in range(3):
        for t in range(6):
            assert (middle_BTC.grad[b, t].abs().sum() > 0) == ((b, t) in counts)


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_frames_count_nothing(parts, kind):
    quantizer, meta, middle_BTC, lens_B, labels_BUN = parts
    distilled = distillation(kind, quantizer, meta)
    labels_BUN = labels_of(kind, quantizer, labels_BUN)
    nothing = no_label(labels_BUN.dtype)
    with torch.no_grad():
        loss, _ = distilled.loss(middle_BTC, lens_B, labels_BUN)
        longer_BTC = F.pad(middle_BTC, (0, 0, 0, 3), value=7.0)
        longer_BUN = F.pad(labels_BUN, (0, 0, 0, 4), value=nothing)
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
    for nothing_BUN in (torch.full_like(labels_BUN, nothing), labels_BUN[:, :0]):
        loss, _ = distilled.loss(middle_BTC, lens_B, nothing_BUN)
        assert loss == 0
        loss.backward()
        assert all(p.grad.count_nonzero() == 0 for p in distilled.head.parameters())


def test_terms_take_what_the_first_one_says():
    settings = DistillationSettings(
        "mvq",
        layer=3,
        quantizer="a.pt",
        more=[
            MoreSettings("mvq-l2", scale=2.0),
            MoreSettings("l1", layer=5, in_loop=True),
            MoreSettings("mvq", field="wavlm", quantizer="b.pt", accept_unknown_origin=True),
        ],
    )
    found = [
        (t.kind, t.scale, t.layer, t.field, t.quantizer, t.in_loop, t.accept_unknown_origin)
        for t in settings.terms()
    ]
    assert found == [
        ("mvq", 0.1, 3, FIELD, "a.pt", False, False),
        ("mvq-l2", 2.0, 3, FIELD, "a.pt", False, False),
        ("l1", 0.1, 5, "embeddings", "a.pt", True, False),
        ("mvq", 0.1, 3, "wavlm", "b.pt", False, True),
    ]
    assert settings.layers() == [3, 5]
    assert DistillationSettings().terms() == [] and DistillationSettings().layers() == []
    for wrong in (
        DistillationSettings("none", more=[MoreSettings("l2")]),
        DistillationSettings("mvq", more=[MoreSettings("none")]),
    ):
        with pytest.raises(RecipeError, match=r"distillation\.more"):
            wrong.terms()


def test_several_terms_on_several_layers(parts):
    quantizer, meta, middle_BTC, lens_B, labels_BUN = parts
    embeddings_BUD = labels_of("l2", quantizer, labels_BUN).half()
    settings = [
        TermSettings("l2", 2.0, layer=5, field="embeddings"),
        TermSettings("mvq", 0.3, layer=2, field=FIELD),
        TermSettings("mvq-l2", 0.5, layer=5, field=FIELD),
    ]
    statistics = quantizer, meta["mean"], meta["std"]
    terms = [Term(s, C, published(), *statistics) for s in settings]
    distilled = Distillation(terms)
    assert (distilled.layers, distilled.fields) == ([2, 5], ["embeddings", FIELD])
    assert list(distilled.head) == [term.head for term in terms]
    lower_BTC, upper_BTC = middle_BTC, 2 * middle_BTC.detach()
    labels = {FIELD: labels_BUN, "embeddings": embeddings_BUD}
    losses = distilled.losses([lower_BTC, upper_BTC], lens_B, labels)
    wanted = {
        "1-l2-": terms[0].loss(upper_BTC, lens_B, embeddings_BUD),
        "2-mvq-": terms[1].loss(lower_BTC, lens_B, labels_BUN),
        "3-mvq-l2-": terms[2].loss(upper_BTC, lens_B, labels_BUN),
    }
    assert list(losses) == list(wanted)
    for name, (loss, accuracy_N) in losses.items():
        assert torch.equal(loss, wanted[name][0])
        assert (accuracy_N is None) == (name != "2-mvq-")


def test_pairs_follow_the_time_warp():
    warp = TimeWarp(num_frames=100, center=40, moved=60)
    pairs_BTR = published().pair(frame_numbers(50).expand(2, -1, -1), 24, [warp, None])[..., 0]
    assert torch.equal(pairs_BTR[1], published().pair(frame_numbers(50), 24)[0, :, :, 0])
    for j, group in enumerate(pairs_BTR[0].tolist()):
        # In feature frames of 10 ms, from edge to edge.
        now = 3.5 + 4 * j
        before = now * 40 / 60 if now < 60 else 40 + (now - 60) * 60 / 40
        assert group[1] == group[0] + 1
        assert 0 <= before - (2 * group[0] + 2.25) < 2


def test_training_logs_the_accuracy_of_each_codebook(parts):
    quantizer, meta, middle_BTC, lens_B, labels_BUN = parts
    distilled = distillation("mvq", quantizer, meta)
    task = StudentTask(
        torch.nn.Identity(),
        TransducerSettings(),
        SimpleNamespace(seconds=1.0),
        {},
        Distillation([distilled]),
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
    batch = SimpleNamespace(
        features_BTF=torch.zeros(3, 30, 8), lengths_B=4 * lens_B, labels={FIELD: labels_BUN}
    )
    _, figures = task.loss(batch, 1, 0.5)
    _, accuracy_N = distilled.loss(middle_BTC, lens_B, labels_BUN)
    # The loop divides by the weight.
    logged = [figures[f"accuracy-{n}"] / figures["weight"] for n in range(N)]
    assert logged == pytest.approx(accuracy_N.tolist())


def test_indexes_without_their_quantizer():
    for kind in ("mvq", "mvq-joint"):
        settings = TermSettings(kind)
        alone = Term(settings, C, published(), Codebooks(N, K))
        known = Term(settings, C, published(), Quantizer(D, K, N))
        shapes = [{n: p.shape for n, p in t.head.named_parameters()} for t in (alone, known)]
        assert shapes[0] == shapes[1]
