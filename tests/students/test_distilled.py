"""Distillation from settings to gradients: every kind, stored or in the loop, on any batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lhotse import CutSet
from lhotse.utils import fastcopy

from mvqkd.data.datamodule import DataSettings, SpecAugmentSettings, StudentData, transcript
from mvqkd.data.labels import (
    FIELD,
    CodebookIndexes,
    Dumper,
    Embeddings,
    LabelSettings,
    Origin,
    dump_labels,
    load_labels,
)
from mvqkd.errors import RecipeError
from mvqkd.losses.distillation import DistillationSettings, MoreSettings, Pairing
from mvqkd.quantizer import Quantizer, save_quantizer
from mvqkd.students import distilled
from mvqkd.students.conformer import ConformerSettings
from mvqkd.students.distilled import build_distillation
from mvqkd.students.task import StudentTask
from mvqkd.students.transducer import TransducerSettings, build_transducer
from mvqkd.teachers.base import Teacher
from tests.conftest import CPU

KINDS = ["mvq", "mvq-joint", "mvq-l1", "mvq-l2", "l1", "l2"]


class Words:
    """Tokens of a transcript."""

    def encode(self, text):
        return [1 + len(word) for word in text.split()]


class ClockTeacher(Teacher):
    """A frame every 12.5 ms; its embedding is the frame's time."""

    name, dim, num_layers, stride, receptive_field = "clock", 3, 1, 200, 400
    window_frames = 10**6

    def _layers(self, prepared_BL, lengths_B, layers):
        frames_T = torch.arange(self.num_frames(prepared_BL.shape[1]))
        times_T = self.frame_offset + self.frame_shift * frames_T
        return [times_T[None, :, None].expand(len(prepared_BL), -1, 3) for _ in layers]


@pytest.fixture(scope="module")
def quantizer():
    quantizer = Quantizer(32, 16, 4, generator=torch.Generator().manual_seed(1))
    quantizer.set_id_from_weights()
    return quantizer.eval()


@pytest.fixture(scope="module")
def origin(quantizer):
    return Origin("tiny", 2, quantizer.get_id(), quantizer.weights_sha256())


@pytest.fixture(scope="module")
def quantizer_file(tmp_path_factory, quantizer, teacher):
    path = tmp_path_factory.mktemp("quantizer") / "quantizer.pt"
    meta = {
        "teacher": "tiny",
        "layer": 2,
        "frame_shift": teacher.frame_shift,
        "frame_offset": teacher.frame_offset,
        "mean": torch.linspace(-1, 1, 32),
        "std": torch.linspace(0.5, 2, 32),
    }
    save_quantizer(path, quantizer, meta)
    return path


@pytest.fixture(scope="module")
def cuts(feature_cuts, teacher, quantizer, origin, tmp_path_factory):
    """Four with three labels each; the last two are of nobody's transcript."""
    kinds = [
        CodebookIndexes(teacher, quantizer, origin, refine_iters=1),
        Embeddings(teacher, 2, "float32", "embeddings"),
        Embeddings(teacher, 1, "float16", "layer1"),
    ]
    out = tmp_path_factory.mktemp("labels") / "train.jsonl.gz"
    some = CutSet.from_cuts(cut.truncate(duration=1.2) for cut in list(feature_cuts)[2:6])
    labelled = list(dump_labels(some, out, Dumper(kinds, LabelSettings(), CPU), 4))
    return CutSet.from_cuts(
        [*labelled[:2], labelled[2].drop_supervisions(), labelled[3].drop_supervisions()]
    )


