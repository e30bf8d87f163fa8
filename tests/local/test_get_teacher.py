"""local/get_teacher.py and the conf files that it reads."""

import json
import re
import shutil

import pytest
import yaml

from local import get_teacher, sample_embeddings
from mvqkd import cli
from mvqkd.errors import RecipeError
from mvqkd.teachers import hub, load_teacher
from tests.conftest import ROOT

CONFS = sorted((ROOT / "conf/teacher").glob("*.yaml"))
CHECKPOINT = ROOT / "tests/golden/fairseq/hubert_large_tiny_ctc.pt"


@pytest.mark.parametrize("conf", CONFS, ids=lambda path: path.stem)
def test_conf_names_a_teacher_and_a_layer(conf):
    args = ["--config", str(conf)]
    settings, _ = cli.parse(get_teacher.Settings, [*args, "--out_dir", "out"])
    sample, _ = cli.parse(
        sample_embeddings.Settings,
        [*args, "--teacher", "exp/teacher", "--train_manifest", "a", "--out", "b"],
    )
    values = yaml.safe_load(conf.read_text())
    assert sample.layer == settings.layer == values["layer"] >= 1
    if settings.teacher != "egs/mini/teacher":
        assert conf.stem == settings.teacher.partition("/")[2]
    assert settings.revision is None or re.fullmatch("[0-9a-f]{40}", settings.revision)
    # What belongs to the model is said by the model.
    assert set(values) <= {"teacher", "revision", "layer"}
    # run.sh reads it with sed.
    assert f"\nteacher: {settings.teacher}\n" in conf.read_text()


def test_one_conf_for_each_family():
    names = " ".join(path.stem for path in CONFS)
    for name in ("hubert-base", "hubert-large", "hubert-xlarge", "wavlm", "wav2vec2", "whisper"):
        assert name in names
    assert load_teacher(ROOT / "egs/mini/teacher").num_layers == 6


def test_checkpoint_becomes_a_folder(tmp_path):
    shutil.copy(CHECKPOINT, tmp_path / "a.pt")
    shutil.copy(CHECKPOINT.with_name("dict.ltr.txt"), tmp_path)
    out = tmp_path / "teacher"
    get_teacher.main(get_teacher.Settings(str(tmp_path / "a.pt"), out, layer=3))
    teacher = load_teacher(out)
    assert (teacher.dim, teacher.num_layers) == (48, 3) and teacher.vocabulary[5] == "E"
    assert teacher.name == str(tmp_path / "a.pt")


def test_revision_that_was_taken_is_noted(tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshots" / ("a" * 40)
    shutil.copytree(ROOT / "egs/mini/teacher", snapshot)
    monkeypatch.setattr(hub, "fetch", lambda name, revision: snapshot)
    get_teacher.main(get_teacher.Settings("lab/teacher", tmp_path / "teacher"))
    origin = json.loads((tmp_path / "teacher/origin.json").read_text())
    assert (origin["teacher"], origin["revision"]) == ("lab/teacher", "a" * 40)
    assert load_teacher(tmp_path / "teacher").name == f"lab/teacher@{'a' * 40}"


def test_layer_that_the_teacher_lacks(tmp_path):
    settings = get_teacher.Settings(str(CHECKPOINT), tmp_path / "teacher", layer=4)
    with pytest.raises(RecipeError, match=rf"teacher {CHECKPOINT}: layer 4 is not in 1\.\.3"):
        get_teacher.main(settings)
    assert not list(tmp_path.iterdir())


def test_folder_that_is_no_teacher_is_not_copied(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/large.bin").write_bytes(b"x")
    with pytest.raises(RecipeError, match=r"home/config\.json: no such file"):
        get_teacher.main(get_teacher.Settings(str(tmp_path / "home"), tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
