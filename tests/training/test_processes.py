"""Training in several processes, exchanging gradients by gloo, against training in one."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import torch
from lhotse import CutSet
from torch import distributed, multiprocessing, nn

from mvqkd import processes
from mvqkd.data.audio import AudioBatch, bucketed_batches, largest_batches
from mvqkd.data.datamodule import SpecAugmentSettings, StudentBatch
from mvqkd.errors import RecipeError
from mvqkd.losses.distillation import Distillation, Pairing, Term, TermSettings
from mvqkd.processes import gathered, rank
from mvqkd.quantizer import Quantizer
from mvqkd.students.conformer import ConformerSettings
from mvqkd.students.scaling import ActivationBalancer
from mvqkd.students.task import StudentTask
from mvqkd.students.transducer import TransducerSettings, build_transducer
from mvqkd.teachers.ctc import SYMBOLS, CtcTask, Spelling
from mvqkd.teachers.hubert import HubertTeacher
from mvqkd.training.checkpoint import load_checkpoint
from mvqkd.training.loop import TrainingSettings, train
from tests.conftest import CPU, ROOT, tiny_hubert
from tests.training.test_loop import Killed, log_of, same, state_of
from tests.training.test_loop import Task as OneProcessTask


def _process(index, count, function, args, port, folder):
    environment = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in environment.items()})
    # With neither of them, for one may leave a run while the other still comes to it; and each
    # run has its own keys, for one may have gone on to the next.
    store = distributed.TCPStore("127.0.0.1", port, is_master=False)
    connect, runs = distributed.init_process_group, itertools.count()
    distributed.init_process_group = lambda backend, timeout: connect(
        backend,
        timeout=timeout,
        store=distributed.PrefixStore(str(next(runs)), store),
        rank=index,
        world_size=count,
    )
    torch.set_num_threads(1)
    torch.save(function(*args), folder / f"returned-{index}.pt")


def in_processes(count, tmp_path, function, *args):
    """What ``function(*args)`` returns in each of ``count`` processes."""
    folder = tmp_path / "processes"
    folder.mkdir()
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    multiprocessing.spawn(_process, (count, function, args, store.port, folder), nprocs=count)
    return [torch.load(folder / f"returned-{i}.pt") for i in range(count)]


# One update from a batch of four utterances: whole, in halves, or in quarters.

UTTERANCES = 4
ONE_STEP = TrainingSettings(num_epochs=1, lr=1e-3, optimizer="adamw")


def share(count, size):
    """The utterances of each batch that this process takes."""
    batches = [list(range(i, i + size)) for i in range(0, UTTERANCES, size)]
    return batches[rank() :: count]


class StudentHalves:
    seconds = 4.0

    def __init__(self, count, size, unread=()):
        generator = torch.Generator().manual_seed(7)
        self.items = []
        for frames, num_tokens in ((61, 5), (80, 3), (47, 4), (75, 6)):
            features_TF = torch.randn(frames, 80, generator=generator)
            tokens = torch.randint(1, 20, (num_tokens,), generator=generator).tolist()
            labels_UN = torch.randint(0, 16, (frames // 2, 4), generator=generator)
            self.items.append((features_TF, tokens, labels_UN))
        for index in unread:
            self.items[index] = (self.items[index][0], None, self.items[index][2])
        self.shares = share(count, size)

    def batches(self, epoch, start, rank, num_processes):
        for chosen in self.shares:
            features, tokens, labels = zip(*(self.items[i] for i in chosen))
            pad = nn.utils.rnn.pad_sequence
            # As long in any batch: the convolutions see the first frames of the padding.
            padded_BTF = torch.full((len(chosen), 80, 80), -23.0)
            for row_TF, features_TF in zip(padded_BTF, features):
                row_TF[: len(features_TF)] = features_TF
            yield (
                StudentBatch(
                    [str(i) for i in chosen],
                    padded_BTF,
                    torch.tensor([len(f) for f in features]),
                    list(tokens),
                    [""] * len(chosen),
                    {"codebook_indexes": pad(labels, batch_first=True, padding_value=-100)},
                ),
                1.0,
            )


def student_task(kind, count, size):
    kind, _, unread = kind.partition(" unread ")
    settings = TransducerSettings(
        ConformerSettings(
            d_model=16,
            nhead=2,
            dim_feedforward=24,
            num_encoder_layers=2,
            cnn_module_kernel=5,
            middle_output_layers=[1],
            dropout=0.0,
            layer_dropout=0.0,
        ),
        decoder_dim=12,
        joiner_dim=12,
        vocab_size=20,
    )
    torch.manual_seed(0)
    model = build_transducer(settings)
    for module in model.modules():
        if isinstance(module, ActivationBalancer):
            module.balance_prob = 0.0
    distillation = None
    if kind != "none":
        quantizer = Quantizer(6, 16, 4, generator=torch.Generator().manual_seed(1))
        pairing = Pairing(0.04, 0.035, 0.02, 0.0125)
        settings_of_term = TermSettings(kind, layer=1, field="codebook_indexes")
        statistics = torch.zeros(6), torch.ones(6)
        distillation = Distillation([Term(settings_of_term, 16, pairing, quantizer, *statistics)])
        model.codebook_loss_net = distillation.head
    return StudentTask(
        model,
        settings,
        StudentHalves(count, size, [int(index) for index in unread]),
        {},
        distillation,
        SpecAugmentSettings(p=0.0),
        None,
        CPU,
    )


class TeacherHalves(CtcTask):
    """Waveforms and transcripts of its own instead of cuts."""

    def __init__(self, count, size):
        self.model = HubertTeacher(tiny_hubert(attention_dropout=0.0, hidden_dropout=0.0,
            activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0),
            True, list(SYMBOLS), "tiny")  # fmt: skip
        self.epoch_seconds, self._dev_cuts, self._device = 4.0, {}, CPU
        self._mask_inputs = False
        self._spelling = Spelling(SYMBOLS)
        self.shares = share(count, size)

    def batches(self, epoch, start):
        generator = torch.Generator().manual_seed(3)
        waves = [torch.randn(n, generator=generator) for n in (9000, 7000, 12000, 8000)]
        texts = ["a bc", "de", "fghij", "k"]
        for chosen in self.shares:
            own = [waves[i] for i in chosen]
            yield (
                AudioBatch(
                    [str(i) for i in chosen],
                    nn.utils.rnn.pad_sequence(own, batch_first=True),
                    torch.tensor([len(w) for w in own]),
                    [texts[i] for i in chosen],
                ),
                1.0,
            )


def gradients(kind, warmup_steps, folder, count=1, size=UTTERANCES, accumulate=1):
    task = TeacherHalves(count, size) if kind == "teacher" else student_task(kind, count, size)
    settings = replace(ONE_STEP, warmup_steps=warmup_steps, accumulate=accumulate)
    train(task, settings, folder / f"{kind}-{warmup_steps}-{count}-{size}", CPU)
    saved = load_checkpoint(folder / f"{kind}-{warmup_steps}-{count}-{size}/epoch-1.pt")
    assert saved["progress"]["step"] == 1
    return {name: p.grad for name, p in task.model.named_parameters()}


# Within the warm-up, where the pruned loss has no weight, and past it.
CASES = [
    ("none", 3),
    ("mvq", 0.5),
    ("mvq-l2", 0.5),
    # A process has a batch without transcripts while the other has one with them.
    ("mvq-joint unread 01", 0.5),
    ("teacher", 1),
]


def all_gradients(folder, count, size, accumulate):
    return [gradients(*case, folder, count, size, accumulate) for case in CASES]


def gradients_of_halves_and_quarters(folder):
    return [all_gradients(folder, 2, 2, 1), all_gradients(folder, 2, 1, 2)]


def test_gradients_are_those_of_one_batch(tmp_path):
    ours, theirs = in_processes(2, tmp_path, gradients_of_halves_and_quarters, tmp_path)
    assert same(ours, theirs)
    alone = all_gradients(tmp_path, 1, 2, 2)
    for case, wholes, *others in zip(CASES, all_gradients(tmp_path, 1, 4, 1), *ours, alone):
        largest = max(g.abs().max().item() for g in wholes.values())
        for name, whole in wholes.items():
            for part in (other[name] for other in others):
                # Biases before a softmax have gradients of rounding errors.
                scale = max(whole.abs().max().item(), 1e-3 * largest)
                assert (part - whole).abs().max().item() <= 1e-4 * scale, (case, name)


# Steps in which the pruned loss has no weight: the joiner gets gradients of 0, and the optimizer
# counts them. The published recipe multiplies this loss by 0, which does the same.

WARMING_UP = TrainingSettings(num_epochs=3, lr=1e-3, warmup_steps=4)


def joiner_in_warm_up(folder, count, size):
    """What Eve knows of each parameter of the joiner, and its value."""
    task = student_task("none", count, size)
    train(task, WARMING_UP, folder / f"warm-up-{count}", CPU)
    saved = state_of(folder / f"warm-up-{count}/epoch-3.pt")
    assert saved["progress"]["step"] == 3
    states = saved["optimizer"]["state"]
    return {
        name: {**states[index], "value": value.detach()}
        for index, (name, value) in enumerate(task.model.named_parameters())
        if name.startswith("joiner.")
    }


def test_the_joiner_in_warm_up_is_the_same_in_one_process_and_in_two(tmp_path):
    alone = joiner_in_warm_up(tmp_path, 1, 4)
    ours, theirs = in_processes(2, tmp_path, joiner_in_warm_up, tmp_path, 2, 2)
    assert len(alone) == 12
    assert same(ours, alone) and same(theirs, alone)
    for state in alone.values():
        assert state["step"] == 3
        assert state["exp_avg"].count_nonzero() == state["exp_avg_sq"].count_nonzero() == 0


# A run of several epochs.

SETTINGS = TrainingSettings(
    num_epochs=2,
    lr=0.02,
    lr_batches=10,
    warmup_steps=10,
    average_period=2,
    log_every_steps=2,
    checkpoint_seconds=0,
)


class Task(OneProcessTask):
    """Each process has batches of its own; the last epoch ends when one has no more."""

    def __init__(self, bad_rank=None, **options):
        super().__init__(**options)
        if rank() != bad_rank:
            self.bad_steps = ()

    def batches(self, epoch, start):
        for index, (batch, seconds) in enumerate(super().batches(epoch, start)):
            batch.x_BC += rank()
            if index + start < 5 - rank() * (epoch == 2):
                yield batch, seconds

    def validate(self):
        return {"rank": float(sum(gathered(rank())))}


def run(folder, name, settings, task=None, **options):
    try:
        train(task or Task(**options), settings, folder / name, CPU)
    except (RecipeError, Killed) as error:
        return repr(error)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def run_all(folder):
    accumulating = replace(SETTINGS, accumulate=2)
    out = {"whole": run(folder, "whole", SETTINGS), "pairs": run(folder, "pairs", accumulating)}
    for kill_at in (1, 4, 6, 8):
        run(folder, f"killed-{kill_at}", SETTINGS, kill_at=kill_at)
        run(folder, f"killed-{kill_at}", SETTINGS)
    run(folder, "killed-pair", accumulating, kill_at=2)
    run(folder, "killed-pair", accumulating)
    out["bad"] = run(folder, "bad", SETTINGS, bad_steps=[3], bad_rank=1)
    some = replace(SETTINGS, max_bad_batches=1)
    out["left out"] = run(folder, "left-out", some, bad_steps=[3], bad_rank=1)
    task = Task()
    out["last"] = run(folder, "weights", some, task=task)
    out["weights"] = task.model.state_dict()
    return out


def test_runs_of_two_processes(tmp_path):
    ours, theirs = in_processes(2, tmp_path, run_all, tmp_path)
    assert same(ours["weights"], theirs["weights"])
    # 5 steps, and 4 because one process has no more.
    whole = state_of(tmp_path / "whole/checkpoint.pt")
    assert whole["progress"]["step"] == 9 and whole["progress"]["speech_seconds"] == 36.0
    assert [e["rank"] for e in log_of(tmp_path / "whole") if e["kind"] == "dev"] == [1.0, 1.0]
    for kill_at in (1, 4, 6, 8):
        killed = tmp_path / f"killed-{kill_at}"
        assert same(state_of(killed / "checkpoint.pt"), whole)
        assert log_of(killed) == log_of(tmp_path / "whole")
    pairs = state_of(tmp_path / "pairs/checkpoint.pt")
    assert pairs["progress"]["step"] == 3 + 2
    assert same(state_of(tmp_path / "killed-pair/checkpoint.pt"), pairs)
    # Both end, for the batch of one of them.
    assert ours["bad"] == theirs["bad"]
    assert "bad-batch-3-1-0.pt: the loss of step 3" in ours["bad"]
    assert not (tmp_path / "bad/bad-batch-3.pt").exists()
    saved = torch.load(tmp_path / "bad/bad-batch-3-1-0.pt", weights_only=True)
    assert saved["ids"] == ["1-2-0", "1-2-1", "1-2-2"]
    assert ours["left out"] is None and theirs["left out"] is None
    assert ours["last"] is None and theirs["last"] is None
    left_out = state_of(tmp_path / "left-out/checkpoint.pt")
    assert left_out["progress"]["bad_batches"] == 1
    assert all(torch.isfinite(value).all() for value in left_out["model"].values())


def run_and_resume(folder):
    run(folder, "whole", SETTINGS)
    for kill_at in (2, 5):
        run(folder, f"killed-{kill_at}", SETTINGS, kill_at=kill_at)
        run(folder, f"killed-{kill_at}", SETTINGS)


def test_three_processes_resume_bit_for_bit(tmp_path):
    """Of three numbers the sum depends on which two are added first."""
    in_processes(3, tmp_path, run_and_resume, tmp_path)
    whole = state_of(tmp_path / "whole/checkpoint.pt")
    assert whole["progress"]["step"] == 5 + 3
    for kill_at in (2, 5):
        assert same(state_of(tmp_path / f"killed-{kill_at}/checkpoint.pt"), whole), kill_at


def test_processes_share_the_batches_of_an_epoch(plain_cuts):
    cuts = CutSet.from_cuts(list(plain_cuts))
    shares = [
        [[c.id for c in b] for b in bucketed_batches(cuts, 4, 1, 2, 2, rank, 2)] for rank in (0, 1)
    ]
    assert len(shares[0]) == len(shares[1]) > 1
    ids = [name for batches in shares for batch in batches for name in batch]
    assert {i.split("_dup")[0] for i in ids} == {c.id for c in cuts}
    assert len(ids) - len(cuts) <= 1


def test_largest_batches(plain_cuts):
    cuts = sorted(plain_cuts, key=lambda cut: cut.duration)
    batches = [CutSet.from_cuts(cuts[i : i + n]) for i, n in ((0, 1), (0, 3), (1, 2))]
    longest = CutSet.from_cuts(cuts[-1:])
    largest = largest_batches([*batches, longest])
    assert 1 <= len(largest) <= 3 and batches[0] not in largest
    padded = [len(b) * max(c.duration for c in b) for b in [*batches, longest]]
    assert [*batches, longest][padded.index(max(padded))] in largest


SCRIPT = """
import sys
from dataclasses import dataclass
from mvqkd import cli
from mvqkd import processes
from mvqkd.errors import RecipeError
from mvqkd.processes import connected, gathered, rank
import torch

@dataclass
class Settings:
    who: int = 0

def main(settings):
    with connected(torch.device("cpu")):
        if rank() == settings.who:
            raise RecipeError(f"FILE: of process {rank()}; mend it")
        print("sum", sum(gathered(1)))

cli.run(main, Settings)
"""


def test_launch_passes_one_line_on(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "mvqkd.launch", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), "--who", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    # What torch's own threads may say when the other process is ended is not ours.
    lines = [line for line in done.stderr.splitlines() if not line.startswith("terminate called")]
    assert lines == [f"{script}: FILE: of process 1; mend it"]


def test_processes_wait_for_longer_than_the_main_one_takes_to_cluster(monkeypatch):
    asked = {}
    monkeypatch.setattr(distributed, "init_process_group", lambda *args, **kw: asked.update(kw))
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(processes, "gathered", lambda value: [value])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with processes.connected(CPU):
        pass
    assert asked["timeout"].total_seconds() > 6 * 3600
