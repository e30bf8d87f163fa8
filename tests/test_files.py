import os
import platform
import subprocess
import sys

import pytest

from mvqkd.errors import RecipeError
from mvqkd.files import require, written_aside


def test_takes_its_place_on_success_only(tmp_path):
    path = tmp_path / "deep/name.jsonl.gz"
    with pytest.raises(KeyError), written_aside(path) as aside:
        aside.write_text("half")
        raise KeyError
    assert list(path.parent.iterdir()) == []
    with written_aside(path) as aside:
        assert aside.name.endswith(".jsonl.gz") and aside.parent == path.parent
        aside.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


def test_folder_replaces_folder(tmp_path):
    for number in range(2):
        with written_aside(tmp_path / "folder") as aside:
            aside.mkdir()
            (aside / str(number)).touch()
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["1"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    script = (
        "import os, sys\n"
        "from mvqkd.files import written_aside\n"
        "with written_aside(sys.argv[1]) as aside:\n"
        "    aside.write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / "a[1].pt"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script, path], check=False)
        left = list(tmp_path.iterdir())
        assert len(left) == 1 and left[0].name.startswith(".part-")
    # Another's file, a living process's and another machine's stay.
    others = [
        left[0].with_name(left[0].name.replace("a[1]", "b")),
        tmp_path / f".part-{platform.node()}-{os.getppid()}-a[1].pt",
        tmp_path / ".part-elsewhere-1-a[1].pt",
    ]
    for other in others:
        other.touch()
    with written_aside(path) as aside:
        aside.write_text("whole")
    assert set(tmp_path.iterdir()) == {path, *others}


def test_require(tmp_path):
    with pytest.raises(RecipeError, match="no such file or folder; look"):
        require(tmp_path / "gone", "look")
    with pytest.raises(RecipeError, match="empty; look"):
        require(tmp_path, "look")
    (tmp_path / "file").write_text("x")
    assert require(tmp_path / "file", "look") == tmp_path / "file"
