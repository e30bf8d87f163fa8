"""Files that are whole or not there."""

import os
import platform
import subprocess

import pytest

from mvqkd.errors import RecipeError
from mvqkd.files import require, written_aside


def test_file_appears_whole_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "new" / "cuts.jsonl.gz"
    for text in ("first", "second"):
        with written_aside(path) as aside:
            assert aside.name.endswith(".jsonl.gz")
            aside.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_folder_replaces_the_old_one(tmp_path):
    path = tmp_path / "folder"
    for name in ("a", "b"):
        with written_aside(path) as aside:
            aside.mkdir()
            (aside / name).write_text(name)
    assert [p.name for p in path.iterdir()] == ["b"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_failure_leaves_the_old_one(tmp_path, kind):
    path = tmp_path / "out"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), written_aside(path) as aside:
        aside.write_text("half") if kind == "file" else aside.mkdir()
        _ = 1 / 0
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    """Those of this path and of processes that are gone."""
    process = subprocess.Popen(["true"])
    process.wait()
    names = {
        "dead": f".part-{platform.node()}-{process.pid}-out",
        "alive": f".part-{platform.node()}-{os.getppid()}-out",
        "elsewhere": f".part-another-host-{process.pid}-out",
        "of another": f".part-{platform.node()}-{process.pid}-out2",
    }
    for name in names.values():
        (tmp_path / name).write_text("half")
    with written_aside(tmp_path / "out") as aside:
        aside.write_text("whole")
    del names["dead"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", *names.values()}


def test_require(tmp_path):
    with pytest.raises(RecipeError, match="no such file or folder; make it"):
        require(tmp_path / "none", "make it")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RecipeError, match="folder: empty; make it"):
        require(tmp_path / "folder", "make it")
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="file: empty; make it"):
        require(tmp_path / "file", "make it")
    (tmp_path / "file").write_text("x")
    assert require(tmp_path / "file", "make it") == tmp_path / "file"
