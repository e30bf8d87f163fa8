"""The training loop on a small regression task."""

import json
import re
import shutil
from dataclasses import dataclass, replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from mvqkd.errors import RecipeError
from mvqkd.training import loop
from mvqkd.training.checkpoint import load_checkpoint
from mvqkd.training.loop import TrainingSettings, train

CPU = torch.device("cpu")
BATCHES = 5
# Of a log's entries, what differs from run to run.
TIMES = ("seconds", "took")


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop may catch it."""


@dataclass
class Batch:
    ids: list[str]
    x_BC: torch.Tensor


class Task:
    """Dropout draws from torch's generator; batches depend on the epoch."""

    epoch_seconds = BATCHES * 2.0
    divided = 0

    def __init__(self, kill_at=None, kill_in_validation=0, bad_steps=()):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.kill_at, self.kill_in_validation = kill_at, kill_in_validation
        self.bad_steps, self.warmups, self.validated = bad_steps, [], 0

    def batches(self, epoch, start):
        generator = torch.Generator().manual_seed(epoch)
        for index in range(BATCHES):
            x_BC = torch.randn(3, 4, generator=generator)
            if index >= start:
                yield Batch([f"{epoch}-{index}-{i}" for i in range(3)], x_BC), 2.0

    def largest_batches(self):
        return [batch for batch, _ in self.batches(1, 0)][:2]

    def divisor(self, batch):
        return self.divided * len(batch.ids)

    def loss(self, batch, step, warmup):
        if step == self.kill_at:
            raise Killed
        self.warmups.append(warmup)
        loss = (self.model(batch.x_BC) - batch.x_BC.sum(1, keepdim=True)).square().sum()
        if step in self.bad_steps:
            loss = loss * float("nan")
        return loss, {"square": loss.item(), "weight": 3.0}

    def validate(self):
        self.validated += 1
        if self.validated == self.kill_in_validation:
            raise Killed
        x_BC = torch.ones(2, 4)
        torch.rand(7)  # draws that training must not see
        return {"out": self.model(x_BC).sum().item()}

    def describe(self, batch):
        return ", ".join(batch.ids)


SETTINGS = TrainingSettings(
    num_epochs=3, lr=0.02, lr_batches=10, warmup_steps=10, average_period=2, log_every_steps=2
)


def log_of(folder):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in TIMES} for entry in entries]


def state_of(path):
    """What a checkpoint holds, but for the time that it took."""
    saved = load_checkpoint(path)
    saved["progress"].pop("train_seconds")
    return saved


def same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


@pytest.mark.parametrize("optimizer", ["eve", "scaled-adam", "adamw"])
@pytest.mark.parametrize("checkpoint_seconds", [0, 1e9])
def test_resumes_bit_for_bit_from_any_step(tmp_path, optimizer, checkpoint_seconds):
    settings = replace(SETTINGS, optimizer=optimizer, checkpoint_seconds=checkpoint_seconds)
    train(Task(), settings, tmp_path / "whole", CPU)
    for kill_at in range(2, 3 * BATCHES + 1):
        folder = tmp_path / f"killed-{kill_at}"
        with pytest.raises(Killed):
            train(Task(kill_at), settings, folder, CPU)
        saved = folder / "checkpoint.pt"
        expected = kill_at - 1 if checkpoint_seconds == 0 else (kill_at - 1) // BATCHES * BATCHES
        assert expected == (load_checkpoint(saved)["progress"]["step"] if saved.exists() else 0)
        train(Task(), settings, folder, CPU)
        for name in ("epoch-1.pt", "epoch-2.pt", "epoch-3.pt"):
            ours, theirs = (state_of(f / name) for f in (folder, tmp_path / "whole"))
            assert same(ours, theirs), (kill_at, name)
        assert log_of(folder) == log_of(tmp_path / "whole"), kill_at


