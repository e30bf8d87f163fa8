"""Grids over a run.sh that trains nothing: what is run, resumed, shared and gathered."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from local import experiment
from mvqkd import cli
from mvqkd.data.shards import taken
from mvqkd.errors import RecipeError
from mvqkd.experiments.grid import (
    GridSettings,
    RunOptions,
    places_of,
    run_command,
    students_of,
    write_confs,
)
from mvqkd.experiments.runner import (
    Calls,
    estimate,
    plans_of,
    run_grid,
    state_of,
    students_at_once,
    threads_each,
    wait_for_others,
    with_done_since,
)
from mvqkd.report.confs import digest_of, grid_digests
from mvqkd.report.costs import CostSettings
from mvqkd.report.grids import collect_grid
from mvqkd.report.table import read_results, write_results_json

ROOT = Path(__file__).parents[2]
GRIDS = sorted(ROOT.glob("egs/*/conf/grids/*.yaml"))
# Leaves what stages 6 and 7 leave; the seed decides how many words a student gets wrong.
FAKE = r"""#!/usr/bin/env bash
set -euo pipefail
while (($#)); do
    name=${1#--}
    declare "${name//-/_}=$2"
    shift 2
done
# What a student is made from: its confs.
stamp() {
    local cell=$overlay/cells/${1%-seed*}.yaml
    { grep "^$1 " "$students_file"; [[ ! -e $cell ]] || cat "$cell"; } | md5sum
}
if [[ ${dry_run:-false} == true ]]; then
    echo "corpus todo make corpus" >>"$mvqkd_plan"
    echo "labels-$labels todo make labels" >>"$mvqkd_plan"
    for student in $students; do
        for step in "student-$student" "decode-$student"; do
            state=todo
            [[ "$(cat "exp/toy/stamps/$step" 2>/dev/null)" != "$(stamp "$student")" ]] || state=done
            echo "$step $state make --config conf/training.yaml" \
                "--config $overlay/seeds/${student##*-seed}.yaml" >>"$mvqkd_plan"
        done
    done
    exit
fi
echo "$students $labels" >>ran
env >"env-$students"
[[ ! -e broken-$students ]] || { echo "broken on purpose"; exit 1; }
grep -q "^$students " "$students_file"
seed=${students##*-seed}
[[ $(cat "$overlay/seeds/$seed.yaml") == *"seed: $seed"* ]]
exp=exp/toy
mkdir -p "$exp/stamps" "$exp/$students"
kind=$(sed -n "s/^$students .*distillation\/\([^ ]*\).*/\1/p" "$students_file")
hyp='["a","b"]'; [[ $kind != none ]] || hyp='["a"]'
(( seed != 2 )) || hyp='["a"]'
echo '{"distillation": {"kind": "'$kind'"}, "device": "cpu", "training": {"seed": '$seed',
    "num_epochs": 3}}' >"$exp/$students/settings.json"
echo '{"kind": "train", "step": 50, "epoch": 3, "seconds": 100}' >"$exp/$students/log.jsonl"
echo '{"setting": "greedy", "streaming": false, "num_params": 9, "test_sets": {"test": {"rtf": 0.1,
    "results": [["one", ["a", "b"], '$hyp'], ["two", ["a", "b"], ["a", "b"]]]}}}' \
    >"$exp/$students/decoded.json"
for step in student decode; do
    stamp "$students" >"$exp/stamps/$step-$students"
    echo 10 >"$exp/stamps/$step-$students.seconds"
