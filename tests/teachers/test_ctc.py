"""CTC training of teachers, in whatever script."""

import json
import logging
import unicodedata

import pytest
import torch
import yaml
from lhotse import CutSet
from lhotse.utils import fastcopy
from torch.nn import functional as F

from local import train_teacher, verify_teacher
from mvqkd.data.audio import collate_audio
from mvqkd.data.manifests import write_cuts
from mvqkd.errors import RecipeError
from mvqkd.teachers import load_teacher
from mvqkd.teachers.ctc import (
    SYMBOLS,
    CtcTask,
    HubertSettings,
    Spelling,
    new_hubert,
    symbols_from,
    symbols_of,
    transcribe_cuts,
)
from mvqkd.training.loop import TrainingSettings
from tests.conftest import CPU, ROOT, tiny_hubert


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


def test_audio_need_not_be_kept(plain_cuts):
    teacher = new_hubert(settings(), seed=3)
    kept, read = (
        CtcTask(teacher, plain_cuts, {}, 6, 1, CPU, False, cache_audio=cache)
        for cache in (True, False)
    )
    for (one, _), (other, _) in zip(kept.batches(1, 0), read.batches(1, 0), strict=True):
        assert one.ids == other.ids and torch.equal(one.waveforms_BL, other.waveforms_BL)
    assert kept._cache.keys() == {cut.id for cut in plain_cuts} and read._cache is None


def saying(texts, cuts):
    """Those cuts with other transcripts."""
    return CutSet.from_cuts(
        fastcopy(cut, supervisions=[fastcopy(cut.supervisions[0], text=text)] if text else [])
        for cut, text in zip(cuts, texts)
    )


def test_training_transcripts_that_the_symbols_cannot_spell(make_task, plain_cuts):
    cuts = saying(["GOOD", "GRÜSSE, MAẞE", "A|B"], plain_cuts)
    second = list(cuts)[1].id
    with pytest.raises(RecipeError) as caught:
        make_task(cuts)
    message = str(caught.value)
    assert message.startswith(f"cut {second}: its transcript has ',', 'Ü', 'ẞ', no symbol of the")
    assert "(2 of 3 transcripts have such: ',', '|', 'Ü', 'ẞ'); normalize them, " in message
    assert "\n" not in message


def test_spelling():
    capitals, small = Spelling(SYMBOLS), Spelling(["<pad>", "<unk>", "|", *"abc"])
    assert capitals("  don't\tgo ") == "DON'T GO" and small("A  Bc") == "a bc"
    assert capitals.indexes("A 'b") == [3, 1, 2, 4]
    assert Spelling("aBc")("Abc") == "Abc" and Spelling(["<pad>", "|", *"你好"])("A你b") == "A你b"
    # No word boundary, no words.
    assert Spelling(["<pad>", "A"])("a a") == "A A"
    # One character, whether it is written as one or as two.
    assert Spelling("й").indexes(unicodedata.normalize("NFD", "Й")) == [0]


def test_symbols(plain_cuts):
    texts = ["привет мир", unicodedata.normalize("NFD", "ёлка й|"), None]
    assert symbols_of(saying(texts, plain_cuts)) == ["<pad>", "|", *"авеийклмпртё"]
    assert symbols_from("'AB") == ["<pad>", "|", "'", "A", "B"]
    with pytest.raises(RecipeError, match="training cuts: none has a transcript; give"):
        symbols_of(saying([None, " "], plain_cuts))
    for given, cause in {"ABA": "'A' is there", "A B": "' ' is there", "": "empty"}.items():
        with pytest.raises(RecipeError, match=f"^symbols: {cause}"):
            symbols_from(given)


def test_shipped_teacher_and_its_conf_keep_their_symbols():
    table = json.loads((ROOT / "egs/mini/teacher/vocab.json").read_text())
    assert sorted(table, key=table.get) == SYMBOLS
    conf = yaml.safe_load((ROOT / "egs/mini/conf/teacher-training.yaml").read_text())
    assert symbols_from(conf["symbols"]) == SYMBOLS


@pytest.fixture
def script_settings(tmp_path):
    def make(train, dev, **changes):
        for name, cuts in (("train", train), ("dev", dev)):
            write_cuts(cuts, tmp_path / f"{name}.jsonl.gz")
        values = {
            "train_manifests": [tmp_path / "train.jsonl.gz"],
            "dev_manifests": [tmp_path / "dev.jsonl.gz"],
            "work_dir": tmp_path / "training",
            "out_dir": tmp_path / "teacher",
            "device": "cpu",
            "mask_inputs": False,
            "hubert": settings(),
            "training": TrainingSettings(num_epochs=1, optimizer="adamw", lr=5e-3, keep_epochs=1),
        }
        return train_teacher.Settings(**{**values, **changes})

    return make


