"""run.sh as a user runs it, at size smoke: all stages, skipping, resuming, bad input."""

import json
import os
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet

from mvqkd.quantizer import load_quantizer, save_quantizer
from tests.recipe_copy import (
    ROOT,
    begun_steps,
    copy_checkout,
    copy_run,
    environment,
    error_line,
    files_under,
    run_sh,
)

ARGS = ("--size", "smoke", "--train-teacher", "true", "--device", "cpu")
STUDENTS = ["none", "mvq", "mvq-l2", "streaming-none", "streaming-mvq-l2"]
PARTS = ["train-clean-100", "train-clean-360", "train-other-500"]
# Of a log's entries, what differs from run to run.
TIMES = ("seconds", "took")
TEST_PARTS = ["test-clean", "test-other"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A copy of the checkout in which run.sh has run; tests that change it make their own."""
    folder = copy_checkout(tmp_path_factory.mktemp("finished") / "recipe")
    done = run_sh(folder, *ARGS)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done


@pytest.fixture
def copy(finished, tmp_path):
    return copy_run(finished[0], tmp_path / "recipe")


def test_leaves_what_each_stage_promises(finished, monkeypatch):
    folder, done = finished
    monkeypatch.chdir(folder)  # manifests name files from there
    data, exp = folder / "data/mini-smoke", folder / "exp/mini-smoke"
    for part in PARTS:
        assert list((data / "corpus" / part).rglob("*.flac")), part
        assert (data / "manifests" / f"{part}.jsonl.gz").exists()
    train = CutSet.from_file(data / "fbank/train.jsonl.gz").to_eager()
    originals = CutSet.from_file(data / "manifests/train-clean-100.jsonl.gz").to_eager()
    assert len(train) == 3 * len(originals)
    assert (data / "tokens/bpe.model").exists() and (data / "tokens/tokens.txt").exists()
    teacher = json.loads((exp / "teacher/origin.json").read_text())
    assert (teacher["epochs"], teacher["init"]["epochs"]) == (1, 2)
    assert set(json.loads((exp / "teacher-wer/wer.json").read_text())["wer"]) == set(TEST_PARTS)
    for part in TEST_PARTS:
        assert list((exp / "teacher-wer").rglob(f"wer-summary-{part}-*"))
    for name in ("embeddings.h5", "quantizer.pt", "diagnostics.json", "diagnostics.png"):
        assert (exp / "quantizer/mvq" / name).exists()
    labelled = CutSet.from_file(data / "labels/mvq/train.jsonl.gz").to_eager()
    assert [cut.id for cut in labelled] == [cut.id for cut in train]
    indexes_TN = labelled[0].load_codebook_indexes()
    assert indexes_TN.dtype == np.uint8 and indexes_TN.shape[1] == 2 and indexes_TN.max() < 16
    results = json.loads((exp / "results.json").read_text())
    assert len(results["students"]) == len(STUDENTS)
    made = [*results["students"], results["teacher"], results["quantizer"]]
    assert all(one["origin"]["device"].startswith("cpu, ") for one in made)
    assert [one["origin"]["seed"] for one in made] == [42] * len(STUDENTS) + [None, 0]
    assert all(one["origin"]["date"] for one in made)
    assert len({one["origin"]["confs"] for one in results["students"]} - {""}) == len(STUDENTS)
    for student in STUDENTS:
        for kind in ("recogs", "errs", "wer-summary"):
            for part in TEST_PARTS:
                assert list((exp / student).rglob(f"{kind}-{part}-*")), (student, kind, part)
        lines = (exp / student / "train.log").read_text().splitlines()
        assert lines and all(f" {student}: " in line for line in lines)
    table = (exp / "report/table.txt").read_text()
    assert table in done.stdout
    assert (exp / "report/training.png").exists() and (exp / "report/wer.png").exists()
    page = (exp / "report/index.html").read_text()
    assert page.count("data:audio/mpeg;base64,") == min(50, page.count("<article")) > 0
    assert not list(folder.rglob(".part-*"))


def test_second_run_does_nothing_but_show_the_table(finished):
    folder, _ = finished
    before = files_under(folder / "data", folder / "exp")
    done = run_sh(folder, *ARGS)
    assert done.returncode == 0, done.stderr
    assert begun_steps(done) == []
    assert done.stdout == (folder / "exp/mini-smoke/report/table.txt").read_text()
    assert files_under(folder / "data", folder / "exp") == before


def test_changed_value_remakes_its_stage_and_those_after(copy):
    before = files_under(copy / "data", copy / "exp")
    conf = copy / "egs/mini/conf/smoke/decoding.yaml"
    conf.write_text(conf.read_text().replace("beam: 2", "beam: 3  # was 2"))
    done = run_sh(copy, *ARGS)
    assert done.returncode == 0, done.stderr
    assert begun_steps(done) == [*(f"decode-{student}" for student in STUDENTS), "report"]
    after = files_under(copy / "data", copy / "exp")
    remade = {str(path.relative_to(copy)) for path in after if after[path] != before.get(path)}
    assert all(
        "decode-" in name
        or "/modified_beam_search/" in name
        or name.endswith(("/decoded.json", "/results.json"))
        or "/report" in name
        for name in remade
    ), remade
    assert "exp/mini-smoke/results.json" in remade
    assert before.keys() <= after.keys()


def test_grid_of_two_students(copy):
    """All of it by run.sh, on the corpus that is there, by the shipped teacher."""
    grids = copy / "egs/mini/conf/grids"
    (grids / "smoke.yaml").write_text(
        "name: smoke\nquestion: Does it run?\ncorpus: mini\nsize: smoke\nseeds: [1]\ncells:\n"
        "  none: {confs: distillation/none}\n"
        "  mvq-low: {confs: distillation/mvq, like: mvq, against: none,\n"
        "    values: {distillation: {layer: 1}}}\n"
    )

    # Of other cells and another seed, in the same folder.
    (grids / "other.yaml").write_text(
        "name: other\nquestion: And this?\ncorpus: mini\nsize: smoke\nseeds: [2]\ncells:\n"
        "  mvq-high: {confs: distillation/mvq, values: {distillation: {layer: 3}}}\n"
    )

    def call(grid, *options):
        words = '. ./path.sh && exec python3 local/experiment.py --config "$@"'
        on_cpu = ["--device", "cpu", "--num_jobs", "2"]
        return subprocess.run(
            ["bash", "-c", words, "grid", str(grids / f"{grid}.yaml"), *on_cpu, *options],
            cwd=copy,
            env=environment(),
            capture_output=True,
            text=True,
        )

    done = call("other", "--plan", "true")
    assert "other: 0 of 1 students are done; the other 1 will take " in done.stderr
    done = call("smoke")
    assert done.returncode == 0, done.stderr
    assert "smoke: 0 of 2 students are done; the other 2 will take 0 h 0" in done.stderr
    assert "smoke: 2 of 2 students are done\n" in done.stderr
    results = json.loads((copy / "exp/mini-smoke/grids/smoke/results.json").read_text())
    assert results["grid"]["run"] == "mini-smoke"
    none, mvq = results["grid"]["cells"]
    parts = {*TEST_PARTS, "dev-clean", "dev-other"}
    assert set(none["test_sets"]) == set(mvq["test_sets"]) == parts
    assert (mvq["distillation"], mvq["seeds_done"]) == ("mvq", [1])
    assert mvq["test_sets"]["test-clean"]["against"]["none"]["num_seeds"] == 1
    assert all(len(set(cell["conf_digests"]) - {""}) == 1 for cell in (none, mvq))
    settings = json.loads((copy / "exp/mini-smoke/mvq-low-seed1/settings.json").read_text())
    assert (settings["distillation"]["layer"], settings["training"]["seed"]) == (1, 1)
    # As many as decoding averages over.
    kept = {path.name for path in (copy / "exp/mini-smoke/mvq-low-seed1").glob("epoch-*.pt")}
    assert kept == {"epoch-2.pt", "epoch-3.pt"}
    done = call("smoke", "--plan", "true")
    assert "smoke: 2 of 2 students are done\n" in done.stderr


def heed_interrupts():
    # A shell that was started with SIGINT ignored, as in the background, could not.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder, *args):
    return subprocess.Popen(
        ["bash", str(folder / "run.sh"), *args],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )


def read_until(process, text):
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} was not printed:\n{''.join(seen)}")


def test_killed_while_training_resumes_to_the_same_result(finished, copy):
    whole = finished[0] / "exp/mini-smoke/mvq"
    broken = copy / "exp/mini-smoke/mvq"
    shutil.rmtree(broken)
    process = start(copy, *ARGS)
    read_until(process, "mvq: epoch 2/3, step")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (broken / "epoch-3.pt").exists()
    done = run_sh(copy, *ARGS)
    assert done.returncode == 0, done.stderr
    assert "mvq: resumed at epoch 2, step" in done.stderr
    assert begun_steps(done) == ["student-mvq", "decode-mvq"]
    for epoch in (1, 2, 3):
        ours, theirs = (
            torch.load(folder / f"epoch-{epoch}.pt", weights_only=True)
            for folder in (broken, whole)
        )
        for kind in ("model", "model_avg"):
            assert ours[kind].keys() == theirs[kind].keys()
            assert all(torch.equal(ours[kind][k], theirs[kind][k]) for k in ours[kind])
    logs = []
    for folder in (broken, whole):
        entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in e.items() if k not in TIMES} for e in entries])
    assert logs[0] == logs[1]
    recogs = sorted(path.relative_to(whole) for path in whole.rglob("recogs-*"))
    assert recogs
    for path in recogs:
        assert (broken / path).read_text() == (whole / path).read_text()
    assert not list(copy.rglob(".part-*"))


def processes_in(session):
    found = []
    for line in subprocess.run(
        ["bash", "-c", "cat /proc/[0-9]*/stat 2>/dev/null"], capture_output=True, text=True
    ).stdout.splitlines():
        state, _, _, its_session = line.rpartition(") ")[2].split()[:4]
        if int(its_session) == session and state != "Z":
            found.append(line)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_by_a_signal_it_leaves_no_process(copy, number):
    shutil.rmtree(copy / "exp/mini-smoke/mvq")
    shutil.rmtree(copy / "exp/mini-smoke/none")
    process = start(copy, *ARGS, "--stage", "6", "--stop-stage", "6")
    read_until(process, "epoch 1/3, step")
    process.send_signal(number)
    # The pipe ends when the last process that holds it has.
    process.communicate()
    assert process.returncode != 0
    assert processes_in(process.pid) == []


def test_one_failing_student_ends_the_others(copy):
    other_quantizer(copy)
    shutil.rmtree(copy / "exp/mini-smoke/none")
    process = start(copy, *ARGS, "--stage", "6", "--students", "none mvq")
    output, _ = process.communicate()
    assert process.returncode != 0
    assert "student-mvq: failed" in output and "its labels were made by" in output
    assert "decode-none: begins" not in output and "Traceback" not in output
    assert processes_in(process.pid) == []


def test_without_train_teacher_the_shipped_one_is_taken(tmp_path):
    folder = copy_checkout(tmp_path / "recipe")
    done = run_sh(folder, "--size", "smoke", "--stage", "1", "--stop-stage", "1")
    assert done.returncode == 0, done.stderr
    shipped, taken = folder / "egs/mini/teacher", folder / "exp/mini-smoke/teacher"
    for path in shipped.iterdir():
        if path.name != "origin.json":
            assert (taken / path.name).read_bytes() == path.read_bytes()
    said, says = (json.loads((place / "origin.json").read_text()) for place in (shipped, taken))
    assert says == {**said, "teacher": "egs/mini/teacher"}


def test_teacher_from_a_checkpoint_of_fairseq(tmp_path):
    folder = copy_checkout(tmp_path / "recipe")
    (tmp_path / "teacher.pt").symlink_to(ROOT / "tests/golden/fairseq/hubert_base_tiny.pt")
    (folder / "conf/teacher/tiny.yaml").write_text("teacher: nowhere\nlayer: 2\n")
    options = ("--teacher", "tiny", "--teacher-dir", "../teacher.pt", "--size", "smoke")
    options += ("--stage", "1", "--stop-stage", "1")
    done = run_sh(folder, *options)
    assert done.returncode == 0, done.stderr
    config = json.loads((folder / "exp/mini-smoke/teacher/config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("hubert", 3)
    assert begun_steps(run_sh(folder, *options)) == []


def test_help(finished):
    done = run_sh(finished[0], "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert "prepare.sh: corpus, manifests, features" in done.stdout
    assert "--num-jobs" in done.stdout and "(default: 2)" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--stagee", "3"), "unknown option --stagee"),
        (("--corpus", "nope"), "--corpus nope: not known; give one of: digits "),
        (("--size", "huge"), "--size huge: not known; give smoke, small, full or large"),
        (("--corpus", "digits", "--split", "odd"), "--split odd: not known"),
        (("--teacher", "nope"), "--teacher nope: not in conf/teacher; it has: hubert-base-ls960 "),
        ((*ARGS, "--teacher", "wavlm-large"), "leave out --teacher and --teacher-dir"),
        (("--corpus", "digits", "--teacher-dir", "x"), "/x: say with --teacher which"),
        (("--size", "smoke", "--teacher-dir", "x"), "/x: say with --teacher which"),
        (("--corpus", "digits", "--size", "full"), "--size full: is nothing to corpus digits"),
        ((*ARGS, "--split", "take"), "--split take: is nothing to corpus mini"),
        ((*ARGS, "--dl-dir", "/x"), "--dl-dir /x: is nothing to corpus mini"),
        ((*ARGS, "--students", "none nope"), "--students nope: not in"),
        ((*ARGS, "--students-file", "x"), "--students-file x: no such file"),
        ((*ARGS, "--overlay", "x"), "--overlay x: no such folder"),
        ((*ARGS, "--labels", "n44"), "--labels n44: neither conf/labels nor"),
        ((*ARGS, "--decoding", "odd"), "--decoding odd: conf/decoding/odd.yaml: no such file"),
        ((*ARGS, "--stage", "10"), "--stage 10 --stop-stage 9: no stage is of both"),
        ((*ARGS, "--stage", "3", "--stop-stage", "2"), "no stage is of both; there are 0 to 9"),
        ((*ARGS, "--stage", "-1", "--stop-stage", "-1"), "no stage is of both"),
        ((*ARGS, "--stage", "08"), "option --stage: '08' begins with 0; write it without"),
        ((*ARGS, "--students", " "), "--students ' ': names no student; conf/laptop/students.txt"),
        ((*ARGS, "--students", "mvq none mvq"), "more than once: mvq; name each once"),
        ((*ARGS, "--overlay", "docs/my confs"), "--overlay docs/my confs: its path has a space"),
        ((*ARGS, "--num-jobs", "0"), "give at least 1"),
        ((*ARGS, "--num-gpus", "0"), "give at least 1"),
        ((*ARGS, "--device", "tpu"), "'tpu' is none of auto, cpu, cuda"),
    ],
)
def test_bad_option_changes_nothing(finished, args, message):
    folder, _ = finished
    before = files_under(folder / "data", folder / "exp")
    assert message in error_line(run_sh(folder, *args))
    assert files_under(folder / "data", folder / "exp") == before


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        # Found before stage 3, which would be the first to run.
        ("decoding.yaml", "step decode-none: {overlay}/decoding.yaml: "),
        ("decodin.yaml", "--overlay {overlay}: no step reads decodin.yaml; name it as"),
        ("distillation/mvq.yaml", "step student-mvq: distillation.layer: 99 is no layer"),
    ],
)
def test_mistakes_in_confs_are_told_before_anything_runs(finished, tmp_path, conf, message):
    folder, _ = finished
    (tmp_path / "distillation").mkdir()
    (tmp_path / conf).write_text("distillation: {layer: 99}\n")
    (tmp_path / "sample.yaml").write_text("sample: {num_utterances: 5}\n")
    before = files_under(folder / "data", folder / "exp")
    line = error_line(run_sh(folder, *ARGS, "--overlay", str(tmp_path)))
    assert message.format(overlay=tmp_path) in line
    assert files_under(folder / "data", folder / "exp") == before


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def unknown_key(copy):
    conf = copy / "egs/mini/conf/smoke/labels.yaml"
    conf.write_text(conf.read_text() + "  shard_sise: 3\n")


def unknown_conf_of_a_student(copy):
    students = copy / "conf/laptop/students.txt"
    students.write_text(students.read_text() + "\nodd distillation/odd\n")


def other_quantizer(copy):
    shutil.rmtree(copy / "exp/mini-smoke/mvq")
    path = copy / "exp/mini-smoke/quantizer/mvq/quantizer.pt"
    weights = torch.load(path, weights_only=True)
    weights["centers"] *= 1.5
    torch.save(weights, path)
    sidecar = path.with_name("quantizer.pt.json")
    meta = json.loads(sidecar.read_text())
    sidecar.unlink()
    quantizer, _ = load_quantizer(path)
    quantizer.set_id_from_weights()
    meta = {key: meta[key] for key in ("teacher", "layer", "frame_shift", "frame_offset")}
    dim = quantizer.dim
    save_quantizer(path, quantizer, {**meta, "mean": torch.zeros(dim), "std": torch.ones(dim)})


def quantizer_cut_short(copy):
    shutil.rmtree(copy / "data/mini-smoke/labels")
    cut_short(copy / "exp/mini-smoke/quantizer/mvq/quantizer.pt")


def weights_cut_short(copy):
    (copy / "exp/mini-smoke/none/decoded.json").unlink()
    cut_short(copy / "exp/mini-smoke/none/epoch-3.pt")


def checkpoint_cut_short(copy):
    (copy / "exp/mini-smoke/stamps/student-none").unlink()
    cut_short(copy / "exp/mini-smoke/none/checkpoint.pt")


@pytest.mark.parametrize(
    ("spoil", "args", "messages", "absent"),
    [
        # The labels of the conf before stay.
        (unknown_key, ("--stage", "5"), ["shard_sise"], "data/mini-smoke/labels/mvq.before"),
        (
            unknown_conf_of_a_student,
            ("--stage", "6", "--students", "odd"),
            ["students.txt: student odd: conf/distillation/odd.yaml: no such file"],
            "exp/mini-smoke/odd",
        ),
        (
            other_quantizer,
            ("--stage", "6", "--students", "mvq"),
            ["its labels were made by quantizer", "labels/mvq and run stage 5"],
            "exp/mini-smoke/mvq/settings.json",
        ),
        (
            quantizer_cut_short,
            ("--stage", "5"),
            ["quantizer.pt: damaged or cut short"],
            "data/mini-smoke/labels/mvq/train.jsonl.gz",
        ),
        (
            weights_cut_short,
            ("--stage", "7", "--students", "none"),
            ["epoch-3.pt: cannot be read as a checkpoint", "mini-smoke/none and train again"],
            "exp/mini-smoke/none/decoded.json",
        ),
        (
            checkpoint_cut_short,
            ("--stage", "6", "--students", "none"),
            ["checkpoint.pt: cannot be read as a checkpoint", "remove it"],
            "exp/mini-smoke/stamps/student-none",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_half_written(copy, spoil, args, messages, absent):
    spoil(copy)
    line = error_line(run_sh(copy, *ARGS, *args))
    assert all(message in line for message in messages), line
    assert not (copy / absent).exists()
    assert not list(copy.rglob(".part-*"))


@pytest.fixture
def recordings(tmp_path):
    """Ten digits by two speakers, three takes: one each for training, dev and test."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for speaker, pitch in (("ann", 200), ("bob", 120)):
        for digit in range(10):
            for take in (0, 5, 8):
                time_L = np.arange(2400 + 80 * take) / 8000
                tone_L = np.sin(2 * np.pi * pitch * (1 + digit / 5) * time_L)
                audio_L = 0.3 * tone_L + 0.01 * rng.standard_normal(len(time_L))
                soundfile.write(folder / f"{digit}_{speaker}_{take}.wav", audio_L, 8000)
    return folder


def test_digits_are_prepared_from_a_folder(recordings, tmp_path):
    folder = copy_checkout(tmp_path / "recipe")
    conf = folder / "egs/digits/conf/corpus.yaml"
    conf.write_text(re.sub(r"train_minutes: \d+", "train_minutes: 1", conf.read_text()))
    # A relative path is meant from where the user stands.
    args = ("--corpus", "digits", "--dl-dir", "recordings", "--stop-stage", "0")
    done = run_sh(folder, *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = folder / "data/digits-take"
    for part in ("train-clean-100", "dev-clean", "test-clean"):
        cuts = CutSet.from_file(data / f"fbank/{part}.jsonl.gz").to_eager()
        assert len(cuts) > 0 and all(3 <= len(c.supervisions[0].text.split()) <= 7 for c in cuts)
    assert begun_steps(run_sh(folder, *args, cwd=tmp_path)) == []
    (recordings / "0_ann_0.wav").unlink()
    assert begun_steps(run_sh(folder, *args, cwd=tmp_path))[0] == "corpus"


def test_missing_folder_of_digits(tmp_path):
    folder = copy_checkout(tmp_path / "recipe")
    line = error_line(run_sh(folder, "--corpus", "digits", "--dl-dir", str(tmp_path / "gone")))
    assert f"{tmp_path}/gone" in line
    assert not (folder / "data/digits-take").exists()
