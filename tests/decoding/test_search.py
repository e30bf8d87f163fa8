"""The searches against plain Python written from the definition, one utterance at a time."""

import itertools
import math

import pytest
import torch
from torch import nn

from mvqkd.decoding.search import (
    BeamSearch,
    GreedySearch,
)
from mvqkd.students.transducer import BLANK
from tests.decoding.random_transducer import CONTEXT, ENCODER_DIM, random_transducer


def make(vocab_size=7, lens=(19, 12, 1, 0, 25), seed=0, **kwargs):
    model = random_transducer(seed, vocab_size, **kwargs)
    return model, torch.randn(len(lens), max(lens), ENCODER_DIM), torch.tensor(lens)


@torch.no_grad()
def log_probs(model, frame_C, tokens):
    """log P(symbol | frame, the last tokens), straight from the modules."""
    size = model.decoder.context_size
    context = ([BLANK] * size + list(tokens))[-size:]
    predictor = model.decoder(torch.tensor([context]), need_pad=False)[:, 0]
    joiner = model.joiner
    logits = joiner(
        joiner.encoder_proj(frame_C[None]), joiner.decoder_proj(predictor), project_input=False
    )
    return logits[0].log_softmax(-1).tolist()


def reference_greedy(model, frames_TC, max_sym_per_frame=1):
    tokens, places, score = [], [], 0.0
    for t, frame_C in enumerate(frames_TC):
        for _ in range(max_sym_per_frame):
            scores = log_probs(model, frame_C, tokens)
            symbol = max(range(len(scores)), key=scores.__getitem__)
            score += scores[symbol]
            if symbol == BLANK:
                break
            tokens.append(symbol)
            places.append(t)
    return tokens, places, score


def reference_beam(model, frames_TC, beam, max_sym_per_frame=1):
    hyps = {(): (0.0, ())}
    for t, frame_C in enumerate(frames_TC):
        # Those that are at the frame still, and those that have had their blank.
        here, gone = [(score, tokens, places) for tokens, (score, places) in hyps.items()], []
        for _ in range(max_sym_per_frame):
            extended = [(*hypothesis, False) for hypothesis in gone]
            for score, tokens, places in here:
                for symbol, log_prob in enumerate(log_probs(model, frame_C, tokens)):
                    if symbol == BLANK:
                        extended.append((score + log_prob, tokens, places, False))
                    else:
                        grown = (*tokens, symbol), (*places, t)
                        extended.append((score + log_prob, *grown, True))
            kept = sorted(extended, key=lambda e: -e[0])[:beam]
            here = [(*hypothesis,) for *hypothesis, stays in kept if stays]
            gone = [(*hypothesis,) for *hypothesis, stays in kept if not stays]
        hyps = {}
        for score, tokens, places in sorted(here + gone, key=lambda e: -e[0]):
            if tokens in hyps:
                first, first_places = hyps[tokens]
                hyps[tokens] = (math.log(math.exp(first) + math.exp(score)), first_places)
            else:
                hyps[tokens] = (score, places)
    tokens, (score, places) = max(
        hyps.items(), key=lambda h: h[1][0] / (len(h[0]) + model.decoder.context_size)
    )
    return list(tokens), list(places), score


def check(hypotheses, expected):
    assert [(h.tokens, h.frames) for h in hypotheses] == [(e[0], e[1]) for e in expected]
    assert [h.log_prob for h in hypotheses] == pytest.approx([e[2] for e in expected], abs=1e-4)


