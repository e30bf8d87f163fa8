"""local/steps.sh, sourced by a small script."""

import os
import subprocess
from pathlib import Path

import pytest

STEPS = Path(__file__).parents[2] / "local" / "steps.sh"


@pytest.fixture
def shell(tmp_path):
    """Runs bash lines in a recipe with two conf files; returns the process and what ran."""
    (tmp_path / "conf/laptop").mkdir(parents=True)
    (tmp_path / "egs/toy/conf/tiny").mkdir(parents=True)
    (tmp_path / "conf/a.yaml").write_text("# about\nkey: 1  # why\n\nurl: x#y\n")
    (tmp_path / "conf/laptop/a.yaml").write_text("other: 2\n")
    (tmp_path / "egs/toy/conf/tiny/a.yaml").write_text("third: 3\n")
    # `work NAME OUT ...` notes its name and leaves OUT.
    head = (
        "set -euo pipefail\n"
        f". {STEPS}\n"
        "corpus=toy size=tiny scale=laptop exp=exp stamps=exp/stamps\n"
        'work() { echo "$1" >>ran; mkdir -p "$(dirname "$2")"; echo "$1" >>"$2"; }\n'
    )

    def start(lines):
        pipe = subprocess.PIPE
        command = ["bash", "-c", head + lines]
        return subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)

    def shell(lines):
        (tmp_path / "ran").write_text("")
        process = start(lines)
        stdout, stderr = process.communicate()
        done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
        return done, (tmp_path / "ran").read_text().split()

    shell.start = start
    return shell


STEP = 'step one "" out/one work one out/one $(conf a)\n'
TWO = STEP + 'step two "one" out/two work two out/two\n'


def test_conf_names_the_files_from_the_general_to_the_particular(shell):
    done, _ = shell("conf a")
    assert done.stdout.split()[1::2] == [
        "conf/a.yaml",
        "conf/laptop/a.yaml",
        "egs/toy/conf/tiny/a.yaml",
    ]


def test_conf_of_the_labels_and_of_the_call_come_last(shell, tmp_path):
    own = ["conf/labels/n4/a.yaml", "egs/toy/conf/labels/n4/a.yaml", "mine/a.yaml"]
    for path in own:
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text("key: 4\n")
    done, _ = shell("labels=n4 overlay=mine; conf a")
    assert done.stdout.split()[7::2] == own


def test_conf_that_is_nowhere_is_an_error(shell):
    done, ran = shell('step one "" out/one work one out/one $(conf b)')
    assert done.returncode == 1 and ran == []
    assert done.stderr == "bash: conf/b.yaml: no such file; name a conf that exists\n"


def test_list(shell):
    done, _ = shell("list a b c; list")
    assert done.stdout == "[a,b,c]\n[]\n"


def test_done_once(shell):
    assert shell(TWO)[1] == ["one", "two"]
    done, ran = shell(TWO)
    assert ran == [] and "one: done already" in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "remade"),
    [
        ("# about", "# another", []),
        ("key: 1  # why", "key: 1", []),
        ("key: 1  # why", "\nkey: 1  # why not\n", []),
        ("key: 1", "key: 2", ["one", "two"]),
        ("x#y", "x#z", ["one", "two"]),
    ],
)
def test_values_count_and_comments_do_not(shell, tmp_path, old, new, remade):
    shell(TWO)
    path = tmp_path / "conf/a.yaml"
    path.write_text(path.read_text().replace(old, new))
    assert shell(TWO)[1] == remade


def test_device_and_workers_do_not_count_and_other_options_do(shell):
    step = 'step one "" out/one work one out/one'
    shell(f"{step} --device cpu --num_workers 2 --seed 1")
    assert shell(f"{step} --device cuda --num_workers 8 --seed 1")[1] == []
    assert shell(f"{step} --device cuda --num_workers 8 --seed 2")[1] == ["one"]


def test_change_upstream_remakes_what_is_after_and_nothing_else(shell):
    three = 'step three "" out/three work three out/three\n'
    shell(TWO + three)
    changed = TWO.replace("$(conf a)", "--seed 3")
    assert shell(changed + three)[1] == ["one", "two"]
    assert shell(changed + three)[1] == []


def test_outputs_are_removed_on_change_and_kept_on_resume(shell, tmp_path):
    failing = 'step one "" "out/one out/never" work one out/one'
    done, _ = shell(failing)
    assert done.returncode == 1 and "one: did not leave out/never" in done.stderr
    shell(failing)
    assert (tmp_path / "out/one").read_text() == "one\none\n"
    shell(failing + " --seed 2")
    assert (tmp_path / "out/one").read_text() == "one\n"