@pytest.fixture
def build(cuts, quantizer_file, teacher, monkeypatch):
    """A task of distillation settings."""
    teachers = {("tiny", None): teacher, ("clock", None): ClockTeacher()}
    monkeypatch.setattr(distilled, "load_teacher", lambda *name: teachers[name])

    def build(kind, cuts=cuts, **settings):
        given = {"quantizer": quantizer_file, "layer": 1, "refine_iters": 1, **settings}
        wanted = DistillationSettings(kind, **given)
        encoder = ConformerSettings(
            d_model=16,
            nhead=2,
            dim_feedforward=24,
            num_encoder_layers=3,
            cnn_module_kernel=5,
            subsampling_channels=(2, 3, 4),
            middle_output_layers=wanted.layers(),
            layer_dropout=0.0,
        )
        model_settings = TransducerSettings(encoder, decoder_dim=8, joiner_dim=8, vocab_size=30)
        torch.manual_seed(1)
        model = build_transducer(model_settings)
        distillation = build_distillation(wanted, model.encoder, cuts, CPU)
        fields, in_loop = distillation.fields, distillation.in_loop
        model.codebook_loss_net = distillation.head
        # A batch of the transcribed, and one of the others, and one of all.
        data = [
            StudentData(CutSet.from_cuts(part), Words(), DataSettings(100), 1, fields, in_loop)
            for part in (list(cuts)[:2], list(cuts)[2:], list(cuts))
        ]
        task = StudentTask(
            model, model_settings, data[2], {}, distillation, SpecAugmentSettings(p=0.0), None, CPU
        )
        batches = [batch for part in data for batch, _ in part.batches(0)]
        assert len(batches) == 3
        return task, batches

    return build


def loss_of(task, batch, warmup=3.0):
    torch.manual_seed(2)
    task.model.zero_grad()
    loss, figures = task.loss(batch, 1, warmup)
    loss.backward()
    return loss.item(), figures


