"""Fast beam search by k2 against the best path found in plain Python, with a few random models.

Run by tests/k2/run.sh.
"""

import pytest
import torch
from torch import nn

from mvqkd.decoding.search import FastBeamSearch

V, C, J = 4, 6, 5
SEEDS = range(5)


class Decoder(nn.Module):
    blank_id, vocab_size = 0, V

    def __init__(self, context_size):
        super().__init__()
        self.context_size = context_size
        self.tables = nn.ModuleList(nn.Embedding(V, C) for _ in range(context_size))

    def forward(self, tokens_BU, need_pad=True):
        assert not need_pad and tokens_BU.shape[1] == self.context_size
        return sum(table(tokens_BU[:, i]) for i, table in enumerate(self.tables))[:, None]


class Joiner(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder_proj, self.decoder_proj = nn.Linear(C, J), nn.Linear(C, J)
        self.output_linear = nn.Linear(J, V)

    def forward(self, encoder_out, decoder_out, project_input=True):
        assert not project_input
        return self.output_linear((encoder_out + decoder_out).tanh())


def transducer(context_size, seed):
    """Random, with something to decide at most frames."""
    torch.manual_seed(seed)
    model = nn.Module()
    model.decoder, model.joiner = Decoder(context_size), Joiner()
    with torch.no_grad():
        model.joiner.output_linear.weight *= 6
    return model.eval()


def best_path(model, encoder_out_TC):
    """(tokens, frames, score) of the likeliest path with at most a token a frame: of all paths
    with the same last tokens only the best can go on."""
    size = model.decoder.context_size
    best = {(0,) * size: ([], [], 0.0)}
    for frame, encoder_J in enumerate(model.joiner.encoder_proj(encoder_out_TC)):
        found = {}
        for context, (tokens, frames, score) in best.items():
            predicted = model.decoder(torch.tensor([context]), need_pad=False)[0, 0]
            predicted_J = model.joiner.decoder_proj(predicted)
            logits_V = model.joiner(encoder_J, predicted_J, project_input=False)
            for token, log_prob in enumerate(logits_V.log_softmax(-1).tolist()):
                path = (tokens, frames, score + log_prob)
                after = context
                if token != 0:
                    path = ([*tokens, token], [*frames, frame], score + log_prob)
                    after = (*context, token)[1:]
                if after not in found or path[2] > found[after][2]:
                    found[after] = path
        best = found
    return max(best.values(), key=lambda path: path[2])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("context_size", [1, 2])
@torch.no_grad()
def test_wide_beam_finds_the_best_path_whole_and_in_chunks(context_size, seed):
    model = transducer(context_size, seed)
    lens_B = torch.tensor([12, 9, 12, 0, 1])
    encoder_out_BTC = 2 * torch.randn(5, 12, C)
    wide = {"beam": 1000.0, "max_contexts": 1000, "max_states": 1000}
    whole = FastBeamSearch(model, **wide)
    whole.step(encoder_out_BTC, lens_B)
    chunked = FastBeamSearch(model, **wide)
    for start in range(0, 12, 5):
        chunked.step(encoder_out_BTC[:, start : start + 5], (lens_B - start).clamp(0, 5))
        assert len(chunked.partial()) == 5
    chunked = chunked.finish()
    emitted = 0
    for b, hypothesis in enumerate(whole.finish()):
        tokens, frames, score = best_path(model, encoder_out_BTC[b, : lens_B[b]])
        for found in (hypothesis, chunked[b]):
            assert (found.tokens, found.frames) == (tokens, frames)
            assert found.log_prob == pytest.approx(score, abs=1e-4)
        emitted += len(tokens)
    assert emitted > 0 and whole.partial() == []


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_a_narrow_beam_finds_a_path_that_is_no_better(seed):
    model = transducer(2, seed)
    encoder_out_BTC = 2 * torch.randn(1, 12, C)
    lens_B = torch.tensor([12])
    narrow = FastBeamSearch(model, beam=0.5, max_contexts=1, max_states=1)
    narrow.step(encoder_out_BTC, lens_B)
    (hypothesis,) = narrow.finish()
    assert hypothesis.log_prob <= best_path(model, encoder_out_BTC[0])[2] + 1e-4
    assert hypothesis.frames == sorted(set(hypothesis.frames))
