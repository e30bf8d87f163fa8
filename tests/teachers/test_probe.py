"""The probe of layers, on speech whose letters only one layer of a teacher tells."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.utils import fastcopy

from local import probe_teacher as script
from mvqkd import cli
from mvqkd.data.manifests import write_cuts
from mvqkd.errors import RecipeError
from mvqkd.quantizer import QuantizerSettings
from mvqkd.teachers.base import Teacher
from mvqkd.teachers.probe import (
    ProbeSettings,
    layer_to_take,
    pick_speech,
    plot_probe,
    probe_table,
    probe_teacher,
    text_of,
    verdict,
)
from tests.conftest import CPU, ROOT

LETTERS = "ABCD"
SEGMENT = 1600
SETTINGS = ProbeSettings(minutes=2, steps=60, lr=0.2, max_duration=12)
QUANTIZER = QuantizerSettings(2, 16, lsq_iters=1, logits_iters=2)


class PhaseTeacher(Teacher):
    """Layer 1 is noise, and layer 2 tells the phase of a tone of 500 Hz in each frame."""

    name, dim, num_layers, stride, receptive_field, window_frames = "phase", 8, 2, 320, 320, 9999

    def __init__(self):
        super().__init__()
        self.asked = []

    def _layers(self, prepared_BL, lengths_B, layers):
        self.asked.append(list(layers))
        frames_BTl = prepared_BL.unfold(1, 320, 320)
        time_l = torch.arange(320) / 16000 * 1000 * np.pi
        noise_BTD = torch.randn(
            *frames_BTl.shape[:2], 8, generator=torch.Generator().manual_seed(1)
        )
        phase_BTD = noise_BTD / 10
        phase_BTD[..., 0] += frames_BTl @ time_l.cos() / 20
        phase_BTD[..., 1] += frames_BTl @ time_l.sin() / 20
        return [(noise_BTD, phase_BTD)[layer - 1] for layer in layers]


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Utterances of 12 letters, each of which is a phase of a tone, with silence between."""
    folder, rng, cuts = tmp_path_factory.mktemp("speech"), np.random.default_rng(1), []
    for number in range(30):
        letters = rng.integers(0, 4, 12)
        phases_L = np.repeat(letters, SEGMENT) * np.pi / 2
        time_L = np.arange(len(phases_L)) / 16000
        path = folder / f"{number:02d}.wav"
        tone_L = 0.3 * np.cos(1000 * np.pi * time_L - phases_L)
        tone_L[np.arange(len(tone_L)) % SEGMENT >= 960] = 0
        soundfile.write(path, tone_L, 16000)
        recording = Recording.from_file(path)
        text = "".join(LETTERS[k] for k in letters).lower()
        supervision = SupervisionSegment(path.stem, path.stem, 0, recording.duration, text=text)
        cuts.append(
            MonoCut(path.stem, 0, recording.duration, 0, [supervision], recording=recording)
        )
    return CutSet.from_cuts(cuts)


@pytest.fixture(scope="module")
def found(speech, tmp_path_factory):
    folder, teacher = tmp_path_factory.mktemp("probe") / "work", PhaseTeacher()
    found = probe_teacher(speech, teacher, folder, SETTINGS, QUANTIZER, CPU)
    assert list(folder.iterdir()) == []
    # 36 seconds of speech, 12 at a time, each of which goes through the teacher once.
    assert all(asked == [1, 2] for asked in teacher.asked) and len(teacher.asked) <= 6
    return found


def test_the_layer_that_tells_the_letters_is_taken(found):
    noise, phase = found["layers"]
    assert (noise["layer"], phase["layer"], found["layer"]) == (1, 2, 2)
    assert phase["error"] < 5 and noise["error"] > 60 and found["filterbanks"]["error"] > 40
    assert phase["low"] <= phase["error"] <= phase["high"]
    assert phase["rrl"] < noise["rrl"] <= 1.1
    assert found["carries_language"] and verdict(found) == "take layer 2"
    assert (found["num_utterances"], found["num_unseen"], found["num_symbols"]) == (30, 6, 4)
    lines = probe_table(found).splitlines()
    assert lines[-3].startswith("2 ") and lines[-3].endswith("<- take") and "-" in lines[3]
    json.dumps(found, allow_nan=False)


def test_plain_warning_where_no_layer_carries_the_language(speech, found, tmp_path):
    alone = {**found, "layers": found["layers"][:1], "layer": 1, "carries_language": False}
    assert "<- take" not in probe_table(alone)
    warning = probe_table(alone).splitlines()[-1]
    assert warning.startswith("WARNING: no layer of phase carries this language: at best (layer 1)")
    assert warning.endswith("take a teacher that was trained on this language")
    plot_probe(alone, tmp_path / "alone.png")
    plot_probe(found, tmp_path / "found.png")
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())


