"""Utterances strung from single words, and the corpus of digits that is made so."""

import hashlib
import logging
import re
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mvqkd.data.stringing import (
    BAD_LIST,
    PartNames,
    StringingSettings,
    check_complete,
    list_recordings,
    make_strung_corpus,
    plan_part,
    read_word,
    render,
    split_by_speaker,
    split_by_take,
)
from mvqkd.errors import RecipeError

TRAIN, DEV, TEST = PARTS = PartNames("train-clean-100", "dev-clean", "test-clean")
ROOT = Path(__file__).parents[2]
PATTERN = r"(?P<word>\d)_(?P<speaker>[a-z]+)_(?P<take>\d+)\.wav"
WORDS = {"0": "zero", "1": "one", "2": "two"}
SPEAKERS = ("ann", "bob", "cat")
TAKES = 6
SETTINGS = StringingSettings(train_minutes=0.3)


def tone(number, rate=8000, seconds=0.2):
    """A word: a tone of its own pitch."""
    t_L = np.arange(int(rate * seconds)) / rate
    return 0.3 * np.sin(2 * np.pi * (200 + 17 * number) * t_L)


@pytest.fixture(scope="module")
def wavs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "recordings"
    folder.mkdir()
    names = [(w, s, t) for w in WORDS for s in SPEAKERS for t in range(TAKES)]
    for number, (word, speaker, take) in enumerate(names):
        soundfile.write(folder / f"{word}_{speaker}_{take}.wav", tone(number), 8000)
    (folder / "notes.txt").write_text("not a recording")
    return folder


@pytest.fixture
def recordings(wavs):
    return list_recordings(wavs, PATTERN, WORDS)


@pytest.fixture
def parts(recordings):
    return split_by_take(recordings, PARTS, test_takes=[0, 1], dev_takes=[2])


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_lists_a_folder_or_the_recordings_in_it(wavs):
    recordings = list_recordings(wavs, PATTERN, WORDS)
    assert len(recordings) == len(WORDS) * len(SPEAKERS) * TAKES
    assert recordings == list_recordings(wavs.parent, PATTERN, WORDS)
    assert {r.word for r in recordings} == {"ZERO", "ONE", "TWO"}
    check_complete(recordings, TAKES, "")
    with pytest.raises(RecipeError, match="9 recordings are missing, the first is take 6 of ONE"):
        check_complete(recordings, TAKES + 1, "")


def test_missing_or_empty_folder(tmp_path):
    with pytest.raises(RecipeError, match="none: no such file or folder; pass a copy"):
        list_recordings(tmp_path / "none", PATTERN, WORDS, "pass a copy")
    with pytest.raises(RecipeError, match="empty; pass a copy"):
        list_recordings(tmp_path, PATTERN, WORDS, "pass a copy")
    (tmp_path / "other.wav").write_text("x")
    with pytest.raises(RecipeError, match=r"no file named like .*; pass a copy"):
        list_recordings(tmp_path, PATTERN, WORDS, "pass a copy")
    with pytest.raises(RecipeError, match="not a folder"):
        list_recordings(tmp_path / "other.wav", PATTERN, WORDS)


def test_split_by_take(parts):
    assert {r.take for r in parts[TEST]} == {0, 1}
    assert {r.take for r in parts[DEV]} == {2}
    assert {r.take for r in parts[TRAIN]} == {3, 4, 5}
    assert all({r.speaker for r in parts[part]} == set(SPEAKERS) for part in PARTS)


def test_split_by_take_of_one_speaker(recordings):
    own = [r for r in recordings if r.speaker == "ann"]
    assert all(split_by_take(own, PARTS, [0], [1]).values())


def test_split_by_speaker(recordings):
    parts = split_by_speaker(recordings, PARTS, ["bob"], [], [0, 1])
    assert {r.speaker for r in parts[TEST]} == {"bob"}
    assert len(parts[TEST]) == len(WORDS) * TAKES
    for part in (TRAIN, DEV):
        assert {r.speaker for r in parts[part]} == {"ann", "cat"}
    assert {r.take for r in parts[DEV]} == {0, 1}
    parts = split_by_speaker(recordings, PARTS, ["bob"], ["cat"], [0, 1])
    assert {part: {r.speaker for r in parts[part]} for part in PARTS} == {
        TRAIN: {"ann"},
        DEV: {"cat"},
        TEST: {"bob"},
    }