done
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The folder of a recipe whose corpus is a toy."""
    (tmp_path / "run.sh").write_text(FAKE)
    (tmp_path / "run.sh").chmod(0o755)
    (tmp_path / "egs/toy").mkdir(parents=True)
    (tmp_path / "egs/toy/recipe.sh").write_text("name=toy\n")
    (tmp_path / "local").mkdir()
    for name in ("recipe.sh", "steps.sh"):
        shutil.copy(ROOT / "local" / name, tmp_path / "local")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/decoding.yaml").write_text("decoding: {avg: 3}\n")
    (tmp_path / "conf/costs.yaml").write_text(yaml.safe_dump(COSTS))
    (tmp_path / "conf/training.yaml").write_text("training: {num_epochs: 10}\n")
    labels = tmp_path / "data/toy/labels/mvq"
    labels.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mvqkd.report.collect.label_bytes_per_hour", lambda *args: 1e6)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


CONF = {
    "name": "one",
    "question": "Does it help?",
    "corpus": "toy",
    "seeds": [1, 2],
    "cells": {
        "none": {"confs": "distillation/none"},
        "mvq": {"confs": "distillation/mvq"},
        "mvq-n4": {"confs": "distillation/mvq", "labels": "n4", "like": "mvq",
                   "values": {"distillation": {"layer": 2}}},
    },
}  # fmt: skip
# Of a training 100 s or 20 an epoch of an hour's speech, for 10 epochs.
COSTS = {
    "measured": "a desk",
    "speech": {"train": 1.0},
    "steps": {
        "corpus": {"seconds": 40.0, "bytes": 1e6},
        "labels": {"seconds": 60.0},
        "student-none": {"seconds": 90.0, "bytes": 1.0e6},
        "student-mvq": {"speech": "train", "epochs": True, "seconds_per_hour": 18.0,
                        "seconds_per_epoch": 1.0, "checkpoint_bytes": 1.0e6},
        "decode": {"seconds": 10.0, "bytes": 1.0e3},
    },
}  # fmt: skip


CPU = RunOptions(device="cpu")


def grid_of(recipe, **changes) -> GridSettings:
    path = recipe / "grid.yaml"
    path.write_text(yaml.safe_dump({**CONF, **changes}, sort_keys=False))
    return cli.parse(GridSettings, ["--config", str(path)])[0]


def settings_of(recipe, monkeypatch) -> experiment.Settings:
    """Of a call for the grid that `grid_of` has left, without rates."""
    monkeypatch.setattr(experiment, "costs_of", lambda settings: CostSettings())
    settings = cli.parse(experiment.Settings, ["--config", str(recipe / "grid.yaml")])[0]
    settings.device = "cpu"
    return settings


def run(grid, num_jobs=1, when_done=lambda: None):
    places = places_of(grid)
    write_confs(grid, places)
    calls = Calls(grid, places, CPU, places.exp / "grids" / grid.name / "logs")
    return run_grid(grid, places, calls, num_jobs, when_done)


def planned(grid, num_at_once=1, costs=None):
    places = places_of(grid)
    write_confs(grid, places)
    if costs is None:
        costs = cli.parse(CostSettings, ["--config", "conf/costs.yaml"])[0]
    return estimate(grid, places, num_at_once, plans_of(grid, places, CPU), costs)


def ran(recipe) -> list[str]:
    """Of the last run."""
    path = recipe / "ran"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


ALL = ["none-seed1 mvq", "mvq-seed1 mvq", "mvq-n4-seed1 n4"]
ALL += [line.replace("seed1", "seed2") for line in ALL]


def test_runs_every_student_with_its_confs(recipe):
    assert run(grid_of(recipe)) == []
    assert ran(recipe) == ALL
    conf = recipe / "exp/toy/grids/conf"
    assert yaml.safe_load((conf / "cells/mvq-n4.yaml").read_text()) == {
        "distillation": {"layer": 2}
    }
    lines = (recipe / "exp/toy/grids/students.txt").read_text().splitlines()
    assert "mvq-n4-seed1 distillation/mvq cells/mvq-n4 seeds/1" in lines


def test_one_that_fails_keeps_none_of_the_others(recipe):
    (recipe / "broken-mvq-seed1").touch()
    assert run(grid_of(recipe), num_jobs=2) == ["mvq-seed1"]
    assert sorted(ran(recipe)) == sorted(ALL)
    log = recipe / "exp/toy/grids/one/logs/mvq-seed1.log"
    assert log.read_text() == "broken on purpose\n"


def test_processes_begin_elsewhere_and_leave_what_others_have(recipe, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    grid = grid_of(recipe)
    locks = recipe / "exp/toy/grids/locks"
    locks.mkdir(parents=True)
    with taken(locks / "mvq-seed1.lock", False) as mine:
        assert mine
        assert run(grid) == []
    assert ran(recipe) == [*ALL[3:], ALL[0], ALL[2]]


def test_one_that_fails_is_not_tried_by_every_process(recipe):
    (recipe / "broken-mvq-seed1").touch()
    grid = grid_of(recipe, seeds=[1])
    assert run(grid) == ["mvq-seed1"]
    ran(recipe)
    # By another, after this one has begun.
    mark = recipe / "exp/toy/grids/locks/mvq-seed1.failed"
    os.utime(mark, (time.time() + 60, time.time() + 60))
    assert run(grid) == ["mvq-seed1"]
    assert "mvq-seed1 mvq" not in ran(recipe)
    # Of an earlier call.
    os.utime(mark, (0, 0))
    assert run(grid) == ["mvq-seed1"]
    assert "mvq-seed1 mvq" in ran(recipe)
    # One that was ended has not failed by itself.
    mark.unlink()
    (recipe / "run.sh").write_text(FAKE.replace("exit 1; }", "kill -TERM $$; }"))
    assert run(grid) == ["mvq-seed1"] and not mark.exists()


def test_waits_for_those_in_other_hands(recipe):
    grid = grid_of(recipe)
    locks = recipe / "exp/toy/grids/locks"
    locks.mkdir(parents=True)
    waiting = threading.Thread(target=wait_for_others, args=(grid, places_of(grid)))
    with taken(locks / "mvq-seed2.lock", False):
        waiting.start()
        assert waiting.is_alive()
    waiting.join(60)
    assert not waiting.is_alive()


@pytest.mark.parametrize("launched", [True, False])
def test_a_launchers_process_says_last_that_a_student_failed(recipe, monkeypatch, launched):
    (recipe / "broken-mvq-seed1").touch()
    grid_of(recipe)
    settings = settings_of(recipe, monkeypatch)
    waited = []
    monkeypatch.setattr(experiment, "wait_for_others", lambda *args: waited.append(args))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(RecipeError, match=r"mvq-seed1\.log: 1 students failed, mvq-seed1; mend"):
        experiment.main(settings)
    assert len(waited) == launched


def test_trains_on_where_results_cannot_be_written(recipe, monkeypatch, caplog):
    caplog.set_level("INFO")
    grid = grid_of(recipe)
    settings = settings_of(recipe, monkeypatch)
    written = []

    def write(*args):
        written.append(args)
        if len(written) <= 3:
            raise RecipeError("results: a damaged log")

    monkeypatch.setattr(experiment, "write_results", write)
    experiment.main(settings)
    assert sorted(ran(recipe)) == sorted(ALL)
    assert caplog.text.count("one: results: a damaged log") == 3
    assert "6 of 6 students are done" in caplog.text and "in hand" not in caplog.text
    assert len(written) == len(students_of(grid)) + 1


def test_says_whom_other_processes_have(recipe, monkeypatch, caplog):
    caplog.set_level("INFO")
    grid_of(recipe)
    settings = settings_of(recipe, monkeypatch)
    locks = recipe / "exp/toy/grids/locks"
    locks.mkdir(parents=True)
    with taken(locks / "mvq-seed1.lock", False):
        experiment.main(settings)
    assert (
        "one: other processes have 1 students in hand, mvq-seed1; call again when these are done"
        in caplog.text
    )
    assert (recipe / "exp/toy/grids/one/results.json").exists()


@pytest.mark.parametrize(
    ("environment", "num_jobs", "device", "expected"),
    [
        ({}, 2, "cpu", 2),
        ({}, 8, "cpu", 4),
        ({}, 8, "cuda", 8),
        ({"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}, 1, "cpu", 3),
        ({"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 1, "cpu", 8),
        ({"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 1, "cuda", 16),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "16"}, 2, "cpu", 32),
    ],
)
def test_no_more_are_trained_at_once_than_have_a_core(
    monkeypatch, environment, num_jobs, device, expected
):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(4))
    assert students_at_once(num_jobs, device) == expected


def test_says_how_long_it_takes(recipe):
    grid = grid_of(recipe)
    plan = planned(grid)
    # First 40, two sets of labels of 60, and 2 x (100 + 200 + 200).
    assert (plan.seconds, plan.num_measured, len(plan.left)) == (1160, 0, 6)
    assert plan.in_words(6, "a desk").startswith(
        "0 of 6 students are done; the other 6 will take 0 h 19 min (0 of them by times measured "
        "here, the others by rates of a desk); disk: "
    )
    # All wait for the corpus and the first labels; the third, beside, for those that it makes.
    assert planned(grid, 2).seconds == 40 + 60 + 100 + 60 + 200 + 200
    assert planned(grid, 6).seconds == 40 + 60 + 200
    (recipe / "broken-mvq-n4-seed2").touch()
    run(grid)
    plan = planned(grid)
    # 100 s of training by its log, 10 of decoding; the sets of labels are still not there.
    assert [student.name for student in plan.left] == ["mvq-n4-seed2"]
    assert (plan.seconds, plan.num_measured) == (40 + 60 + 110, 1)
    # Like ones have taken 100 s for 10 epochs.
    (recipe / "conf/training.yaml").write_text("training: {num_epochs: 20}\n")
    assert planned(grid).seconds == 40 + 60 + 110

    (recipe / "exp/toy/none-seed1/log.jsonl").write_text('{"seconds": 100}\n{"seco')
    with pytest.raises(RecipeError, match=r"none-seed1/log\.jsonl: .* remove .*student-none-seed1"):
        planned(grid)


def test_what_is_left_shrinks_with_each_student(recipe):
    grid = grid_of(recipe)
    places = places_of(grid)
    write_confs(grid, places)
    costs = cli.parse(CostSettings, ["--config", "conf/costs.yaml"])[0]
    (recipe / "broken-mvq-seed2").touch()
    run(grid)
    # One that was trained with other confs is not done before it has been trained anew.
    stamp = recipe / "exp/toy/stamps/decode-mvq-seed1"
    stamp.write_text("of other confs\n")
    before = {"mvq-seed1": state_of(places, students_of(grid)[1])}
    plans = {name: [replace(s, done=False) for s in steps]
             for name, steps in plans_of(grid, places, CPU).items()}  # fmt: skip

    def told():
        now = with_done_since(grid, places, plans, before)
        return estimate(grid, places, 1, now, costs).progress(6)

    # 100 s of training and 10 of decoding as measured, the labels are there.
    assert told() == "4 of 6 students are done, about 0 h 04 min left"
    stamp.write_text("of these\n")
    assert told() == "5 of 6 students are done, about 0 h 02 min left"
    (recipe / "broken-mvq-seed2").unlink()
    run(grid)
    assert told() == "6 of 6 students are done"


def test_times_of_like_students_count_epochs(recipe):
    cells = {"mvq": CONF["cells"]["mvq"], "long": {**CONF["cells"]["mvq"], "like": "mvq"}}
    grid = grid_of(recipe, cells=cells, seeds=[1])
    (recipe / "broken-long-seed1").touch()
    run(grid)
    plans = plans_of(grid, places_of(grid), CPU)
    longer = recipe / "longer.yaml"
    longer.write_text("training: {num_epochs: 30}\n")
    plans["long-seed1"] = [
        replace(step, command=f"{step.command} --config {longer}") for step in plans["long-seed1"]
    ]
    costs = cli.parse(CostSettings, ["--config", "conf/costs.yaml"])[0]
    seconds = estimate(grid, places_of(grid), 1, plans, costs).seconds
    assert seconds == pytest.approx(40 + 60 + 3 * 100 + 10)


def test_tells_the_disk_and_refuses_where_it_is_short(recipe, monkeypatch):
    grid = grid_of(recipe, seeds=[1])
    (disk,) = planned(grid).disks
    # Decoding averages over 3 epochs, for which it reads 4; one more is to go on from.
    assert disk.needed == 1e6 + 1e6 + 2 * (3 + 1 + 1) * 1e6 + 3 * 1e3
    assert planned(grid).unknown_disk == ["labels-mvq", "labels-n4"]
    told = planned(grid).in_words(3, "a desk")
    assert "; disk: 12.0 MB on the disk of exp/toy, where " in told
    assert told.endswith(" are free, without labels: not measured")
    planned(grid).check_disks()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=11e6))
    with pytest.raises(
        RecipeError, match=r"exp/toy: what is left takes 12\.0 MB, and 11\.0 MB are"
    ):
        planned(grid).check_disks()
    # One that was killed has some of it.
    (recipe / "exp/toy/mvq-seed1").mkdir(parents=True)
    (recipe / "exp/toy/mvq-seed1/epoch-1.pt").write_bytes(bytes(1_500_000))
    (disk,) = planned(grid).disks
    assert disk.needed == 1e6 + 1e6 + 10 * 1e6 + 3 * 1e3 - 1.5e6
    planned(grid).check_disks()


def test_one_that_is_trained_anew_is_not_done(recipe):
    grid = grid_of(recipe)
    run(grid)
    (recipe / "exp/toy/mvq-seed1/decoded.json").unlink()
    assert state_of(places_of(grid), students_of(grid)[1]) is None
    rows = collect_grid(grid, places_of(grid), "COMMAND")["students"]
    assert len(rows) == 5


def test_without_rates_the_time_is_not_measured(recipe):
    plan = planned(grid_of(recipe), costs=CostSettings())
    assert plan.in_words(6, "nowhere").startswith(
        "0 of 6 students are done; the time of the other 6: not measured; disk: 0 B on "
    )
    # Of a step before, what the others take is known.
    costs = cli.parse(CostSettings, ["--config", "conf/costs.yaml"])[0]
    costs.steps.pop("labels")
    text = planned(grid_of(recipe), costs=costs).in_words(6, "a desk")
    assert " will take 0 h 17 min " in text
    assert " rates of a desk), without labels-mvq, labels-n4: not measured; disk: " in text


def test_students_of_unknown_time_are_no_part_of_the_sum(recipe):
    costs = cli.parse(CostSettings, ["--config", "conf/costs.yaml"])[0]
    costs.steps.pop("student-mvq")
    plan = planned(grid_of(recipe), costs=costs)
    text = plan.in_words(6, "a desk")
    assert ", without student-mvq-seed1, student-mvq-n4-seed1, student-mvq-seed2" in text
    assert plan.progress(6).endswith(" left, without 4 steps: not measured")
    # Of one that was ended before it was decoded nothing is known either.
    run(grid_of(recipe))
    (recipe / "exp/toy/stamps/decode-mvq-seed1").unlink()
    costs.steps.clear()
    for stamp in (recipe / "exp/toy/stamps").glob("*.seconds"):
        stamp.unlink()
    assert planned(grid_of(recipe), costs=costs).seconds is None


def test_times_of_another_device_say_nothing_of_this(recipe):
    run(grid_of(recipe, seeds=[1]))
    grid = grid_of(recipe, seeds=[1, 2])
    places = places_of(grid)
    write_confs(grid, places)
    plans = plans_of(grid, places, CPU)
    costs = cli.parse(CostSettings, ["--config", "conf/costs.yaml"])[0]
    assert estimate(grid, places, 1, plans, costs, "cpu").num_measured == 3
    assert estimate(grid, places, 1, plans, costs, "cuda").num_measured == 0


def test_seeds_keep_what_decoding_reads(recipe):
    grid = grid_of(recipe)
    seed = recipe / "exp/toy/grids/conf/seeds/1.yaml"

    def written():
        write_confs(grid, places_of(grid))
        return yaml.safe_load(seed.read_text())["training"]

    keep = {"keep_epochs": 4, "keep_every_epochs": 0}
    assert written() == {"seed": 1, **keep}
    (recipe / "egs/toy/conf").mkdir()
    (recipe / "egs/toy/conf/decoding.yaml").write_text("decoding: {avg: 5}\n")
    assert written() == {"seed": 1, **keep, "keep_epochs": 6}
    # Of an epoch that is named, nothing is known.
    (recipe / "conf/decoding").mkdir()
    (recipe / "conf/decoding/tenth.yaml").write_text("decoding: {epoch: 10}\n")
    grid.decoding = "tenth"
    assert written() == {"seed": 1}


def test_confs_stay_word_by_word_where_another_grid_is_run(recipe):
    values = {"training": {"num_epochs": 16, "lr_epochs": 12}, "data": {"z": 1, "a": 2}}
    cells = {"none": CONF["cells"]["none"], "long": {"confs": "x", "values": values}}
    grid = grid_of(recipe, cells=cells)
    write_confs(grid, places_of(grid))
    conf = recipe / "exp/toy/grids/conf/cells/long.yaml"
    text = conf.read_text()
    other = grid_of(recipe, name="two")
    write_confs(other, places_of(other))
    assert conf.read_text() == text and text.index("num_epochs") < text.index("lr_epochs")


def test_conf_that_another_process_is_writing_is_none(recipe):
    grid = grid_of(recipe, seeds=[2])
    seeds = recipe / "exp/toy/grids/conf/seeds"
    seeds.mkdir(parents=True)
    (seeds / ".part-host-1-1.yaml").touch()
    (seeds / "1.yaml").touch()
    write_confs(grid, places_of(grid))
    assert {line.split()[0] for line in places_of(grid).students_file.read_text().splitlines()} == {
        f"{cell}-seed{seed}" for cell in grid.cells for seed in (1, 2)
    }


def test_changed_confs_are_told_and_run_again(recipe):
    run(grid_of(recipe))
    ran(recipe)
    cells = {**CONF["cells"], "mvq-n4": {**CONF["cells"]["mvq-n4"], "values": {"a": 1}}}
    grid = grid_of(recipe, cells=cells)
    places, plan = places_of(grid), planned(grid)
    names = [student.name for student in plan.left]
    assert names == ["mvq-n4-seed1", "mvq-n4-seed2"]
    assert plan.in_words(6, "a desk").startswith(
        "4 of 6 students are done; the other 2 (2 of them done before their confs or data changed) "
        "will take 0 h "
    )
    old = {student.name: state_of(places, student) for student in plan.out_of_date}
    last = collect_grid(grid, places, "COMMAND", CPU, old)["grid"]["cells"][2]
    assert (last["seeds_done"], last["seeds_out_of_date"]) == ([], [1, 2])
    (recipe / "broken-mvq-n4-seed2").touch()
    told = []
    assert run(grid, when_done=lambda: told.append(1)) == ["mvq-n4-seed2"]
    assert len(told) == 1  # the four that are done have not changed
    last = collect_grid(grid, places, "COMMAND", CPU, old)["grid"]["cells"][2]
    assert (last["seeds_done"], last["seeds_out_of_date"]) == ([1], [2])


def test_students_whose_data_were_made_again_as_they_were_stay(recipe, monkeypatch, caplog):
    caplog.set_level("INFO")
    run(grid_of(recipe))
    settings = settings_of(recipe, monkeypatch)
    asked = []

    def plans(*args):
        asked.append(args)
        found = plans_of(*args)
        if len(asked) > 1:
            return found
        # The labels are gone: what comes from them is to be made again, as far as is known.
        return {name: [replace(s, done=False) for s in steps] for name, steps in found.items()}

    monkeypatch.setattr(experiment, "plans_of", plans)
    monkeypatch.setattr("sys.argv", ["local/experiment.py", "--seeds", "[1, 2]"])
    experiment.main(settings)
    results = json.loads((recipe / "exp/toy/grids/one/results.json").read_text())
    assert "(6 of them done before their confs or data changed)" in caplog.text
    assert len(results["students"]) == 6 and "in hand" not in caplog.text
    assert not any(cell["seeds_out_of_date"] for cell in results["grid"]["cells"])
    assert [cell["devices"] for cell in results["grid"]["cells"]] == [["cpu"]] * 3
    # As one would type it again.
    command = "python3 local/experiment.py --seeds '[1, 2]'"
    assert results["grid"]["origin"]["command"] == command


def test_confs_that_cannot_be_read_in_the_end_lose_no_results(recipe, monkeypatch, caplog):
    grid_of(recipe, seeds=[1])
    (recipe / "broken-mvq-seed1").touch()
    settings = settings_of(recipe, monkeypatch)
    asked = []

    def plans(*args):
        asked.append(args)
        if len(asked) > 1:
            raise RecipeError("conf/training.yaml: half a line")
        return plans_of(*args)

    monkeypatch.setattr(experiment, "plans_of", plans)
    with pytest.raises(RecipeError, match="1 students failed, mvq-seed1"):
        experiment.main(settings)
    assert "one: conf/training.yaml: half a line" in caplog.text
    results = json.loads((recipe / "exp/toy/grids/one/results.json").read_text())
    assert len(results["students"]) == 2


def test_one_that_another_process_makes_again_is_in_its_hands(recipe, monkeypatch, caplog):
    caplog.set_level("INFO")
    run(grid_of(recipe, seeds=[1]))
    cells = {**CONF["cells"], "mvq-n4": {**CONF["cells"]["mvq-n4"], "values": {"a": 1}}}
    grid_of(recipe, seeds=[1], cells=cells)
    settings = settings_of(recipe, monkeypatch)
    # Which has not got further than its labels.
    with taken(recipe / "exp/toy/grids/locks/mvq-n4-seed1.lock", False):
        experiment.main(settings)
    assert "have 1 students in hand, mvq-n4-seed1; call again" in caplog.text
    assert "meanwhile" not in caplog.text


def test_digests_are_of_the_confs_that_students_had(recipe, monkeypatch):
    grid = grid_of(recipe, seeds=[1])
    settings = settings_of(recipe, monkeypatch)

    def call(*args):
        (recipe / "conf/training.yaml").write_text("training: {num_epochs: 20}\n")
        return run_grid(*args)

    monkeypatch.setattr(experiment, "run_grid", call)
    experiment.main(settings)
    cells = json.loads((recipe / "exp/toy/grids/one/results.json").read_text())["grid"]["cells"]
    now = grid_digests(grid, CPU)
    assert {f"{cell['cell']}-seed1": cell["conf_digests"][0] for cell in cells} == now


def test_confs_that_change_while_a_grid_runs_are_told(recipe, monkeypatch, caplog):
    caplog.set_level("INFO")
    grid_of(recipe, seeds=[1])
    settings = settings_of(recipe, monkeypatch)

    def call(*args):
        failed = run_grid(*args)
        (recipe / "exp/toy/grids/conf/cells/mvq-n4.yaml").write_text("another: 1\n")
        return failed

    monkeypatch.setattr(experiment, "run_grid", call)
    experiment.main(settings)
    assert "one: confs have changed meanwhile, those of mvq-n4-seed1; call again" in caplog.text
    assert "in hand" not in caplog.text


def test_what_is_started_is_no_part_of_the_job(recipe, monkeypatch):
    job = {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0",
        "MASTER_ADDR": "host0", "MASTER_PORT": "1", "GROUP_RANK": "0", "PET_NNODES": "2",
        "PET_NODE_RANK": "1", "MVQKD_LAUNCH": "1", "TORCHELASTIC_ERROR_FILE": "error.json",
        "SLURM_ARRAY_TASK_ID": "0",
    }  # fmt: skip
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    assert run(grid_of(recipe, seeds=[1])) == []
    lines = (recipe / "env-none-seed1").read_text().splitlines()
    assert {line.split("=")[0] for line in lines} & set(job) == {"LOCAL_RANK"}


def test_failing_student_says_why_in_its_log_under_a_launcher(recipe):
    grid_of(recipe, seeds=[1], cells={"none": CONF["cells"]["none"]})
    (recipe / "fails.py").write_text(
        "from mvqkd import cli\nfrom mvqkd.errors import RecipeError\n"
        "def main(settings: dict):\n    raise RecipeError('its own message')\n"
        "import dataclasses\nS = dataclasses.make_dataclass('S', [])\ncli.run(main, S)\n"
    )
    fake = FAKE.replace("[[ ! -e broken-", f'"{sys.executable}" fails.py\n[[ ! -e broken-', 1)
    (recipe / "run.sh").write_text(fake)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MVQKD_LAUNCH": "1", "LOCAL_WORLD_SIZE": "1"}
    env["TORCHELASTIC_ERROR_FILE"] = str(recipe / "error.json")
    command = [sys.executable, str(ROOT / "local/experiment.py"), "--config", "grid.yaml"]
    assert subprocess.run(command, env=env, capture_output=True).returncode == 1
    log = (recipe / "exp/toy/grids/one/logs/none-seed1.log").read_text()
    assert log == "fails.py: its own message\n"
    # Of the grid's own process the launcher tells.
    assert "none-seed1.log: 1 students failed" in (recipe / "error.json").read_text()


def test_processes_of_a_host_share_its_threads(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (threads_each(1), threads_each(2)) == (12, 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (threads_each(1), threads_each(2), threads_each(8)) == (3, 1, 1)


def test_several_grids_at_once_keep_all_cells(recipe):
    grids = [
        grid_of(recipe, name=f"grid{n}", cells={f"cell{n}": {"confs": "distillation/none"}})
        for n in range(8)
    ]
    places = places_of(grids[0])
    threads = [threading.Thread(target=write_confs, args=(grid, places)) for grid in grids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    known = yaml.safe_load((places.exp / "grids/cells.yaml").read_text())
    assert set(known) == {f"cell{n}" for n in range(8)}


def test_options_of_the_call_go_to_run_sh(recipe):
    cells = {"mvq": {"confs": "distillation/mvq", "untranscribed_parts": "a b"}}
    grid = grid_of(recipe, cells=cells, decoding="chunks")
    options = RunOptions("cuda", "copy", "none", "large", "folder", 4)
    words = run_command(grid, places_of(grid), students_of(grid)[:1], options)
    assert words[:2] == ["./run.sh", "--corpus"]
    given = dict(zip(words[1::2], words[2::2]))
    wanted = {
        "--device": "cuda", "--dl-dir": "copy", "--noise-dir": "none", "--teacher": "large",
        "--teacher-dir": "folder", "--num-gpus": "4", "--decoding": "chunks",
        "--untranscribed-parts": "a b", "--labels": "mvq", "--num-jobs": "1",
    }  # fmt: skip
    assert wanted.items() <= given.items()
    plain = run_command(grid_of(recipe), places_of(grid), students_of(grid)[:1], CPU)
    assert not {"--num-gpus", "--dl-dir", "--decoding"} & set(plain)


def test_cell_against_none_of_the_grid_is_refused(recipe):
    cells = {"mvq": {"confs": "distillation/mvq", "against": "l2"}}
    with pytest.raises(RecipeError, match="cell mvq is against 'l2'; name another cell"):
        students_of(grid_of(recipe, cells=cells))


def test_cells_are_compared_with_those_that_they_name(recipe):
    cells = {
        "none": {"confs": "distillation/none"},
        "l2": {"confs": "distillation/l2", "labels": "floats", "like": "mvq"},
        "mvq": {"confs": "distillation/mvq", "against": ["none", "l2"]},
    }
    (recipe / "broken-l2-seed2").touch()
    grid = grid_of(recipe, cells=cells)
    run(grid)
    none, l2, mvq = collect_grid(grid, places_of(grid), "COMMAND")["grid"]["cells"]
    assert none["test_sets"]["test"]["against"] == l2["test_sets"]["test"]["against"] == {}
    against = mvq["test_sets"]["test"]["against"]
    assert against["none"] == mvq["test_sets"]["test"]["difference"]
    assert (against["none"]["delta"], against["none"]["num_seeds"]) == (-12.5, 2)
    assert (against["l2"]["delta"], against["l2"]["num_seeds"]) == (0.0, 1)


def test_grids_share_students_that_mean_the_same(recipe):
    run(grid_of(recipe))
    cells = {"mvq": {**CONF["cells"]["mvq"], "student": "another name in tables"}}
    other = grid_of(recipe, name="two", cells=cells)
    assert planned(other).left == []
    other = grid_of(recipe, name="two", cells={"mvq": {"confs": "streaming distillation/mvq"}})
    with pytest.raises(RecipeError, match="cell mvq means something else in grid one"):
        write_confs(other, places_of(other))


def test_results_hold_students_and_cells(recipe):
    grid = grid_of(recipe)
    (recipe / "broken-mvq-n4-seed1").touch()
    (recipe / "broken-mvq-n4-seed2").touch()
    run(grid)
    path = places_of(grid).results(grid)
    write_results_json(path, collect_grid(grid, places_of(grid), "python3 local/experiment.py"))
    rows = read_results(path)
    assert [(row.distillation, row.origin.seed) for row in rows] == [
        ("none", 1), ("mvq", 1), ("none", 2), ("mvq", 2)
    ]  # fmt: skip
    assert rows[1].test_sets["test"].delta == -25.0 and rows[3].test_sets["test"].delta == 0.0
    assert rows[1].steps == 50 and rows[1].origin.date
    assert "--students mvq-seed1" in rows[1].origin.command
    none, mvq, missing = json.loads(path.read_text())["grid"]["cells"]
    assert missing["seeds_done"] == [] and "test_sets" not in missing
    assert (
        none["test_sets"]["test"]["wer"] == 25.0 and "difference" not in none["test_sets"]["test"]
    )
    assert mvq["test_sets"]["test"]["of_seeds"] == [0.0, 25.0]
    assert mvq["test_sets"]["test"]["wer"] == 12.5
    assert mvq["test_sets"]["test"]["difference"]["delta"] == -12.5
    assert mvq["seconds_per_step"] == 2.0 and mvq["label_bytes_per_hour"] == 1e6


def test_results_tell_the_confs_of_each_student(recipe):
    grid = grid_of(recipe, seeds=[1], size="")
    run(grid)
    places = places_of(grid)
    plans = plans_of(grid, places, CPU)
    confs = {name: digest_of(steps) for name, steps in plans.items()}
    assert len(set(confs.values())) == 1  # the toy's steps read no conf of a cell
    document = collect_grid(grid, places, "COMMAND", CPU, None, confs)
    section = document["grid"]
    assert (section["run"], section["size"], section["split"]) == ("toy", "", "")
    assert RunOptions(**section["options"]) == CPU
    assert section["cells"][1]["conf_digests"] == [confs["mvq-seed1"]]
    assert document["students"][0]["origin"]["confs"] == confs["none-seed1"]
    # They are the same where nothing has been run, and others once a conf is.
    shutil.rmtree("exp")
    assert grid_digests(grid, CPU) == confs and not Path("exp").exists()
    (recipe / "conf/decoding.yaml").write_text("decoding: {avg: 4}\n")
    assert not {*grid_digests(grid, CPU).values()} & {*confs.values()}
    (recipe / "run.sh").write_text("#!/usr/bin/env bash\nexit 1\n")
    assert grid_digests(grid, CPU) == {}


def test_script_fills_results_and_resumes(recipe):
    grid_of(recipe, cells={"none": CONF["cells"]["none"]})
    command = [sys.executable, str(ROOT / "local/experiment.py"), "--config", "grid.yaml"]
    (recipe / "broken-none-seed2").touch()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "one: 0 of 2 students are done; the other 2 will take 0 h 0" in done.stderr
    assert done.stderr.splitlines()[-1].endswith(
        "exp/toy/grids/one/logs/none-seed2.log: 1 students failed, none-seed2; mend what it says "
        "and call again"
    )
    results = json.loads((recipe / "exp/toy/grids/one/results.json").read_text())
    assert results["grid"]["cells"][0]["seeds_done"] == [1]
    assert "1 of 2 students are done" in (recipe / "exp/toy/grids/one/index.html").read_text()


def test_two_processes_share_the_students(recipe):
    """Both have one in hand before either goes on; what the other has made is left as it is."""
    names = ["none", "none-b", "none-c"]  # without labels, which are not there
    grid_of(recipe, cells=dict.fromkeys(names, CONF["cells"]["none"]))
    begins = 'echo "$students $labels"'
    waits = """made=exp/toy/stamps/student-$students