@pytest.mark.parametrize("validation", [1, 2, 3])
def test_resumes_from_the_last_step_of_an_epoch_that_is_not_validated(tmp_path, validation):
    settings = replace(SETTINGS, checkpoint_seconds=0)
    train(Task(), settings, tmp_path / "whole", CPU)
    with pytest.raises(Killed):
        train(Task(kill_in_validation=validation), settings, tmp_path / "killed", CPU)
    train(Task(), settings, tmp_path / "killed", CPU)
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")


def test_log_is_trimmed_to_the_checkpoint_and_a_cut_line_dropped(tmp_path):
    train(Task(), SETTINGS, tmp_path / "whole", CPU)
    with pytest.raises(Killed):
        train(Task(kill_at=2 * BATCHES), SETTINGS, tmp_path / "killed", CPU)
    path = tmp_path / "killed/log.jsonl"
    assert [e["step"] for e in log_of(tmp_path / "killed")] == [2, 4, 5, 6, 8]
    dev = {"kind": "dev", "step": BATCHES, "epoch": 2, "seconds": 1.0, "took": 0.5, "out": 1.0}
    path.write_text(path.read_text() + json.dumps(dev) + '\n{"kind": "tra')
    train(Task(), SETTINGS, tmp_path / "killed", CPU)
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")


def test_finished_run_is_left_as_it_is(tmp_path):
    train(Task(), SETTINGS, tmp_path, CPU)
    before = load_checkpoint(tmp_path / "checkpoint.pt"), log_of(tmp_path)
    train(Task(kill_at=1), SETTINGS, tmp_path, CPU)
    assert same(before[0], load_checkpoint(tmp_path / "checkpoint.pt"))
    assert before[1] == log_of(tmp_path)


@pytest.mark.parametrize("bad_steps", [(), (4,), (2, 3, 10)])
def test_running_average_is_the_mean_of_the_weights_at_its_steps(tmp_path, bad_steps):
    settings = replace(SETTINGS, num_epochs=2, checkpoint_seconds=0, max_bad_batches=3)
    weights = []

    class Recorder(Task):
        def loss(self, batch, step, warmup):
            weights.append(self.model[0].weight.detach().clone())  # after step - 1
            return super().loss(batch, step, warmup)

    task = Recorder(bad_steps=bad_steps)
    train(task, settings, tmp_path, CPU)
    weights.append(task.model[0].weight.detach().clone())
    average = load_checkpoint(tmp_path / "epoch-2.pt")["model_avg"]["0.weight"]
    expected = torch.stack(weights)[2::2].mean(0)
    torch.testing.assert_close(average, expected)


def test_bad_batch_is_named_and_saved(tmp_path):
    with pytest.raises(RecipeError) as raised:
        train(Task(bad_steps=[7]), SETTINGS, tmp_path, CPU)
    message = str(raised.value)
    assert "bad-batch-7.pt" in message and "2-1-0, 2-1-1, 2-1-2" in message
    assert "\n" not in message
    saved = torch.load(tmp_path / "bad-batch-7.pt", weights_only=True)
    assert saved["ids"] == ["2-1-0", "2-1-1", "2-1-2"] and saved["x_BC"].shape == (3, 4)


def test_bad_batches_up_to_the_limit_are_left_out(tmp_path):
    settings = replace(SETTINGS, max_bad_batches=2)
    task = Task(bad_steps=[3, 9])
    train(task, settings, tmp_path, CPU)
    assert (tmp_path / "bad-batch-3.pt").exists() and (tmp_path / "bad-batch-9.pt").exists()
    assert all(torch.isfinite(p).all() for p in task.model.parameters())
    with pytest.raises(RecipeError, match="bad-batch-11"):
        train(Task(bad_steps=[3, 9, 11]), settings, tmp_path / "more", CPU)


def test_left_out_steps_are_logged_and_saved_as_others(tmp_path):
    settings = replace(SETTINGS, max_bad_batches=3, save_every_steps=2, keep_steps=2)
    train(Task(bad_steps=[4, 13, 14]), settings, tmp_path, CPU)
    # But for the 14th: nothing has been learned since the 12th.
    logged = [e["step"] for e in log_of(tmp_path) if e["kind"] == "train"]
    assert logged == [2, 4, 6, 8, 10, 12]
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {
        "checkpoint-12.pt",
        "checkpoint-14.pt",
    }


