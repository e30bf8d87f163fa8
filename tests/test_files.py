import errno
import fcntl
import os
import platform
import subprocess
import sys
import threading
import time

import pytest

from mvqkd.errors import RecipeError
from mvqkd.files import locked, read_json, read_json_lines, require, written_aside


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


def test_read_json(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(RecipeError, match=r"a\.json: no such file or folder; run it$"):
        read_json(path, "run it")
    for damaged, cause in [
        (b"", "empty; run it"),
        (b'{"a": [1,', "JSONDecodeError: .*; remove it, then run it"),
        (b"\xff\xfe", "UnicodeDecodeError: .*; remove it, then run it"),
        (b"[1]", "ValueError: list, not an object.*; remove it, then run it"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(RecipeError, match=rf"a\.json: .*{cause}$"):
            read_json(path, "run it")
    with pytest.raises(RecipeError, match=r"; copy it$"):
        read_json(path, "run it", "copy it")
    with pytest.raises(RecipeError, match="IsADirectoryError"):
        read_json(tmp_path, "run it")
    path.write_text('{"a": "ä"}', encoding="utf-8")
    assert read_json(path, "run it") == {"a": "ä"}


def test_read_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(RecipeError, match=r"a\.jsonl: no such file or folder; run it$"):
        read_json_lines(path, "run it")
    path.write_text('{"a": 1}\n{"a": ')
    with pytest.raises(RecipeError, match=r"a\.jsonl: a line .*JSONDecodeError: .*; run it$"):
        read_json_lines(path, "run it")
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert read_json_lines(path, "run it") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("has_links", [True, False])
def test_first_stays(tmp_path, monkeypatch, has_links):
    def no_links(source, target):
        raise PermissionError

    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "name"
    for content in ("first", "second"):
        with written_aside(path, first_stays=True) as aside:
            aside.write_text(content)
    with written_aside(tmp_path / "other", first_stays=True) as aside:
        aside.write_text("late")
        (tmp_path / "other").write_text("written meanwhile")
    assert path.read_text() == "first"
    assert (tmp_path / "other").read_text() == "written meanwhile"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["name", "other"]


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    path = tmp_path / "name"
    with pytest.raises(RecipeError) as caught, written_aside(path) as aside:
        aside.write_text("half")
        raise OSError(errno.ENOSPC, "whatever the library says\nin lines")
    assert str(caught.value) == (
        f"{path}: cannot be written (No space left on device); make room on that disk and start "
        "again: what is done is kept"
    )
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="Input/output"), written_aside(path):
        raise OSError(errno.EIO, "Input/output error")


def test_lock_is_held_and_given_back(tmp_path):
    path = tmp_path / "deep/lock"
    with locked(path), path.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_lock_that_does_not_stay_is_held_by_one_at_a_time(tmp_path):
    path, inside, most = tmp_path / "lock", [], []

    def take():
        for _ in range(50):
            with locked(path, stays=False):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0)
                inside.pop()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 200 and set(most) == {1} and list(tmp_path.iterdir()) == []


def test_without_locks_of_the_file_system(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", flock)
    for stays in (True, False):
        with locked(tmp_path / "lock", stays):
            pass
        assert (tmp_path / "lock").exists() == stays
