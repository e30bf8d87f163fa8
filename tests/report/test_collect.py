"""What the report gathers, and what its rows are called."""

import json
import shutil

import pytest
import torch

from mvqkd.data.labels import (
    FIELD,
    CodebookIndexes,
    Dumper,
    Embeddings,
    LabelSettings,
    dump_labels,
)
from mvqkd.errors import RecipeError
from mvqkd.report.collect import collect_results, kind_of, label_bytes_per_hour, read_log
from mvqkd.report.table import (
    read_document,
    read_results,
    results_document,
    write_results_json,
)


@pytest.mark.parametrize(
    ("settings", "name", "fields"),
    [
        ({"kind": "none"}, "none", []),
        ({"kind": "mvq"}, "mvq", [FIELD]),  # of a run before there were further terms
        ({"kind": "mvq", "in_loop": False, "more": []}, "mvq", [FIELD]),
        ({"kind": "l2", "in_loop": True, "more": []}, "l2 in loop", []),
        (
            {"kind": "mvq", "in_loop": True, "more": [{"kind": "l2", "in_loop": None}]},
            "mvq in loop + l2 in loop",
            [],
        ),
        (
            {"kind": "mvq", "in_loop": False, "more": [{"kind": "mvq-l2", "in_loop": True}]},
            "mvq + mvq-l2 in loop",
            [FIELD],
        ),
        (
            {"kind": "mvq", "field": "layer4", "more": [{"kind": "l1"}]},
            "mvq + l1",
            ["layer4", "embeddings"],
        ),
        ({"kind": "l2", "forgotten_key": 1}, "l2", ["embeddings"]),
    ],
)
def test_kinds_of_all_terms(settings, name, fields):
    assert kind_of(settings) == (name, set(fields))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bytes_of_the_fields_that_a_student_learned(
    feature_cuts, teacher, quantizer, origin, tmp_path, dtype
):
    kinds = [
        CodebookIndexes(teacher, quantizer, origin, refine_iters=1),
        Embeddings(teacher, 1, dtype, "embeddings"),
    ]
    folders = [tmp_path / "both", tmp_path / "indexes"]
    for folder, chosen in zip(folders, (kinds, kinds[:1])):
        dumper = Dumper(chosen, LabelSettings(), torch.device("cpu"))
        cuts = dump_labels(feature_cuts, folder / "train.jsonl.gz", dumper, 5)
    both = label_bytes_per_hour(folders[0], {FIELD, "embeddings"})
    indexes = label_bytes_per_hour(folders[0], {FIELD})
    assert indexes + label_bytes_per_hour(folders[0], {"embeddings"}) == pytest.approx(both)
    hours = sum(cut.duration for cut in cuts) / 3600
    frames = sum(cut.custom[FIELD].num_frames for cut in cuts)
    # What is in the files beside the arrays is shared, and those of so few frames are mostly that.
    alone = label_bytes_per_hour(folders[1], {FIELD})
    assert frames * 4 < indexes * hours < 1.5 * alone * hours
    assert indexes < both / 2
    with pytest.raises(RecipeError, match=r"train.jsonl.gz: its cuts have no embeddings"):
        label_bytes_per_hour(folders[1], {"embeddings"})
    # Labels that are made again are read again.
    shutil.copytree(folders[0], folders[1], dirs_exist_ok=True)
    assert label_bytes_per_hour(folders[1], {"embeddings"}) > 0


def test_published_labels_have_no_teacher_here(labelled_cuts, origin, tmp_path):
    (tmp_path / "labels/published").mkdir(parents=True)
    labelled_cuts.to_file(tmp_path / "labels/published/train.jsonl.gz")
    (tmp_path / "stamps").mkdir()
    (tmp_path / "stamps/labels-published").write_text("0123456789abcdef\n")
    command = "./run.sh --use-extracted-codebook true"
    rows, other = collect_results(tmp_path, tmp_path, "published", [], command, published=True)
    assert rows == [] and set(other) == {"labels"}
    assert other["labels"]["made_by"] == f"{origin.quantizer} of layer 2 of tiny"
    assert other["labels"]["origin"]["conf_hash"] == "0123456789ab"
    write_results_json(tmp_path / "results.json", results_document(rows, other))


@pytest.fixture
def exp_dir(tmp_path):
    """What the stages leave of a streaming student that was not distilled."""
    exp = tmp_path / "exp"
    heard = [["one", ["a", "b"], ["a"]], ["two", ["a", "b"], ["a", "b"]]]
    test_set = {"rtf": 0.1, "results": heard}
    documents = {
        "none/settings.json": {
            "distillation": {"kind": "none"},
            "device": "cpu",
            "training": {"seed": 1, "num_epochs": 3},
        },
        "none/log.jsonl": {"kind": "train", "step": 50, "epoch": 3, "seconds": 100, "loss": 1.0},
        "none/decoded.json": {
            "setting": "greedy",
            "streaming": True,
            "num_params": 9,
            "test_sets": {"test": test_set},
        },
        "teacher-wer/wer.json": {"wer": {"test": 9.0}, "device": "cpu"},
        "quantizer/mvq/diagnostics.json": {
            "rrl": {"0": 0.3},
            "num_codebooks": 2,
            "device": "cpu",
            "seed": 0,
        },
    }
    for name, document in documents.items():
        (exp / name).parent.mkdir(parents=True, exist_ok=True)
        (exp / name).write_text(json.dumps(document) + "\n")
    (exp / "stamps").mkdir()
    for step in ("decode-none", "verify-teacher", "quantizer-mvq"):
        (exp / "stamps" / step).write_text("0123456789abcdef\n")
    return exp