@pytest.mark.parametrize("in_loop", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_on_any_batch(build, kind, in_loop):
    task, (transcribed, others, mixed) = build(kind, in_loop=in_loop)
    assert (transcribed.waveforms_BL is None) == (not in_loop)
    assert list(transcribed.labels) == ([] if in_loop else task._distillation.fields)
    for batch in (transcribed, others, mixed):
        _, figures = loss_of(task, batch)
        for name, parameter in task.model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert figures["distillation"] > 0
        for parameter in task.model.codebook_loss_net.parameters():
            assert parameter.grad.count_nonzero() > 0
    joiner = task.model.joiner.output_linear.weight
    assert joiner.grad.count_nonzero() > 0
    loss, figures = loss_of(task, others)
    assert joiner.grad.count_nonzero() == 0
    assert (figures["simple"], figures["pruned"]) == (0, 0)
    assert loss == pytest.approx(figures["distillation"])
    # In the warm-up, while the pruned loss has no weight, too.
    assert loss_of(task, others, warmup=0.5)[0] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_in_the_loop_teaches_what_its_stored_labels_do(build, kind):
    stored, batches = build(kind)
    in_loop, batches_in_loop = build(kind, in_loop=True)
    for batch, heard in zip(batches, batches_in_loop):
        assert batch.ids == heard.ids
        one, figures = loss_of(stored, batch)
        two, figures_in_loop = loss_of(in_loop, heard)
        # Sums in a batch of another size may tip a near tie of two indexes.
        assert two == pytest.approx(one, rel=1e-3)
        assert figures_in_loop == pytest.approx(figures, rel=0.05, abs=1e-3)


def test_teacher_is_neither_trained_nor_saved(build, teacher):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    task, batches = build("mvq-l2", in_loop=True)
    loss_of(task, batches[0])
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any("teacher" in name for name in task.model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        labels = task._labels(batches[0])
    assert labels["in_loop_1"].dtype == torch.int64


def test_terms_share_teachers_layers_and_labels(build, quantizer_file):
    more = [
        MoreSettings("mvq-l2", layer=3),
        MoreSettings("l2", field="layer1", in_loop=False, frame_offset=0.0125),
        MoreSettings("l1", teacher_layer=1),
        MoreSettings("mvq", layer=2),
    ]
    task, batches = build("mvq", in_loop=True, more=more)
    found = task._distillation
    assert (found.layers, found.fields) == ([1, 2, 3], ["layer1"])
    assert [(k.field, k.origin.layer) for k in found._kinds] == [("in_loop_1", 2), ("in_loop_2", 1)]
    _, figures = loss_of(task, batches[2])
    for name in ("1-mvq-", "2-mvq-l2-", "3-l2-", "4-l1-", "5-mvq-"):
        assert figures[f"{name}distillation"] > 0
    assert {"1-mvq-accuracy-0", "5-mvq-accuracy-3"} < set(figures)
    assert all(p.grad.count_nonzero() > 0 for p in task.model.codebook_loss_net.parameters())


def test_teachers_of_two_frame_rates_one_stored_and_one_in_the_loop(build, cuts, monkeypatch):
    """Each is paired with the student by time, and their losses are added."""
    paired, pair = [], Pairing.pair

    def kept(self, *args):
        paired.append(pair(self, *args))
        return paired[-1]

    clock = MoreSettings("l2", in_loop=True, teacher="clock", teacher_layer=1, layer=2, scale=0.5)
    task, batches = build("mvq", more=[clock])
    stored, _ = build("mvq")
    head = task.model.codebook_loss_net[0].state_dict()
    stored.model.codebook_loss_net.load_state_dict(head)
    found = task._distillation
    assert (found.fields, found.layers, found.in_loop) == ([FIELD], [1, 2], True)
    monkeypatch.setattr(Pairing, "pair", kept)
    for batch in batches:
        paired.clear()
        loss, figures = loss_of(task, batch)
        for name, parameter in task.model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert all(p.grad.count_nonzero() > 0 for p in task.model.codebook_loss_net.parameters())
        terms = [figures[name] for name in ("1-mvq-distillation", "2-l2-distillation")]
        whole = 0.5 * figures["simple"] + figures["pruned"] + sum(terms)
        assert min(terms) > 0 and loss == pytest.approx(whole, rel=1e-5)

        indexes_BTRN, times_BTRD = paired
        assert indexes_BTRN.shape[2:] == (2, 4) and times_BTRD.shape[2:] == (4, 3)
        num_frames = times_BTRD.shape[1]
        assert num_frames == indexes_BTRN.shape[1] > 20
        wanted_BTN = batch.labels[FIELD][:, : 2 * num_frames]
        assert torch.equal(indexes_BTRN.flatten(1, 2)[:, : wanted_BTN.shape[1]], wanted_BTN)
        # The latest four frames whose middle is not after that of the student's.
        late_BT = 0.035 + 0.04 * torch.arange(num_frames) - times_BTRD.mean((2, 3))
        within_BT = times_BTRD.isfinite().all(-1).all(-1)
        assert within_BT[:, :-2].all()
        assert late_BT[within_BT].min() > -1e-4 and late_BT[within_BT].max() < 0.0125 + 1e-4
        alone = loss_of(stored, batch)[1]["distillation"]
        assert terms[0] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("in_loop", [False, True])
def test_mean_and_deviation_where_the_quantizer_is_of_another_layer(build, cuts, in_loop):
    """Of the same frames, stored or not."""
    task, _ = build("l2", field="layer1", teacher_layer=1, in_loop=in_loop)
    frames_FD = np.concatenate([load_labels(cut, "layer1") for cut in cuts]).astype(np.float64)
    head = task.model.codebook_loss_net
    np.testing.assert_allclose(head.std_D, frames_FD.std(0), rtol=0.01)
    np.testing.assert_allclose(head.origin_D * head.std_D, frames_FD.mean(0), atol=5e-3)
    # That of the quantizer's layer are in its file.
    same, _ = build("l2", in_loop=in_loop)
    torch.testing.assert_close(same.model.codebook_loss_net.std_D, torch.linspace(0.5, 2, 32))


@pytest.mark.parametrize("kind", ["mvq", "mvq-joint"])
def test_indexes_that_others_have_made_need_no_quantizer(build, cuts, kind):
    own, batches = build(kind)
    published, _ = build(kind, quantizer=None, codebook_size=16)
    published.model.load_state_dict(own.model.state_dict())
    for batch in batches:
        assert loss_of(published, batch)[0] == loss_of(own, batch)[0]
    # The offset of HuBERT's frames, unless the conf knows better.
    later, _ = build(kind, quantizer=None, codebook_size=16, frame_offset=0.0)
    pairings = [task._distillation._terms[0]._pairing for task in (own, published, later)]
    assert [pairing.teacher_offset for pairing in pairings] == [0.0125, 0.0125, 0.0]
    unknown = [
        fastcopy(cut, custom={FIELD: cut.custom[FIELD]}) if n == 1 else cut
        for n, cut in enumerate(cuts)
    ]
    for accept, cause in ((False, "do not say what made them"), (True, "of unknown origin")):
        with pytest.raises(RecipeError, match=f"cut {cuts[1].id}: its labels .*{cause}"):
            build(
                kind,
                cuts=CutSet.from_cuts(unknown),
                quantizer=None,
                accept_unknown_origin=accept,
            )


def test_mixed_and_padded_cuts_keep_their_labels(build, cuts, plain_cuts, feature_cuts):
    speech, noise = cuts[0], list(feature_cuts)[6].truncate(duration=0.8).drop_supervisions()
    mixed = [
        speech.mix(noise, offset_other_by=0.3, snr=10),
        noise.mix(cuts[1], offset_other_by=0.4),
        speech.pad(duration=speech.duration + 1.0),
        cuts[1].pad(duration=cuts[1].duration + 0.5, direction="left"),
    ]
    mixed = CutSet.from_cuts(fastcopy(cut, id=f"mixed-{n}") for n, cut in enumerate(mixed))
    for kind, in_loop in (("mvq", False), ("l2", False), ("mvq-l2", True)):
        task, batches = build(kind, cuts=mixed, in_loop=in_loop)
        for batch in batches:
            assert batch.features_BTF.dtype == torch.float32
            row = dict(zip(batch.ids, range(len(batch.ids))))
            assert all(transcript(cut) is not None for cut in mixed)
            assert all(tokens for tokens in batch.tokens)
            if kind == "l2" and "mixed-3" in row:
                labels_UD = batch.labels["embeddings"][row["mixed-3"]]
                assert labels_UD[:25].isnan().all() and labels_UD[25:80].isfinite().all()
            assert np.isfinite(loss_of(task, batch)[0])
    untold = replace(mixed[0].tracks[0], cut=fastcopy(speech, custom={FIELD: speech.custom[FIELD]}))
    broken = CutSet.from_cuts([fastcopy(mixed[0], tracks=[untold, *mixed[0].tracks[1:]])])
    with pytest.raises(RecipeError, match="its labels do not say what made them"):
        build("mvq", cuts=broken)


def test_settings_that_lack_something_get_their_line(build, cuts, quantizer, tmp_path):
    bare = tmp_path / "bare.pt"
    torch.save(quantizer.state_dict(), bare)
    elsewhere = tmp_path / "other.pt"
    save_quantizer(elsewhere, quantizer, {"teacher": "other", "layer": 2, "frame_offset": 0.0})
    for kind, settings, cause in (
        ("mvq", {"quantizer": None, "in_loop": True}, r"\.quantizer: kind mvq needs one"),
        ("mvq-l1", {"quantizer": None}, "kind mvq-l1 regresses on what the quantizer decodes"),
        ("mvq-l2", {"quantizer": None}, "kind mvq-l2 regresses on what the quantizer decodes"),
        ("mvq", {"quantizer": None, "field": "nothing"}, "has no nothing; run stage 5"),
        ("mvq", {"field": "nothing"}, "has no nothing; run stage 5"),
        ("l2", {"teacher_layer": 3}, "embeddings are float32 of layer 2 of tiny, not .* layer 3"),
        ("l2", {"teacher": "else"}, "float32 of layer 2 of tiny, not float32 of layer 2 of else"),
        ("l2", {"field": FIELD}, "its codebook_indexes are"),
        ("l2", {"quantizer": None}, "when the first frame of embeddings is; give frame_offset"),
        ("l2", {"quantizer": elsewhere}, "when the first frame of embeddings is"),
        ("l2", {"quantizer": None, "in_loop": True}, "give teacher and teacher_layer"),
        ("mvq", {"quantizer": bare, "in_loop": True}, "give teacher and teacher_layer"),
        ("mvq-l2", {"quantizer": bare, "frame_offset": 0.0125}, "knows no mean and deviation"),
        ("l2", {"in_loop": True, "teacher_layer": 3}, "layer 3 is not in 1..2"),
    ):
        with pytest.raises(RecipeError, match=cause) as caught:
            build(kind, **settings)
        assert "\n" not in str(caught.value)
    # The authors' file tells its indexes by their hash.
    build("mvq", quantizer=bare)
    with pytest.raises(RecipeError, match="has no transcript, and no teacher to learn from"):
        next(StudentData(cuts, Words(), DataSettings(100), 1).batches(0))
