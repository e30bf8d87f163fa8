"""benchmarks/quantizer: rows, tables, and runs that are killed and gone on with, at tiny sizes."""

import json
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from multi_quantization import QuantizerTrainer as PeerTrainer

from benchmarks.quantizer import codecs, exactness, run, time_to_rrl
from benchmarks.quantizer.rows import Row, markdown_table
from mvqkd.errors import RecipeError
from tests.quantizer.peer import frames_for, pair

TINY = partial(codecs._ours, rounds=0, lsq_iters=0, logits_iters=1)


class _KilledError(Exception):
    pass


@pytest.fixture(autouse=True)
def threads():
    """Put back what the benchmarks set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A folder of eight recordings of a second: tones of a quarter in another order each."""
    folder, rng = tmp_path_factory.mktemp("recordings"), np.random.default_rng(0)
    for number in range(8):
        pitch = np.repeat(rng.permutation([250, 600, 1300, 2900]), 2000)
        tones = 0.3 * np.sin(2 * np.pi * pitch * np.arange(8000) / 8000)
        soundfile.write(folder / f"{number}.wav", tones + 0.01 * rng.standard_normal(8000), 8000)
    return folder


def test_rows_that_need_a_gpu_read_not_measured_without_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run.main(["--only", "encode-rate-gpu", "train-step-gpu", "--out-dir", str(tmp_path)])
    table = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out == table
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == 3 and len(table.splitlines()) == 5
    for row, line in zip(rows, table.splitlines()[2:]):
        assert row["device"] == "cuda" and row["ours"] is row["floor_rate"] is None
        assert line.count("not measured") >= 4 and row["floor"] in line


def test_markdown_table():
    row = Row("encode", "cpu", "frames/s", 12345.6, "peer", 86.04, 143.5, 1.2345, "a product", None)
    assert markdown_table([row]).splitlines() == [
        "| what | device | unit | ours | peer | ratio | ratio, CPU time | floor | rate |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| encode | cpu | frames/s | 12,346 | peer: 86 | 144x | 1.23x | a product | not measured |",
    ]


def table(folder):
    return (folder / "table.md").read_text()


def _codecs(recordings, out_dir, *more):
    codecs.main(
        [
            *("--recordings", str(recordings), "--out-dir", str(out_dir)),
            *("--frames", "fbank", "--bytes", "1", "2", *more),
        ]
    )


def _here(*job):
    """As `codecs.measure_apart`, without the seconds that a process of its own takes to start."""
    found = []
    codecs._measure_or_say(*job, SimpleNamespace(send=found.append))
    return found[0]


def test_codecs_go_on_where_they_were_killed(recordings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(codecs, "codecs", lambda peer_steps: {"ours, tiny": TINY})
    asked = []

    def dies(*job):
        if len(asked) == 1:
            raise _KilledError
        asked.append(job[2])
        return _here(*job)

    monkeypatch.setattr(codecs, "measure_apart", dies)
    with pytest.raises(_KilledError):
        _codecs(recordings, tmp_path)
    (first,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert first["num_bytes"] == 1 and "ours, tiny" in (tmp_path / "table.md").read_text()

    monkeypatch.setattr(codecs, "measure_apart", lambda *job: asked.append(job[2]) or _here(*job))
    for _ in range(2):
        _codecs(recordings, tmp_path)
    assert asked == [1, 2]
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["results"][0] == first and document["frames"]["fbank-train"][1] == 400
    assert [result["num_bytes"] for result in document["results"]] == [1, 2]
    assert all(0 < result["rrl"] < 1 for result in document["results"])
    assert capsys.readouterr().out.endswith(table(tmp_path))
    assert (tmp_path / "codecs.png").read_bytes().startswith(b"\x89PNG")
    names = ["codecs.png", "results.json", "table.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with pytest.raises(RecipeError, match="made with seed 0, this run with 1; give another --out"):
        _codecs(recordings, tmp_path, "--seed", "1")


def _raises(*_):
    raise ValueError("too few frames")


def _ends(*_):
    os._exit(3)


def test_a_codec_that_fails_gets_a_line_and_stops_no_other(
    recordings, tmp_path, monkeypatch, capsys
):
    found = {"bad": _raises, "ours, tiny": TINY}
    monkeypatch.setattr(codecs, "codecs", lambda peer_steps: found)
    monkeypatch.setattr(codecs, "measure_apart", _here)
    with pytest.raises(RecipeError, match=r"2 codecs failed \(bad at 1 bytes, bad at 2 bytes\)"):
        _codecs(recordings, tmp_path)
    said = capsys.readouterr().err
    assert "filterbanks, 10 x 40, bad at 1 bytes: failed, ValueError: too few frames\n" in said
    assert table(tmp_path).count("ours, tiny") == 2 and "bad" not in table(tmp_path)


def test_a_codec_whose_process_ends_is_told(tmp_path):
    for name in ("train", "unseen"):
        np.save(tmp_path / f"{name}.npy", np.zeros((8, 4), np.float32))
    paths = (tmp_path / "train.npy", tmp_path / "unseen.npy")
    assert codecs.measure_apart(_ends, paths, 1, 0, 1) == "its process ended with 3"


def test_the_peer_at_some_numbers_of_bytes_alone(recordings, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        codecs, "measure_apart", lambda *job: asked.append(job[2]) or (0.5, 1, 1, 1, 1, 1)
    )
    peer = ["--only", "multi", "--peer-steps", "5", "--peer-bytes", "2"]
    _codecs(recordings, tmp_path, *peer)
    assert asked == [2]
    assert "multi_quantization, 5 + 5 steps" in table(tmp_path)


def test_fewer_than_two_recordings_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="fewer than 2 WAV files; name another folder"):
        _codecs(tmp_path, tmp_path / "out")


def test_indexes_beside_the_peers_on_real_frames(recordings, capsys, monkeypatch):
    monkeypatch.setattr(exactness, "train_briefly", lambda frames, seed, n: pair(n, 16, 192)[0])
    options = ["--recordings", str(recordings), "--codebooks", "2", "16", "--frames", "40"]
    exactness.main(options)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[0], row[1], row[4]) for row in rows] == [("2", "40", "0"), ("16", "20", "0")]


