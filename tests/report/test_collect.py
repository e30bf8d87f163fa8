"""What the report gathers."""

from mvqkd.report.collect import collect_results
from mvqkd.report.table import results_document, write_results_json


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