def collect(exp_dir):
    return collect_results(exp_dir, exp_dir, "mvq", ["none"], "./run.sh")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}) + "\n")


@pytest.mark.parametrize(
    ("name", "missing", "damaged"),
    [
        ("teacher-wer/wer.json", "run stage 2", "remove {}/stamps/verify-teacher, .* stage 2"),
        ("none/settings.json", "run stage 6", "remove {}/stamps/student-none, .* stage 6"),
        ("none/log.jsonl", "stage 6", "remove {}/stamps/student-none, .* stage 6"),
        ("none/decoded.json", "run stage 7", "remove it, then run stage 7"),
        ("quantizer/mvq/diagnostics.json", "run stage 4", "remove it, then run stage 4"),
    ],
)
def test_what_is_missing_or_damaged_is_said_with_its_stage(exp_dir, name, missing, damaged):
    (exp_dir / name).write_text('{"a": 1, ')
    with pytest.raises(
        RecipeError, match=f"{name}: .*JSONDecodeError.*; {damaged}".format(exp_dir)
    ):
        collect(exp_dir)
    (exp_dir / name).unlink()
    with pytest.raises(RecipeError, match=f"{name}: no such file or folder; .*{missing}$"):
        collect(exp_dir)


def test_other_weights_have_rows_of_their_own(exp_dir):
    shutil.copytree(exp_dir / "none", exp_dir / "mvq")
    (exp_dir / "stamps/decode-mvq").write_text("aaaa\n")
    change(exp_dir / "mvq/settings.json", distillation={"kind": "mvq", "in_loop": True})
    document = json.loads((exp_dir / "none/decoded.json").read_text())
    heard = [["one", ["a", "b"], ["a", "b"]], ["two", ["a", "b"], ["a", "b"]]]
    other = {**document, "setting": "greedy-epoch-2", "decoding": {"epoch": 2, "avg": 1}}
    better = {**other, "test_sets": {"test": {"rtf": 0.1, "results": heard}}}
    change(exp_dir / "none/decoded.json", more=[other])
    change(exp_dir / "mvq/decoded.json", more=[better])
    rows, _ = collect_results(exp_dir, exp_dir, "mvq", ["none", "mvq"], "./run.sh")
    assert [(row.epochs, row.weights, row.decoding) for row in rows] == 2 * [
        (3, "", "greedy"),
        (2, "epoch-2-avg-1", "greedy-epoch-2"),
    ]
    deltas = [row.test_sets["test"].delta for row in rows]
    assert deltas == [None, None, 0.0, -25.0]
    assert rows[1].training_seconds is rows[1].steps is rows[1].step_seconds is None


def test_time_of_a_step_leaves_decoding_of_dev_out(exp_dir):
    # Of a version that did not tell how long that took.
    assert collect(exp_dir)[0][0].step_seconds == 100 / 50
    entries = [
        {"kind": "train", "step": 50, "epoch": 1, "seconds": 100, "loss": 1.0},
        {"kind": "dev", "step": 50, "epoch": 1, "seconds": 110, "took": 10, "wer-dev": 1.0},
        {"kind": "dev", "step": 100, "epoch": 2, "seconds": 220, "took": 20, "wer-dev": 1.0},
    ]
    (exp_dir / "none/log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    (row,), _ = collect(exp_dir)
    assert (row.training_seconds, row.step_seconds) == (220, 190 / 100)
    assert read_log(exp_dir / "none")[1]["losses"] == {"dev/wer-dev": 1.0}


def test_document_holds_what_the_report_shows(exp_dir):
    # Of a version before there was more.
    rows, other = collect(exp_dir)
    assert rows[0].test_sets["test"].emission_delay is None
    assert other["teacher"]["name"] is None and other["teacher"]["layer"] is None
    assert set(other["quantizer"]) == {"rrl", "num_codebooks", "origin"}

    delay = {"tokens": 3, "mean": 0.04, "p90": 0.08, "shown": 0.5}
    decoded = json.loads((exp_dir / "none/decoded.json").read_text())
    decoded["test_sets"]["test"]["emission_delay"] = delay
    change(exp_dir / "none/decoded.json", **decoded)
    facts = {"teacher": "hubert", "layer": 5, "dim": 4, "frame_shift": 0.02}
    (exp_dir / "quantizer/mvq/quantizer.pt.json").write_text(json.dumps(facts))
    use = {"entropy_bits": [7.5, 7.9], "entropy_bits_max": 8.0, "dead_entries": [3, 0]}
    change(exp_dir / "quantizer/mvq/diagnostics.json", **use, index_counts=[[1], [2]])
    path = exp_dir / "results.json"
    write_results_json(path, results_document(*collect(exp_dir)))
    document = read_document(path)
    assert document["students"][0]["test_sets"]["test"]["emission_delay"] == delay
    assert use.items() <= document["quantizer"].items()
    assert "index_counts" not in document["quantizer"]
    assert (document["teacher"]["name"], document["teacher"]["layer"]) == ("hubert", 5)
    assert document["teacher"]["embedding_bytes_per_hour"] == 4 * 4 * 50 * 3600
    assert read_results(path) == collect(exp_dir)[0]