[[ ! -e $made || "$(cat "$made")" != "$(stamp "$students")" ]] || exit 0
echo "$students" >at
read -r _ <go
"""
    (recipe / "run.sh").write_text(FAKE.replace(begins, waits + begins))
    for name in ("at", "go"):
        os.mkfifo(recipe / name)
    command = [sys.executable, str(ROOT / "local/experiment.py"), "--config", "grid.yaml"]
    command += ["--num_jobs", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    # For reading and writing, so that neither end waits for the other to open it.
    with (
        open(os.open("at", os.O_RDWR), "r+b", buffering=0) as at,
        open(os.open("go", os.O_RDWR), "r+b", buffering=0) as go,
    ):
        processes = [
            subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)
        ]
        assert {at.readline(), at.readline()} == {b"none-seed1\n", b"none-b-seed1\n"}
        go.write(b"go\n" * 6)
        said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    wanted = [f"{name}-seed{seed} mvq" for name in names for seed in (1, 2)]
    assert sorted(ran(recipe)) == sorted(wanted)
    assert any("none-seed1: in the hands of another process" in one for one in said)
    results = json.loads((recipe / "exp/toy/grids/one/results.json").read_text())
    assert [cell["seeds_done"] for cell in results["grid"]["cells"]] == 3 * [[1, 2]]


def test_ended_calls_start_nothing_more(recipe):
    grid = grid_of(recipe)
    places = places_of(grid)
    write_confs(grid, places)
    os.mkfifo(recipe / "at")
    (recipe / "run.sh").write_text("#!/usr/bin/env bash\necho >at\nread <never\n")
    os.mkfifo(recipe / "never")
    calls = Calls(grid, places, CPU, recipe / "logs")
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(calls(students_of(grid)[0], 1)))
    thread.start()
    (recipe / "at").read_text()
    calls.end()
    thread.join()
    assert statuses == [-15] and calls(students_of(grid)[1], 1) == 143


def test_shipped_grids_are_whole(tmp_path):
    cells = {}
    for path in GRIDS:
        grid = cli.parse(GridSettings, ["--config", str(path)])[0]
        assert grid.name == path.stem
        for student in students_of(grid):
            cell = student.cell
            meaning = cell.meaning()
            assert cells.setdefault((grid.corpus, student.cell_name), meaning) == meaning
            for conf in cell.confs.split():
                assert (ROOT / "conf" / f"{conf}.yaml").exists(), (grid.name, conf)
            own = [ROOT / "conf/labels", ROOT / "egs" / grid.corpus / "conf/labels"]
            assert cell.labels == "mvq" or any((f / cell.labels).is_dir() for f in own)
    assert len(GRIDS) >= 7