def test_split_by_speaker_draws_one_if_none_is_given(recordings):
    drawn = [
        split_by_speaker(recordings, PARTS, [], [], [0], seed)[TEST] for seed in (1, 1, 2, 3, 4, 5)
    ]
    assert drawn[0] == drawn[1]
    assert all(len({r.speaker for r in test}) == 1 for test in drawn)
    assert len({test[0].speaker for test in drawn}) > 1


def test_splits_that_make_no_sense(recordings):
    with pytest.raises(RecipeError, match="0 is also in test_takes"):
        split_by_take(recordings, PARTS, [0], [0])
    with pytest.raises(RecipeError, match="train-clean-100: no recording is left"):
        split_by_take(recordings, PARTS, [0, 1, 2, 3], [4, 5])
    with pytest.raises(RecipeError, match="test_speakers dan: the recordings are by ann, bob, cat"):
        split_by_speaker(recordings, PARTS, ["dan"], [], [0])
    with pytest.raises(RecipeError, match="dev_speakers bob: is also in test_speakers"):
        split_by_speaker(recordings, PARTS, ["bob"], ["bob"], [0])
    with pytest.raises(RecipeError, match="hold out fewer"):
        split_by_speaker(recordings, PARTS, list(SPEAKERS), [], [0])
    with pytest.raises(RecipeError, match="all recordings are by ann"):
        split_by_speaker([r for r in recordings if r.speaker == "ann"], PARTS, [], [], [0])


def test_same_bytes_for_any_number_of_workers(parts, tmp_path):
    for name, workers in (("one", 1), ("four", 4), ("again", 4)):
        make_strung_corpus(parts, tmp_path / name, SETTINGS, workers)
    one = digests(tmp_path / "one")
    assert one == digests(tmp_path / "four") == digests(tmp_path / "again")
    make_strung_corpus(parts, tmp_path / "again", replace(SETTINGS, seed=2), 4)
    other = digests(tmp_path / "again")
    assert not set(one.values()) & {d for p, d in other.items() if p.endswith(".flac")}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "four", "one"]


def test_a_speaker_is_the_same_whoever_else_is_there(recordings):
    own = [r for r in recordings if r.speaker == "bob"]
    seconds = {r.path: 0.2 for r in recordings}
    ids = {"ann": 1, "bob": 2, "cat": 3}
    alone = plan_part(TEST, PARTS, own, seconds, ids, SETTINGS)
    among = plan_part(TEST, PARTS, recordings, seconds, ids, SETTINGS)
    assert alone == [u for u in among if u.recordings[0].speaker == "bob"]


def test_plan_keeps_the_conf(parts):
    seconds = {r.path: 0.2 for part in PARTS for r in parts[part]}
    ids = {s: i for i, s in enumerate(SPEAKERS, 1)}
    for part in PARTS:
        plan = plan_part(part, PARTS, parts[part], seconds, ids, SETTINGS)
        assert len({u.id for u in plan}) == len(plan)
        for utterance in plan:
            assert 3 <= len(utterance.recordings) <= 7
            assert len({r.speaker for r in utterance.recordings}) == 1
            assert set(utterance.recordings) <= set(parts[part])
            assert all(0.05 <= gap <= 0.3 for gap in utterance.gaps[1:-1])
            assert all(-9 <= gain <= 9 for gain in utterance.gains_db)
        uses = Counter(r.path for u in plan for r in u.recordings)
        if part == TRAIN:
            # Passes: no recording is used twice more often than another of its speaker.
            assert len(uses) == len(parts[part])
            for speaker in SPEAKERS:
                own = [uses[r.path] for r in parts[part] if r.speaker == speaker]
                assert max(own) - min(own) <= 1
        else:
            assert set(uses.values()) == {2} and len(uses) == len(parts[part])


def test_training_speech_is_as_long_as_asked(parts, tmp_path):
    summary = make_strung_corpus(parts, tmp_path / "out", SETTINGS)
    # Each of three speakers may run over by one utterance of at most 7 words.
    assert 0.3 * 60 <= summary[TRAIN].seconds <= 0.3 * 60 + 3 * (7 * 0.5 + 0.6)
    assert summary[TEST].words == 2 * summary[TEST].recordings == 2 * len(parts[TEST])


