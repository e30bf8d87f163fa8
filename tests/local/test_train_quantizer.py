"""local/train_quantizer.py: what stage 4 leaves, also of a quantizer that it refuses."""

import json

import h5py
import numpy as np
import pytest

from local import train_quantizer
from mvqkd import cli
from mvqkd.errors import RecipeError
from mvqkd.quantizer import QuantizerSettings, load_quantizer
from tests.conftest import ROOT

LABELS = sorted(
    path
    for pattern in ("conf/labels/*/quantizer.yaml", "egs/*/conf/labels/*/quantizer.yaml")
    for path in ROOT.glob(pattern)
)

LSQ = {"lsq_iters": 1, "logits_iters": 2}
PAPER = {"trainer": "paper", "phase_one_iters": 2, "phase_two_iters": 2, "batch_size": 64}


def _settings(folder, frames, **quantizer):
    """Of stage 4, on frames of which the first hundred are unseen in training."""
    with h5py.File(folder / "embeddings.h5", "w") as file:
        for name, part in (("unseen", frames[:100]), ("train", frames[100:])):
            file[name] = part
            file[f"{name}-utterances"] = ["a", "b"]
            file[f"{name}-starts"] = [0, len(part) // 2]
        file.attrs.update(teacher="tiny", layer=2, frame_shift=0.02, frame_offset=0.0125)
    return train_quantizer.Settings(
        folder / "embeddings.h5", folder / "out", "cpu", QuantizerSettings(2, 16, **quantizer)
    )


def _frames(count=500, dim=6):
    return np.random.default_rng(0).standard_normal((count, dim)).astype(np.float32)


@pytest.mark.parametrize("beam", [0, 4])
def test_what_is_left(tmp_path, beam):
    train_quantizer.main(_settings(tmp_path, _frames(), beam=beam, **LSQ))
    names = ["diagnostics.json", "diagnostics.png", "quantizer.pt", "quantizer.pt.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    found = json.loads((tmp_path / "out/diagnostics.json").read_text())
    quantizer, meta = load_quantizer(tmp_path / "out/quantizer.pt")
    assert (meta["teacher"], meta["layer"]) == ("tiny", 2)
    assert found["quantizer_id"] == quantizer.get_id() and quantizer.beam == beam
    assert found["num_frames"] == 100 and found["rrl"]["5"] < 1 and found["seed"] == 0


@pytest.mark.parametrize(
    "frames,settings,cause",
    [
        (1000 + _frames(), PAPER, "RRL .* worse than the mean alone; likely too few frames"),
        # All but a few are alike.
        (np.where(np.arange(500)[:, None] < 480, 1.0, _frames()), LSQ, "are not used; likely"),
    ],
    ids=["not normalized", "unused"],
)
def test_a_quantizer_that_is_refused_leaves_its_diagnostics(tmp_path, frames, settings, cause):
    with pytest.raises(RecipeError, match=cause):
        train_quantizer.main(_settings(tmp_path, frames.astype(np.float32), **settings))
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["diagnostics.json", "diagnostics.png"]
    found = json.loads((tmp_path / "out/diagnostics.json").read_text())
    assert found["rrl"].keys() == {str(rounds) for rounds in range(6)}
    assert (tmp_path / "out/diagnostics.png").read_bytes().startswith(b"\x89PNG")


def test_shipped_sets_of_labels_have_confs_that_can_be():
    found = {}
    for path in LABELS:
        confs = [ROOT / "conf/quantizer.yaml", ROOT / "conf/laptop/quantizer.yaml", path]
        words = [word for conf in confs for word in ("--config", str(conf))]
        words += ["--embeddings", "a.h5", "--out_dir", "out"]
        found[path.parent.name] = cli.parse(train_quantizer.Settings, words)[0].quantizer
    assert found["paper"].trainer == "paper" and found["paper"].standardize
    assert (found["beam"].trainer, found["beam"].beam) == ("lsq", 16)
    assert [found[f"n{n}"].num_codebooks for n in (1, 2, 4, 16)] == [1, 2, 4, 16]


def test_a_conf_that_cannot_be_is_refused_before_anything_is_read():
    conf = ["--config", str(ROOT / "conf/quantizer.yaml"), "--embeddings", "a.h5"]
    with pytest.raises(RecipeError, match="num_codebooks: 3 is not a power of two"):
        cli.parse(
            train_quantizer.Settings, [*conf, "--out_dir", "out", "--quantizer.num_codebooks", "3"]
        )