def test_command_that_makes_nothing_leaves_what_was_there(shell, tmp_path):
    shell(STEP)
    conf = tmp_path / "conf/a.yaml"
    right = conf.read_text()
    conf.write_text("mistyped: 1\n")
    done, _ = shell('step one "" out/one false one out/one $(conf a)')
    assert done.returncode == 1
    assert (tmp_path / "out/one").read_text() == "one\n"
    conf.write_text(right)
    _, ran = shell(STEP)
    assert ran == []
    assert not list(tmp_path.rglob("*.before"))


def test_what_a_killed_run_put_aside_comes_back_with_its_settings(shell, tmp_path):
    shell(STEP)
    conf = tmp_path / "conf/laptop/a.yaml"
    conf.write_text("other: 3\n")
    # Of the same command line, so that the conf alone decides the hash.
    killed = 'work() { echo half >"$2"; kill -KILL $$; }\n'
    done, _ = shell(killed + STEP)
    assert done.returncode == -9 and (tmp_path / "out/one").read_text() == "half\n"
    conf.write_text("other: 2\n")
    done, ran = shell(STEP)
    assert ran == [] and "one: done already" in done.stderr
    assert (tmp_path / "out/one").read_text() == "one\n"
    assert not list(tmp_path.rglob("*.before"))


@pytest.mark.parametrize("third", ['echo third >"$2"; kill -KILL $$', "false"])
def test_whole_result_stays_aside_over_any_number_of_killed_runs(shell, tmp_path, third):
    step = 'step one "" "out/one out/work?" work one out/one'
    shell(step + " --lr 1")
    shell('work() { echo half | tee "$2" >out/work; kill -KILL $$; }\n' + step + " --lr 2")
    assert (tmp_path / "out/one").read_text() == "half\n"
    shell(f"work() {{ {third}; }}\n{step} --lr 3")
    done, ran = shell(step + " --lr 1")
    assert ran == [] and "one: done already" in done.stderr
    assert (tmp_path / "out/one").read_text() == "one\n"
    assert not (tmp_path / "out/work").exists()
    assert not list(tmp_path.rglob("*.before"))


def test_killed_run_goes_on_beside_what_it_put_aside(shell, tmp_path):
    step = 'step one "" out/one work one out/one'
    shell(step + " --lr 1")
    shell('work() { echo half >"$2"; kill -KILL $$; }\n' + step + " --lr 2")
    assert shell(step + " --lr 2")[1] == ["one"]
    assert (tmp_path / "out/one").read_text() == "half\none\n"
    assert not list(tmp_path.rglob("*.before"))


def test_killed_run_comes_back_when_one_with_a_mistake_fails_at_once(shell, tmp_path):
    step = 'step one "" out/one work one out/one'
    shell('work() { mkdir out; echo half >"$2"; kill -KILL $$; }\n' + step + " --lr 1")
    shell("work() { false; }\n" + step + " --lr 2")
    assert shell(step + " --lr 1")[1] == ["one"]
    assert (tmp_path / "out/one").read_text() == "half\none\n"


def test_optional_output_is_removed_but_need_not_be_there(shell, tmp_path):
    step = 'step one "" "out/one out/work?" work one out/one'
    assert shell(step)[0].returncode == 0
    assert shell(step)[1] == []
    (tmp_path / "out/work").write_text("left by a kill")
    assert shell(step + " --seed 2")[1] == ["one"]
    assert not (tmp_path / "out/work").exists()


def test_missing_output_is_remade(shell, tmp_path):
    shell(TWO)
    (tmp_path / "out/one").unlink()
    assert shell(TWO)[1] == ["one"]


@pytest.mark.parametrize("command", ["false", "exit 3", "kill -9 $BASHPID"])
def test_failing_command_leaves_no_stamp_and_ends_the_script(shell, tmp_path, command):
    lines = f'bad() {{ work bad out/bad; {command}; }}\nstep bad "" out/bad bad\necho after'
    done, _ = shell(lines)
    assert done.returncode != 0 and "after" not in done.stdout
    assert "bad: failed" in done.stderr
    assert not (tmp_path / "exp/stamps/bad").exists()
    # A step that was done and fails when remade is not done any more.
    shell('step bad "" out/bad work bad out/bad')
    assert (tmp_path / "exp/stamps/bad").exists()
    shell(lines)
    assert not (tmp_path / "exp/stamps/bad").exists()