def test_words_lie_where_the_plan_says(parts):
    settings = replace(SETTINGS, noise_db=(-90, -90), fade_seconds=0.001)
    audio = {r.path: read_word(r.path, settings) for r in parts[TEST]}
    seconds = {path: len(x_L) / 16000 for path, x_L in audio.items()}
    ids = dict.fromkeys(SPEAKERS, 1)
    utterance = plan_part(TEST, PARTS, parts[TEST], seconds, ids, settings)[0]
    samples_L = render(utterance, audio, settings) / 32767
    start = 0
    for recording, gap, gain in zip(utterance.recordings, utterance.gaps, utterance.gains_db):
        gap_L = samples_L[start : start + round(gap * 16000)]
        assert np.abs(gap_L).max() < 1e-3
        start += len(gap_L)
        word_L = audio[recording.path] * 10 ** (gain / 20)
        inner = slice(32, len(word_L) - 32)
        found_L = samples_L[start : start + len(word_L)]
        np.testing.assert_allclose(found_L[inner], word_L[inner], atol=2e-3)
        start += len(word_L)
    assert len(samples_L) - start == round(utterance.gaps[-1] * 16000)


def test_loud_words_are_not_clipped(parts):
    settings = replace(SETTINGS, utterance_gain_db=(30, 30))
    audio = {r.path: read_word(r.path, settings) for r in parts[TEST]}
    plan = plan_part(
        TEST, PARTS, parts[TEST], dict.fromkeys(audio, 0.2), dict.fromkeys(SPEAKERS, 1), settings
    )
    samples_L = render(plan[0], audio, settings)
    assert np.abs(samples_L).max() == round(0.99 * 32767)
    assert np.sum(np.abs(samples_L) > 0.985 * 32767) < 0.05 * len(samples_L)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100])
def test_any_rate_becomes_16_khz_at_the_same_pitch(tmp_path, rate):
    path = tmp_path / "word.wav"
    soundfile.write(path, np.stack([tone(10, rate)] * 2, axis=1), rate)
    samples_L = read_word(path, SETTINGS)
    assert samples_L.dtype == np.float32 and abs(len(samples_L) - 3200) <= 2
    spectrum = np.abs(np.fft.rfft(samples_L, 16000))
    assert abs(int(spectrum.argmax()) - 370) <= 3


def bad_files():
    yield "noise", b"not audio at all", "cannot be read as audio"
    yield "no-bytes", b"", "cannot be read as audio"
    yield "empty", (np.zeros(0), 8000), "holds no samples"
    yield "silent", (np.zeros(2000), 8000), "is silent"
    yield "slow", (tone(1, 4000), 4000), "its sampling rate is 4000 Hz, below 8000"
    yield "short", (tone(1, 8000, 0.01), 8000), "lasts 0.01 s"
    yield "long", (tone(1, 8000, 6), 8000), "lasts 6 s"
    yield "nan", (np.full(2000, np.nan), 8000), "not finite"


@pytest.mark.parametrize(
    ("content", "cause"), [pytest.param(content, cause, id=n) for n, content, cause in bad_files()]
)
def test_bad_recording(wavs, tmp_path, content, cause):
    for path in wavs.glob("*.wav"):
        (tmp_path / path.name).symlink_to(path)
    bad = tmp_path / "1_bob_4.wav"
    bad.unlink()
    if isinstance(content, bytes):
        bad.write_bytes(content)
    else:
        soundfile.write(bad, *content, subtype="FLOAT")
    parts = split_by_take(list_recordings(tmp_path, PATTERN, WORDS), PARTS, [0, 1], [2])
    out = tmp_path / "out"
    with pytest.raises(RecipeError) as error:
        make_strung_corpus(parts, out, SETTINGS)
    message = str(error.value)
    assert message.startswith(f"{bad}: ") and cause in message and "\n" not in message
    assert "replace or remove the file" in message and "1 of 54" in message
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".wav"]
    summary = make_strung_corpus(parts, out, replace(SETTINGS, max_bad_share=0.02))
    assert sum(s.recordings for s in summary.values()) == 53
    listed = (out / BAD_LIST).read_text()
    assert listed.count("\n") == 1 and str(bad) in listed and cause in listed


def test_parts_that_share_a_recording(parts, tmp_path):
    shared = {**parts, DEV: parts[TEST][:1]}
    with pytest.raises(RecipeError, match="is in dev-clean and in test-clean"):
        make_strung_corpus(shared, tmp_path / "out", SETTINGS)


