"""Audio files in blocks against the same work on the whole file."""

import numpy as np
import pytest
import soundfile
from lhotse import Fbank, FbankConfig
from scipy.signal import resample_poly

from mvqkd.data import audio_files
from mvqkd.data.audio_files import AudioFile, feature_blocks, resampled
from mvqkd.errors import RecipeError

RNG = np.random.default_rng(0)


def in_blocks(x, *sizes):
    """``x`` in blocks of these sizes, again and again."""
    start = 0
    while start < len(x):
        for size in sizes:
            if start < len(x):
                yield x[start : start + size]
            start += size


def noise(length):
    return RNG.standard_normal(length).astype(np.float32) * 0.1


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000, 16001])
@pytest.mark.parametrize("sizes", [(1, 7, 5000), (3001,)])
def test_resampling_in_blocks_equals_the_whole(rate, sizes):
    x = noise(rate // 2 + 123)
    whole = resample_poly(x, 16000, rate)
    parts = list(resampled(in_blocks(x, *sizes), rate, 16000))
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)


@pytest.mark.parametrize("length", [400, 479, 480, 799, 1000, 16000, 33333])
@pytest.mark.parametrize("sizes", [(1, 160, 999), (4000,), (50_000,)])
def test_features_in_blocks_equal_the_whole(length, sizes):
    extractor = Fbank(FbankConfig(num_mel_bins=20))
    x = noise(length)
    parts = list(feature_blocks(in_blocks(x, *sizes), extractor))
    np.testing.assert_allclose(np.concatenate(parts), extractor.extract(x, 16000), atol=1e-4)


@pytest.mark.parametrize("length", [1, 79, 100, 399])
def test_audio_too_short_for_a_word_has_no_frame(length):
    extractor = Fbank(FbankConfig(num_mel_bins=20))
    assert [len(part) for part in feature_blocks([noise(length)], extractor)] == [0]


def test_channels_are_averaged_and_seconds_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(audio_files, "BLOCK_SECONDS", 1)
    x = noise(5 * 8000).reshape(-1, 2)
    soundfile.write(tmp_path / "a b.wav", x, 8000, subtype="FLOAT")
    audio = AudioFile(tmp_path / "a b.wav")
    blocks = list(audio.blocks())
    assert len(blocks) > 2 and audio.seconds == 2.5
    expected = resample_poly(x.mean(1), 2, 1)
    np.testing.assert_allclose(np.concatenate(blocks), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3", "a.aiff"])
def test_formats(tmp_path, name):
    soundfile.write(tmp_path / name, noise(16000), 16000)
    audio = AudioFile(tmp_path / name)
    assert sum(len(block) for block in audio.blocks()) == 16000 and audio.seconds == 1


def bad_files(folder):
    good = folder / "good.flac"
    soundfile.write(good, noise(40000), 16000)
    data = good.read_bytes()
    (folder / "cut.flac").write_bytes(data[: len(data) // 2])
    (folder / "text.wav").write_text("what is this")
    (folder / "nothing.wav").write_bytes(b"")
    soundfile.write(folder / "no-sample.wav", noise(0), 16000)
    soundfile.write(folder / "nan.wav", np.full(100, np.nan), 16000, subtype="FLOAT")
    soundfile.write(folder / "good.mp3", noise(40000), 16000)
    data = (folder / "good.mp3").read_bytes()
    (folder / "cut.mp3").write_bytes(data[: len(data) // 2])
    (folder / "folder.wav").mkdir()
    return folder


BAD = {
    "cut.flac": "cannot be decoded",
    "cut.mp3": "cut short: holds 1.",
    "text.wav": "cannot be decoded",
    "nothing.wav": "cannot be decoded",
    "no-sample.wav": "holds no sample",
    "nan.wav": "not finite",
    "folder.wav": "is a folder",
    "missing.wav": "no such file",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_get_one_line(tmp_path, name):
    path = bad_files(tmp_path) / name
    with pytest.raises(RecipeError) as raised:
        list(AudioFile(path).blocks())
    message = str(raised.value)
    assert message.startswith(f"{path}: ") and BAD[name] in message and "\n" not in message
