"""LibriSpeech by lhotse's downloader, from a server on this machine, and from a copy."""

import importlib
import io
import random
import tarfile
from functools import partial

import pytest

from mvqkd.errors import RecipeError
from tests.data.server import serving

# Not a name that `import` takes.
recipe = importlib.import_module("egs.librispeech-100.make_corpus")
PART = "dev-clean"
SOUND = random.Random(1).randbytes(5000)
NAME = f"LibriSpeech/{PART}/1/2/1-2-0000.flac"


@pytest.fixture
def server(monkeypatch):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        info = tarfile.TarInfo(NAME)
        info.size = len(SOUND)
        archive.addfile(info, io.BytesIO(SOUND))
    with serving(packed.getvalue()) as server:
        there = partial(recipe.download_librispeech, base_url=server.url)
        monkeypatch.setattr(recipe, "download_librispeech", there)
        yield server


@pytest.fixture
def make(tmp_path):
    """Calls the recipe; returns what is in the corpus."""

    def make(dl_dir=None):
        recipe.main(recipe.Settings(tmp_path / "corpus", [PART], dl_dir, tmp_path / "download"))
        return (tmp_path / "corpus" / PART / "1/2/1-2-0000.flac").read_bytes()

    return make


def test_download_goes_on_where_it_was_cut(server, make, tmp_path):
    server.cuts, server.cut_at = 1, 2000
    with pytest.raises(RecipeError, match=rf"{PART}\.tar\.gz: cut short or damaged .* run again"):
        make()
    assert not (tmp_path / "corpus").exists()
    assert make() == SOUND
    assert server.seen == ["bytes=0-", "bytes=2000-"]


def test_what_is_there_is_not_fetched_again(server, make, tmp_path):
    assert make() == make() == SOUND
    assert len(server.seen) == 1
    # Killed while it was unpacked.
    (tmp_path / "download/LibriSpeech" / PART / ".completed").unlink()
    assert make() == SOUND
    assert server.seen[1:] == [f"bytes={len(server.body)}-"]


def test_refused_download_says_how_to_go_on(server, make):
    server.answers = [503]
    with pytest.raises(RecipeError, match=r"503.*run again to resume, or pass --dl-dir"):
        make()
    assert make() == SOUND


@pytest.mark.parametrize("nested", ["LibriSpeech", "."])
def test_copy_is_taken_as_it_is(make, tmp_path, nested):
    path = tmp_path / "copy" / nested / PART / "1/2/1-2-0000.flac"
    path.parent.mkdir(parents=True)
    path.write_bytes(SOUND)
    assert make(tmp_path / "copy") == SOUND
    assert (tmp_path / "corpus").resolve() == path.parents[3]


def test_copy_without_a_part_is_refused(make, tmp_path):
    (tmp_path / "copy/dev-other").mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"copy must hold dev-clean, itself or in a folder"):
        make(tmp_path / "copy")
    assert not (tmp_path / "corpus").exists()
