"""local/prepare_noise.py: MUSAN by lhotse's downloader, from a server on this machine."""

import io
import tarfile
from functools import partial

import numpy as np
import pytest
import soundfile
from lhotse import CutSet

from local import prepare_noise
from mvqkd.errors import RecipeError
from tests.data.server import serving


@pytest.fixture
def server(monkeypatch):
    sound, packed = io.BytesIO(), io.BytesIO()
    noise_L = 0.1 * np.random.default_rng(1).standard_normal(16000)
    soundfile.write(sound, noise_L, 16000, format="WAV")
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        info = tarfile.TarInfo("musan/noise/free-sound/a.wav")
        info.size = sound.tell()
        sound.seek(0)
        archive.addfile(info, sound)
    with serving(packed.getvalue()) as server:
        there = partial(prepare_noise.download_musan, url=server.url)
        monkeypatch.setattr(prepare_noise, "download_musan", there)
        yield server


def test_musan_is_downloaded_and_goes_on_where_it_was_cut(server, tmp_path):
    settings = prepare_noise.Settings(
        tmp_path / "noise", download_dir=tmp_path / "download", seconds=0.5, num_workers=1
    )
    server.cuts, server.cut_at = 1, 2000
    with pytest.raises(RecipeError, match=r"musan\.tar\.gz: cut short or damaged .* run again"):
        prepare_noise.main(settings)
    assert not settings.out_dir.exists()
    prepare_noise.main(settings)
    prepare_noise.main(settings)
    assert server.seen == ["bytes=0-", "bytes=2000-"]
    cuts = CutSet.from_file(settings.out_dir / "noise.jsonl.gz").to_eager()
    assert [cut.duration for cut in cuts] == [0.5, 0.5] and cuts[0].has_features
    server.answers = [503]
    settings.download_dir = tmp_path / "elsewhere"
    with pytest.raises(RecipeError, match=r"503.*or --noise-dir none"):
        prepare_noise.main(settings)