def test_schedules(tmp_path):
    settings = replace(SETTINGS, log_every_steps=1)
    task = Task()
    train(task, settings, tmp_path / "eve", CPU)
    assert task.warmups == [step / 10 for step in range(1, 16)]
    rates = [e["lr"] for e in log_of(tmp_path / "eve") if e["kind"] == "train"]
    for step, rate in enumerate(rates, start=1):
        epoch = (step - 1) // BATCHES
        batch_factor = ((step**2 + 10**2) / 10**2) ** -0.25
        assert rate == pytest.approx(
            0.02 * batch_factor * ((epoch**2 + 6**2) / 6**2) ** -0.25, rel=1e-6
        )
    settings = replace(settings, optimizer="adamw", warm_share=0.2)
    train(Task(), settings, tmp_path / "adamw", CPU)
    rates = [e["lr"] for e in log_of(tmp_path / "adamw") if e["kind"] == "train"]
    assert rates[:3] == pytest.approx([0.02 / 3, 0.04 / 3, 0.02])
    assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(0.02 * 1e-3)


def test_only_the_last_epochs_are_kept(tmp_path):
    train(Task(), replace(SETTINGS, keep_epochs=2), tmp_path, CPU)
    assert sorted(p.name for p in tmp_path.glob("epoch-*")) == ["epoch-2.pt", "epoch-3.pt"]


def test_every_nth_epoch_is_kept_beside_the_last(tmp_path):
    settings = replace(SETTINGS, num_epochs=5, keep_epochs=1, keep_every_epochs=2)
    train(Task(), settings, tmp_path, CPU)
    names = sorted(p.name for p in tmp_path.glob("epoch-*"))
    assert names == ["epoch-2.pt", "epoch-4.pt", "epoch-5.pt"]


def test_resumes_from_each_checkpoint_that_is_kept(tmp_path):
    settings = replace(SETTINGS, save_every_steps=3, keep_steps=2, keep_epochs=2)
    whole = tmp_path / "whole"
    train(Task(), settings, whole, CPU)
    kept = sorted(p.name for p in whole.glob("*-*.pt"))
    assert kept == ["checkpoint-12.pt", "checkpoint-15.pt", "epoch-2.pt", "epoch-3.pt"]
    for name in kept:
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(whole / name, folder / "checkpoint.pt")
        shutil.copy(whole / "log.jsonl", folder)
        train(Task(), settings, folder, CPU)
        assert same(state_of(folder / "checkpoint.pt"), state_of(whole / "checkpoint.pt")), name
        assert log_of(folder) == log_of(whole)


@pytest.mark.parametrize("divided", [0, 1])
def test_accumulated_batches_are_one(tmp_path, divided):
    class Whole(Task):
        """Two batches in one, the odd last one alone."""

        def batches(self, epoch, start):
            single = list(super().batches(epoch, 0))
            for i in range(2 * start, BATCHES, 2):
                both = [batch for batch, _ in single[i : i + 2]]
                ids = [name for batch in both for name in batch.ids]
                yield Batch(ids, torch.cat([batch.x_BC for batch in both])), 2.0 * len(both)

    settings = replace(SETTINGS, optimizer="adamw", lr=0.002)
    models = []
    for task_class, accumulate in ((Task, 2), (Whole, 1)):
        task = task_class()
        task.model[1].p, task.divided = 0.0, divided
        name = task_class.__name__
        train(task, replace(settings, accumulate=accumulate), tmp_path / name, CPU)
        models.append(task.model.state_dict())
    for ours, theirs in zip(*(model.values() for model in models)):
        torch.testing.assert_close(ours, theirs)
    logs = [log_of(tmp_path / name) for name in ("Task", "Whole")]
    assert [e["step"] for e in logs[0]] == [e["step"] for e in logs[1]]


