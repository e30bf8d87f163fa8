"""Transcribing files against decoding their features."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mvqkd.data.features import FeatureSettings, make_extractor
from mvqkd.decoding.decode import DecodingSettings, decode_batch
from mvqkd.decoding.times import Token, Word, words_with_times
from mvqkd.decoding.transcribe import (
    SegmentSettings,
    Transcript,
    as_ctm,
    as_json,
    as_text,
    segments,
    transcribe,
)
from mvqkd.errors import RecipeError
from tests.decoding.random_transducer import NUM_FEATURES, few_tokens, random_transducer

CPU = torch.device("cpu")
EXTRACTOR = make_extractor(FeatureSettings(num_mel_bins=NUM_FEATURES))
# Rounding, which differs from one batch to another, tips a beam of random weights over.
SETTINGS = DecodingSettings("greedy_search", chunk_size=16, left_context=16)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return few_tokens(tmp_path_factory.mktemp("tokens") / "tokens")


@pytest.fixture(scope="module", params=[True, False], ids=["streaming", "whole"])
def model(request, tokens):
    return random_transducer(vocab_size=len(tokens), causal=request.param, sharpness=8.0)


def write(path, seconds):
    """Noise whose loudness comes and goes."""
    time = np.arange(round(16000 * seconds)) / 16000
    samples = RNG.standard_normal(len(time)) * 0.1 * np.abs(np.sin(2 * time))
    soundfile.write(path, samples, 16000)
    return path


def features_of(path):
    samples_L, rate = soundfile.read(path, dtype="float32")
    return torch.from_numpy(EXTRACTOR.extract(samples_L, rate))


def words_of(model, tokens, features_TF):
    lens_B = torch.tensor([len(features_TF)])
    (hypothesis,) = decode_batch(model, features_TF[None], lens_B, SETTINGS)
    seconds = len(features_TF) / 100
    return words_with_times(model.encoder, hypothesis, tokens, seconds)


def test_a_file_is_decoded_as_its_features_are(model, tokens, tmp_path):
    path = write(tmp_path / "a.wav", 2.0)
    transcript = transcribe(path, model, tokens, EXTRACTOR, SETTINGS, 20, CPU)
    features_TF = features_of(path)
    assert transcript.words == words_of(model, tokens, features_TF)
    assert transcript.seconds == 2.0 and transcript.text
    pieces = [token.text for token in transcript.tokens]
    assert tokens.decode(pieces).split() == transcript.text.split()
    assert transcript.words[0].start <= transcript.tokens[0].time <= transcript.words[0].end


@pytest.mark.parametrize("max_duration", [1, 2, 300])
def test_a_long_file_is_the_sum_of_its_segments(model, tokens, tmp_path, max_duration):
    path = write(tmp_path / "a.wav", 3.0)
    settings = dataclasses.replace(SETTINGS, max_duration=max_duration)
    transcript = transcribe(path, model, tokens, EXTRACTOR, settings, 1, CPU)
    features_TF = features_of(path)
    expected, begin = [], 0
    for segment_TF in segments([features_TF], 100):
        for word in words_of(model, tokens, segment_TF):
            expected.append((word.text, begin + word.start, begin + word.end))
        begin += len(segment_TF) / 100
    assert begin == pytest.approx(3.0)
    assert [w.text for w in transcript.words] == [e[0] for e in expected]
    times = [(w.start, w.end) for w in transcript.words]
    assert np.allclose(times, [e[1:] for e in expected])
    assert all(a[1] <= b[0] + 1e-6 for a, b in itertools.pairwise(times))
    # The tokens too are of the file, not of their segment.
    emitted = [token.time for token in transcript.tokens]
    assert emitted == sorted(emitted) and transcript.words[-1].start <= emitted[-1]


@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.03, 0.06, 0.07, 0.1, 0.3])
def test_a_file_shorter_than_a_chunk(model, tokens, tmp_path, seconds):
    path = write(tmp_path / "a.wav", seconds)
    transcript = transcribe(path, model, tokens, EXTRACTOR, SETTINGS, 20, CPU)
    assert transcript.seconds == pytest.approx(seconds)
    assert all(0 <= w.start <= w.end <= seconds + 0.005 for w in transcript.words)


@pytest.mark.parametrize("block", [1, 33, 1000])
def test_segments_are_all_of_it_once(block):
    features_TF = torch.randn(1000, 4)
    found = list(segments(features_TF.split(block), 120))
    assert torch.equal(torch.cat(found), features_TF)
    assert all(60 <= len(s) <= 120 for s in found[:-1]) and len(found[-1]) <= 120
    whole = list(segments([features_TF], 120))
    assert [len(s) for s in found] == [len(s) for s in whole]


def test_segments_end_in_pauses():
    features_TF = torch.randn(1000, 4)
    for begin in (150, 390, 600, 850):
        features_TF[begin : begin + 30] -= 20
    lengths = [len(s) for s in segments([features_TF], 300)]
    assert np.cumsum(lengths).tolist() == [165, 405, 615, 865, 1000]
    assert [len(s) for s in segments([features_TF], 1000)] == [1000]
    assert list(segments([], 100)) == []


def test_segments_of_no_length_are_refused():
    with pytest.raises(RecipeError, match=r"segment\.length: 0\.5 s"):
        SegmentSettings(0.5)


def test_formats():
    path = Path("a/b c.wav")
    tokens = [Token("\u2581ON", 0.12), Token("\u2581MON", 1.02), Token("DAY", 12.326)]
    transcript = Transcript([Word("ON", 0.1, 0.25), Word("MONDAY", 1.0, 12.346)], 13.0, tokens)
    lines = as_text(path, transcript).split("\n")
    assert lines[0] == "a/b c.wav: ON MONDAY"
    assert [line.split() for line in lines[1:]] == [
        ["0.10", "0.25", "ON"],
        ["1.00", "12.35", "MONDAY"],
    ]
    assert as_ctm(path, transcript) == "b_c 1 0.10 0.15 ON\nb_c 1 1.00 11.35 MONDAY"
    assert json.loads(as_json(path, transcript)) == {
        "file": "a/b c.wav",
        "seconds": 13.0,
        "text": "ON MONDAY",
        "words": [
            {"text": "ON", "start": 0.1, "end": 0.25},
            {"text": "MONDAY", "start": 1.0, "end": 12.346},
        ],
        "tokens": [
            {"text": "\u2581ON", "time": 0.12},
            {"text": "\u2581MON", "time": 1.02},
            {"text": "DAY", "time": 12.326},
        ],
    }
    nothing = Transcript([], 1.0)
    assert as_text(path, nothing) == "a/b c.wav:" and as_ctm(path, nothing) == ""
