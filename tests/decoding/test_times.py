"""Times of tokens and words, and the delay of streams."""

import itertools
import random

import pytest
import torch

from mvqkd.decoding.search import BeamSearch, GreedySearch, Hypothesis
from mvqkd.decoding.streaming import decode_streaming
from mvqkd.decoding.times import (
    Word,
    emission_delays,
    summarize_delays,
    token_times,
    tokens_with_times,
    words_with_times,
)
from tests.decoding.random_transducer import NUM_FEATURES, few_tokens, random_transducer


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return few_tokens(tmp_path_factory.mktemp("tokens") / "tokens")


@pytest.fixture(scope="module")
def model():
    return random_transducer(vocab_size=9, sharpness=8.0)


def test_a_frame_is_40_ms_and_lies_where_its_receptive_field_does(model):
    # Frame 0 sees the first 8 feature frames of 10 ms and one of padding before them.
    assert token_times(model.encoder, Hypothesis([5, 6], [0, 10])) == pytest.approx([0.035, 0.435])


def test_tokens_are_spelt_as_the_tokenizer_spells_them(model, tokens):
    ids = tokens.encode("THE OLD", out_type=int)
    found = tokens_with_times(model.encoder, Hypothesis(ids, list(range(len(ids)))), tokens)
    assert [token.text for token in found] == tokens.encode("THE OLD", out_type=str)
    assert found[0].time == 0.035 and found[1].time == 0.075


def test_words_are_those_of_the_decoded_text(model, tokens):
    rng = random.Random(0)
    for length in (0, 1, 3, 30):
        ids = [rng.randrange(2, len(tokens)) for _ in range(length)]
        frames = sorted(rng.sample(range(100), length))
        words = words_with_times(model.encoder, Hypothesis(ids, frames), tokens, 10.0)
        assert [w.text for w in words] == tokens.decode(ids).split()
        assert all(0 <= w.start < w.end <= 10 for w in words)
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(words))


def test_words_last_from_their_first_token_to_their_last(model, tokens):
    ids = tokens.encode("THE", out_type=int)
    assert len(ids) < 4
    frames = list(range(10, 10 + 2 * len(ids), 2))
    (word,) = words_with_times(model.encoder, Hypothesis(ids, frames), tokens, 9.0)
    end = 0.435 + 0.08 * (len(ids) - 1) + 0.02
    assert (word.text, word.start, word.end) == ("THE", pytest.approx(0.415), pytest.approx(end))
    # The file ended before the frame did.
    (word,) = words_with_times(model.encoder, Hypothesis(ids, frames), tokens, 0.42)
    assert word == Word("THE", pytest.approx(0.415), 0.42)


def test_delay_of_known_hypotheses(model):
    whole = Hypothesis([3, 4, 5, 6], [2, 10, 20, 30])
    streamed = Hypothesis([3, 7, 5, 6], [3, 10, 19, 31])  # one substituted, one earlier
    delays = emission_delays(streamed, whole, model.encoder, chunk_size=8, right_context=2)
    assert delays.pop(1) is None
    emitted, shown = zip(*delays)
    assert emitted == pytest.approx([0.04, -0.04, 0.04])
    # Frames 3, 19 and 31 wait for the features of frames 9, 25 and 33, which reach 40 ms further.
    assert shown == pytest.approx([0.04 * 7 + 0.04, 0.04 * 5 + 0.04, 0.04 * 3 + 0.04])
    summary = summarize_delays([None, *delays, None])
    assert summary.tokens == 3
    assert summary.mean == pytest.approx(0.04 / 3) and summary.p90 == pytest.approx(0.04)
    assert summary.shown == pytest.approx(0.24)


def test_delay_without_tokens(model):
    delays = emission_delays(Hypothesis(), Hypothesis([4], [3]), model.encoder, 8, 0)
    assert delays == [] and summarize_delays(delays) is None
    delays = emission_delays(Hypothesis([4, 5], [3, 4]), Hypothesis(), model.encoder, 8, 0)
    assert delays == [None, None] and summarize_delays(delays) is None
    # A token that only one of them has moves no other's.
    delays = emission_delays(
        Hypothesis([3, 4, 5], [1, 5, 9]), Hypothesis([4, 6, 5], [4, 6, 9]), model.encoder, 8, 0
    )
    assert delays[0] is None
    assert [d[0] for d in delays[1:]] == pytest.approx([0.04, 0.0])


@pytest.mark.parametrize("search_class", [GreedySearch, BeamSearch])
def test_one_chunk_has_no_delay_of_emission(model, search_class):
    """A chunk that holds the utterance is the whole utterance."""
    torch.manual_seed(0)
    features_BTF, lens_B = torch.randn(2, 130, NUM_FEATURES), torch.tensor([130, 90])
    search = search_class(model)
    streamed = decode_streaming(model, features_BTF, lens_B, 40, 40, 0, search)
    with torch.no_grad():
        encoder_out_BTC, encoder_lens_B, _ = model.encoder(features_BTF, lens_B)
    search.step(encoder_out_BTC, encoder_lens_B)
    delays = [
        d
        for s, w in zip(streamed, search.finish())
        for d in emission_delays(s, w, model.encoder, 40, 0)
    ]
    summary = summarize_delays(delays)
    assert summary.tokens == sum(len(s.tokens) for s in streamed) > 5
    assert summary.mean == summary.p90 == 0 and summary.shown > 0
