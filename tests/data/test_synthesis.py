"""Synthetic speech: reproducible, disjoint, in LibriSpeech's layout."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import yaml
from lhotse.recipes import prepare_librispeech

from egs.mini.make_corpus import PartSettings, Settings, main, speakers_of
from mvqkd import cli
from mvqkd.data.synthesis import Espeak, Grammar, GrammarSettings
from mvqkd.errors import RecipeError
from tests.conftest import ROOT, mini_settings


def digest(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = [str(p.relative_to(folder)) for p in files]
    return names, [hashlib.sha256(p.read_bytes()).hexdigest() for p in files]


def conf_of(size):
    files = [ROOT / "egs/mini/conf/corpus.yaml", ROOT / f"egs/mini/conf/{size}/corpus.yaml"]
    args = [word for path in files for word in ("--config", str(path))]
    return cli.parse(Settings, [*args, "--out_dir", "unused"])[0]


def test_same_bytes_with_any_number_of_workers_and_another_seed_differs(tmp_path):
    for name, seed, workers in (("one", 1, 1), ("two", 1, 2), ("seed", 2, 2)):
        main(mini_settings(tmp_path / name, seed, workers, seconds=2))
    one, two, seed = (digest(tmp_path / name) for name in ("one", "two", "seed"))
    assert one == two
    audio = {digest for file, digest in zip(*seed) if file.endswith(".flac")}
    assert audio and audio.isdisjoint(one[1])


def test_lhotse_reads_it_and_parts_are_disjoint(corpus):
    manifests = prepare_librispeech(corpus)
    assert set(manifests) == {"train-clean-100", "dev-clean", "test-other"}
    texts = {part: {s.text for s in m["supervisions"]} for part, m in manifests.items()}
    speakers = {part: {s.speaker for s in m["supervisions"]} for part, m in manifests.items()}
    for kind in (texts, speakers):
        assert len(set.union(*kind.values())) == sum(map(len, kind.values()))
    assert len(speakers["train-clean-100"]) == 2
    seconds = sum(r.duration for r in manifests["train-clean-100"]["recordings"])
    assert 16 <= seconds < 32
    recording = next(iter(manifests["test-other"]["recordings"]))
    assert recording.sampling_rate == 16000
    samples_L = recording.load_audio()[0]
    # -30 to -20 dB.
    assert 0.025 < np.sqrt(np.mean(samples_L**2)) < 0.11


def test_sentences_belong_to_one_split():
    grammar = Grammar(mini_settings("unused").grammar)
    rng = np.random.default_rng(0)
    said = {split: {grammar.sentence(rng, split) for _ in range(200)} for split in ("test", "dev")}
    said["train"] = {grammar.sentence(rng, "train") for _ in range(200)}
    assert len(set.union(*said.values())) == sum(map(len, said.values()))
    assert all(word in grammar.vocabulary() for text in said["test"] for word in text.split())


def test_vocabulary_is_of_words_that_can_be_said():
    classes = {"NAME": ["anna", "peter"], "VERB": ["ran"], "MONTH": ["may"]}
    grammar = Grammar(GrammarSettings(classes, ["NAME VERB again?"], num_words={"NAME": 1}))
    assert grammar.vocabulary() == {"anna", "ran", "again"}


def test_sizes_ask_for_enough_words_and_voices():
    full, small = conf_of("full"), conf_of("small")
    assert len(Grammar(full.grammar).vocabulary()) >= 300
    assert len(Grammar(small.grammar).vocabulary()) >= 50
    for settings in (full, small):
        speakers = speakers_of(settings)
        assert len({speaker.id for speaker in speakers}) == len(speakers)
        variants = [speaker.voice.partition("+")[2] for speaker in speakers]
        assert len(set(variants)) == len(variants)
    parts = full.parts.items()
    assert sum(p.num_voices for name, p in parts if name.startswith("train")) >= 60
    assert sum(p.num_voices for name, p in parts if name.startswith("test")) >= 15
    assert full.parts["test-other"].adverse and not full.parts["test-clean"].adverse
    assert all(part.split == name.split("-")[0] for name, part in parts)


@pytest.mark.parametrize("size", ["smoke", "small"])
def test_a_voice_of_a_smaller_corpus_is_that_of_the_full_one(size):
    full = {s.voice.partition("+")[2]: s for s in speakers_of(conf_of("full"))}
    for speaker in speakers_of(conf_of(size)):
        match = full[speaker.voice.partition("+")[2]]
        for name in ("voice", "pitch", "rate", "pitch_range", "part"):
            assert getattr(speaker, name) == getattr(match, name)


def test_espeak_knows_every_voice_of_the_full_corpus():
    espeak = Espeak()
    for speaker in speakers_of(conf_of("full")):
        samples_L = espeak.say("tea", speaker.voice, speaker.pitch, speaker.rate, 50)
        assert samples_L.dtype == np.float32 and 500 < len(samples_L) < 32000
    for voice in ("xx-nosuch+f1", "en-us+nosuch"):
        with pytest.raises(RecipeError, match="unknown to eSpeak NG"):
            espeak.say("tea", voice, 50, 170, 50)


def test_bad_conf_gets_its_line(tmp_path):
    settings = mini_settings(tmp_path / "corpus")
    settings.parts["extra"] = PartSettings("train", ["f1"], 1, 1)
    with pytest.raises(RecipeError, match=r"parts\.extra: variant f1 is also in train-clean-100"):
        main(settings)
    settings.parts["extra"] = PartSettings("train", ["f2"], 2, 1)
    with pytest.raises(RecipeError, match=r"parts\.extra: num_voices is 2"):
        main(settings)
    with pytest.raises(RecipeError, match="template names VERB, which is no class"):
        Grammar(GrammarSettings({"NAME": ["anna"]}, ["NAME VERB"]))
    with pytest.raises(RecipeError, match="grammar: has no sentences for nosuch"):
        Grammar(GrammarSettings({}, ["yes"])).sentence(np.random.default_rng(0), "nosuch")
    path = tmp_path / "corpus.yaml"
    conf = yaml.safe_load((ROOT / "egs/mini/conf/corpus.yaml").read_text())
    conf["parts"] = {
        "train-x": {"split": "trian", "variants": ["f1"], "num_voices": 1, "minutes": 1}
    }
    path.write_text(yaml.safe_dump(conf))
    with pytest.raises(RecipeError, match="split"):
        cli.parse(Settings, ["--config", str(path), "--out_dir", "unused"])


def test_grammar_that_is_used_up_stops_and_leaves_nothing(tmp_path):
    settings = mini_settings(tmp_path / "corpus")
    settings.grammar = GrammarSettings({"A": ["one", "two", "six", "ten"]}, ["A A A"])
    for part in settings.parts.values():
        part.minutes *= 100
    with pytest.raises(RecipeError, match="too few sentences"):
        main(settings)
    assert list(tmp_path.iterdir()) == []


def test_breathy_voice_is_the_same_in_every_process():
    say = (
        "import hashlib; from mvqkd.data.synthesis import Espeak; "
        "audio = Espeak().say('a red lamp', 'en-us+f2', 50, 170, 50); "
        "print(hashlib.sha256(audio.tobytes()).hexdigest())"
    )
    run = [sys.executable, "-c", say]
    said = {subprocess.run(run, cwd=ROOT, capture_output=True, check=True).stdout for _ in range(2)}
    assert len(said) == 1
