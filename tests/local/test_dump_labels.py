"""local/dump_labels.py in many processes: torchrun, a Slurm array, killed and gone on with."""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse import CutSet
from lhotse.utils import fastcopy

from local.dump_labels import MoreLabels, Settings, main, make_kinds
from mvqkd.data.labels import Dumper, LabelSettings
from mvqkd.data.manifests import write_cuts
from mvqkd.errors import RecipeError
from mvqkd.quantizer import Quantizer, save_quantizer
from mvqkd.teachers.ctc import SYMBOLS
from mvqkd.teachers.hubert import HubertTeacher
from tests.conftest import ROOT, tiny_hubert

OUT = "labels/train.jsonl.gz"
# The shard in which the cut of the file `late.flac` lies, of six.
LATE_SHARD = 2
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

FAKE_SBATCH = """#!/usr/bin/env bash
# Runs the script on stdin for each task of --array=0-N, all at once, as Slurm would.
set -u
echo "$@" >>"$SBATCH_SEEN"
for word; do
    case $word in --array=0-*) last=${word#--array=0-} ;; --output=*) logs=${word#--output=} ;; esac
done
script=$(cat)
for task in $(seq 0 "$last"); do
    log=${logs//%A/7} log=${log//%a/$task}
    SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_COUNT=$((last + 1)) SLURM_ARRAY_TASK_MIN=0 \\
        bash <(echo "$script") >"$log" 2>&1 &
done
status=0
for _ in $(seq 0 "$last"); do wait -n || status=$?; done
exit $status
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, feature_cuts, teacher, quantizer):
    """A folder with teacher, quantizer and a manifest, one of whose recordings is `late.flac`."""
    folder = tmp_path_factory.mktemp("inputs")
    teacher.save(folder / "teacher")
    save_quantizer(folder / "quantizer.pt", quantizer, {"teacher": "tiny", "layer": 2})
    cuts = list(feature_cuts)
    late = cuts[2 * LATE_SHARD]
    source = late.recording.sources[0]
    shutil.copy(source.source, folder / "late.flac")
    recording = fastcopy(late.recording, sources=[fastcopy(source, source="late.flac")])
    cuts[2 * LATE_SHARD] = fastcopy(late, recording=recording)
    write_cuts(CutSet.from_cuts(cuts), folder / "train.jsonl.gz")
    return folder


@pytest.fixture
def job(inputs, tmp_path):
    return Path(shutil.copytree(inputs, tmp_path / "job"))


def settings(**changes):
    labels = LabelSettings(shard_size=2, refine_iters=1, num_threads=1)
    values = {"labels": labels, "device": "cpu", **changes}
    return Settings("teacher", Path("train.jsonl.gz"), Path(OUT), Path("quantizer.pt"), **values)


COMMAND = [
    str(ROOT / "local/dump_labels.py"),
    *("--teacher", "teacher", "--quantizer", "quantizer.pt", "--device", "cpu"),
    *("--train_manifest", "train.jsonl.gz", "--out", OUT),
    *("--labels.shard_size", "2", "--labels.refine_iters", "1", "--labels.num_threads", "1"),
]


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The bytes of an unbroken run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "job"
    shutil.copytree(inputs, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(settings())
    return written(folder)


def written(folder):
    paths = [path for path in (folder / "labels").rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_what_is_left_in_the_end(whole):
    shards = [f"labels/shards/{number:05d}.h5" for number in range(6)]
    assert sorted(whole) == [*shards, "labels/shards/made-from.json", OUT]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
# The same, whose failures are one line.
LAUNCH = [sys.executable, "-m", "mvqkd.launch", *TORCHRUN[3:]]


def killed_at_the_late_file(job, launcher, num_done):
    """Start it, and kill all processes when ``num_done`` shards are done; their times."""
    # The worker that comes to this file waits in it, as one does that is killed within a shard.
    late, kept = job / "late.flac", (job / "late.flac").read_bytes()
    late.unlink()
    os.mkfifo(late)
    process = subprocess.Popen(
        [*launcher, *COMMAND], cwd=job, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    said = []
    while sum(": shard " in line for line in said) < num_done:
        said.append(process.stderr.readline())
        assert said[-1], "".join(said)
    for worker in children(process.pid) or [process.pid]:
        os.kill(worker, signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0
    shards = job / "labels/shards"
    done = [path.name for path in shards.glob("[0-9]*.jsonl.gz")]
    assert len(done) == num_done and f"{LATE_SHARD:05d}.jsonl.gz" not in done
    assert not (job / OUT).exists() and not (shards / f"{LATE_SHARD:05d}.h5").exists()

    assert stat.S_ISFIFO(late.stat().st_mode)
    late.unlink()
    late.write_bytes(kept)
    return times_of(job)


def times_of(job):
    return {path: path.stat().st_mtime_ns for path in (job / "labels/shards").glob("[0-9]*.h5")}


def test_killed_under_torchrun_and_ended_by_one_process(job, whole, monkeypatch):
    before = killed_at_the_late_file(job, [*TORCHRUN, "2"], 5)
    monkeypatch.chdir(job)
    main(settings())
    assert written(job) == whole
    assert before.items() <= times_of(job).items()


def test_killed_alone_and_ended_by_three_processes(job, whole):
    before = killed_at_the_late_file(job, [sys.executable], LATE_SHARD)
    command = [*LAUNCH, "3", "--no-python", sys.executable, *COMMAND]
    done = subprocess.run(command, cwd=job, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum(": shard " in line for line in done.stderr.splitlines()) == 6 - LATE_SHARD
    assert written(job) == whole
    assert before.items() <= times_of(job).items()


def test_failure_of_processes_that_run_sh_launches_is_one_line(job):
    """As its option --label-launcher has them."""
    step = job / "step.sh"
    step.write_text(
        f"cd {ROOT} && . local/steps.sh && cd {job}\n"
        "stamps=stamps exp=exp dry_run=false\n"
        f'launcher="{" ".join(LAUNCH)} 2 --no-python"\n'
        f'step labels "" "labels {OUT}" {sys.executable} "$@"\n'
    )
    (job / "late.flac").unlink()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", str(step), *COMMAND],
        cwd=job,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and not (job / OUT).exists()
    lines = [line for line in done.stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert len(lines) == 1 and lines[0].startswith(f"{COMMAND[0]}: late.flac: cut "), done.stderr


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_slurm_array_shares_the_shards(job, whole, tmp_path):
    recipe = tmp_path / "recipe"
    (recipe / "local").mkdir(parents=True)
    shutil.copy(ROOT / "local/slurm_array.sh", recipe / "local")
    (recipe / "path.sh").write_text(f"export PYTHONPATH={ROOT}\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(FAKE_SBATCH)
    (tmp_path / "bin/sbatch").chmod(0o755)
    env = {
        **ENVIRONMENT,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SBATCH_SEEN": str(tmp_path / "seen"),
    }

    def submit(*words, **changes):
        command = ["bash", str(recipe / "local/slurm_array.sh"), *words]
        return subprocess.run(
            command, cwd=job, env={**env, **changes}, capture_output=True, text=True
        )

    done = submit("2", "--partition=gpu", "--", sys.executable, *COMMAND)
    assert done.returncode == 0, done.stderr
    seen = (tmp_path / "seen").read_text()
    assert "--wait --array=0-1" in seen and "--partition=gpu" in seen
    logs = sorted((recipe / "exp/slurm").iterdir())
    assert [log.name for log in logs] == ["7_0.log", "7_1.log"]
    assert sum(log.read_text().count(": shard ") for log in logs) == 6
    assert written(job) == whole

    failed = submit("1", "--", "false")
    assert failed.returncode == 1 and "a task failed, see" in failed.stderr
    assert "no number of tasks" in submit("x", "--", "true").stderr
    assert "no command after --" in submit("2", "true").stderr
    (tmp_path / "bin/sbatch").unlink()
    gone = submit("1", "--", "true", PATH=os.environ["PATH"])
    assert gone.returncode == 1 and "sbatch is not here" in gone.stderr


def test_second_call_and_lost_shards(job, whole, monkeypatch):
    monkeypatch.chdir(job)
    main(settings())
    Path("labels/shards/00001.h5").unlink()
    main(settings())
    assert written(job) == whole
    Path("labels/shards/00001.h5").write_bytes(b"damaged")
    with pytest.raises(
        RecipeError, match=r"00001\.h5: .* cannot be read .*remove it and the labels' stamp"
    ):
        main(settings())


def test_job_that_would_write_other_labels_is_refused(job, whole, monkeypatch):
    monkeypatch.chdir(job)
    main(settings())
    other = settings(labels=LabelSettings(shard_size=3, refine_iters=1, num_threads=1))
    with pytest.raises(RecipeError) as caught:
        main(other)
    assert "made-from.json: labels in this folder are made from shard_size 2, and" in str(
        caught.value
    )
    assert "this job's from 3; give it another folder" in str(caught.value)
    with pytest.raises(RecipeError, match=r"made from codebook_indexes .*'refine_iters': 1"):
        main(settings(labels=LabelSettings(shard_size=2, refine_iters=2, num_threads=1)))
    shutil.copytree("teacher", "kept")
    retrained = HubertTeacher(tiny_hubert(seed=3), True, list(SYMBOLS)).eval()
    retrained.save(Path("teacher"))
    with pytest.raises(RecipeError, match="made from teacher_weights"):
        main(settings())
    shutil.rmtree("teacher")
    shutil.move("kept", "teacher")
    cuts = CutSet.from_file("train.jsonl.gz").to_eager()
    write_cuts(cuts.subset(first=3), Path("train.jsonl.gz"))
    with pytest.raises(RecipeError, match="made from cuts 12 of sha256"):
        main(settings())
    assert written(job) == whole


@pytest.mark.parametrize("place", [1, 5])  # of two in the first shard, and in another
def test_cut_that_is_there_twice_is_named(job, monkeypatch, place):
    monkeypatch.chdir(job)
    cuts = list(CutSet.from_file("train.jsonl.gz"))
    cuts[place] = fastcopy(cuts[place], id=cuts[0].id)
    write_cuts(CutSet.from_cuts(cuts), Path("train.jsonl.gz"))
    with pytest.raises(RecipeError, match=f"^cut {cuts[0].id}: is there twice; give each cut of"):
        main(settings())
    assert not Path("labels").exists()


def other_layer(kind):
    return 1 if kind == "layer" else 2


def other_job(job, kind, quantizer):
    """Settings that would leave other labels in the same folder."""
    if kind == "quantizer":
        quantizer = Quantizer(32, 256, 4, generator=torch.Generator().manual_seed(2))
        quantizer.set_id_from_weights()
    save_quantizer(job / "other.pt", quantizer, {"teacher": "tiny", "layer": other_layer(kind)})
    other = settings()
    other.quantizer = Path("other.pt")
    return other


@pytest.mark.parametrize("kind", ["layer", "quantizer"])
def test_another_job_is_refused_while_one_is_at_work(job, whole, monkeypatch, quantizer, kind):
    monkeypatch.chdir(job)
    other, label, refused = other_job(job, kind, quantizer), Dumper.__call__, []

    def with_another_beside(self, cuts, arrays, **options):
        before = written(job)
        try:
            main(other)
        except RecipeError as error:
            refused.append(str(error))
        assert written(job) == before
        return label(self, cuts, arrays, **options)

    monkeypatch.setattr(Dumper, "__call__", with_another_beside)
    main(settings())
    assert len(refused) == 6 and len(set(refused)) == 1
    cause = f"'layer': {other_layer(kind)}, 'quantizer': "
    assert refused[0].startswith("labels/shards/made-from.json: labels in this folder are made")
    assert cause in refused[0].partition("this job's from")[2] and "\n" not in refused[0]
    assert written(job) == whole


def test_of_two_jobs_that_begin_at_once_the_later_is_refused(job, whole, monkeypatch, quantizer):
    monkeypatch.chdir(job)
    name, link = "labels/shards/made-from.json", os.link

    def too_late(aside, path):
        Path(path).write_bytes(whole[name])
        link(aside, path)

    monkeypatch.setattr(os, "link", too_late)
    with pytest.raises(RecipeError, match=r"made-from\.json: labels in this folder are made from"):
        main(other_job(job, "quantizer", quantizer))
    assert written(job) == {name: whole[name]}
    monkeypatch.undo()
    monkeypatch.chdir(job)
    main(settings())
    assert written(job) == whole


def test_several_teachers_of_different_frame_shifts_at_once(job, monkeypatch, teacher):
    """Each gives what it gives alone."""
    slow = tiny_hubert(seed=2, hidden_size=16, conv_kernel=[240, 1, 4], conv_stride=[160, 1, 4])
    slow = HubertTeacher(slow, False, list(SYMBOLS), "slow").eval()
    slow.save(job / "slow")
    monkeypatch.chdir(job)
    main(
        settings(
            more=[
                MoreLabels("slow", teacher="slow", layer=1, dtype="float32"),
                MoreLabels("mine", teacher="teacher", layer=1, dtype="float32"),
            ]
        )
    )
    both = CutSet.from_file(OUT).to_eager()
    assert slow.frame_shift == 2 * teacher.frame_shift == 0.04
    before = {}
    for cut in both:
        before["slow", cut.id], before["mine", cut.id] = cut.load_slow(), cut.load_mine()
        frames = slow.num_frames(cut.num_samples)
        assert cut.load_slow().shape == (frames, 16)
        assert cut.load_mine().shape == (teacher.num_frames(cut.num_samples), 32)
        assert frames < 0.51 * len(cut.load_mine())
        shifts = [cut.custom[field].frame_shift for field in ("slow", "mine", "codebook_indexes")]
        assert shifts == [0.04, 0.02, 0.02]
    for field, name in (("slow", "slow"), ("mine", "teacher")):
        alone = settings(more=[MoreLabels(field, teacher=name, layer=1, dtype="float32")])
        alone.quantizer, alone.out = None, Path(f"{field}-alone/train.jsonl.gz")
        main(alone)
        for cut in CutSet.from_file(alone.out):
            np.testing.assert_array_equal(before[field, cut.id], getattr(cut, f"load_{field}")())


def test_several_layers_and_kinds_at_once(job, monkeypatch, teacher):
    monkeypatch.chdir(job)
    more = [
        MoreLabels("layer1", layer=1),
        MoreLabels("layer2", layer=2, dtype="float32", teacher="teacher"),
        MoreLabels("again", "codebook_indexes", quantizer=Path("quantizer.pt")),
    ]
    main(settings(more=more))
    for cut in CutSet.from_file(OUT):
        frames = teacher.num_frames(cut.num_samples)
        assert cut.load_layer1().shape == cut.load_layer2().shape == (frames, 32)
        assert cut.load_layer1().dtype == np.float16 and cut.load_layer2().dtype == np.float32
        np.testing.assert_array_equal(cut.load_again(), cut.load_codebook_indexes())
        origin = cut.custom["layer1_origin"]
        assert (origin["layer"], origin["quantizer"]) == (1, "float16")
    for bad, cause in (
        ([MoreLabels("a", teacher="teacher")], "a are embeddings; name their layer"),
        ([MoreLabels("a", "codebook_indexes")], "a are indexes; name their quantizer"),
        ([MoreLabels("a", layer=3)], "layer 3 is not in 1..2"),
        ([MoreLabels("codebook_indexes", layer=1)], "two are called codebook_indexes"),
        ([MoreLabels("a b", layer=1)], "'a b' is no name"),
    ):
        with pytest.raises(RecipeError, match=cause):
            main(settings(more=bad))
    same = make_kinds(settings(more=[MoreLabels("embeddings")]))
    assert same[1].origin.layer == same[0].origin.layer
    alone = settings(more=more[:1])
    alone.quantizer = None
    assert [kind.field for kind in make_kinds(alone)] == ["layer1"]