def test_files_of_a_folder_count(shell, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").write_text("1")
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped/weights").write_text("1")
    step = 'step one "" out/one work one out/one --dl_dir in --teacher shipped'
    shell(step)
    assert shell(step)[1] == []
    (tmp_path / "in/b").write_text("1")
    assert shell(step)[1] == ["one"]
    os.utime(tmp_path / "in/b", (1, 1))  # another file of the same size
    assert shell(step)[1] == ["one"]
    (tmp_path / "shipped/weights").write_text("2")
    assert shell(step)[1] == ["one"]
    assert shell(step)[1] == []


def test_bytes_of_a_file_count(shell, tmp_path):
    (tmp_path / "real").write_text("1")
    (tmp_path / "checkpoint.pt").symlink_to("real")
    step = 'step one "" out/one work one out/one --teacher checkpoint.pt'
    shell(step)
    assert shell(step)[1] == []
    (tmp_path / "real").write_text("2")
    assert shell(step)[1] == ["one"]
    assert shell(step)[1] == []


def test_second_run_waits_for_the_first(shell, tmp_path):
    step = 'step one "" out/one slow\n'
    slow = f"slow() {{ echo >{tmp_path}/at; read <{tmp_path}/go; work one out/one; }}\n"
    os.mkfifo(tmp_path / "at")
    os.mkfifo(tmp_path / "go")
    first = shell.start(slow + step)
    (tmp_path / "at").read_text()
    second = shell.start(slow + step)
    assert "one: another run is at it; waiting" in second.stderr.readline()
    (tmp_path / "go").write_text("\n")
    first.communicate()
    _, said = second.communicate()
    assert first.returncode == second.returncode == 0
    assert "one: done already" in said


def test_file_system_without_locks_is_named_and_done_without(shell):
    done, ran = shell("flock() { return 71; }\n" + STEP)
    assert (done.returncode, ran) == (0, ["one"])
    assert "one: no locks on the file system of exp/stamps: start no second run" in done.stderr


def test_other_hosts_only_take_part_in_training(shell, tmp_path):
    lines = (
        "export PET_NODE_RANK=1\n"
        'step one "" out/one work one out/one\n'
        'step two "one" out/two work two out/two -m mvqkd.launch script\n'
    )
    done, ran = shell(lines)
    assert done.returncode == 0 and ran == ["two"]
    assert not (tmp_path / "exp/stamps").exists()
    done, _ = shell('PET_NODE_RANK=1\nstep two "" out/two false -m mvqkd.launch script')
    assert done.returncode == 1


def test_launcher_starts_the_command_and_is_no_part_of_the_stamp(shell, tmp_path):
    launched = 'launch() { echo launched $1 >>said; shift 2; "$@"; }\n'
    done, ran = shell(launched + "launcher='launch of 4' " + STEP)
    assert done.returncode == 0 and ran == ["one"]
    assert (tmp_path / "said").read_text().endswith("launched of\n")
    assert shell(STEP)[1] == []


def test_dry_run_lists_what_is_to_do_and_runs_nothing(shell, tmp_path):
    other = 'step three "" out/three work three out/three "a b"\n'
    shell(TWO)
    before = sorted(tmp_path.rglob("*"))
    dry = "dry_run=true; begin_plan\n" + TWO + other + 'cat "$mvqkd_plan"; rm "$mvqkd_plan"'
    done, ran = shell(dry)
    assert ran == [] and sorted(tmp_path.rglob("*")) == before
    assert done.stdout.splitlines() == [
        "one done work one out/one --config conf/a.yaml --config conf/laptop/a.yaml "
        "--config egs/toy/conf/tiny/a.yaml ",
        "two done work two out/two ",
        "three todo work three out/three a\\ b ",
    ]
    # What is after a step that is to be made again, too.
    done, _ = shell(dry.replace("$(conf a)", "--seed 3"))
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["todo", "todo", "todo"]


def test_script_that_is_called_adds_to_the_list_and_shows_nothing(shell):
    done, _ = shell(
        "dry_run=true; begin_plan\n(begin_plan; " + STEP.strip() + "; show_plan)\n"
        'cat "$mvqkd_plan"; rm "$mvqkd_plan"; $own_plan'
    )
    assert done.returncode == 0 and done.stdout.startswith("one todo work one out/one")