def test_what_is_no_tie_is_counted(monkeypatch):
    ours, _ = pair(4, 16)
    frames = frames_for(ours, 50)
    assert exactness.compare(ours, frames) == [(0, 0, 0)] * 6
    right = ours.encode
    monkeypatch.setattr(ours, "encode", lambda x, *options, **more: right(x, *options, **more) ^ 1)
    first, *others = exactness.compare(ours, frames)
    assert first == (50, 50, 50) and others == [(50, 0, 0)] * 5


def test_time_to_rrl_goes_on_where_it_was_killed(recordings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(time_to_rrl, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(time_to_rrl, "OURS", {"tiny": {"lsq_iters": 1, "logits_iters": 1}})

    def measure(folder):
        time_to_rrl.main(
            [
                *("--recordings", str(recordings), "--out-dir", str(folder)),
                *("--dim", "32", "--bytes", "1", "--peer-steps", "4", "--unseen-frames", "50"),
            ]
        )
        return json.loads((folder / "results.json").read_text())

    whole = measure(tmp_path / "whole")
    real_step = PeerTrainer.step
    for kill_at in (3, 7):

        def dies(self, x, kill_at=kill_at):
            if self.cur_iter == kill_at:
                raise _KilledError
            real_step(self, x)

        monkeypatch.setattr(PeerTrainer, "step", dies)
        with pytest.raises(_KilledError):
            measure(tmp_path / "killed")
    monkeypatch.setattr(PeerTrainer, "step", real_step)
    found = measure(tmp_path / "killed")
    assert "peer: goes on at step 7" in capsys.readouterr().err
    assert found["peer"]["rrl"] == whole["peer"]["rrl"]
    (row,) = found["rows"]
    assert row["ratio"] == found["peer"]["seconds"] / found["ours"]["tiny"]["reached"]["seconds"]
    assert found["ours"]["tiny"]["reached"]["rrl"] <= found["peer"]["rrl"]["5"]
    assert "multi_quantization 0.1.1, 4 + 4 steps" in table(tmp_path / "killed")
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [
        "results.json",
        "table.md",
    ]

    # Done: nothing is trained again.
    monkeypatch.setattr(time_to_rrl, "train_peer", None)
    monkeypatch.setattr(time_to_rrl, "train_ours", None)
    assert measure(tmp_path / "killed") == found
    document = {**found, "ours": {"tiny": {**found["ours"]["tiny"], "reached": None}}}
    (row,) = time_to_rrl.make_rows(document)
    assert row.ours is None and "not reached" in row.what
    with pytest.raises(RecipeError, match="--dim: 40 is not a multiple of 32"):
        time_to_rrl.main(["--recordings", "a", "--out-dir", "b", "--dim", "40"])
