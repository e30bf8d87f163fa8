"""Words with times of audio files of any length, by any student.

B: segments, T: feature frames, F: bins.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from lhotse.features.base import FeatureExtractor
from torch import Tensor

from mvqkd.data.audio_files import AudioFile, feature_blocks
from mvqkd.data.datamodule import LOG_EPSILON
from mvqkd.decoding.decode import DecodingSettings, decode_batch
from mvqkd.decoding.search import Hypothesis
from mvqkd.decoding.times import Token, Word, tokens_with_times, words_with_times
from mvqkd.errors import RecipeError
from mvqkd.students.transducer import Transducer

# Below it the encoder has no frame.
MIN_FRAMES = 7

# Over which what is quietest is sought: longer than what a plosive closes, as short as a breath.
PAUSE_FRAMES = 30


@dataclass
class SegmentSettings:
    """How long audio is cut."""

    # Seconds that a segment lasts at most; it ends at the quietest place of its second half. None:
    # as long as the student's training utterances were, or 20 where that is not known. Given
    # more, a transducer that has heard only single sentences tends to fall silent after the first.
    length: float | None = None

    def __post_init__(self):
        if self.length is not None and self.length < 1:
            raise RecipeError(
                f"segment.length: {self.length:g} s leaves no room for a word; set it to 1 or more"
            )


@dataclass(frozen=True)
class Transcript:
    """What is said in a file of ``seconds``."""

    words: list[Word]
    seconds: float
    tokens: list[Token] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)


def segments(blocks: Iterable[Tensor], max_frames: int) -> Iterator[Tensor]:
    """Features (T, F) in blocks of any size as segments of at most ``max_frames``.

    Each ends where the mean of its log energies over 0.3 s is least, in its second half; so audio
    of up to ``max_frames`` is one segment. None is lost, and none is in two.
    """
    held_TF = None
    for block_TF in blocks:
        held_TF = block_TF if held_TF is None else torch.cat([held_TF, block_TF])
        while len(held_TF) > max_frames:
            loudness_T = held_TF[max_frames // 2 : max_frames].mean(dim=1)
            size = min(PAUSE_FRAMES, len(loudness_T))
            mean_T = loudness_T.unfold(0, size, 1).mean(dim=1)
            cut = max_frames // 2 + int(mean_T.argmin()) + size // 2
            yield held_TF[:cut]
            held_TF = held_TF[cut:]
    if held_TF is not None and len(held_TF) > 0:
        yield held_TF


def transcribe(
    path: Path,
    model: Transducer,
    tokens,
    extractor: FeatureExtractor,
    settings: DecodingSettings,
    length: float,
    device: torch.device,
) -> Transcript:
    """The words of an audio file, see `AudioFile`, and its tokens with their times, see
    `words_with_times` and `tokens_with_times`.

    Long audio is cut into `segments`, which are decoded as utterances of a test set are, a batch at
    a time; by a causal student as streams. Memory does not grow with the length of the file.

    Args:
      model: in evaluation mode, on ``device``.
      tokens: the sentencepiece model.
      length: seconds of a segment at most.
    Raises:
      RecipeError: the file cannot be read to its end.
    """
    audio = AudioFile(path)
    shift = extractor.frame_shift
    blocks = map(torch.from_numpy, feature_blocks(audio.blocks(), extractor))
    parts = segments(blocks, round(length / shift))
    words: list[Word] = []
    emitted: list[Token] = []
    begin = 0  # frames before the batch
    for batch in _batches(parts, round(settings.max_duration / shift)):
        found = _decode_segments(model, batch, settings, device)
        for segment_TF, hypothesis in zip(batch, found):
            seconds = len(segment_TF) * shift
            for word in words_with_times(model.encoder, hypothesis, tokens, seconds):
                start, end = (round(begin * shift + at, 3) for at in (word.start, word.end))
                words.append(Word(word.text, start, end))
            for token in tokens_with_times(model.encoder, hypothesis, tokens):
                emitted.append(Token(token.text, round(begin * shift + token.time, 3)))
            begin += len(segment_TF)
    return Transcript(words, audio.seconds, emitted)


def _batches(segments_TF: Iterable[Tensor], max_frames: int) -> Iterator[list[Tensor]]:
    """Of one segment, or more that have up to ``max_frames`` together."""
    batch, total = [], 0
    for segment_TF in segments_TF:
        if batch and total + len(segment_TF) > max_frames:
            yield batch
            batch, total = [], 0
        batch.append(segment_TF)
        total += len(segment_TF)
    if batch:
        yield batch


def _decode_segments(
    model: Transducer, batch: list[Tensor], settings: DecodingSettings, device: torch.device
) -> list[Hypothesis]:
    """One hypothesis a segment, an empty one for what is too short for a frame."""
    hypotheses = [Hypothesis() for _ in batch]
    chosen = [b for b, segment_TF in enumerate(batch) if len(segment_TF) >= MIN_FRAMES]
    if chosen:
        features_BTF = torch.nn.utils.rnn.pad_sequence(
            [batch[b] for b in chosen], batch_first=True, padding_value=LOG_EPSILON
        )
        lens_B = torch.tensor([len(batch[b]) for b in chosen])
        found = decode_batch(model, features_BTF.to(device), lens_B.to(device), settings)
        for b, hypothesis in zip(chosen, found):
            hypotheses[b] = hypothesis
    return hypotheses


def as_text(path: Path, transcript: Transcript) -> str:
    """The file and its words, then a line a word: start and end in seconds, and the word."""
    lines = [f"{path}: {transcript.text}".rstrip()]
    lines += [f"{word.start:10.2f} {word.end:9.2f}  {word.text}" for word in transcript.words]
    return "\n".join(lines)


def as_ctm(path: Path, transcript: Transcript) -> str:
    """NIST's CTM: recording (the file's name without suffix), channel, start, duration, word."""
    name = "_".join(path.stem.split())
    return "\n".join(
        f"{name} 1 {word.start:.2f} {word.end - word.start:.2f} {word.text}"
        for word in transcript.words
    )


def as_json(path: Path, transcript: Transcript) -> str:
    """One line: ``{"file", "seconds", "text", "words": [{"text", "start", "end"}], "tokens":
    [{"text", "time"}]}``."""
    document = {
        "file": str(path),
        "seconds": round(transcript.seconds, 3),
        "text": transcript.text,
        "words": [asdict(word) for word in transcript.words],
        "tokens": [asdict(token) for token in transcript.tokens],
    }
    return json.dumps(document, ensure_ascii=False)


FORMATS = {"text": as_text, "ctm": as_ctm, "json": as_json}
