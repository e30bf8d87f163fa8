"""When tokens and words were said, and how late a stream says them.

The time of encoder frame f is its centre, ``frame_offset + f * frame_shift`` seconds from the start
of the audio: both are the encoder's, so that subsampling is accounted for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import kaldialign
import numpy as np
from torch import nn

from mvqkd.decoding.search import Hypothesis

# Of alignments: no token.
_NOTHING = -1


@dataclass(frozen=True)
class Token:
    """A token as the tokenizer spells it, and when it was emitted, in seconds from the start of the
    audio."""

    text: str
    time: float


@dataclass(frozen=True)
class Word:
    """A word and where it lies, in seconds from the start of the audio."""

    text: str
    start: float
    end: float


def frame_time(encoder: nn.Module, frame: int) -> float:
    """Seconds from the start of the audio to the centre of an encoder frame."""
    return encoder.frame_offset + frame * encoder.frame_shift


def token_times(encoder: nn.Module, hypothesis: Hypothesis) -> list[float]:
    """Seconds at which each token of ``hypothesis`` was emitted."""
    return [frame_time(encoder, frame) for frame in hypothesis.frames]


def tokens_with_times(encoder: nn.Module, hypothesis: Hypothesis, tokens) -> list[Token]:
    """The tokens of ``hypothesis``, with `token_times` to milliseconds.

    Args:
      tokens: the sentencepiece model.
    """
    times = token_times(encoder, hypothesis)
    return [
        Token(tokens.id_to_piece(token), round(time, 3))
        for token, time in zip(hypothesis.tokens, times)
    ]


def words_with_times(
    encoder: nn.Module, hypothesis: Hypothesis, tokens, seconds: float
) -> list[Word]:
    """The words of ``hypothesis``, those of ``tokens.decode(hypothesis.tokens).split()``.

    A word starts where the frame begins that emitted its first token and ends where that of its
    last one ends: a transducer says when it was sure of a token, not how long it sounded, so a word
    of one token lasts one frame (40 ms).

    Args:
      tokens: the sentencepiece model.
      seconds: length of the audio; no word ends after it.
    """
    groups: list[tuple[list[int], list[float]]] = []
    unknown, previous = tokens.unk_id(), None
    for token, time in zip(hypothesis.tokens, token_times(encoder, hypothesis)):
        # What is unknown is a word of its own, as in sentencepiece's decoding.
        begins = tokens.id_to_piece(token).startswith("\u2581") or unknown in (token, previous)
        if begins or not groups:
            groups.append(([], []))
        groups[-1][0].append(token)
        groups[-1][1].append(time)
        previous = token
    half = encoder.frame_shift / 2
    words = []
    for ids, times in groups:
        text = tokens.decode(ids).strip()
        if text:
            start, end = max(0.0, times[0] - half), min(seconds, times[-1] + half)
            # To milliseconds, so that words that meet still do so however they are printed.
            words.append(Word(text, round(min(start, end), 3), round(end, 3)))
    return words


@dataclass(frozen=True)
class EmissionDelay:
    """How late a stream emits tokens, in seconds; see `emission_delays`."""

    # Tokens compared.
    tokens: int
    # Of the frame of emission: mean, and what nine of ten tokens stay below.
    mean: float
    p90: float
    # The mean until the token can be shown: with the wait for the end of its chunk.
    shown: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def emission_delays(
    streamed: Hypothesis, whole: Hypothesis, encoder: nn.Module, chunk_size: int, right_context: int
) -> list[tuple[float, float] | None]:
    """Of each token, how much later a stream emits it, and can show it, than it was said.

    There is no measured time at which a token was said. What stands for it is when the same student
    with the same search emits it where every frame sees the whole utterance, which gives no reason
    to wait. The two token sequences are aligned by edit distance; a token that is not the same in
    both has none.

    A token can be shown once its chunk has been computed: when the last feature frame that the
    chunk and its look-ahead need is there. What computing takes is not in it (see RTF), nor that
    beam search may change its mind. The last chunk is taken as if the speech went on.

    Args:
      streamed, whole: of one utterance.
      chunk_size, right_context: of the stream, in encoder frames.
    Returns:
      Of each token of ``streamed``: (seconds until emitted, seconds until shown), or None. The
      first is negative where the stream is earlier.
    """
    aligned = kaldialign.align(whole.tokens, streamed.tokens, _NOTHING)
    # From a frame's centre to that of the last feature frame that it depends on.
    reach = encoder.receptive_field // 2 * encoder.feature_frame_shift
    delays: list[tuple[float, float] | None] = [None] * len(streamed.tokens)
    w = s = 0
    for in_whole, in_streamed in aligned:
        if in_whole == in_streamed:
            said = frame_time(encoder, whole.frames[w])
            frame = streamed.frames[s]
            last = (frame // chunk_size + 1) * chunk_size + right_context - 1
            shown = frame_time(encoder, last) + reach
            delays[s] = frame_time(encoder, frame) - said, shown - said
        w += in_whole != _NOTHING
        s += in_streamed != _NOTHING
    return delays


def summarize_delays(delays: Sequence[tuple[float, float] | None]) -> EmissionDelay | None:
    """Over the tokens of a test set that have one; None where there are none."""
    known = [delay for delay in delays if delay is not None]
    if not known:
        return None
    emitted, shown = np.array(known).T
    return EmissionDelay(
        len(known), float(emitted.mean()), float(np.percentile(emitted, 90)), float(shown.mean())
    )