def test_teacher_of_other_scripts(script_settings, plain_cuts, tmp_path, caplog):
    text = "йа 你好"
    (cut,) = saying([unicodedata.normalize("NFD", text)], plain_cuts)
    cut = cut.truncate(duration=0.5)
    # An epoch of as many steps.
    said = CutSet.from_cuts(cut.with_id(f"{number}") for number in range(120))
    strange = saying([text + " Ж!"], said)
    surely = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout"), 0.0)
    surely |= {"feat_proj_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0}
    given = script_settings(said, strange, hubert=settings(**surely), max_duration=0.6)
    with caplog.at_level(logging.WARNING):
        train_teacher.main(given)
    assert [r.getMessage() for r in caplog.records] == [
        "dev: 1 of 1 transcripts have characters that are no symbols of the teacher ('!', 'ж'); "
        "they count as errors"
    ]

    teacher = load_teacher(tmp_path / "teacher")
    assert teacher.vocabulary == ["<pad>", "|", *"ай你好"]
    batch = collate_audio(CutSet.from_cuts([cut]))
    assert teacher.transcribe(batch.waveforms_BL, batch.lengths_B) == [text]
    caplog.clear()
    verify = verify_teacher.Settings(
        str(tmp_path / "teacher"), given.train_manifests, tmp_path / "wer", device="cpu"
    )
    with caplog.at_level(logging.WARNING):
        verify_teacher.main(verify)
    assert json.loads((tmp_path / "wer/wer.json").read_text())["wer"] == {"train": 0.0}
    assert not caplog.records
    verify.test_manifests = given.dev_manifests
    with caplog.at_level(logging.WARNING):
        verify_teacher.main(verify)
    assert [r.getMessage()[:24] for r in caplog.records] == ["dev: 1 of 1 transcripts "]
    assert json.loads((tmp_path / "wer/wer.json").read_text())["wer"]["dev"] > 0


def test_head_of_init_stays_unless_another_is_asked_for(script_settings, plain_cuts, tmp_path):
    english, russian = (saying([text], plain_cuts) for text in ("a bad", "да нет"))
    given = script_settings(english, english, symbols="DCBA")
    train_teacher.main(given)
    symbols = ["<pad>", "|", *"DCBA"]
    assert load_teacher(tmp_path / "teacher").vocabulary == symbols

    on = {"init": str(tmp_path / "teacher"), "work_dir": tmp_path / "b", "out_dir": tmp_path / "c"}
    train_teacher.main(script_settings(english, english, **on))
    assert load_teacher(tmp_path / "c").vocabulary == symbols
    with pytest.raises(
        RecipeError, match=r"symbols\.json: the training there is of other symbols;"
    ):
        train_teacher.main(script_settings(russian, russian, **on, new_head=True))
    on["work_dir"] = tmp_path / "d"
    with pytest.raises(RecipeError, match=r"no symbol of the teacher .* or set new_head: true"):
        train_teacher.main(script_settings(russian, russian, **on))
    train_teacher.main(script_settings(russian, russian, **on, new_head=True))
    teacher = load_teacher(tmp_path / "c")
    assert teacher.vocabulary == ["<pad>", "|", *"адент"] and teacher.dim == 32


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


def test_cut_that_is_too_short_for_a_frame_is_named(make_task, plain_cuts):
    cuts = list(plain_cuts)[:3]
    cuts[1] = cuts[1].truncate(duration=450 / 16000, preserve_id=True)
    cuts = CutSet.from_cuts(cuts)
    short = list(cuts)[1].id
    task = make_task(cuts)
    list(task.batches(1, 0))
    transcribe_cuts(task.model, cuts, CPU)
    said = "samples are shorter than one frame of teacher"
    with pytest.raises(RecipeError, match=f"^cut {short}_sp1.25: 360 {said}"):
        list(make_task(cuts, speed_factors=(1.25,)).batches(1, 0))
    cuts = CutSet.from_cuts(cut.truncate(duration=300 / 16000, preserve_id=True) for cut in cuts)
    first = f"^cut ({'|'.join(cut.id for cut in cuts)}): 300 {said}"
    for called in (
        lambda: list(make_task(cuts).batches(1, 0)),
        lambda: make_task(cuts).largest_batches(),
        lambda: transcribe_cuts(task.model, cuts, CPU),
    ):
        with pytest.raises(RecipeError, match=first) as caught:
            called()
        assert str(caught.value).endswith("; remove it")


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
