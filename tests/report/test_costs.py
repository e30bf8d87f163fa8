"""What steps would cost, by rates."""

import pytest

from mvqkd import cli
from mvqkd.errors import RecipeError
from mvqkd.report.costs import Cost, CostSettings, StepCost, cost_of, plan_text, with_teacher
from tests.recipe_copy import ROOT

CONF = """
measured: a desk
speech: {train: 10, test: 2}
steps:
  labels: {speech: train, seconds_per_hour: 30, bytes_per_hour: 1.5e+6, memory: 2.5}
  student: {speech: train, seconds: 60, seconds_per_hour: 20, epochs: true, bytes: 5.0e+6}
  student-streaming: {speech: train, seconds_per_hour: 40, epochs: true, memory: 4}
  corpus: {speech: corpus, seconds_per_hour: 1, bytes: 7}
"""


@pytest.fixture
def settings(tmp_path) -> CostSettings:
    (tmp_path / "costs.yaml").write_text(CONF)
    return cli.parse(CostSettings, ["--config", str(tmp_path / "costs.yaml")])[0]


@pytest.fixture
def training(tmp_path) -> str:
    """A training whose last word on epochs is 3."""
    (tmp_path / "a.yaml").write_text("training: {num_epochs: 8, lr: 1}\n")
    (tmp_path / "b.yaml").write_text("training: {num_epochs: 3}\n")
    (tmp_path / "c.yaml").write_text("distillation: {kind: mvq}\n")
    names = [f"--config {tmp_path}/{name}.yaml" for name in "abc"]
    return f"python3 train.py {' '.join(names)} --device cpu"


def test_rates_times_hours_and_epochs(settings, training):
    assert cost_of("labels-n4", [], settings) == Cost(300, 15e6, 2.5)
    words = training.split()
    assert cost_of("student-mvq", words, settings) == Cost(60 + 3 * 200, 5e6, None)
    assert cost_of("student-streaming-mvq", words, settings) == Cost(1200, None, 4)


def test_training_of_a_share_and_its_checkpoints(settings, training, tmp_path):
    rates = settings.steps["student"]
    rates.bytes, rates.checkpoint_bytes, rates.seconds_per_epoch = None, 1e6, 2.0
    # The last conf of three epochs keeps all of them, and one to go on from.
    assert cost_of("student-mvq", training.split(), settings) == Cost(60 + 3 * 202, 4e6, None)
    (tmp_path / "d.yaml").write_text("training: {keep_epochs: 2}\ntranscribed_share: 0.25\n")
    words = [*training.split(), "--config", str(tmp_path / "d.yaml")]
    assert cost_of("student-mvq", words, settings) == Cost(60 + 3 * 52, 3e6, None)
    (tmp_path / "d.yaml").write_text(
        "training: {num_epochs: 50, keep_epochs: 11, keep_every_epochs: 10}\n"
    )
    assert cost_of("student-mvq", words, settings).bytes == (11 + 3 + 1) * 1e6


def test_speech_of_one_part(settings):
    settings.speech["train-clean-360"] = 3.0
    settings.steps["more-labels"] = StepCost("part", bytes_per_hour=2.0)
    assert cost_of("more-labels-mvq-train-clean-360", [], settings) == Cost(None, 6.0, None)
    assert cost_of("more-labels-mvq-train-other-500", [], settings) == Cost(None, None, None)


def test_copy_that_is_named_is_not_fetched(settings):
    settings.speech["corpus"] = 3.0
    settings.steps["corpus"] = StepCost("corpus", bytes=1.0, download_bytes_per_hour=2.0)
    settings.steps["noise"] = StepCost(download_bytes=5.0)
    for copy, corpus, noise in ([], 7.0, 5.0), (["--dl_dir", "copy"], 1.0, None):
        assert cost_of("corpus", copy, settings).bytes == corpus
        assert cost_of("noise", copy, settings).bytes == noise


def test_what_was_not_measured(settings):
    assert cost_of("decode-mvq", [], settings) == Cost(None, None, None)
    # How much speech the corpus has is not said.
    assert cost_of("corpus", [], settings) == Cost(None, 7, None)


def test_training_without_epochs_is_refused(settings):
    with pytest.raises(RecipeError, match=r"no conf has training\.num_epochs"):
        cost_of("student-mvq", ["train.py"], settings)


def test_epochs_that_are_no_number_are_refused(settings, training, tmp_path):
    (tmp_path / "b.yaml").write_text('training: {num_epochs: "3"}\n')
    assert cost_of("student-mvq", training.split(), settings).seconds == 60 + 3 * 200
    (tmp_path / "b.yaml").write_text("training: {num_epochs: some}\n")
    with pytest.raises(RecipeError, match=r"b\.yaml .*: num_epochs, .* is no number .*'some'"):
        cost_of("student-mvq", training.split(), settings)