def test_too_few_recordings_of_a_speaker(parts, tmp_path):
    few = {**parts, TEST: parts[TEST][:1]}
    with pytest.raises(RecipeError, match="test-clean has 1 recordings of ann, too few"):
        make_strung_corpus(few, tmp_path / "out", SETTINGS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"num_words": (7, 3)},
        {"num_words": (0, 3)},
        {"test_uses": 0},
        {"pause_seconds": (-0.1, 0.1)},
        {"train_minutes": 0.0},
    ],
)
def test_settings_that_make_no_sense(parts, tmp_path, change):
    with pytest.raises(RecipeError, match=f"{next(iter(change))} .*; change it in the corpus conf"):
        make_strung_corpus(parts, tmp_path / "out", replace(SETTINGS, **change))


def test_lhotse_reads_it_as_librispeech(parts, tmp_path):
    from lhotse.recipes import prepare_librispeech

    logging.disable(logging.INFO)
    summary = make_strung_corpus(parts, tmp_path / "out", SETTINGS)
    manifests = prepare_librispeech(tmp_path / "out", dataset_parts=list(PARTS))
    logging.disable(logging.NOTSET)
    assert sorted(manifests) == sorted(PARTS)
    ids = []
    for part in PARTS:
        recordings = manifests[part]["recordings"]
        supervisions = manifests[part]["supervisions"]
        assert len(recordings) == len(supervisions) == summary[part].utterances
        assert all(r.sampling_rate == 16000 for r in recordings)
        seconds = sum(r.duration for r in recordings)
        assert seconds == pytest.approx(summary[part].seconds, abs=0.01)
        assert {w for s in supervisions for w in s.text.split()} == {"ZERO", "ONE", "TWO"}
        assert {s.speaker for s in supervisions} == {"1", "2", "3"}
        ids += [s.id for s in supervisions]
    assert len(set(ids)) == len(ids)
    table = (tmp_path / "out" / "SPEAKERS.TXT").read_text()
    assert re.search(r"^2 +\| U \| train-clean-100 .*\| bob$", table, re.MULTILINE)


def make_digits(*args):
    return subprocess.run(
        [
            *(sys.executable, "egs/digits/make_corpus.py"),
            *("--config", "egs/digits/conf/corpus.yaml", *map(str, args)),
        ],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )


def test_digits_script(wavs, tmp_path):
    options = ("--dl_dir", wavs, "--out_dir", tmp_path / "out", "--stringing.train_minutes", "0.2")
    done = make_digits(*options, "--split", "speaker", "--test_speakers", "[bob]")
    assert done.returncode == 0, done.stderr
    assert "test-clean: " in done.stderr and "36 words from 18 recordings by bob" in done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["SPEAKERS.TXT", *sorted(PARTS)]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_digits_script_downloads_once(wavs, tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    with tarfile.open(served / "v1.tar.gz", "w:gz") as tar:
        tar.add(wavs, "digits-1/recordings")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=served))
    options = [
        *("--url", f"http://127.0.0.1:{server.server_port}/v1.tar.gz"),
        *("--download_dir", tmp_path / "download", "--stringing.train_minutes", "0.2"),
        *("--test_takes", "[0]", "--dev_takes", "[1]"),
    ]
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        short = make_digits(*options, "--out_dir", tmp_path / "short")
        server.shutdown()
        thread.join()
    assert short.returncode == 1 and not (tmp_path / "short").exists()
    assert "396 recordings are missing, the first is take 6 of ONE by ann; remove" in short.stderr
    # The server is gone: what has been unpacked is used.
    done = make_digits(*options, "--out_dir", tmp_path / "out", "--takes_per_digit", TAKES)
    assert done.returncode == 0, done.stderr
    assert "test-clean: " in done.stderr and "from 9 recordings by ann, bob, cat" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dl_dir", "nowhere"], "nowhere: no such file or folder; pass --dl-dir FOLDER"),
        (["--dl_dir", ".", "--stringing.volume", "1"], "--stringing.volume"),
        (["--dl_dir", ".", "--split", "word"], "split"),
    ],
)
def test_digits_script_errors_are_one_line(tmp_path, args, message):
    done = make_digits("--out_dir", tmp_path / "out", *args)
    assert done.returncode == 1 and message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
