"""From a LibriSpeech tree to cuts; what bad input gets."""

import gzip
import shutil

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording
from scipy.signal import firwin, resample_poly

from mvqkd.data.audio import bucketed_batches, collate_audio, load_audio
from mvqkd.data.features import FeatureSettings, compute_features
from mvqkd.data.manifests import (
    CheckSettings,
    of_duration,
    prepare_part,
    read_cuts,
    split_by_share,
)
from mvqkd.errors import RecipeError

PART = "train-clean-100"


@pytest.fixture
def tree(corpus, tmp_path):
    """A copy of the corpus that may be damaged."""
    return shutil.copytree(corpus, tmp_path / "corpus")


@pytest.fixture
def utterances(tree):
    """Audio files of the part."""
    return sorted((tree / PART).rglob("*.flac"))


def prepare(tree, **check):
    return prepare_part(tree, PART, tree.parent / f"{PART}.jsonl.gz", CheckSettings(**check))


def set_text(path, text):
    """Replace, or with None remove, the transcript of the utterance at ``path``."""
    (transcripts,) = path.parent.glob("*.trans.txt")
    lines = []
    for line in transcripts.read_text().splitlines():
        if line.split()[0] == path.stem:
            line = f"{path.stem} {text}"
        lines.append(f"{line}\n")
    transcripts.write_text("".join(lines))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write(path, samples, rate=16000):
    soundfile.write(path, samples, rate, subtype="PCM_16")


NOISE = np.random.default_rng(0).standard_normal(8000) * 0.1

DAMAGES = {
    "broken": (lambda p: p.write_bytes(b"no FLAC"), "cannot be decoded"),
    "truncated": (truncate, "cannot be decoded"),
    "empty file": (lambda p: p.write_bytes(b""), "cannot be decoded"),
    "no samples": (lambda p: write(p, np.zeros(0)), "cannot be decoded"),
    "short": (lambda p: write(p, NOISE[:800]), "only 0.050 s long; remove it"),
    "silent": (lambda p: write(p, np.zeros(8000)), "silent from start to end"),
    "wrong rate": (
        lambda p: write(p, NOISE, 8000),
        "sampled at 8000 Hz, most of its part at 16000",
    ),
    "stereo": (lambda p: write(p, np.stack([NOISE, NOISE], 1)), "has 2 channels"),
    "empty transcript": (lambda p: set_text(p, ""), "empty transcript"),
    "missing": (lambda p: p.unlink(), "no such file"),
}


def test_cuts_of_a_good_part(corpus, plain_cuts):
    files = sorted((corpus / PART).rglob("*.flac"))
    assert [c.id for c in plain_cuts] == [f.stem for f in files]
    assert [c.recording.sources[0].source for c in plain_cuts] == [str(f) for f in files]
    again = read_cuts(corpus.parent / "manifests/train.jsonl.gz")
    assert [c.id for c in again] == [c.id for c in plain_cuts]
    batch = collate_audio(plain_cuts)
    assert batch.waveforms_BL.shape == (len(files), int(batch.lengths_B.max()))
    assert all(text and text == text.upper() for text in batch.texts)


@pytest.mark.parametrize("damage, reason", DAMAGES.values(), ids=DAMAGES.keys())
def test_bad_utterance_stops_or_is_left_out_and_listed(tree, utterances, damage, reason):
    bad = utterances[1]
    damage(bad)
    with pytest.raises(RecipeError) as caught:
        prepare(tree)
    message = str(caught.value)
    assert message.startswith(f"{bad}: ") and reason in message and "\n" not in message
    assert "max_bad_share = 0.01" in message
    assert not list(tree.parent.glob("*.jsonl.gz"))

    cuts = prepare(tree, max_bad_share=0.5)
    left = [u for u in utterances if u != bad]
    assert [c.recording.sources[0].source for c in cuts] == [str(u) for u in left]
    for cut in cuts:
        assert len(load_audio(cut)) == cut.num_samples and cut.supervisions[0].text
    (listing,) = tree.parent.glob("bad-utterances-*")
    assert listing.read_text().startswith(f"{bad}: ") and reason in listing.read_text()


def test_part_at_another_rate_is_resampled(tree, utterances, plain_cuts, caplog):
    caplog.set_level("INFO")
    for path in utterances:
        samples_L, _ = soundfile.read(path)
        write(path, resample_poly(samples_L, 1, 2), 8000)
    cuts = prepare(tree)
    assert "sampled at 8000 Hz, resampled to 16000" in caplog.text
    assert not list(tree.parent.glob("bad-utterances-*"))
    for cut, plain in zip(read_cuts(tree.parent / f"{PART}.jsonl.gz"), plain_cuts, strict=True):
        assert (cut.id, cut.sampling_rate) == (plain.id, 16000)
        assert abs(cut.num_samples - plain.num_samples) <= 1

    some = CutSet.from_cuts(list(cuts)[:1])
    settings = FeatureSettings(speed_factors=[0.9])
    for cut in compute_features(some, tree.parent / "fbank.jsonl.gz", True, settings, 0):
        # The same speech as from the files at 16 kHz, above 4 kHz aside.
        (plain,) = (c for c in plain_cuts if c.id == cut.id.removesuffix("_sp0.9"))
        plain = plain if plain.id == cut.id else plain.perturb_speed(0.9)
        samples_L, expected_L = load_audio(cut), load_audio(plain)
        assert len(samples_L) == cut.num_samples and abs(len(samples_L) - len(expected_L)) <= 2
        shorter = min(len(samples_L), len(expected_L))
        samples_L, expected_L = samples_L[:shorter], expected_L[:shorter]
        smooth = firwin(101, 3000, fs=16000)
        difference_L = np.convolve(samples_L - expected_L, smooth)
        assert (difference_L**2).mean() < 1e-3 * (expected_L**2).mean()
        assert cut.load_features().shape == (round(100 * cut.duration), 80)

    write(utterances[1], NOISE, 16000)
    with pytest.raises(RecipeError, match="sampled at 16000 Hz, most of its part at 8000"):
        prepare(tree)