def test_scan_names_the_batch_that_does_not_fit_before_the_first_step(tmp_path):
    class Large(Task):
        def loss(self, batch, step, warmup):
            if batch.ids[0].startswith("1-1"):
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            return super().loss(batch, step, warmup)

    settings = replace(SETTINGS, scan_batches="always")
    with pytest.raises(RecipeError, match=r"1-1-0, 1-1-1, 1-1-2: .* lower max_duration"):
        train(Large(), settings, tmp_path / "scanned", CPU)
    assert not (tmp_path / "scanned/log.jsonl").exists()
    # Without it, at the batch.
    with pytest.raises(RecipeError, match=r"1-1-0, 1-1-1, 1-1-2: .* lower max_duration"):
        train(Large(), SETTINGS, tmp_path / "met", CPU)


def test_scan_changes_nothing(tmp_path):
    train(Task(), SETTINGS, tmp_path / "without", CPU)
    train(Task(), replace(SETTINGS, scan_batches="always"), tmp_path / "with", CPU)
    ours, theirs = (state_of(tmp_path / name / "checkpoint.pt") for name in ("with", "without"))
    assert same(ours, theirs)


def scalars_of(folder):
    """What TensorBoard shows: by tag, the (step, value) in order."""
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
    }


def test_tensorboard_shows_the_log_of_a_resumed_run_too(tmp_path):
    settings = replace(SETTINGS, checkpoint_seconds=0)
    with pytest.raises(Killed):
        train(Task(kill_at=8), settings, tmp_path, CPU)
    train(Task(), settings, tmp_path, CPU)
    expected = {}
    for entry in log_of(tmp_path):
        for name in entry.keys() - {"kind", "step", "epoch"}:
            tag = f"{entry['kind']}/{name}"
            expected.setdefault(tag, []).append((entry["step"], pytest.approx(entry[name])))
    assert expected.keys() == {"train/square", "train/lr", "dev/out"}
    assert scalars_of(tmp_path) == expected


def test_progress_line_has_the_rate_and_the_time_left(tmp_path, caplog, monkeypatch):
    now = [100.0]

    class Timed(Task):
        """A batch of 2 s of speech takes a quarter of a second."""

        def loss(self, *args):
            now[0] += 0.25
            return super().loss(*args)

    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    caplog.set_level("INFO")
    settings = replace(SETTINGS, num_epochs=60)
    train(Timed(), settings, tmp_path, CPU)
    lines = [line for line in caplog.messages if "x real time" in line]
    assert len(lines) == 60 * BATCHES // 2
    # 300 batches take 75 s.
    pattern = r"epoch (\d+)/60, step (\d+): square \S+, lr \S+, 8 x real time, (\S+) min left"
    found = [re.fullmatch(pattern, line).groups() for line in lines]
    assert found[0] == ("1", "2", "1.2") and found[-1] == ("60", "300", "0.0")
    for epoch, step, left in found:
        assert int(epoch) == (int(step) - 1) // BATCHES + 1
        assert float(left) == pytest.approx((300 - int(step)) / 240, abs=0.051)


@pytest.mark.parametrize(
    ("precision", "has_bf16", "expected"),
    [
        ("bf16", False, torch.bfloat16),
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("float32", True, torch.float32),
    ],
)
def test_precision(tmp_path, monkeypatch, precision, has_bf16, expected):
    used = set()

    class Seen(Task):
        def loss(self, batch, step, warmup):
            used.add(self.model(batch.x_BC).dtype)
            return super().loss(batch, step, warmup)

    monkeypatch.setattr(loop, "has_bf16", lambda device: has_bf16)
    train(Seen(), replace(SETTINGS, precision=precision, num_epochs=1), tmp_path, CPU)
    assert used == {expected}
    saved = state_of(tmp_path / "epoch-1.pt")
    assert {v.dtype for table in ("model", "model_avg") for v in saved[table].values()} == {
        torch.float32
    }
    moments = [v for state in saved["optimizer"]["state"].values() for v in state.values()]
    assert all(v.dtype == torch.float32 for v in moments if isinstance(v, torch.Tensor))


def test_settings_that_make_no_sense():
    with pytest.raises(RecipeError, match=r"training\.accumulate: 0; give at least 1"):
        TrainingSettings(accumulate=0)