@pytest.mark.parametrize(
    ("teacher", "left"),
    [
        ("own", {"labels", "labels-floats", "more-labels-floats", "teacher", "student"}),
        ("made", {"labels", "labels-floats", "more-labels-floats", "student"}),
        ("other", {"student"}),
    ],
)
def test_rates_of_another_teacher_are_left_out(settings, teacher, left):
    names = ("labels", "labels-floats", "more-labels-floats", "teacher", "student")
    settings.steps = {name: StepCost(seconds=1.0) for name in names}
    assert set(with_teacher(settings, teacher).steps) == left


def test_plan_in_words(settings, training):
    plan = f"corpus done make\nlabels-mvq todo dump a\\ b \nstudent-mvq todo {training} \n"
    plan += "decode-mvq todo decode \n"
    assert plan_text(plan, settings).splitlines() == [
        "# corpus: done already",
        "# labels-mvq: time 5m00s, disk 15.0 MB, memory 2.5 GB",
        "dump a\\ b",
        "# student-mvq: time 11m00s, disk 5.0 MB, memory not measured",
        training,
        "# decode-mvq: time not measured, disk not measured, memory not measured",
        "decode",
        "# 3 steps to do: time 16m00s, disk 20.0 MB, memory 2.5 GB",
        "# time of 1 of these: not measured, and not in the sum",
        "# disk of 1 of these: not measured, and not in the sum",
        "# memory of 2 of these: not measured, and not in the sum",
        "# rates: a desk",
    ]


def test_students_side_by_side(settings, training):
    # 660 s and 5 MB; three of them, two at once, take as long as two. Streaming ones: 1200 s, 4 GB.
    plan = "labels todo dump\n" + "".join(f"student-{n} todo {training}\n" for n in "abc")
    last = plan_text(plan, settings, num_jobs=2).splitlines()[-3]
    assert last == ("# 4 steps to do: time 27m00s, disk 30.0 MB, memory 2.5 GB; 2 students at once")
    assert "time 38m00s, disk 30.0 MB, memory 2.5 GB" in plan_text(plan, settings)
    plan += "".join(f"student-streaming-{n} todo {training}\n" for n in "ab")
    # a and b end at 11 min, c at 22, then the first stream at 31 and the second at 42.
    assert "time 47m00s, disk 30.0 MB, memory 8.0 GB;" in plan_text(plan, settings, num_jobs=2)


def test_gpu_hours(settings, training):
    plan = f"corpus todo make\nstudent-mvq todo {training}\n"
    plan += f"student-many todo python3 -m mvqkd.launch --nproc-per-node 4 {training[8:]}\n"
    plan += "decode-mvq todo decode --device cuda\n"
    lines = plan_text(plan, settings, device="cuda").splitlines()
    # Rates of another device say nothing.
    assert "# student-mvq: time not measured, disk 5.0 MB, memory not measured, GPU-hours not " in (
        "\n".join(lines)
    )
    assert lines[0] == "# corpus: time not measured, disk 7 B, memory not measured"
    assert lines[-6].endswith(", memory not measured, GPU-hours not measured")
    assert lines[-2] == "# GPU-hours of 3 of these: not measured, and not in the sum"
    settings.device = "cuda"
    text = plan_text(plan, settings, device="cuda")
    assert "# student-mvq: time 11m00s, disk 5.0 MB, memory not measured, GPU-hours 0.2\n" in text
    assert "# student-many: time 11m00s, disk 5.0 MB, memory not measured, GPU-hours 0.7\n" in text
    assert (
        "# 4 steps to do: time 22m00s, disk 10.0 MB, memory not measured, GPU-hours 0.9\n" in text
    )
    assert "# GPU-hours of 1 of these: not measured, and not in the sum\n" in text
    assert "GPU" not in plan_text(plan, settings)


def test_shipped_rates_are_read():
    files = sorted([*ROOT.glob("conf/**/costs.yaml"), *ROOT.glob("egs/*/conf/**/costs.yaml")])
    assert len(files) > 5
    for path in files:
        assert cli.parse(CostSettings, ["--config", str(path)])[0]


def test_shipped_students_of_two_cores(monkeypatch):
    """As measured in a quiet run of ./run.sh --size small, of time and of disk."""
    monkeypatch.chdir(ROOT)
    paths = ["conf/laptop/costs.yaml", "egs/mini/conf/small/costs.yaml"]
    confs = [word for path in paths for word in ("--config", path)]
    costs = cli.parse(CostSettings, confs)[0]
    measured = {
        "none": (227, 217e6),
        "mvq": (256, 293e6),
        "mvq-l2": (240, 224e6),
        "streaming-none": (404, 361e6),
        "streaming-mvq-l2": (409, 373e6),
    }
    for student, (seconds, num_bytes) in measured.items():
        files = ["training", "laptop/training"]
        files += ["laptop/streaming"] if student.startswith("streaming") else []
        words = [word for name in files for word in ("--config", f"conf/{name}.yaml")]
        costs_of_steps = [
            cost_of(f"{step}-{student}", words, costs) for step in ("student", "decode")
        ]
        assert sum(cost.seconds for cost in costs_of_steps) == pytest.approx(seconds, rel=0.05)
        assert costs_of_steps[0].bytes == pytest.approx(num_bytes, rel=0.02)