def test_missing_and_empty_folders(tree):
    for remove, cause in ((False, "has no transcripts"), (False, "empty"), (True, "no such file")):
        if cause == "has no transcripts":
            for path in tree.rglob("*.trans.txt"):
                path.unlink()
        else:
            shutil.rmtree(tree / PART)
            if not remove:
                (tree / PART).mkdir()
        with pytest.raises(RecipeError, match=f"{PART}: {cause}"):
            prepare(tree)


def test_transcripts_that_are_no_text(tree):
    path = next((tree / PART).rglob("*.trans.txt"))
    path.write_bytes(b"101-1011-0000 \xff\xfe\n")
    with pytest.raises(RecipeError, match=r"trans.txt: is no UTF-8 text"):
        prepare(tree)


def test_manifest_that_cannot_be_read(corpus, tmp_path):
    good = (corpus.parent / "manifests/train.jsonl.gz").read_bytes()
    path = tmp_path / "cuts.jsonl.gz"
    with pytest.raises(RecipeError, match=r"cuts.jsonl.gz: no such file or folder; run"):
        read_cuts(path)
    for content, cause in (
        (b"", "empty"),
        (good[: len(good) // 2], "cannot be read as a lhotse manifest"),
        (b"no gzip", "cannot be read as a lhotse manifest"),
        (gzip.compress(b'{"id": 1}\n'), "cannot be read as a lhotse manifest"),
        (gzip.compress(b""), "holds no cuts"),
    ):
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=rf"^{path}: {cause}") as caught:
            read_cuts(path)
        assert "\n" not in str(caught.value)


def test_cut_that_names_missing_audio(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, NOISE, 16000)
    cut = Recording.from_file(path).to_cut()
    path.unlink()
    with pytest.raises(RecipeError, match=rf"^{path}: cut {cut.id} cannot be read") as caught:
        load_audio(cut)
    assert "\n" not in str(caught.value)


def test_batches_hold_every_cut_once_in_an_order_of_seed_and_epoch(plain_cuts, recwarn):
    def order(seed, epoch):
        return [[c.id for c in cuts] for cuts in bucketed_batches(plain_cuts, 6, seed, epoch)]

    everything = sorted(c.id for c in plain_cuts)
    assert sorted(i for ids in order(1, 0) for i in ids) == everything
    assert order(1, 0) == order(1, 0)
    assert len({str(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) > 1
    single = CutSet.from_cuts([next(iter(plain_cuts))])
    assert [len(cuts) for cuts in bucketed_batches(single, 6, 1, 0)] == [1]
    double = CutSet.from_cuts([next(iter(plain_cuts)).with_id(name) for name in "ab"])
    assert sum(len(cuts) for cuts in bucketed_batches(double, 6, 1, 0)) == 2
    about_settings = ("eagerly", "empty slice", "invalid value")
    assert not [w for w in recwarn if any(words in str(w.message) for words in about_settings)]


def test_shares_nest_and_keep_the_speeds_of_an_utterance_together(feature_cuts):
    parts = {share: split_by_share(feature_cuts, share) for share in (0.25, 0.5, 1.0)}
    ids = {share: {cut.id for cut in part[0]} for share, part in parts.items()}
    assert ids[0.25] < ids[0.5] < ids[1.0] == {cut.id for cut in feature_cuts}
    assert [len(ids[share]) for share in parts] == [3, 6, 12]  # of 4 at three speeds
    assert len({id.split("_sp")[0] for id in ids[0.25]}) == 1
    for taken, rest in parts.values():
        assert sorted(cut.id for cut in [*taken, *rest]) == sorted(ids[1.0])


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, 0.1])
def test_share_that_leaves_nothing_is_refused(feature_cuts, share):
    with pytest.raises(RecipeError, match=f"transcribed_share {share}: "):
        split_by_share(feature_cuts, share)


def test_utterances_of_other_durations_are_left_out(feature_cuts):
    durations = sorted(cut.duration for cut in feature_cuts)
    low, high = durations[1], durations[-2]
    kept = [cut.id for cut in of_duration(feature_cuts, low, high)]
    assert kept == [cut.id for cut in feature_cuts if low <= cut.duration <= high]
    assert 0 < len(kept) < len(durations)
    assert list(of_duration(feature_cuts, 0.0, None)) == list(feature_cuts)
    with pytest.raises(RecipeError, match=r"none of \d+ lasts 1 to 0.5 .* data\.max_seconds"):
        of_duration(feature_cuts, 1, 0.5)
