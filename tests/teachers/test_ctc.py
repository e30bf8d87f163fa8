"""CTC training of the embedded teacher."""

import pytest
import torch
from lhotse import CutSet
from lhotse.utils import fastcopy
from torch.nn import functional as F

from mvqkd.data.audio import collate_audio
from mvqkd.errors import RecipeError
from mvqkd.teachers.ctc import SYMBOLS, CtcTask, HubertSettings, new_hubert, transcribe_cuts
from tests.conftest import CPU, tiny_hubert


def settings(**changes):
    config = tiny_hubert().config
    names = (
        "hidden_size num_hidden_layers num_attention_heads intermediate_size conv_dim conv_kernel "
        "conv_stride conv_bias num_conv_pos_embeddings num_conv_pos_embedding_groups "
        "feat_extract_norm do_stable_layer_norm"
    )
    values = {name: getattr(config, name) for name in names.split()}
    return HubertSettings({**values, **changes})


@pytest.fixture
def make_task(plain_cuts):
    def make(cuts=None, mask_inputs=False, speed_factors=(1.0,), **changes):
        cuts = CutSet.from_cuts(list(plain_cuts)[:3]) if cuts is None else cuts
        teacher = new_hubert(settings(**changes), seed=3)
        return CtcTask(teacher, cuts, {"dev": cuts}, 20, 1, CPU, mask_inputs, speed_factors)

    return make


def test_a_few_steps_reduce_the_loss(make_task):
    task = make_task()
    task.model.train()
    optimizer = torch.optim.Adam(task.model.parameters(), lr=3e-3)
    losses = []
    for step in range(20):
        for batch, seconds in task.batches(epoch=step, start=0):
            loss, figures = task.loss(batch, step, warmup=1.0)
            loss = loss / task.divisor(batch)
            assert seconds == pytest.approx(task.epoch_seconds)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert figures["ctc"] == pytest.approx(losses[-1] * figures["weight"], rel=1e-5)
    assert figures["weight"] == sum(len(text) for text in batch.texts)
    for name, parameter in task.model.named_parameters():
        if "masked_spec_embed" not in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_loss_is_that_of_each_utterance_alone(make_task, plain_cuts):
    task = make_task()
    task.model.eval()
    cuts = list(plain_cuts)[:3]
    whole, figures = task.loss(collate_audio(CutSet.from_cuts(cuts)), 0, 1.0)
    alone = [task.loss(collate_audio(CutSet.from_cuts([c])), 0, 1.0)[1] for c in cuts]
    assert figures["ctc"] == pytest.approx(sum(f["ctc"] for f in alone), rel=1e-4)
    assert whole.item() == figures["ctc"]
    assert task.divisor(collate_audio(CutSet.from_cuts(cuts))) == figures["weight"]


def test_each_epoch_draws_speeds_anew(make_task, plain_cuts):
    cuts = CutSet.from_cuts(list(plain_cuts)[:8])
    task = make_task(cuts, speed_factors=(0.8, 1.0, 1.25))
    originals = {cut.id: cut for cut in cuts}

    def drawn(epoch):
        found = {}
        for batch, _ in task.batches(epoch, start=0):
            for name, length, text in zip(batch.ids, batch.lengths_B.tolist(), batch.texts):
                original = originals[name.partition("_sp")[0]]
                assert text == original.supervisions[0].text
                found[original.id] = round(original.num_samples / length, 2)
        return found

    first, second = drawn(1), drawn(2)
    assert first == drawn(1) != second
    assert first.keys() == originals.keys()
    assert {*first.values(), *second.values()} == {0.8, 1.0, 1.25}


def test_mask_hides_frames_in_training_only(make_task, plain_cuts):
    masks = {"mask_time_prob": 0.5, "mask_time_length": 4, "hidden_dropout": 0.0}
    off = dict.fromkeys(("attention_dropout", "activation_dropout", "final_dropout"), 0.0)
    off.update(feat_proj_dropout=0.0, layerdrop=0.0)
    task = make_task(mask_inputs=True, **masks, **off)
    batch = collate_audio(CutSet.from_cuts(list(plain_cuts)[:2]))

    def logits():
        return task.model.ctc_logits(batch.waveforms_BL, batch.lengths_B, task._mask_inputs)[0]

    with torch.no_grad():
        task.model.eval()
        assert torch.equal(logits(), logits())
        task.model.train()
        assert not torch.allclose(logits(), logits(), atol=1e-3)
    loss, _ = task.loss(batch, 0, 1.0)
    loss.backward()
    assert task.model.model.hubert.masked_spec_embed.grad.abs().sum() > 0


def test_batches_are_those_of_seed_and_epoch(make_task, plain_cuts):
    task = make_task(plain_cuts)
    task._max_duration = 6
    orders = [[b.ids for b, _ in task.batches(epoch, 0)] for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] and len(orders[0]) > 2
    everything = sorted(cut.id for cut in plain_cuts)
    assert all(sorted(i for ids in order for i in ids) == everything for order in orders)
    assert [b.ids for b, _ in task.batches(0, 1)] == orders[0][1:]


def test_foreign_symbol_gets_its_line(make_task, plain_cuts):
    cut = next(iter(plain_cuts))
    supervision = fastcopy(cut.supervisions[0], text="GRÜSSE")
    cuts = CutSet.from_cuts([fastcopy(cut, supervisions=[supervision])])
    task = make_task(cuts)
    with pytest.raises(RecipeError, match=f"cut {cut.id}: its transcript has 'Ü'"):
        task.loss(collate_audio(cuts), 0, 1.0)


def test_word_error_rate_of_a_perfect_teacher(make_task, plain_cuts, monkeypatch):
    task = make_task(plain_cuts)
    texts = {collate_audio(CutSet.from_cuts([c])).lengths_B.item(): c for c in plain_cuts}
    assert len(texts) == len(plain_cuts)

    def read(waveforms_BL, lengths_B):
        return [texts[int(n)].supervisions[0].text for n in lengths_B]

    monkeypatch.setattr(task.model, "transcribe", read)
    assert task.validate() == {"wer-dev": 0.0}
    results = transcribe_cuts(task.model, plain_cuts, CPU, max_duration=6)
    assert [name for name, _, _ in results] == sorted(c.id for c in plain_cuts)
    monkeypatch.setattr(task.model, "transcribe", lambda w, n: [""] * len(n))
    assert task.validate() == {"wer-dev": 100.0}


def test_new_hubert_is_reproducible_and_checked():
    one, two, other = (new_hubert(settings(), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(RecipeError, match=r"^hubert\.config: ") as caught:
        new_hubert(settings(num_attention_heads=5), 1)
    assert "\n" not in str(caught.value)


def test_front_end_starts_as_a_filterbank():
    """A tone excites the band of its frequency most."""
    first, second = new_hubert(
        settings(conv_dim=[160, 40, 24]), 1
    ).model.hubert.feature_extractor.conv_layers[:2]
    time_L = torch.arange(1600) / 16000
    bands = []
    for hertz in (300, 1000, 3000):
        tone_1L = torch.sin(2 * torch.pi * hertz * time_L)[None, None]
        with torch.no_grad():
            magnitudes = second.conv(F.gelu(first.conv(tone_1L)))
        bands.append(int(magnitudes[0].mean(-1).argmax()))
    assert bands == sorted(bands) and len(set(bands)) == 3
    assert len(SYMBOLS) == 29
