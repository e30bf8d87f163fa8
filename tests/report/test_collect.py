"""What the report gathers, and what its rows are called."""

import pytest

from mvqkd.report.collect import collect_results, kind_of
from mvqkd.report.table import results_document, write_results_json


@pytest.mark.parametrize(
    ("settings", "name", "stored"),
    [
        ({"kind": "none"}, "none", False),
        ({"kind": "mvq"}, "mvq", True),  # of a run before there were further terms
        ({"kind": "mvq", "in_loop": False, "more": []}, "mvq", True),
        ({"kind": "l2", "in_loop": True, "more": []}, "l2 in loop", False),
        (
            {"kind": "mvq", "in_loop": True, "more": [{"kind": "l2", "in_loop": None}]},
            "mvq in loop + l2 in loop",
            False,
        ),
        (
            {"kind": "mvq", "in_loop": False, "more": [{"kind": "mvq-l2", "in_loop": True}]},
            "mvq + mvq-l2 in loop",
            True,
        ),
    ],
)
def test_kinds_of_all_terms(settings, name, stored):
    assert kind_of(settings) == (name, stored)


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
