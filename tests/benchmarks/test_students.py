"""The benchmarks of the student, at sizes that take no time: that they run and print their rows."""

import io
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import decoding, distillation, student_step, transducer_loss
from mvqkd.errors import RecipeError
from mvqkd.students.conformer import ConformerSettings
from mvqkd.students.transducer import TransducerSettings

# As small as `benchmarks.distillation`'s size tiny.
ENCODER = ConformerSettings(
    num_features=40,
    d_model=32,
    nhead=2,
    dim_feedforward=48,
    num_encoder_layers=2,
    subsampling_channels=(4, 8, 16),
)
LATTICE = {"B": 2, "T": 9, "S": 6, "V": 12, "D": 8}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Jobs run in this process, for on a machine with a GPU autograd takes no fork after its first
    use. What they import is forgotten."""
    modules, path = dict(sys.modules), list(sys.path)

    def alternating(jobs, rounds, not_measured=None):
        return {name: [job() for _ in range(rounds)] for name, job in jobs.items()}

    monkeypatch.setattr(distillation, "alternating", alternating)
    monkeypatch.setattr(student_step, "alternating", alternating)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    sys.path[:] = path
    for name in sys.modules.keys() - modules.keys():
        if name.split(".")[0] in {*student_step.STAND_INS, *student_step.PEER_FILES}:
            del sys.modules[name]
    sys.modules.update(modules)


def rows_of(text, *names):
    """The lines that begin with each of ``names``, which all have one."""
    found = {name: [line for line in text.splitlines() if line.startswith(name)] for name in names}
    assert all(len(lines) >= 1 for lines in found.values()), (found, text)
    return {name: lines[0].removeprefix(name).split() for name, lines in found.items()}


def test_distillation(capsys):
    distillation.main(distillation.Settings("tiny", "cpu", rounds=1, steps=1))
    rows = rows_of(capsys.readouterr().out, *distillation.ROWS)
    assert rows["none"][2] == "+0.0%" and rows["none"][5] == "+0.0%"
    with pytest.raises(RecipeError, match="--rows mvp: not known; it has: none, mvq"):
        distillation.main(distillation.Settings("tiny", "cpu", rows=["mvp"]))


# What the published model takes and gives, by the names of its files; no more of it than that.
PEER = {
    "conformer": """
import torch
from torch.utils.flop_counter import FlopCounterMode
class Conformer(torch.nn.Linear):
    def __init__(self, num_features, d_model, subsampling_factor, layer_dropout,
                 middle_output_layer=None, **sizes):
        assert (subsampling_factor, layer_dropout) == (4, 0.0)
        super().__init__(num_features, d_model)
""",
    "decoder": """
import torch
from torch.utils.flop_counter import FlopCounterMode
class Decoder(torch.nn.Embedding):
    def __init__(self, vocab_size, decoder_dim, blank_id, context_size):
        super().__init__(vocab_size, decoder_dim)
""",
    "encoder_interface": "",
    "joiner": """
import torch
from torch.utils.flop_counter import FlopCounterMode
class Joiner(torch.nn.Linear):
    def __init__(self, encoder_dim, decoder_dim, joiner_dim, vocab_size):
        super().__init__(joiner_dim, vocab_size)
""",
    "scaling": "",
    "optim": "from mvqkd.training.optim import Eve",
    "model": """
