"""Whether the confs of a run are those that are there now, by a toy run.sh."""

import pytest

from mvqkd.report.confs import conf_digests

RUN_SH = """#!/usr/bin/env bash
[[ "$*" == "--size small --dry-run true" ]] || { echo "run.sh: no such option" >&2; exit 1; }
cat >>"$mvqkd_plan" <<'END'
quantizer-mvq done python3 train_quantizer.py --config quantizer.yaml
student-none done python3 train.py --config student.yaml --config none.yaml --exp_dir exp/none
student-mvq todo python3 train.py --config student.yaml --config mvq.yaml --exp_dir exp/mvq
decode-none done python3 decode.py --config decoding.yaml
decode-mvq todo python3 decode.py --config decoding.yaml
report todo python3 report.py --config report.yaml
END
"""
COMMAND = "./run.sh --size small"


@pytest.fixture(autouse=True)
def recipe(tmp_path, monkeypatch):
    (tmp_path / "run.sh").write_text(RUN_SH)
    (tmp_path / "run.sh").chmod(0o755)
    for name in ("quantizer", "student", "none", "mvq", "decoding", "report"):
        (tmp_path / f"{name}.yaml").write_text(f"{name}: {{a: 1, b: [2]}}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(recipe, name, text):
    """The students whose digest is another once ``name`` holds ``text``."""
    before = conf_digests(COMMAND)
    assert set(before) == {"none", "mvq"}
    (recipe / f"{name}.yaml").write_text(text)
    after = conf_digests(COMMAND)
    return {student for student in before if before[student] != after[student]}


def test_students_differ():
    assert len(set(conf_digests(COMMAND).values())) == 2


@pytest.mark.parametrize("name", ["quantizer", "student", "none", "mvq", "decoding"])
def test_what_a_conf_says_counts_and_not_how(recipe, name):
    assert changed(recipe, name, f"# A comment.\n{name}:\n  b: [2]\n  a: 1  # one\n") == set()
    own = {name} if name in ("none", "mvq") else {"none", "mvq"}
    assert changed(recipe, name, f"{name}: {{a: 1, b: [3]}}\n") == own


def test_how_it_is_reported_does_not_count(recipe):
    assert changed(recipe, "report", "report: {a: 2}\n") == set()


def test_call_that_cannot_be_made_has_none(recipe):
    assert conf_digests("./run.sh --size large") == {}
    assert conf_digests("./gone.sh") == {}


def test_no_other_command_is_run(recipe):
    (recipe / "other.sh").write_text(f"touch was-run\n{RUN_SH}")
    assert conf_digests("bash other.sh") == {} and not (recipe / "was-run").exists()
