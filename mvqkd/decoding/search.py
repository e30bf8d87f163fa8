"""Greedy, modified and fast beam search for a transducer with a stateless predictor, in batches.

All searches keep their state between calls, so an utterance may arrive whole or chunk by chunk;
the result is the same::

    search = BeamSearch(model, beam=4)
    for encoder_out_BTC, encoder_lens_B in chunks:
        search.step(encoder_out_BTC, encoder_lens_B)
    hypotheses = search.finish()

Shape suffixes: B utterances, T encoder frames, C encoder channels, J joiner channels, V
vocabulary (blank included), K hypotheses of a beam, R times that beams are extended, U tokens the
predictor looks back at (its ``context_size``), S integers that a hypothesis is, A utterances that
still have a frame at the moment, N rows of whatever is worked on, E those that emit a token.

What a model must have (the names are icefall's): ``decoder(y_BU, need_pad=False)`` -> (B, 1,
decoder channels), ``decoder.blank_id``, ``decoder.context_size``, ``decoder.vocab_size`` (for
`FastBeamSearch`), ``joiner.encoder_proj``,
``joiner.decoder_proj`` and ``joiner(enc, dec, project_input=False)``, which broadcasts (..., J)
and (..., J) -> (..., V).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mvqkd.errors import RecipeError
from mvqkd.losses.rnnt import import_k2

# Multiplier of the rolling hash that identifies a token sequence: odd, so that no bit is lost
# (Knuth's for 64-bit congruential generators).
_HASH_MULTIPLIER = 6364136223846793005


@dataclass
class Hypothesis:
    """What was recognised in one utterance.

    ``frames[i]`` is the encoder frame, counted from the start of the utterance, at which
    ``tokens[i]`` was emitted. ``log_prob`` is the natural logarithm of the probability that the
    search gave to the token sequence: of the one best path in greedy search, summed over the
    paths that it kept in beam search.
    """

    tokens: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    log_prob: float = 0.0


def _runs(active_T: list[int]) -> Iterator[tuple[int, int, int]]:
    """(first, end, A) of each run of frames at which the same streams are active."""
    first = 0
    while first < len(active_T):
        end = first
        while end < len(active_T) and active_T[end] == active_T[first]:
            end += 1
        yield first, end, active_T[first]
        first = end


def _lists(*arrays: np.ndarray) -> list[list[int]]:
    return [array.tolist() for array in arrays]


def _taken(lists: list[list], places: list[int]) -> list[list]:
    """The list at each of ``places``; what is asked for again is a copy."""
    seen: set[int] = set()
    found = []
    for place in places:
        found.append(list(lists[place]) if place in seen else lists[place])
        seen.add(place)
    return found


def _num_shared(sequences: list[list]) -> int:
    """How many items all of ``sequences`` begin with."""
    number = 0
    for items in zip(*sequences):
        if items.count(items[0]) < len(items):
            break
        number += 1
    return number


class _Search:
    """What both searches share: where the streams stand, and which of them have a frame now.

    A step walks over the frames of a chunk with the streams sorted by length, so that at each
    frame those that still have one are a leading slice of every state tensor.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.blank = model.decoder.blank_id
        self.context_size = model.decoder.context_size
        self.batch_size: int | None = None

    @torch.no_grad()
    def step(self, encoder_out_BTC: Tensor, encoder_lens_B: Tensor) -> None:
        """Take in the next frames of every stream.

        Args:
          encoder_out_BTC: encoder output; what lies past ``encoder_lens_B`` is not read.
          encoder_lens_B: valid frames of each stream in this call, 0 for one that has ended.
        Raises:
          ValueError: the number of streams differs from that of the calls before.
        """
        B = encoder_out_BTC.size(0)
        if self.batch_size is None:
            self.batch_size = B
            self.frames_seen_B = torch.zeros(B, dtype=torch.int64)
            self._start(encoder_out_BTC)
        elif self.batch_size != B:
            raise ValueError(f"a search over {self.batch_size} streams was given {B}")

        lens_B = encoder_lens_B.to("cpu", torch.int64)
        sorted_lens_B, order_B = torch.sort(lens_B, descending=True, stable=True)
        T = int(sorted_lens_B[0]) if B else 0
        if T > 0:
            active_T = (sorted_lens_B[None, :] > torch.arange(T)[:, None]).sum(1).tolist()
            order_B = order_B.to(encoder_out_BTC.device)
            # One product for the whole chunk; frames lead, so that a frame is one block.
            encoder_out_TBC = encoder_out_BTC[order_B, :T].transpose(0, 1)
            self._advance(self.model.joiner.encoder_proj(encoder_out_TBC), active_T, order_B)
        self.frames_seen_B = self.frames_seen_B + lens_B

    def _predict(self, context_NU: Tensor) -> Tensor:
        """Predictor output for the contexts, projected for the joiner: (N, J)."""
        return self.model.joiner.decoder_proj(self.model.decoder(context_NU, need_pad=False)[:, 0])

    def _log_probs(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        """(..., J) and (..., J) -> (..., V), in float32: sums over frames in half precision would
        be too coarse."""
        logits = self.model.joiner(encoder, predictor, project_input=False)
        return logits.log_softmax(dim=-1, dtype=torch.float32)

    def _start(self, encoder_out_BTC: Tensor) -> None:
        raise NotImplementedError

    def _advance(self, encoder_TBJ: Tensor, active_T: list[int], order_B: Tensor) -> None:
        raise NotImplementedError

    def partial(self) -> list[Hypothesis]:
        """The best hypothesis of each stream so far; the search may go on."""
        raise NotImplementedError

    def finish(self) -> list[Hypothesis]:
        """The final hypothesis of each stream; the search is then ready for other streams."""
        hypotheses = self.partial()
        self.batch_size = None
        return hypotheses


class GreedySearch(_Search):
    """Take the likeliest symbol at each frame (of the transducer of Graves, arXiv 1211.3711).

    Args:
      model: the transducer, in evaluation mode.
      max_sym_per_frame: tokens that a frame may give; see `BeamSearch`.
    """

    def __init__(self, model: nn.Module, max_sym_per_frame: int = 1):
        super().__init__(model)
        self.max_sym_per_frame = max_sym_per_frame

    def _start(self, encoder_out_BTC: Tensor) -> None:
        B, device = encoder_out_BTC.size(0), encoder_out_BTC.device
        self.context_BU = torch.full((B, self.context_size), self.blank, device=device)
        self.predictor_BJ = self._predict(self.context_BU)
        self.log_prob_B = torch.zeros(B, device=device)
        self.emitted: list[Hypothesis] = [Hypothesis() for _ in range(B)]

    def _advance(self, encoder_TBJ: Tensor, active_T: list[int], order_B: Tensor) -> None:
        context_BU, predictor_BJ = self.context_BU[order_B], self.predictor_BJ[order_B]
        log_prob_B = self.log_prob_B[order_B]
        everyone_B = torch.arange(len(order_B), device=order_B.device)
        symbols, frames = [], []
        for t, A in enumerate(active_T):
            row_N = everyone_B[:A]
            for _ in range(self.max_sym_per_frame):
                log_probs_NV = self._log_probs(
                    encoder_TBJ[t].index_select(0, row_N), predictor_BJ.index_select(0, row_N)
                )
                best_N, symbol_N = log_probs_NV.max(dim=-1)
                log_prob_B.index_add_(0, row_N, best_N)
                place_E = (symbol_N != self.blank).nonzero()[:, 0]
                if place_E.numel() == 0:
                    break
                row_N, symbol_N = row_N[place_E], symbol_N[place_E]
                shifted_NU = torch.cat(
                    [context_BU.index_select(0, row_N)[:, 1:], symbol_N[:, None]], dim=1
                )
                context_BU.index_copy_(0, row_N, shifted_NU)
                predictor_BJ.index_copy_(0, row_N, self._predict(shifted_NU))
                blanks_B = torch.full_like(context_BU[:, 0], self.blank)
                symbols.append(blanks_B.index_copy_(0, row_N, symbol_N))
                frames.append(t)

        inverse_B = order_B.argsort()
        self.context_BU, self.predictor_BJ = context_BU[inverse_B], predictor_BJ[inverse_B]
        self.log_prob_B = log_prob_B[inverse_B]
        if symbols:
            # One transfer a chunk, so that a GPU is not waited for at each token.
            symbols_NB = torch.stack(symbols)[:, inverse_B].cpu().numpy()
            n_E, b_E = (symbols_NB != self.blank).nonzero()
            frames_E = self.frames_seen_B.numpy()[b_E] + np.array(frames)[n_E]
            for b, token, frame in zip(*_lists(b_E, symbols_NB[n_E, b_E], frames_E)):
                self.emitted[b].tokens.append(token)
                self.emitted[b].frames.append(frame)

    def partial(self) -> list[Hypothesis]:
        if self.batch_size is None:
            return []
        return [
            Hypothesis(list(emitted.tokens), list(emitted.frames), log_prob)
            for emitted, log_prob in zip(self.emitted, self.log_prob_B.tolist())
        ]


class BeamSearch(_Search):
    """Modified beam search: few tokens a frame, equal token sequences merged.

    At each frame the ``beam`` best of all extensions of all hypotheses (blank, or one token) are
    kept; those with the same tokens become one, with their probabilities added. At the end the
    hypothesis with the best log probability per symbol wins, where the blanks that the predictor
    starts from are counted as symbols. With one token a frame this is icefall's
    ``modified_beam_search``; the topology is the monotonic transducer's (Tripathi et al.,
    "Monotonic recurrent neural network transducer and decoding strategies", ASRU 2019).

    With more, a hypothesis that has taken a token stays at the frame until it takes blank or has
    taken ``max_sym_per_frame``, as in the topology that the transducer is trained with (Graves,
    arXiv 1211.3711). Such a transducer may have learned to give the rest of a word in one frame,
    which one token a frame would drop.

    Args:
      model: the transducer, in evaluation mode.
      beam: hypotheses kept per stream.
      max_sym_per_frame: tokens that a frame may give a hypothesis.
    """

    def __init__(self, model: nn.Module, beam: int = 4, max_sym_per_frame: int = 1):
        super().__init__(model)
        if beam < 1:
            raise ValueError(f"beam is {beam}; it must be 1 or more")
        self.beam = beam
        self.max_sym_per_frame = max_sym_per_frame

    def _start(self, encoder_out_BTC: Tensor) -> None:
        B, K, U = encoder_out_BTC.size(0), self.beam, self.context_size
        device = encoder_out_BTC.device
        # What belongs to a hypothesis, in one tensor that one look-up regroups: the U tokens that
        # the predictor sees, the hash of the whole sequence, and its length.
        # A sequence is identified by a 64-bit hash, hash(y, v) = a * hash(y) + value(v) modulo
        # 2^64: comparing tokens would cost more the longer the utterance. With random values, two
        # sequences in one beam are confused with probability about 2^-64.
        self.state_BKS = torch.zeros(B, K, U + 2, dtype=torch.int64, device=device)
        self.state_BKS[:, :, :U] = self.blank
        predictor_BJ = self._predict(self.state_BKS[:, 0, :U])
        self.predictor_BKJ = predictor_BJ[:, None].repeat(1, K, 1)
        # A place of the beam that holds no hypothesis has log probability -inf.
        self.log_prob_BK = torch.full((B, K), float("-inf"), device=device)
        self.log_prob_BK[:, 0] = 0.0
        self.hash_value_V: Tensor | None = None
        self.first_row_B1 = torch.arange(0, B * K, K, device=device)[:, None]
        self.earlier_KK = torch.ones(K, K, dtype=torch.bool, device=device).tril(-1)
        # Of each stream the tokens, with their frames, that all of its hypotheses begin with, and
        # by place of the beam the (token, frame) that come after them. A stream may go on for
        # hours: what is agreed on is held once, and looked at no more.
        self.agreed: list[Hypothesis] = [Hypothesis() for _ in range(B)]
        self.rest: list[list[list[tuple[int, int]]]] = [[[] for _ in range(K)] for _ in range(B)]

    def _values(self, V: int, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        low, high = -(2**63), 2**63 - 1
        return torch.randint(low, high, (V,), generator=generator).to(device)

    def _advance(self, encoder_TBJ: Tensor, active_T: list[int], order_B: Tensor) -> None:
        K = self.beam
        B, device = encoder_TBJ.shape[1], encoder_TBJ.device
        state_BKS, predictor_BKJ = self.state_BKS[order_B], self.predictor_BKJ[order_B]
        log_prob_BK = self.log_prob_BK[order_B]
        frames: list[int] = []
        sources_RBK, tokens_RBK = [], []

        # The state of active streams is copied once a run.
        for first, end, A in _runs(active_T):
            beams = (log_prob_BK[:A], state_BKS[:A], predictor_BKJ[:A])
            run = []
            for t in range(first, end):
                beams, steps = self._frame(encoder_TBJ[t, :A], beams)
                run += steps
                frames += [t] * len(steps)
            log_prob_BK[:A], state_BKS[:A], predictor_BKJ[:A] = beams
            source_RBK = torch.arange(K, device=device).repeat(len(run), B, 1)
            token_RBK = torch.full_like(source_RBK, self.blank)
            source_RBK[:, :A] = torch.stack([source_AK for source_AK, _ in run])
            token_RBK[:, :A] = torch.stack([token_AK for _, token_AK in run])
            sources_RBK.append(source_RBK)
            tokens_RBK.append(token_RBK)

        inverse_B = order_B.argsort()
        self.state_BKS, self.predictor_BKJ = state_BKS[inverse_B], predictor_BKJ[inverse_B]
        self.log_prob_BK = log_prob_BK[inverse_B]
        source_RBK, token_RBK = (
            torch.cat(parts)[:, inverse_B].cpu().numpy() for parts in (sources_RBK, tokens_RBK)
        )
        self._remember(np.array(frames), source_RBK, token_RBK)

    def _remember(self, frame_R: np.ndarray, source_RBK: np.ndarray, token_RBK: np.ndarray) -> None:
        """Add a chunk to the hypotheses.

        Args:
          frame_R: of the chunk, for each time that the beams were extended.
          source_RBK, token_RBK: then, which place of the beam a hypothesis came from, and the token
            that it added, blank for none.
        """
        R, B, K = source_RBK.shape
        # numpy: the same small look-ups cost torch several times as much.
        stream_B1, place_BK = np.arange(B)[:, None], np.tile(np.arange(K), (B, 1))
        added_RBK = np.empty_like(token_RBK)
        for r in reversed(range(R)):
            added_RBK[r] = token_RBK[r, stream_B1, place_BK]
            place_BK = source_RBK[r, stream_B1, place_BK]
        self.rest = [
            _taken(rest_K, place_K) for rest_K, place_K in zip(self.rest, place_BK.tolist())
        ]
        r_E, b_E, k_E = (added_RBK != self.blank).nonzero()
        frame_E = self.frames_seen_B.numpy()[b_E] + frame_R[r_E]
        for b, k, token, frame in zip(*_lists(b_E, k_E, added_RBK[r_E, b_E, k_E], frame_E)):
            self.rest[b][k].append((token, frame))

        gone_BK = (self.log_prob_BK == float("-inf")).tolist()
        for agreed, rest_K, gone_K in zip(self.agreed, self.rest, gone_BK):
            # A place without a hypothesis never has one that counts again.
            there = [rest for rest, gone in zip(rest_K, gone_K) if not gone] or rest_K
            num_shared = _num_shared(there)
            for token, frame in there[0][:num_shared]:
                agreed.tokens.append(token)
                agreed.frames.append(frame)
            for rest, gone in zip(rest_K, gone_K):
                del rest[: len(rest) if gone else num_shared]

    def _frame(
        self, encoder_AJ: Tensor, beams: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], list[tuple[Tensor, Tensor]]]:
        """One frame of A streams.

        Returns the beams after it (log probabilities, states, predictor outputs), and for each
        time that they were extended the place that each hypothesis came from, and the token that
        it added.
        """
        steps: list[tuple[Tensor, Tensor]] = []
        grown, stays_AK = False, None
        for _ in range(self.max_sym_per_frame):
            beams, source_AK, token_AK, grows = self._extend(encoder_AJ, *beams, stays_AK)
            steps.append((source_AK, token_AK))
            if not grows:
                break
            grown, stays_AK = True, token_AK != self.blank
        # Without any that has grown, no two can have become the same.
        if grown:
            log_prob_AK, state_AKS, predictor_AKJ = beams
            beams = (self._merged(log_prob_AK, state_AKS), state_AKS, predictor_AKJ)
        return beams, steps

    def _extend(
        self,
        encoder_AJ: Tensor,
        log_prob_AK: Tensor,
        state_AKS: Tensor,
        predictor_AKJ: Tensor,
        stays_AK: Tensor | None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor, bool]:
        """Extend by one symbol the hypotheses that are at the frame (``stays_AK``; None: all).

        Returns the beams, the places they came from, the tokens, and whether any is no blank.
        """
        A, K, U = *log_prob_AK.shape, self.context_size
        log_probs_AKV = self._log_probs(encoder_AJ[:, None], predictor_AKJ)
        V = log_probs_AKV.size(-1)
        if self.hash_value_V is None:
            self.hash_value_V = self._values(V, log_probs_AKV.device)
        if stays_AK is not None:
            # The others have had their blank.
            log_probs_AKV.masked_fill_(~stays_AK[:, :, None], float("-inf"))
            log_probs_AKV[:, :, self.blank].masked_fill_(~stays_AK, 0.0)
        log_probs_AKV += log_prob_AK[:, :, None]
        log_prob_AK, index_AK = log_probs_AKV.view(A, K * V).topk(K, dim=-1)
        source_AK = index_AK // V
        token_AK = index_AK - source_AK * V
        row_N = (source_AK + self.first_row_B1[:A]).view(-1)
        state_NS = state_AKS.reshape(A * K, -1).index_select(0, row_N)
        predictor_NJ = predictor_AKJ.reshape(A * K, -1).index_select(0, row_N)

        # E: places whose hypothesis has grown.
        row_E = (token_AK.view(-1) != self.blank).nonzero()[:, 0]
        if row_E.numel() > 0:
            self._grow(row_E, token_AK, state_NS, predictor_NJ)
        beams = (log_prob_AK, state_NS.view(A, K, U + 2), predictor_NJ.view(A, K, -1))
        return beams, source_AK, token_AK, row_E.numel() > 0

    def _grow(
        self,
        row_E: Tensor,
        token_AK: Tensor,
        state_NS: Tensor,
        predictor_NJ: Tensor,
    ) -> None:
        """Append the new tokens, in place."""
        U = self.context_size
        # index_select and index_copy_ rather than brackets: half the time at these sizes.
        token_E = token_AK.view(-1).index_select(0, row_E)
        grown_ES = state_NS.index_select(0, row_E)
        grown_ES[:, : U - 1] = grown_ES[:, 1:U].clone()
        grown_ES[:, U - 1] = token_E
        value_E = self.hash_value_V.index_select(0, token_E)
        grown_ES[:, U].mul_(_HASH_MULTIPLIER).add_(value_E)
        grown_ES[:, U + 1] += 1
        state_NS.index_copy_(0, row_E, grown_ES)
        predictor_NJ.index_copy_(0, row_E, self._predict(grown_ES[:, :U]))

    def _merged(self, log_prob_AK: Tensor, state_AKS: Tensor) -> Tensor:
        """The log probabilities with those of equal token sequences added up."""
        hash_AK = state_AKS[:, :, self.context_size]
        same_AKK = hash_AK[:, :, None] == hash_AK[:, None, :]
        repeats_AKK = same_AKK & self.earlier_KK
        # The test costs less than the merge, which few frames need.
        if repeats_AKK.any():
            # topk sorts, so the copy that stays, the first, is the likeliest: its frames are
            # the ones reported.
            total_AK = log_prob_AK[:, None].masked_fill(~same_AKK, float("-inf")).logsumexp(-1)
            log_prob_AK = total_AK.masked_fill(repeats_AKK.any(dim=-1), float("-inf"))
        return log_prob_AK

    def partial(self) -> list[Hypothesis]:
        if self.batch_size is None:
            return []
        num_tokens_BK = self.state_BKS[:, :, -1]
        normalized_BK = self.log_prob_BK / (num_tokens_BK + self.context_size)
        place_B = normalized_BK.argmax(dim=1)
        log_probs = self.log_prob_BK.gather(1, place_B[:, None])[:, 0].tolist()

        hypotheses = []
        for agreed, rest_K, place, log_prob in zip(
            self.agreed, self.rest, place_B.tolist(), log_probs
        ):
            rest = rest_K[place]
            tokens = agreed.tokens + [token for token, _ in rest]
            frames = agreed.frames + [frame for _, frame in rest]
            hypotheses.append(Hypothesis(tokens, frames, log_prob))
        return hypotheses


class FastBeamSearch(_Search):
    """The best path through the lattice of one graph, by k2: at most one token a frame.

    Of the hypotheses of a frame those with the same last ``context_size`` tokens are one, with the
    better score, so that far more of them are followed than by `BeamSearch`. The graph allows any
    tokens. This is icefall's ``fast_beam_search`` (Kang et al., "Fast and parallel decoding for
    transducer", arXiv 2211.00484).

    Args:
      model: the transducer, in evaluation mode.
      beam: what scores worse than the best of its frame by more than this, in nats, is dropped.
      max_contexts, max_states: kept per stream and frame.

    Raises:
      RecipeError: k2 does not import.
    """

    def __init__(
        self, model: nn.Module, beam: float = 20.0, max_contexts: int = 8, max_states: int = 64
    ):
        super().__init__(model)
        self._k2 = import_k2()
        if self._k2 is None:
            raise RecipeError(
                "decoding.method: fast_beam_search needs k2, which does not import; install k2, or "
                "take modified_beam_search"
            )
        self._config = self._k2.RnntDecodingConfig(
            vocab_size=model.decoder.vocab_size,
            decoder_history_len=self.context_size,
            beam=beam,
            max_contexts=max_contexts,
            max_states=max_states,
        )

    def _start(self, encoder_out_BTC: Tensor) -> None:
        graph = self._k2.trivial_graph(self._config.vocab_size - 1, encoder_out_BTC.device)
        self._streams = [self._k2.RnntDecodingStream(graph) for _ in encoder_out_BTC]
        # By stream: which frame of the encoder each frame of k2's was; None where it was none.
        self._frames: list[list[int | None]] = [[] for _ in self._streams]

    def _advance(self, encoder_TBJ: Tensor, active_T: list[int], order_B: Tensor) -> None:
        seen_B, order = self.frames_seen_B.tolist(), order_B.tolist()
        for first, end, A in _runs(active_T):
            together = self._together(order[:A])
            for t in range(first, end):
                shape, context_NU = together.get_contexts()
                encoder_NJ = encoder_TBJ[t].index_select(0, shape.row_ids(1).long())
                together.advance(self._log_probs(encoder_NJ, self._predict(context_NU.long())))
            together.terminate_and_flush_to_streams()
            for b in order[:A]:
                self._frames[b] += range(seen_B[b] + first, seen_B[b] + end)

    def _together(self, members: list[int]):
        return self._k2.RnntDecodingStreams([self._streams[b] for b in members], self._config)

    def partial(self) -> list[Hypothesis]:
        if self.batch_size is None:
            return []
        hypotheses = [Hypothesis() for _ in range(self.batch_size)]
        begun = [b for b, frames in enumerate(self._frames) if frames]
        if not begun:
            return hypotheses
        # k2 lets a path end in place of its last frame. So each gets one more, on which blank is
        # certain, and which changes nothing if the search goes on.
        together = self._together(begun)
        _, context_NU = together.get_contexts()
        shape = len(context_NU), self._config.vocab_size
        certain_NV = torch.full(shape, float("-inf"), device=context_NU.device)
        certain_NV[:, self.blank] = 0.0
        together.advance(certain_NV)
        together.terminate_and_flush_to_streams()
        for b in begun:
            self._frames[b].append(None)
        lattices = together.format_output([len(self._frames[b]) for b in begun], True)
        paths = self._k2.shortest_path(lattices, use_double_scores=True)
        scores = paths.get_tot_scores(use_double_scores=True, log_semiring=False).tolist()
        for number, (b, score) in enumerate(zip(begun, scores)):
            hypotheses[b].log_prob = score
            for frame, label in zip(self._frames[b], paths[number].labels.tolist()):
                if frame is not None and label != self.blank:
                    hypotheses[b].tokens.append(label)
                    hypotheses[b].frames.append(frame)
        return hypotheses


def greedy_search_batch(
    model: nn.Module, encoder_out_BTC: Tensor, encoder_lens_B: Tensor, max_sym_per_frame: int = 1
) -> list[Hypothesis]:
    """Greedy search over whole utterances; see `GreedySearch`."""
    search = GreedySearch(model, max_sym_per_frame)
    search.step(encoder_out_BTC, encoder_lens_B)
    return search.finish()


def modified_beam_search(
    model: nn.Module, encoder_out_BTC: Tensor, encoder_lens_B: Tensor, beam: int = 4
) -> list[Hypothesis]:
    """Modified beam search over whole utterances; see `BeamSearch`."""
    search = BeamSearch(model, beam)
    search.step(encoder_out_BTC, encoder_lens_B)
    return search.finish()