import k2
import torch
from torch.utils.flop_counter import FlopCounterMode
from icefall.utils import add_sos, make_pad_mask
from multi_quantization.prediction import JointCodebookLoss
class Transducer(torch.nn.Module):
    def __init__(self, encoder, decoder, joiner, encoder_dim, decoder_dim, joiner_dim, vocab_size,
                 num_codebooks):
        super().__init__()
        self.encoder, self.decoder, self.joiner = encoder, decoder, joiner
        self.codebooks = JointCodebookLoss(encoder_dim, num_codebooks) if num_codebooks else None
    def forward(self, x, x_lens, y, prune_range, am_scale, lm_scale, warmup, codebook_indexes):
        assert y.num_axes == 2 and y.dim0 == len(x) and warmup == 3.0
        lens = ((x_lens - 1) // 2 - 1) // 2
        am = self.encoder(x[:, : 4 * int(lens.max()) : 4])
        assert not make_pad_mask(lens).any()
        splits = y.shape.row_splits(1)
        symbols = y.pad("constant", 0).long()
        boundary = torch.zeros(len(x), 4, dtype=torch.int64)
        boundary[:, 2], boundary[:, 3] = splits[1:] - splits[:-1], lens
        lm = self.decoder(add_sos(y, sos_id=0).pad("constant", 0).long())
        simple = k2.rnnt_loss_smoothed(
            self.joiner(lm), self.joiner(am), symbols, 0, lm_scale, am_scale, boundary)
        codebook = None
        if self.codebooks is not None:
            indexes = codebook_indexes[:, : 2 * am.size(1)].unflatten(1, (-1, 2)).flatten(2)
            codebook = self.codebooks(am[:, : indexes.size(1)], indexes)
        return simple, simple, codebook
""",
}


@pytest.fixture
def peer_dir(tmp_path) -> Path:
    for name, text in PEER.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def test_student_step_beside_the_published_code(peer_dir, capsys, monkeypatch):
    # As where neither is installed: the stand-ins are what is tried.
    for package in ("k2", "icefall", "multi_quantization"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    real_import = student_step.importlib.import_module

    def import_module(name):
        if name in student_step.STAND_INS and name not in sys.modules:
            raise ImportError(name)
        return real_import(name)

    monkeypatch.setattr(
        student_step, "importlib", types.SimpleNamespace(import_module=import_module)
    )
    keeping = []
    for module in (distillation, student_step):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: keeping.append(True))
    settings = student_step.Settings("tiny", ["cpu"], ["float32"], peer_dir=peer_dir)
    settings.rounds = settings.steps = 1
    student_step.main(settings)
    # Nobody does that for the published code.
    assert len(keeping) == len(student_step.KINDS)
    head, table = capsys.readouterr().out.split("matrix products at")
    assert "a step, on either side: SpecAugment, batch to the device, losses" in head
    names = ("none ", "mvq ", "mvq-l2 ", "published, none ", "published, mvq ")
    for name, row in rows_of(table, *names).items():
        assert row[1] == "s" and row[5] == "GFLOP" and row[-1].endswith("%"), (name, row)
    assert "published, mvq: transducer losses of mvqkd" in table and "x its memory" in table


def test_student_step_without_the_published_code(tmp_path, capsys):
    settings = student_step.Settings("tiny", ["cpu"], ["bf16"], ["none"], rounds=1, steps=1)
    student_step.main(settings)
    out = capsys.readouterr().out
    assert "published code: not measured, no --peer_dir" in out and "x the speed" not in out
    with pytest.raises(RecipeError, match=r"has no conformer\.py; give the folder of"):
        student_step.import_peer(tmp_path)
    settings.peer_dir = tmp_path / "nowhere"
    with pytest.raises(RecipeError, match="nowhere: no such folder"):
        student_step.main(settings)


def test_decoding(capsys):
    model = TransducerSettings(ENCODER, decoder_dim=16, joiner_dim=16, vocab_size=20)
    settings = decoding.Settings("cpu", num_utterances=2, seconds=1.5, rounds=1, model=model)
    decoding.main(settings)
    passes = ("search alone", "whole utterances", "streams")
    names = [f"{name}, {search}, {most} a frame"
             for name in passes for search in ("greedy", "beam 4") for most in (1, 4)]  # fmt: skip
    rows = rows_of(capsys.readouterr().out, *names)
    assert all(len(row) == 3 for row in rows.values())
    assert all(row[2] == "1.00" for name, row in rows.items() if "greedy" in name)


def test_transducer_loss_on_a_device(capsys):
    transducer_loss.measure_on(torch.device("cpu"), LATTICE, 1)
    out = capsys.readouterr().out
    for row in ("lattice with occupations, torch", "pruned loss", "turn"):
        assert f"| {row} | " in out
    assert "torchaudio's loss" in out


def test_transducer_loss_beside_k2(capsys, monkeypatch):
    # A process answers each line with the seconds and the peak of a turn.
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    transducer_loss.main(["--serve", "native", "--size", json.dumps(LATTICE), "--threads", "1"])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 2 and all(answer["seconds"] > 0 for answer in answers)

    class Process:
        """One that was given as many lines as it has answers."""

        def __init__(self, command, **pipes):
            assert command[1:3] == ["-m", "benchmarks.transducer_loss"]
            backend = command[command.index("--serve") + 1]
            self.factor = {"native": 1, "k2": 2}[backend]
            self.stdin, self.left = io.StringIO(), [1.0, 0.5, 0.25]
            self.stdout = self

        def readline(self):
            seconds = self.left.pop(0)
            return json.dumps({"seconds": self.factor * seconds, "bytes": 2**20 * self.factor})

        def communicate(self):
            assert not self.left and self.stdin.getvalue() == "\n\n\n"

    monkeypatch.setattr(transducer_loss.subprocess, "Popen", Process)
    monkeypatch.setattr("mvqkd.losses.rnnt.import_k2", lambda: types.ModuleType("k2"))
    transducer_loss.main(["--repeats", "2", "--size", json.dumps(LATTICE)])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| B 2, ")]
    assert row.split(" | ")[1:7] == ["0.250 s", "0.500 s", "0.50", "1", "2", "0.50"]
    monkeypatch.setattr("mvqkd.losses.rnnt.import_k2", lambda: None)
    with pytest.raises(SystemExit):
        transducer_loss.main([])
    assert "k2 does not import; call tests/k2/run.sh" in capsys.readouterr().err


def test_operations_are_those_of_groups_and_of_products_in_place():
    conv, x = torch.nn.Conv1d(6, 6, 3, groups=6), torch.randn(2, 6, 10, requires_grad=True)
    counter = FlopCounterMode(display=False, custom_mapping=student_step.FORMULAS)
    with counter:
        y = conv(x)
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * y.numel() * 3
    counter = FlopCounterMode(display=False, custom_mapping=student_step.FORMULAS)
    with counter:
        torch.zeros(2, 4).addmm_(torch.ones(2, 5), torch.ones(5, 4))
        torch.zeros(3, 2, 4).baddbmm_(torch.ones(3, 2, 5), torch.ones(3, 5, 4))
    assert counter.get_total_flops() == (1 + 3) * 2 * 2 * 5 * 4
