"""local/transcribe.py on a student with random weights."""

import json
import sys
from dataclasses import asdict

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch

from local import transcribe
from mvqkd import cli
from mvqkd.students.transducer import TransducerSettings
from mvqkd.training.checkpoint import save_checkpoint
from tests.decoding.random_transducer import few_tokens, random_transducer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Word pieces, a trained student, and audio, good and bad."""
    folder = tmp_path_factory.mktemp("transcribe")
    tokens = few_tokens(folder / "tokens")
    model = random_transducer(vocab_size=len(tokens), causal=False, sharpness=8.0)
    settings = TransducerSettings(
        model.encoder.settings, decoder_dim=8, joiner_dim=8, vocab_size=len(tokens)
    )
    document = {
        "model": asdict(settings),
        "training": {"num_epochs": 3},
        "longest_utterances": 1.0,
    }
    (folder / "student").mkdir()
    (folder / "student/settings.json").write_text(json.dumps(document))
    weights = model.state_dict()
    entries = {"model": weights, "model_avg": weights, "averaged_steps": 1}
    save_checkpoint(folder / "student/epoch-3.pt", **entries)
    torch.save({"model": weights}, folder / "pretrained.pt")
    samples = np.random.default_rng(0).standard_normal(3 * 22050) * 0.1
    soundfile.write(folder / "a b.wav", samples, 22050)
    soundfile.write(folder / "c.flac", samples[:22050], 22050)
    (folder / "bad.wav").write_text("no audio")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Calls the script as the command line does; (exit status, stdout, stderr)."""

    def run(*args, student=("--exp_dir", f"{folder}/student")):
        options = [*student, "--tokens_dir", f"{folder}/tokens"]
        files = [f"{folder}/{arg}" if arg.endswith((".wav", ".flac")) else arg for arg in args]
        monkeypatch.setattr(sys, "argv", ["transcribe.py", *options, "--device", "cpu", *files])
        try:
            cli.run(transcribe.main, transcribe.Settings)
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_words_with_times(run, folder):
    status, out, _ = run("a b.wav", "c.flac")
    lines = out.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert status == 0
    assert [head.partition(": ")[0] for head in heads] == [f"{folder}/a b.wav", f"{folder}/c.flac"]
    words = [line.split() for line in lines if line.startswith(" ")]
    assert " ".join(w[2] for w in words) == " ".join(head.partition(": ")[2] for head in heads)
    assert words and all(float(w[0]) <= float(w[1]) <= 3 for w in words)


def test_bad_files_are_named_and_the_others_transcribed(run, folder):
    status, out, err = run("--format", "json", "bad.wav", "c.flac", "missing.wav")
    assert status == 1
    assert [json.loads(line)["file"] for line in out.splitlines()] == [f"{folder}/c.flac"]
    assert [line.split(": ")[:2] for line in err.splitlines()] == [
        ["transcribe.py", f"{folder}/bad.wav"],
        ["transcribe.py", f"{folder}/missing.wav"],
    ]


def test_ctm(run):
    status, out, _ = run("--format", "ctm", "a b.wav")
    assert status == 0
    assert {line.split()[0] for line in out.splitlines()} == {"a_b"}
    assert all(len(line.split()) == 5 for line in out.splitlines())


def test_segments_are_as_long_as_training_utterances(run):
    known = run("a b.wav")
    assert known == run("--segment.length", "1", "a b.wav")
    assert known != run("--segment.length", "5", "a b.wav")


def test_decoded_as_last_in_stage_7(run, folder):
    beam = run("c.flac")
    greedy = run("--decoding.method", "greedy_search", "c.flac")
    path = folder / "student/decoded.json"
    path.write_text(json.dumps({"decoding": {"method": "greedy_search"}}))
    assert run("c.flac") == greedy != beam
    # A key that is given changes that one alone.
    assert run("--decoding.beam", "2", "c.flac") == greedy
    path.write_text("{}")
    status, _, err = run("c.flac")
    assert status == 1 and f"{path}: cannot be read as decoding settings" in err
    path.unlink()


def test_a_checkpoint_of_icefall(run, folder):
    checkpoint = ("--checkpoint", f"{folder}/pretrained.pt", "--segment.length", "1")
    assert run("a b.wav", student=checkpoint) == run("a b.wav")
    status, out, err = run("c.flac", student=())
    assert status == 1 and out == "" and "--exp_dir: not given; name" in err


def test_word_pieces_of_another_student(run, folder, tmp_path):
    (folder / "other").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ABC CAB AB BC A B C"]),
        model_prefix=str(folder / "other/bpe"),
        vocab_size=7,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    status, out, err = run("--tokens_dir", str(folder / "other"), "c.flac")
    assert status == 1 and out == "" and len(err.splitlines()) == 1
    assert "other: holds" in err and "the student was trained on" in err


@pytest.mark.parametrize("args", [(), ("--format", "srt", "c.flac")])
def test_wrong_options(run, args):
    status, out, err = run(*args)
    assert status == 1 and out == "" and len(err.splitlines()) == 1
