"""What run.sh would run for the cells of grids, by its own ``--dry-run true``."""

import shlex
import subprocess
from dataclasses import replace

import pytest
import yaml

from egs.mini import make_corpus
from local import decode, experiment, sample_embeddings, train_student, train_teacher
from mvqkd import cli
from mvqkd.errors import RecipeError
from mvqkd.experiments.grid import (
    GridSettings,
    RunOptions,
    places_of,
    run_command,
    students_of,
    write_confs,
)
from mvqkd.experiments.plan import PlannedStep, check_steps, plan_of
from mvqkd.experiments.runner import estimate, plans_of
from mvqkd.report.confs import conf_digests
from mvqkd.report.costs import CostSettings
from tests.recipe_copy import copy_checkout, error_line, run_sh


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("calls") / "recipe")


@pytest.fixture
def here(recipe, monkeypatch):
    monkeypatch.chdir(recipe)
    for name in ("PET_NNODES", "PET_NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    return recipe


def values_after(step, option):
    words = step.words
    return [words[n + 1] for n, word in enumerate(words) if word == option]


def commands(*options):
    return {step.name: step for step in plan_of(["./run.sh", *options])}


def test_options_reach_the_steps_of_librispeech(here):
    path = "egs/librispeech-100/conf/grids/kinds.yaml"
    grid = cli.parse(GridSettings, ["--config", path])[0]
    places = places_of(grid)
    write_confs(grid, places)
    options = RunOptions("cuda", "copy", "musan", "", "folder", 2)
    (student,) = [s for s in students_of(grid) if s.cell_name == "streaming-mvq-l2"]
    plan = {step.name: step for step in plan_of(run_command(grid, places, [student], options))}
    assert values_after(plan["corpus"], "--dl_dir") == [f"{here}/copy"]
    assert values_after(plan["noise"], "--dl_dir") == [f"{here}/musan"]
    assert values_after(plan["teacher"], "--teacher") == [f"{here}/folder"]
    training = plan["student-streaming-mvq-l2-seed42"]
    assert values_after(training, "--nproc-per-node") == ["2"]
    assert values_after(training, "--device") == ["cuda"]
    confs = values_after(decoding := plan["decode-streaming-mvq-l2-seed42"], "--config")
    assert confs[-2:] == [
        "exp/librispeech-100/grids/conf/decoding.yaml",
        "conf/decoding/left64-chunk16-right9.yaml",
    ]
    words = [word for path in confs for word in ("--config", path)]
    words += ["--exp_dir", "exp", "--test_manifests", "[a]", "--tokens_dir", "tokens"]
    assert cli.parse(decode.Settings, words)[0].more == []  # of each student one row
    assert values_after(training, "--config")[-2:] == [
        "conf/distillation/mvq-l2.yaml",
        "exp/librispeech-100/grids/conf/seeds/42.yaml",
    ]
    folder = "data/librispeech-100/fbank"
    parts = ["test-clean", "test-other", "dev-clean", "dev-other"]
    manifests = ",".join(f"{folder}/{part}.jsonl.gz" for part in parts)
    assert values_after(decoding, "--test_manifests") == [f"[{manifests}]"]
    assert "report" not in plan and not any(step.done for step in plan.values())

    plans = plans_of(grid, places, options)
    names = {step.name for step in plans["l2-seed42"]}
    assert {"labels-floats", "student-l2-seed42", "decode-l2-seed42"} <= names
    assert not {"labels-mvq", "student-l1-seed42"} & names
    left = estimate(grid, places, 1, plans, CostSettings(), "cuda")
    assert left.in_words(18, "").startswith(
        "0 of 18 students are done; the time of the other 18: not measured; disk: "
    )


@pytest.mark.parametrize(
    ("name", "hours", "gigabytes"),
    [("kinds", 1.1, 3.6), ("amounts", 1.2, 3.3), ("epochs", 0.84, 1.6)],
)
def test_what_a_grid_of_the_embedded_corpus_takes(here, name, hours, gigabytes):
    options = ["--config", f"egs/mini/conf/grids/{name}.yaml", "--seeds", "[1]"]
    settings = cli.parse(experiment.Settings, options)[0]
    places = places_of(settings)
    write_confs(settings, places)
    plans = plans_of(settings, places, RunOptions("cpu"))
    costs = experiment.costs_of(settings)
    left = estimate(settings, places, 2, plans, costs)
    assert left.unknown_time == left.unknown_disk == []
    assert left.seconds / 3600 == pytest.approx(hours, rel=0.1)
    assert sum(disk.needed for disk in left.disks) / 1e9 == pytest.approx(gigabytes, rel=0.1)
    # Rates of the corpus's own teacher say nothing of another.
    settings.teacher_dir = "other"
    steps = experiment.costs_of(settings).steps
    assert not {"labels", "labels-floats", "more-labels-floats", "teacher"} & steps.keys()
    assert "quantizer" in steps


def test_mistake_in_the_last_cell_is_told_before_the_first(here, tmp_path):
    cells = {"none": {"confs": "distillation/none"}}
    conf = {"name": "wrong", "question": "?", "corpus": "mini", "size": "smoke", "seeds": [1]}
    mistakes = [
        ({"distilation": {"scale": 1.0}}, "distilation"),
        ({"training": {"num_epochs": "some"}}, "num_epochs"),
    ]
    for values, key in mistakes:
        cells["last"] = {"confs": "distillation/mvq", "values": values}
        path = tmp_path / "wrong.yaml"
        path.write_text(yaml.safe_dump({**conf, "cells": cells}))
        settings = cli.parse(experiment.Settings, ["--config", str(path)])[0]
        with pytest.raises(RecipeError, match=f"^step student-last-seed1: .*{key}"):
            experiment.main(settings)


def test_scripts_of_one_name_are_told_apart(tmp_path):
    steps = []
    for folder, key in (("one", "a"), ("other", "b")):
        script = tmp_path / folder / "make.py"
        script.parent.mkdir()
        script.write_text(
            "from __future__ import annotations\nfrom dataclasses import dataclass\n"
            f"from typing import Literal\nOf_{key} = Literal['x']\n"
            f"@dataclass\nclass Settings:\n    {key}: Of_{key} = 'x'\n"
        )
        steps.append(PlannedStep(folder, False, f"python3 {script} --{key} x"))
    check_steps(steps)
    with pytest.raises(RecipeError, match=r"^step other: "):
        check_steps([replace(steps[1], command=f"{steps[1].command} --a x")])
    # The first, whose types are looked up once the other is there.
    check_steps([replace(steps[0], command=f"{steps[0].command} --a=x")])


def test_size_large_is_of_real_size(here):
    plan = commands("--size", "large")
    check_steps(plan.values())  # their confs hold what their scripts know

    def settings_of(name, script):
        return cli.parse(script.Settings, plan[name].words[2:])[0]

    teacher = settings_of("teacher", train_teacher)
    assert teacher.init == "exp/mini-large/teacher-first"
    sizes = ("hidden_size", "num_hidden_layers", "intermediate_size")
    assert [teacher.hubert.config[name] for name in sizes] == [768, 12, 3072]
    assert settings_of("embeddings-mvq", sample_embeddings).layer == 10
    student = settings_of("student-streaming-mvq-l2", train_student)
    assert (student.model.encoder.d_model, student.model.encoder.num_encoder_layers) == (512, 12)
    assert (student.distillation.scale, student.distillation.layer) == (5.0, 6)
    parts = settings_of("corpus", make_corpus).parts
    assert sum(part.minutes for part in parts.values()) / 60 > 24
    averaged = settings_of("decode-mvq", decode).decoding.avg
    assert student.training.keep_epochs == averaged + 1
    done = run_sh(here, "--size", "large", "--device", "cuda", "--dry-run", "true")
    assert ": time not measured, disk " in done.stdout and "GPU-hours not measured" in done.stdout


def test_labels_of_the_pool_go_to_distilled_students(here):
    plan = commands("--untranscribed-parts", "train-clean-360 train-other-500")
    folder = "data/mini-small/untranscribed"
    for part in ("train-clean-360", "train-other-500"):
        features = plan[f"more-features-{part}"]
        assert values_after(features, "--manifests_dir") == ["data/mini-small/manifests"]
        assert values_after(features, "--train_parts") == ["[]"]
        labels = plan[f"more-labels-mvq-{part}"]
        assert values_after(labels, "--train_manifest") == [f"{folder}/fbank/{part}.jsonl.gz"]
        assert values_after(labels, "--out") == [f"{folder}/labels/mvq/{part}/cuts.jsonl.gz"]
    names = [name for name in plan if name.startswith("student-")]
    assert names[:3] == [
        "student-none", "student-mvq-and-untranscribed", "student-mvq-l2-and-untranscribed"
    ]  # fmt: skip
    assert values_after(plan[names[0]], "--untranscribed_manifests") == []
    paths = [
        f"{folder}/labels/mvq/{p}/cuts.jsonl.gz" for p in ("train-clean-360", "train-other-500")
    ]
    assert values_after(plan[names[1]], "--untranscribed_manifests") == [f"[{','.join(paths)}]"]
    command = values_after(plan["report"], "--command")[0]
    assert '--untranscribed-parts "train-clean-360 train-other-500"' in command
    # All else is as without them.
    plain = commands()
    (parts,) = values_after(plain["decode-mvq"], "--test_manifests")
    assert "test-other" in parts and "dev-" not in parts
    assert "--decode-dev" not in values_after(plain["report"], "--command")[0]
    (parts,) = values_after(commands("--decode-dev", "true")["report"], "--test_manifests")
    assert parts.endswith(",data/mini-small/fbank/dev-other.jsonl.gz]")
    assert "student-mvq" in plain and "untranscribed" not in str(plain)
    same = [name for name in plain if name in plan and name != "report"]
    assert "labels-mvq" in same and all(plan[name] == plain[name] for name in same)


def test_parts_that_are_fetched_only_when_asked_for(here):
    plan = commands("--corpus", "librispeech-100", "--untranscribed-parts", "train-clean-360")
    fetched = plan["more-corpus-train-clean-360"]
    assert values_after(fetched, "--parts") == ["[train-clean-360]"]
    folder = "data/librispeech-100/untranscribed"
    manifests = plan["more-manifests-train-clean-360"]
    assert values_after(manifests, "--corpus_dir") == [f"{folder}/corpus/train-clean-360"]
    features = plan["more-features-train-clean-360"]
    assert values_after(features, "--manifests_dir") == [f"{folder}/manifests"]


def test_unknown_part_is_refused(here):
    with pytest.raises(
        RecipeError, match="--untranscribed-parts dev-clean: is none of corpus mini"
    ):
        plan_of(["./run.sh", "--untranscribed-parts", "dev-clean"])
    published = ["--corpus", "librispeech-100", "--use-extracted-codebook", "true"]
    done = run_sh(here, *published, "--untranscribed-parts", "train-clean-360")
    assert "published indexes are of the training parts alone" in error_line(done)


def test_dry_run_of_students_side_by_side(here):
    totals = {}
    for device in ("cpu", "cuda"):
        done = run_sh(here, "--num-jobs", "2", "--device", device, "--dry-run", "true")
        lines = done.stdout.splitlines()
        totals[device] = next(line for line in lines if " steps to do: " in line)
        assert any("GPU-hours" in line for line in lines) == (device == "cuda")
    assert totals["cpu"].endswith("; 2 students at once")
    assert totals["cuda"].endswith(", GPU-hours not measured")


def test_max_duration_is_of_training_alone(here):
    plan = commands("--size", "small", "--max-duration", "40", "--students", "none")
    options = {name: values_after(step, "--data.max_duration") for name, step in plan.items()}
    assert {name: values for name, values in options.items() if values} == {"student-none": ["40"]}
    assert "--max-duration 40 " in " ".join(values_after(plan["report"], "--command"))


def test_lines_of_a_students_file_may_end_in_any_way(here, tmp_path):
    path = tmp_path / "students.txt"
    path.write_bytes(b"# mine\r\n\r\nfirst distillation/none\r\nlast streaming distillation/mvq")
    plan = commands("--students-file", str(path))
    assert [name for name in plan if name.startswith("student-")] == [
        *("student-first", "student-last")
    ]
    assert "conf/streaming.yaml" in values_after(plan["student-last"], "--config")


def test_students_file_that_names_none_or_one_twice(here, tmp_path):
    path = tmp_path / "students.txt"
    path.write_text("# none\n")
    with pytest.raises(RecipeError, match="names no student; write lines like"):
        commands("--students-file", str(path))
    path.write_text("a distillation/none\nb distillation/mvq\na distillation/mvq\n")
    with pytest.raises(RecipeError, match="more than once: a; name each once"):
        commands("--students-file", str(path))


def test_prepare_sh_of_no_stage_is_refused(here):
    done = subprocess.run(
        ["bash", "prepare.sh", "--stage", "5"], cwd=here, capture_output=True, text=True
    )
    assert "--stage 5 --stop-stage 3: no stage is of both; there are 0 to 3" in error_line(done)


def test_the_last_conf_names_the_teacher(here, tmp_path):
    conf = "hubert-base-ls960"
    options = ("--teacher", conf, "--stage", "1", "--stop-stage", "1")
    (teacher,) = values_after(commands(*options)["teacher"], "--teacher")
    assert teacher == "facebook/hubert-base-ls960"
    (tmp_path / "teacher").mkdir()
    mine = tmp_path / "teacher" / f"{conf}.yaml"
    for text, name in (
        ('teacher: "some/folder"  # mine\n', "some/folder"),
        ("layer: 3\n", "facebook/hubert-base-ls960"),
    ):
        mine.write_text(text)
        step = commands(*options, "--overlay", str(tmp_path))["teacher"]
        assert values_after(step, "--teacher") == [name]
    step = commands(*options, "--overlay", str(tmp_path), "--teacher-dir", "mine.pt")["teacher"]
    assert values_after(step, "--teacher") == [f"{here}/mine.pt"]
    mine.write_text("teacher: [\n")
    line = error_line(run_sh(here, *options, "--overlay", str(tmp_path)))
    assert f"step teacher: {mine}: " in line


def test_teacher_of_the_call_wins_over_a_recipe_that_sets_one(tmp_path):
    folder = copy_checkout(tmp_path / "recipe")
    own = folder / "egs/own"
    own.mkdir()
    (own / "recipe.sh").write_text(
        'name=own scale=laptop train_parts=a pool_parts="" dev_parts=b test_parts=c teacher=mini\n'
    )
    (own / "conf").mkdir()
    for options, conf in (((), "mini"), (("--teacher", "wavlm-large"), "wavlm-large")):
        command = ["--corpus", "own", "--stage", "1", "--stop-stage", "1", *options]
        (step,) = plan_of([str(folder / "run.sh"), *command])
        assert values_after(step, "--config") == [f"conf/teacher/{conf}.yaml"]


def test_one_folder_has_one_name(here, tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "link").symlink_to("copy")
    for spelled in ("copy", "copy/", "./x/..//copy", "link"):
        plan = commands("--corpus", "digits", "--dl-dir", f"{tmp_path}/{spelled}")
        assert values_after(plan["corpus"], "--dl_dir") == [f"{tmp_path}/copy"]


def test_command_in_the_report_can_be_given_again(here, tmp_path):
    folder = tmp_path / "one's own"
    folder.mkdir()
    students = folder / "students.txt"
    students.write_text("first distillation/none\n")
    options = ["--corpus", "digits", "--dl-dir", "my copy", "--students-file", str(students)]
    (command,) = values_after(commands(*options)["report"], "--command")
    assert [word for word in shlex.split(command) if word in options] == options
    assert set(conf_digests(command)) == {"first"}
