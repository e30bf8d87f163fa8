"""benchmarks/dumping.py and label_precision.py: their rows, at the tiniest size."""

import re

import pytest
import torch
from lhotse import CutSet
from transformers import HubertConfig

from benchmarks import dumping, label_precision
from mvqkd.data.labels import LabelSettings
from mvqkd.data.manifests import write_cuts
from mvqkd.quantizer import save_quantizer


@pytest.fixture(autouse=True)
def threads():
    """Put back what the benchmarks set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_operations_of_xlarge():
    config = HubertConfig(**dumping.SIZES["xlarge"])
    assert dumping.operations(config, 36, 12 * 16000) / 12 == pytest.approx(82.45e9, rel=1e-4)


def test_operations_are_those_of_the_products():
    """As torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import HubertModel

    config = HubertConfig(**dumping.SIZES["tiny"], num_hidden_layers=2)
    config._attn_implementation = "eager"
    model = HubertModel(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 16000))
    assert dumping.operations(config, 2, 16000) == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )


def test_dumping(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    labels = LabelSettings(max_duration=2, shard_size=2, num_threads=1, num_loaders=1)
    dumping.main(
        dumping.Settings("tiny", 2, seconds=0.5, num_utterances=3, rounds=1, labels=labels)
    )
    head, floor, columns, *rows, last = capsys.readouterr().out.splitlines()
    assert ", float32: tiny to layer 2, 3 utterances of 0.5 s at three speeds" in head
    assert re.search(
        r"^0\.0\d G operations a second of speech; .* floor [\d,]+ x real time$", floor
    )
    assert " ".join(columns.split()) == "seconds x real time over forward of the rate"
    assert [row[:12].strip() for row in rows] == ["forward", "+ encode", "dump"]
    assert rows[0].split()[-2] == "+0.0%" and all(row.endswith("%") for row in rows)
    assert last == "cuda: not measured; PyTorch finds no CUDA device here"


def test_label_precision(teacher, quantizer, plain_cuts, tmp_path, capsys):
    teacher.save(tmp_path / "teacher")
    save_quantizer(tmp_path / "quantizer.pt", quantizer, {"teacher": "tiny", "layer": 2})
    cuts = list(plain_cuts)[:3]
    write_cuts(CutSet.from_cuts(cuts), tmp_path / "cuts.jsonl.gz")
    label_precision.main(
        label_precision.Settings(
            str(tmp_path / "teacher"),
            tmp_path / "quantizer.pt",
            tmp_path / "cuts.jsonl.gz",
            device="cpu",
            num_utterances=2,
            refine_iters=1,
        )
    )
    head, apart, differ, *rrl = capsys.readouterr().out.splitlines()
    frames = sum(teacher.num_frames(cut.num_samples) for cut in cuts[:2])
    assert f"2 utterances, {frames} frames, layer 2 of" in head and "N = 4, 1 rounds" in head
    assert 0 < float(re.search(r"apart: (\S+) of", apart)[1]) < 1e-3
    share, in_frames = map(float, re.findall(r"([\d.]+)%", differ))
    assert 0 < share < in_frames < 4.1 * share and share < 20
    assert [line.split(":")[0] for line in rrl] == ["RRL, float32", "RRL, bfloat16"]
    assert float(rrl[0].split()[-1]) == pytest.approx(float(rrl[1].split()[-1]), rel=0.01)
