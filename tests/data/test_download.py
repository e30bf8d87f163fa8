"""Downloads against a server on this machine that cuts, ignores, refuses and changes."""

import gzip
import hashlib
import io
import socket
import subprocess
import sys
import tarfile

import pytest

from mvqkd.data.download import download, extract_files
from mvqkd.errors import RecipeError
from tests.data.server import serving

BODY = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server():
    with serving(BODY) as server:
        yield server


def fetch(server, path, sha256=SHA256, **options):
    return download(server.url, path, sha256, False, **{"pause": 0, "timeout": 10, **options})


def test_whole_file_is_written_once(server, tmp_path):
    path = fetch(server, tmp_path / "new" / "file")
    assert path.read_bytes() == BODY
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    fetch(server, path)
    assert len(server.seen) == 1


FETCH = """
import sys
from mvqkd.data.download import download
sys.stdin.read(1)  # all at once
download(*sys.argv[1:], False, pause=0)
"""


def test_several_processes_fetch_one_file(server, tmp_path):
    """One does, over a connection that breaks, and the others find it whole."""
    server.cuts, server.cut_at = 3, 200_000
    command = [sys.executable, "-c", FETCH, server.url, str(tmp_path / "file"), SHA256]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)
    ]
    for process in started:
        process.stdin.write(b".")
        process.stdin.flush()
    for process in started:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert (tmp_path / "file").read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert server.seen == [None, *(f"bytes={n}00000-" for n in (2, 4, 6))]


@pytest.mark.parametrize("chunked", [False, True])
def test_cut_connection_resumes(server, tmp_path, chunked):
    server.cuts, server.chunked = 2, chunked
    assert fetch(server, tmp_path / "file").read_bytes() == BODY
    assert server.seen == [None, "bytes=300000-", "bytes=600000-"]


def test_cuts_beyond_the_limit_still_arrive_while_bytes_come(server, tmp_path):
    server.cuts, server.cut_at = 20, 50_000
    assert fetch(server, tmp_path / "file", attempts=2).read_bytes() == BODY


def test_part_of_an_earlier_run_is_kept_and_continued(server, tmp_path):
    server.cuts, server.cut_at = 2, 300_000
    with pytest.raises(RecipeError, match="cut after 300000 of 1048576 bytes"):
        fetch(server, tmp_path / "file", attempts=1)
    assert not (tmp_path / "file").exists()
    server.cuts = 0
    assert fetch(server, tmp_path / "file").read_bytes() == BODY
    assert server.seen[-1] == "bytes=300000-"


def test_server_without_ranges_starts_over(server, tmp_path):
    server.cuts, server.ranges = 1, False
    assert fetch(server, tmp_path / "file").read_bytes() == BODY


def test_server_without_ranges_that_always_cuts_is_given_up(server, tmp_path):
    server.cuts, server.ranges = 100, False
    with pytest.raises(RecipeError, match=r"cut after .* \(3 attempts in a row\); pass a copy"):
        fetch(server, tmp_path / "file", attempts=3, remedy="pass a copy")
    assert len(server.seen) <= 4


def test_file_changed_on_the_server_starts_over(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    (tmp_path / "file.part.etag").write_text('"older"')
    assert fetch(server, tmp_path / "file", sha256=None).read_bytes() == BODY


@pytest.mark.parametrize("length", [1000, len(BODY), len(BODY) + 5])
def test_foreign_part_is_caught_by_the_checksum(server, tmp_path, length):
    (tmp_path / "file.part").write_bytes(b"x" * length)
    assert fetch(server, tmp_path / "file").read_bytes() == BODY


def test_wrong_checksum_names_both_and_leaves_nothing(server, tmp_path):
    with pytest.raises(RecipeError, match=f"{SHA256}, not {'0' * 64}"):
        fetch(server, tmp_path / "file", sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_file_with_wrong_checksum_is_fetched_again(server, tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    assert fetch(server, tmp_path / "file").read_bytes() == BODY


def test_busy_server_is_asked_again(server, tmp_path):
    server.answers = [503, 429]
    assert fetch(server, tmp_path / "file").read_bytes() == BODY


def test_missing_file_is_final(server, tmp_path):
    server.answers = [404, 404]
    with pytest.raises(RecipeError, match=r"answers 404 Not Found; pass a copy"):
        fetch(server, tmp_path / "file", remedy="pass a copy")
    assert len(server.seen) == 1


def test_no_server_is_one_line(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/file"
        with pytest.raises(RecipeError, match=r"cannot be reached \(.*refused.*\)") as error:
            download(url, tmp_path / "file", None, False, attempts=2, pause=0)
    assert url in str(error.value) and "\n" not in str(error.value)


def test_silent_server_times_out(server, tmp_path):
    server.mute = True
    with pytest.raises(RecipeError, match="the server fell silent"):
        fetch(server, tmp_path / "file", timeout=0.05, attempts=2)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "nonsense", "ftp://127.0.0.1/x"])
def test_url_of_another_kind_is_refused(url, tmp_path):
    with pytest.raises(RecipeError, match="give a URL that begins with http"):
        download(url, tmp_path / "file", None, False, pause=0)


def test_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RecipeError, match="taken"):
        fetch(server, tmp_path / "taken" / "file")


def make_tar(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_archive_cannot_write_outside(tmp_path):
    members = [("top/a.wav", b"a"), ("../../b.wav", b"b"), ("/tmp/c.wav", b"c"), ("l.wav", None)]
    archive = make_tar(tmp_path / "x.tar.gz", [*members, ("top/readme", b"no")])
    folder = extract_files(archive, tmp_path / "deep" / "down", r".*\.wav")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        "a.wav": b"a",
        "b.wav": b"b",
        "c.wav": b"c",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "x.tar.gz"]


def broken_archives():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo("a.wav")
        info.size = len(BODY)
        tar.addfile(info, io.BytesIO(BODY))
    whole = buffer.getvalue()
    yield "cut", whole[: len(whole) // 2]
    yield "not-tar", b"<html>sorry</html>"
    yield "not-tar-inside", gzip.compress(b"sorry")
    yield "empty", b""


@pytest.mark.parametrize("content", [pytest.param(c, id=n) for n, c in broken_archives()])
def test_broken_archive_is_removed_and_named(tmp_path, content):
    archive = tmp_path / "x.tar.gz"
    archive.write_bytes(content)
    with pytest.raises(RecipeError, match=r"x\.tar\.gz: cannot be unpacked .*run again"):
        extract_files(archive, tmp_path / "out", r".*\.wav")
    assert list(tmp_path.iterdir()) == []


def test_archive_without_matches_or_with_twins(tmp_path):
    with pytest.raises(RecipeError, match="holds no file named like"):
        extract_files(make_tar(tmp_path / "x.tar.gz", [("a", b"")]), tmp_path / "out", r"b")
    twins = make_tar(tmp_path / "x.tar.gz", [("p/a", b"1"), ("q/a", b"2")])
    with pytest.raises(RecipeError, match="cannot be unpacked"):
        extract_files(twins, tmp_path / "out", r"a")
