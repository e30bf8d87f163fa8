"""Decoding a test set."""

import types

import pytest
import torch

from mvqkd.data.datamodule import StudentBatch
from mvqkd.decoding import search
from mvqkd.decoding.decode import DecodingSettings, decode, decode_batch, load_student
from mvqkd.decoding.times import tokens_with_times, words_with_times
from mvqkd.errors import RecipeError
from tests.decoding.random_transducer import NUM_FEATURES, few_tokens, random_transducer

CPU = torch.device("cpu")
LENGTHS = torch.tensor([150, 90])


@pytest.mark.parametrize("causal", [False, True])
def test_words_come_with_their_times(causal, tmp_path):
    tokens = few_tokens(tmp_path / "tokens")
    model = random_transducer(vocab_size=len(tokens), causal=causal, sharpness=8.0)
    generator = torch.Generator().manual_seed(0)
    features_BTF = torch.randn(2, 150, NUM_FEATURES, generator=generator)
    batch = StudentBatch(["b", "a"], features_BTF, LENGTHS, [[], []], ["THE", "A"], None)
    data = types.SimpleNamespace(seconds=2.4, batches=lambda epoch: [(batch, 2.4)])
    settings = DecodingSettings("greedy_search", chunk_size=16, left_context=16)
    decoded = decode(model, data, tokens, settings, CPU)
    assert [(name, ref) for name, ref, _ in decoded.results] == [("a", ["A"]), ("b", ["THE"])]
    with torch.inference_mode():
        found = decode_batch(model, features_BTF, LENGTHS, settings)
    assert decoded.times.keys() == {"a", "b"}
    for name, _, heard in decoded.results:
        place = batch.ids.index(name)
        seconds = int(LENGTHS[place]) / 100
        words = words_with_times(model.encoder, found[place], tokens, seconds)
        assert [word.text for word in words] == heard
        assert decoded.times[name] == [(word.start, word.end) for word in words]
        assert decoded.tokens[name] == tokens_with_times(model.encoder, found[place], tokens)
    assert any(decoded.times.values())
    assert decoded.tokens.keys() == decoded.times.keys()
    assert (decoded.emission_delay is not None) == causal
    assert decoded.delays.keys() == (decoded.times.keys() if causal else set())
    for name, delays in decoded.delays.items():
        assert len(delays) == len(decoded.tokens[name])
    known = [d for delays in decoded.delays.values() for d in delays if d is not None]
    if causal:
        assert len(known) == decoded.emission_delay.tokens
        assert sum(known) / len(known) == pytest.approx(decoded.emission_delay.mean, abs=0.005)


def test_fast_beam_search_needs_k2(monkeypatch):
    settings = DecodingSettings("fast_beam_search")
    assert settings.name(30, True) == (
        "fast_beam_search-beam-20.0-max-contexts-8-max-states-64-"
        "chunk-16-left-64-right-0-epoch-30-avg-10"
    )
    monkeypatch.setattr(search, "import_k2", lambda: None)
    model, features_BTF = random_transducer(), torch.zeros(2, 150, NUM_FEATURES)
    with pytest.raises(RecipeError, match=r"decoding\.method: fast_beam_search needs k2") as caught:
        decode_batch(model, features_BTF, LENGTHS, settings)
    assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=r"decoding\.max_states: 0; give more"):
        DecodingSettings(max_states=0)


def test_student_without_whole_settings_is_refused(tmp_path):
    folder = tmp_path / "mvq"
    with pytest.raises(RecipeError, match=r"mvq/settings\.json: no such file.*; run stage 6$"):
        load_student(folder, DecodingSettings())
    folder.mkdir()
    (folder / "settings.json").write_text('{"model": {')
    with pytest.raises(RecipeError, match=r"settings\.json: .*; remove .*stamps/student-mvq, then"):
        load_student(folder, DecodingSettings())
