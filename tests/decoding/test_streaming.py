"""Streaming decoding against the whole-utterance pass with a chunk mask."""

import pytest
import torch

from mvqkd.decoding.search import BeamSearch, GreedySearch
from mvqkd.decoding.streaming import decode_streaming
from mvqkd.errors import RecipeError
from tests.decoding.random_transducer import NUM_FEATURES, random_transducer

LENS = (163, 90, 31, 163, 7, 48)


def make(causal=True, lens=LENS):
    model = random_transducer(vocab_size=9, causal=causal, sharpness=8.0)
    features_BTF = torch.randn(len(lens), max(lens), NUM_FEATURES)
    for x, n in zip(features_BTF, lens):
        x[n:] = 100.0  # padding must not be seen
    return model, features_BTF, torch.tensor(lens)


def outcome(hypotheses):
    return [(h.tokens, h.frames) for h in hypotheses]


@pytest.mark.parametrize("search_class", [GreedySearch, BeamSearch])
@pytest.mark.parametrize(("chunk_size", "left_context"), [(4, 8), (8, 16), (16, 64)])
def test_equals_the_masked_whole(search_class, chunk_size, left_context):
    model, features_BTF, lens_B = make()
    search = search_class(model)
    streamed = decode_streaming(model, features_BTF, lens_B, chunk_size, left_context, 0, search)
    # One utterance at a time: where the utterance ends, the masked pass pads.
    for b, n in enumerate(lens_B.tolist()):
        with torch.no_grad():
            encoder_out_BTC, encoder_lens_B, _ = model.encoder(
                features_BTF[b : b + 1, :n],
                lens_B[b : b + 1],
                chunk_size=chunk_size,
                left_context=left_context,
            )
        search.step(encoder_out_BTC, encoder_lens_B)
        (whole,) = search.finish()
        assert outcome([streamed[b]]) == outcome([whole])
        assert streamed[b].log_prob == pytest.approx(whole.log_prob, abs=1e-3)
    assert sum(len(h.tokens) for h in streamed) > 20


@pytest.mark.parametrize("right_context", [0, 2, 9])
def test_a_stream_does_not_depend_on_the_batch(right_context):
    model, features_BTF, lens_B = make()
    search = BeamSearch(model)
    together = decode_streaming(model, features_BTF, lens_B, 4, 8, right_context, search)
    for b, n in enumerate(lens_B.tolist()):
        alone = decode_streaming(
            model, features_BTF[b : b + 1, :n], lens_B[b : b + 1], 4, 8, right_context, search
        )
        assert outcome([together[b]]) == outcome(alone)


@pytest.mark.parametrize("right_context", [0, 1, 5])
def test_every_frame_is_searched_once(right_context):
    model, features_BTF, lens_B = make()
    search = GreedySearch(model)
    seen = []
    step = search.step
    search.step = lambda out, lens: (seen.append(lens), step(out, lens))
    decode_streaming(model, features_BTF, lens_B, 4, 8, right_context, search)
    assert torch.stack(seen).sum(0).tolist() == [((n - 1) // 2 - 1) // 2 for n in LENS]


def test_look_ahead_changes_what_is_seen():
    model, features_BTF, lens_B = make()
    search = GreedySearch(model)
    results = [
        decode_streaming(model, features_BTF, lens_B, 4, 8, right_context, search)
        for right_context in (0, 4)
    ]
    assert [h.log_prob for h in results[0]] != [h.log_prob for h in results[1]]


def test_streams_without_an_output_frame():
    model, features_BTF, _ = make(lens=(20, 6, 0))
    search = GreedySearch(model)
    hypotheses = decode_streaming(model, features_BTF, torch.tensor([20, 6, 0]), 4, 8, 0, search)
    assert outcome(hypotheses[1:]) == [([], []), ([], [])]


def test_an_encoder_that_looks_ahead_is_refused():
    model, features_BTF, lens_B = make(causal=False)
    with pytest.raises(RecipeError, match="causal"):
        decode_streaming(model, features_BTF, lens_B, 4, 8, 0, GreedySearch(model))