@pytest.mark.parametrize("max_sym_per_frame", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_plain_python(seed, max_sym_per_frame):
    model, encoder_out_BTC, lens_B = make(seed=seed, blank_logit=0.0)
    search = GreedySearch(model, max_sym_per_frame)
    search.step(encoder_out_BTC, lens_B)
    hypotheses = search.finish()
    expected = [
        reference_greedy(model, x[:n], max_sym_per_frame) for x, n in zip(encoder_out_BTC, lens_B)
    ]
    assert sum(len(e[0]) for e in expected) > 10
    repeated = any(len(set(places)) < len(places) for _, places, _ in expected)
    assert repeated == (max_sym_per_frame > 1)
    check(hypotheses, expected)


@pytest.mark.parametrize("max_sym_per_frame", [1, 2, 4])
@pytest.mark.parametrize("beam", [1, 4, 9])
@pytest.mark.parametrize("seed", range(4))
def test_beam_equals_plain_python(seed, beam, max_sym_per_frame):
    model, encoder_out_BTC, lens_B = make(seed=seed, sharpness=3.0)
    search = BeamSearch(model, beam, max_sym_per_frame)
    search.step(encoder_out_BTC, lens_B)
    hypotheses = search.finish()
    expected = [
        reference_beam(model, x[:n], beam, max_sym_per_frame)
        for x, n in zip(encoder_out_BTC, lens_B)
    ]
    assert sum(len(e[0]) for e in expected) > 4
    check(hypotheses, expected)


@pytest.mark.parametrize("max_sym_per_frame", [1, 3])
@pytest.mark.parametrize("context_size", [1, 3])
@pytest.mark.parametrize("chunk", [5, 25])
def test_contexts_of_other_sizes_equal_plain_python(context_size, chunk, max_sym_per_frame):
    """In chunks, with utterances that end within them, and a beam that is wider than V."""
    most = max_sym_per_frame
    model, encoder_out_BTC, lens_B = make(seed=9, sharpness=3.0, context_size=context_size)
    expected = [
        (reference_greedy(model, x[:n], most), reference_beam(model, x[:n], 8, most))
        for x, n in zip(encoder_out_BTC, lens_B)
    ]
    for kind, search in enumerate((GreedySearch(model, most), BeamSearch(model, 8, most))):
        for start in range(0, encoder_out_BTC.size(1), chunk):
            part_BTC = encoder_out_BTC[:, start : start + chunk]
            search.step(part_BTC, (lens_B - start).clamp(0, part_BTC.size(1)))
        check(search.finish(), [e[kind] for e in expected])


def test_a_beam_that_holds_everything_gives_exact_probabilities():
    """Each sequence's probability is then the sum over all V^T paths that give it."""
    T, V = 4, 3
    model, encoder_out_BTC, lens_B = make(vocab_size=V, lens=(T,), sharpness=2.0)
    exact = {}
    for path in itertools.product(range(V), repeat=T):
        tokens, score = (), 0.0
        for frame_C, symbol in zip(encoder_out_BTC[0], path):
            score += log_probs(model, frame_C, tokens)[symbol]
            tokens = tokens if symbol == BLANK else (*tokens, symbol)
        exact[tokens] = exact.get(tokens, 0.0) + math.exp(score)
    best = max(exact, key=lambda tokens: math.log(exact[tokens]) / (len(tokens) + CONTEXT))

    search = BeamSearch(model, beam=V**T)
    search.step(encoder_out_BTC, lens_B)
    found = search.log_prob_BK[0].isfinite()
    assert int(found.sum()) == len(exact)
    assert sorted(search.log_prob_BK[0][found].exp().tolist()) == pytest.approx(
        sorted(exact.values()), abs=1e-6
    )
    (hypothesis,) = search.finish()
    assert tuple(hypothesis.tokens) == best
    assert hypothesis.log_prob == pytest.approx(math.log(exact[best]), abs=1e-5)


SEARCHES = [GreedySearch, BeamSearch]


@pytest.mark.parametrize("search_of", SEARCHES)
@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_chunks_equal_the_whole(search_of, chunk):
    model, encoder_out_BTC, lens_B = make(sharpness=4.0)
    search = search_of(model)
    search.step(encoder_out_BTC, lens_B)
    whole = search.finish()
    assert max(len(h.tokens) for h in whole) > 5
    # The same object serves the next batch.
    for start in range(0, encoder_out_BTC.size(1), chunk):
        part_BTC = encoder_out_BTC[:, start : start + chunk]
        search.step(part_BTC, (lens_B - start).clamp(0, part_BTC.size(1)))
    check(search.finish(), [(h.tokens, h.frames, h.log_prob) for h in whole])


class FramesAlone(nn.Module):
    """A transducer whose logits are the encoder's output, whatever the tokens so far."""

    def __init__(self):
        super().__init__()
        self.joiner = lambda encoder, predictor, project_input: encoder + predictor
        self.joiner.encoder_proj = self.joiner.decoder_proj = lambda x: x
        self.decoder = lambda y_BU, need_pad: torch.zeros(len(y_BU), 1, 1)
        self.decoder.blank_id, self.decoder.context_size = BLANK, 2


def check_stream(search, encoder_out_BTC, lens_B, chunk):
    """In chunks as at once, and of what all hypotheses share nothing is kept for each of them.

    Returns the tokens of each utterance, and the most that a hypothesis had of its own.
    """
    search.step(encoder_out_BTC, lens_B)
    whole = search.finish()
    most = 0
    for start in range(0, encoder_out_BTC.size(1), chunk):
        part_BTC = encoder_out_BTC[:, start : start + chunk]
        search.step(part_BTC, (lens_B - start).clamp(0, chunk))
        most = max(most, *(len(rest) for rest_K in search.rest for rest in rest_K))
        for agreed, partial, final in zip(search.agreed, search.partial(), whole):
            shared = len(agreed.tokens)
            assert agreed.tokens == partial.tokens[:shared] == final.tokens[:shared]
            assert agreed.frames == partial.frames[:shared] == final.frames[:shared]
        for rest_K, score_K in zip(search.rest, search.log_prob_BK):
            there = [rest for rest, score in zip(rest_K, score_K) if score > -math.inf]
            assert not all(there) or len({rest[0] for rest in there}) > 1
            assert sum(map(len, rest_K)) == sum(map(len, there))
    check(search.finish(), [(h.tokens, h.frames, h.log_prob) for h in whole])
    return [h.tokens for h in whole], most


def test_a_long_stream_holds_what_its_hypotheses_share_once():
    lens_B = torch.tensor([400, 40, 400])
    model, encoder_out_BTC, _ = make(lens=lens_B.tolist(), sharpness=3.0)
    tokens, most = check_stream(BeamSearch(model, 4, 2), encoder_out_BTC, lens_B, 8)
    assert 0 < most < len(tokens[0])


def test_a_stream_that_always_agrees_again_holds_no_more_the_longer_it_is():
    torch.manual_seed(0)
    lens_B = torch.tensor([1500, 40, 1500])
    logits_BTV = 50.0 * nn.functional.one_hot(torch.randint(0, 7, (3, 1500)), 7)
    # Every 25 frames two symbols are likely, ever more alike: the beam of 2 forgets the last two.
    for n, t in enumerate(range(10, 1500, 25), 1):
        logits_BTV[:, t] = torch.tensor([-50.0, 0.0, -2 / n, -50.0, -50.0, -50.0, -50.0])
    tokens, most = check_stream(BeamSearch(FramesAlone(), 2), logits_BTV, lens_B, 8)
    assert len(tokens[0]) > 1200 and 0 < most <= 25 + 8


@pytest.mark.parametrize("search_of", SEARCHES)
def test_streams_may_pause(search_of):
    """A stream without frames in a call goes on in the next one; times count its own frames."""
    model, encoder_out_BTC, _ = make(lens=(12, 12), sharpness=4.0)
    search = search_of(model)
    search.step(encoder_out_BTC, torch.tensor([12, 12]))
    whole = search.finish()
    search.step(encoder_out_BTC[:, :6], torch.tensor([6, 0]))
    search.step(torch.stack([encoder_out_BTC[0, 6:], encoder_out_BTC[1, :6]]), torch.tensor([6, 6]))
    search.step(torch.stack([encoder_out_BTC[0, :6], encoder_out_BTC[1, 6:]]), torch.tensor([0, 6]))
    check(search.finish(), [(h.tokens, h.frames, h.log_prob) for h in whole])


@pytest.mark.parametrize("search_of", SEARCHES)
def test_a_hypothesis_does_not_depend_on_the_batch(search_of):
    model, encoder_out_BTC, lens_B = make(sharpness=4.0)
    # What lies past an utterance's end must not be looked at.
    for x, n in zip(encoder_out_BTC, lens_B):
        x[n:] = float("nan")
    search = search_of(model)
    search.step(encoder_out_BTC, lens_B)
    together = search.finish()
    for b, n in enumerate(lens_B.tolist()):
        search.step(encoder_out_BTC[b : b + 1, :n], lens_B[b : b + 1])
        check(search.finish(), [(together[b].tokens, together[b].frames, together[b].log_prob)])


@pytest.mark.parametrize("search_of", SEARCHES)
def test_partial_results_leave_the_search_as_it_was(search_of):
    model, encoder_out_BTC, lens_B = make(lens=(20,), sharpness=4.0)
    search = search_of(model)
    assert search.partial() == []
    search.step(encoder_out_BTC[:, :10], lens_B - 10)
    first = search.partial()
    assert first == search.partial()
    search.step(encoder_out_BTC[:, 10:], lens_B - 10)
    broken = search.finish()
    search.step(encoder_out_BTC, lens_B)
    assert broken == search.finish()


def test_no_frames_at_all():
    model, encoder_out_BTC, lens_B = make(lens=(0, 0))
    for search in (GreedySearch(model), BeamSearch(model)):
        search.step(encoder_out_BTC, lens_B)
        assert [h.tokens for h in search.finish()] == [[], []]


def test_wrong_use_is_refused():
    model, encoder_out_BTC, lens_B = make()
    with pytest.raises(ValueError, match="beam is 0"):
        BeamSearch(model, 0)
    search = GreedySearch(model)
    search.step(encoder_out_BTC, lens_B)
    with pytest.raises(ValueError, match="5 streams was given 2"):
        search.step(encoder_out_BTC[:2], lens_B[:2])
