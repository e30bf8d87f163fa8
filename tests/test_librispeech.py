"""The recipes of LibriSpeech: all stages on a small tree of its shape, plan, sizes, settings."""

import json
from pathlib import Path

import pytest
from lhotse import CutSet

from mvqkd.teachers.ctc import SYMBOLS
from mvqkd.teachers.hubert import HubertTeacher
from tests.conftest import tiny_hubert
from tests.librispeech_tree import make_tree, write_confs
from tests.recipe_copy import begun_steps, copy_checkout, files_under, run_sh

STUDENTS = ["none", "streaming-mvq"]
UNTRANSCRIBED = "data/librispeech-100/untranscribed"
# What makes it small. All else is as published: speeds, 8 bytes a frame, layer 36 into layer 6.
OVERLAY = {
    "tokens": {"tokens": {"vocab_size": 40}},
    "sample": {"sample": {"num_utterances": 24, "num_unseen": 4}},
    "quantizer": {
        "quantizer": {
            "codebook_size": 16,
            "trainer": "lsq",
            "lsq_frames": 2000,
            "lsq_iters": 2,
            "logits_iters": 10,
        }
    },
    "student": {
        "model": {
            "decoder_dim": 24,
            "joiner_dim": 24,
            "encoder": {
                "d_model": 24,
                "nhead": 2,
                "dim_feedforward": 32,
                "num_encoder_layers": 6,
                "cnn_module_kernel": 5,
                "subsampling_channels": [2, 4, 8],
            },
        }
    },
    "training": {
        "data": {"max_duration": 40},
        "training": {"num_epochs": 2, "warmup_steps": 2, "average_period": 1},
    },
    "decoding": {"decoding": {"beam": 2, "avg": 1}, "more": [{"epoch": 1, "avg": 1}]},
}


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """The folder of what a call needs, the checkout among it, and the call's options."""
    folder = tmp_path_factory.mktemp("librispeech")
    make_tree(folder, minutes=0.4, full_grammar=False)
    write_confs(folder / "small", OVERLAY)
    model = tiny_hubert(num_hidden_layers=48, hidden_size=16, intermediate_size=16)
    HubertTeacher(model, True, list(SYMBOLS), "tiny").save(folder / "teacher")
    copy_checkout(folder / "recipe")
    # Relative paths are meant from where the user stands.
    options = ["--corpus", "librispeech-100", "--dl-dir", "copy", "--teacher-dir", "teacher"]
    options += ["--noise-dir", "musan", "--decoding", "left64-chunk16-right9"]
    options += ["--overlay", "small", "--students", " ".join(STUDENTS), "--device", "cpu"]
    return folder, options


def utterances(part):
    lines = [p.read_text().splitlines() for p in sorted(part.rglob("*.trans.txt"))]
    return dict(line.split(" ", 1) for of_chapter in lines for line in of_chapter)


def test_all_stages_on_a_small_tree(call, monkeypatch):
    folder, options = call
    done = run_sh(folder / "recipe", *options, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    monkeypatch.chdir(folder / "recipe")  # manifests name files from there
    tree = folder / "copy/LibriSpeech"
    data, exp = (folder / "recipe" / kind / "librispeech-100" for kind in ("data", "exp"))
    labelled = CutSet.from_file(data / "labels/mvq/train.jsonl.gz").to_eager()
    assert len(labelled) == 3 * len(utterances(tree / "train-clean-100")) > 0
    assert all(cut.load_codebook_indexes().shape[1] == 8 for cut in labelled)
    assert json.loads((exp / "quantizer/mvq/quantizer.pt.json").read_text())["layer"] == 36
    assert len(CutSet.from_file(data / "noise/noise.jsonl.gz").to_eager()) == 4

    results = json.loads((exp / "results.json").read_text())
    rows = results["students"]
    assert [(row["distillation"], row["streaming"], row["epochs"]) for row in rows] == [
        ("none", False, 2),
        ("none", False, 1),
        ("mvq", True, 2),
        ("mvq", True, 1),
    ]
    assert rows[2]["origin"]["confs"] == rows[3]["origin"]["confs"] != rows[1]["origin"]["confs"]
    assert len((exp / "report/table.md").read_text().splitlines()) > 5
    rows = rows[::2]
    assert "chunk-16-left-64-right-9" in rows[1]["decoding"]
    assert "chunk" not in rows[0]["decoding"]
    assert set(results["teacher"]["wer"]) == {"test-clean", "test-other"}
    assert results["quantizer"]["num_codebooks"] == 8
    for student, row in zip(STUDENTS, rows):
        settings = json.loads((exp / student / "settings.json").read_text())
        assert settings["data"]["noise"]["manifest"].endswith("noise/noise.jsonl.gz")
        for part in ("test-clean", "test-other"):
            said = utterances(tree / part)
            assert row["test_sets"][part]["words"] == sum(len(t.split()) for t in said.values())
            of_epochs = (exp / student / "modified_beam_search").glob(f"recogs-{part}-*.txt")
            recogs, _ = sorted(of_epochs)
            lines = recogs.read_text().splitlines()
            assert sum("ref=" in line for line in lines) == len(said)
            assert all(any(name in line for line in lines) for name in said)
    assert (exp / "report/index.html").exists()

    before = files_under(data, exp)
    again = run_sh(folder / "recipe", *options, cwd=folder)
    assert again.returncode == 0 and begun_steps(again) == [], again.stderr
    assert files_under(data, exp) == before


def test_960_hours_are_all_training_parts(call, monkeypatch):
    folder, options = call
    options = ["--corpus", "librispeech-960", *options[2:], "--students", "mvq"]
    done = run_sh(folder / "recipe", *options, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    monkeypatch.chdir(folder / "recipe")  # manifests name files from there
    labelled = CutSet.from_file("data/librispeech-960/labels/mvq/train.jsonl.gz").to_eager()
    said = [utterances(part) for part in (folder / "copy/LibriSpeech").glob("train-*")]
    assert len(said) == 3
    recordings = {cut.recording_id.split("_sp")[0] for cut in labelled}
    assert recordings == {name for of_part in said for name in of_part}
    assert len(labelled) == 3 * len(recordings)
    results = json.loads(Path("exp/librispeech-960/results.json").read_text())
    assert [row["distillation"] for row in results["students"][::2]] == ["mvq"]
    assert Path("exp/librispeech-960/report/index.html").exists()


def test_a_part_is_fetched_and_learned_from_without_its_transcripts(call, monkeypatch):
    folder, options = call
    options = [*options, "--untranscribed-parts", "train-clean-360", "--students", "streaming-mvq"]
    options += ["--stop-stage", "6"]
    done = run_sh(folder / "recipe", *options, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    monkeypatch.chdir(folder / "recipe")  # manifests name files from there
    more = CutSet.from_file(f"{UNTRANSCRIBED}/labels/mvq/train-clean-360/cuts.jsonl.gz").to_eager()
    # At their own speed alone.
    assert len(more) == len(utterances(folder / "copy/LibriSpeech/train-clean-360")) > 0
    assert all(cut.load_codebook_indexes().shape[1] == 8 for cut in more)
    exp = folder / "recipe/exp/librispeech-100/streaming-mvq-and-untranscribed"
    settings = json.loads((exp / "settings.json").read_text())
    assert settings["untranscribed_manifests"] == [
        f"{UNTRANSCRIBED}/labels/mvq/train-clean-360/cuts.jsonl.gz"
    ]
    again = run_sh(folder / "recipe", *options, cwd=folder)
    assert again.returncode == 0 and begun_steps(again) == [], again.stderr