def test_script_leaves_table_and_plot_and_warns(speech, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(script, "load_teacher", lambda name, revision: PhaseTeacher())
    write_cuts(speech, tmp_path / "cuts.jsonl.gz")
    settings = script.Settings("phase", tmp_path / "cuts.jsonl.gz", tmp_path / "out", layer=2)
    settings.device, settings.quantizer = "cpu", QUANTIZER
    settings.probe = replace(SETTINGS, layers=[1])
    with caplog.at_level(logging.WARNING):
        script.main(settings)
    assert [r.getMessage()[:26] for r in caplog.records] == ["WARNING: no layer of phase"]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["probe.json", "probe.png", "probe.txt"]
    assert capsys.readouterr().out == (tmp_path / "out/probe.txt").read_text()
    assert not json.loads((tmp_path / "out/probe.json").read_text())["carries_language"]
    settings.probe.layers = [3]
    with pytest.raises(RecipeError, match=r"teacher phase: layer 3 is not in 1\.\.2"):
        script.main(settings)


def test_bad_utterances_are_left_out_and_listed(speech, tmp_path, caplog):
    cuts = list(speech)[:20]
    cuts[3] = cuts[3].truncate(duration=0.01, preserve_id=True)
    source = fastcopy(cuts[7].recording.sources[0], source=str(tmp_path / "gone.wav"))
    cuts[7] = fastcopy(cuts[7], recording=fastcopy(cuts[7].recording, sources=[source]))
    cuts, folder = CutSet.from_cuts(cuts), tmp_path / "work"
    few = replace(SETTINGS, steps=1, layers=[2])
    with pytest.raises(RecipeError, match=r"\(. of 20 .* max_bad_share = 0.05 of the key probe\)"):
        probe_teacher(cuts, PhaseTeacher(), folder, few, QUANTIZER, CPU)
    assert list(folder.iterdir()) == []
    few.max_bad_share = 0.1
    found = probe_teacher(cuts, PhaseTeacher(), folder, few, QUANTIZER, CPU)
    assert found["num_utterances"] == 18 and found["minutes"] == pytest.approx(18 * 0.02)
    assert [path.name for path in folder.iterdir()] == ["bad-utterances.txt"]
    lines = sorted((folder / "bad-utterances.txt").read_text().splitlines())
    assert lines[0].startswith(f"{tmp_path}/gone.wav: cut 07 cannot be read")
    assert lines[1].startswith("cut 03: 160 samples are shorter than one frame of teacher phase")
    assert "2 bad utterances left out, listed in" in caplog.text


def test_one_standard_error():
    rows = [
        {"layer": 1, "error": 30.0, "low": 26.0, "high": 34.0, "rrl": 0.1},
        {"layer": 2, "error": 21.5, "low": 18.0, "high": 25.0, "rrl": 0.2},
        {"layer": 3, "error": 20.0, "low": 16.1, "high": 23.9, "rrl": 0.3},
    ]
    assert layer_to_take(rows) == 2  # 1.5 worse than layer 3, whose standard error is 2
    rows[1]["error"] = 22.1
    assert layer_to_take(rows) == 3


def test_speech_that_is_looked_at(speech):
    cuts = list(speech)
    assert text_of(cuts[0]) == cuts[0].supervisions[0].text.upper()
    spelt = fastcopy(cuts[0].supervisions[0], text=" e\u0301  \u00e9")
    assert text_of(fastcopy(cuts[0], supervisions=[spelt])) == "\u00c9 \u00c9"
    slower = [cut.perturb_speed(0.9) for cut in cuts]
    other_rate = CutSet.from_cuts([*slower, *(cut.resample(8000) for cut in cuts)])
    picked = list(pick_speech(other_rate, ProbeSettings(minutes=0.4)))
    assert {cut.id for cut in picked} <= {cut.id for cut in cuts} and len(picked) == 20
    assert all(cut.sampling_rate == 16000 for cut in picked)
    assert picked[0].load_audio().shape == (1, 19200)
    with pytest.raises(
        RecipeError, match=r"5 utterances with transcripts in 0\.1 minutes, at least"
    ):
        pick_speech(speech, ProbeSettings(minutes=0.1))
    with pytest.raises(RecipeError, match="0 utterances with transcripts"):
        pick_speech(CutSet.from_cuts(slower), ProbeSettings())


@pytest.mark.parametrize(
    "path", sorted((ROOT / "conf/teacher").glob("*.yaml")), ids=lambda p: p.stem
)
def test_takes_every_conf_of_a_teacher(path):
    args = ["--config", str(path), "--config", str(ROOT / "conf/quantizer.yaml")]
    settings, _ = cli.parse(script.Settings, [*args, "--manifest", "a", "--out_dir", "b"])
    assert settings.teacher and settings.layer >= 1
