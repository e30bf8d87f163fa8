"""local/parse_options.sh, sourced by a small script."""

import shutil
import subprocess
from pathlib import Path

import pytest

PARSER = Path(__file__).parents[2] / "local" / "parse_options.sh"
SCRIPT = """#!/usr/bin/env bash
# Shows its options.
# And says so in two lines.
set -euo pipefail
before=1  # not an option

# options
stage=0          # first stage to run
stop_stage=99    # last stage to run
scale=0.5        # of the loss
device=auto      # auto|cpu|cuda: where to run
dl_dir=          # folder with a copy # of the data
name="two words" # with $ and \\ and `ticks`
train_teacher=false  # make it again
bare=x
kind=mvq         # what is learned:
                 # one of many
offset=-1        # may be negative
# end of options
after=1  # not an option

. "PARSER"
for v in stage stop_stage scale device dl_dir name train_teacher bare offset before after; do
    printf '%s=%s\\n' "$v" "${!v}"
done
"""


@pytest.fixture
def run(tmp_path):
    script = tmp_path / "script.sh"
    script.write_text(SCRIPT.replace("PARSER", str(PARSER)))

    def run(*args):
        done = subprocess.run(["bash", script, *args], capture_output=True, text=True)
        lines = [line.split("=", 1) for line in done.stdout.splitlines() if "=" in line]
        return done, dict(pair for pair in lines if len(pair) == 2)

    return run


def test_defaults_stay(run):
    done, values = run()
    assert done.returncode == 0 and done.stderr == ""
    assert values["stage"] == "0" and values["name"] == "two words" and values["dl_dir"] == ""


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["--stage", "3"], "stage", "3"),
        (["--stage=3"], "stage", "3"),
        (["--stop-stage", "4"], "stop_stage", "4"),
        (["--stop_stage=4"], "stop_stage", "4"),
        (["--offset", "-7"], "offset", "-7"),
        (["--scale", "1e-3"], "scale", "1e-3"),
        (["--device", "cuda"], "device", "cuda"),
        (["--train-teacher", "true"], "train_teacher", "true"),
        (["--dl-dir", "/a b/$HOME/*"], "dl_dir", "/a b/$HOME/*"),
        (["--dl-dir=x=y"], "dl_dir", "x=y"),
        (["--dl-dir=--odd"], "dl_dir", "--odd"),
        (["--name="], "name", ""),
        (["--name", ""], "name", ""),
        (["--bare", "$(exit 3)"], "bare", "$(exit 3)"),
        (["--stage", "1", "--stage", "2"], "stage", "2"),
    ],
)
def test_option_is_set_and_no_other(run, args, name, value):
    _, defaults = run()
    done, values = run(*args)
    assert done.returncode == 0, done.stderr
    assert values == {**defaults, name: value}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--stagee", "3"],
            "unknown option --stagee; the options are --stage --stop-stage --scale",
        ),
        (["--before", "3"], "unknown option --before"),
        (["--after=3"], "unknown option --after"),
        (["--a[$(echo x >&2)]", "3"], "unknown option --a[$(echo x >&2)]"),
        (["--_po_line", "3"], "unknown option --_po_line"),
        (["--stage"], "option --stage needs a value"),
        (["--stage", "--device", "cpu"], "option --stage needs a value"),
        (["--stage", "two"], "option --stage: 'two' is not an integer"),
        (["--stage", "08"], "option --stage: '08' begins with 0"),
        (["--offset=-07"], "option --offset: '-07' begins with 0"),
        (["--stage="], "option --stage: '' is not an integer"),
        (["--train-teacher", "yes"], "'yes' is none of true, false"),
        (["--train-teacher="], "'' is none of true, false"),
        (["--device", "tpu"], "'tpu' is none of auto, cpu, cuda"),
        (["--device", "cpu|cuda"], "'cpu|cuda' is none of"),
        (["3"], "unexpected argument '3'"),
        (["-s", "3"], "unexpected argument '-s'"),
        (["--stage", "3", "rest"], "unexpected argument 'rest'"),
        (["--", "3"], "unexpected argument '--'"),
        ([""], "unexpected argument ''"),
    ],
)
def test_error_is_one_line(run, args, message):
    done, values = run(*args)
    assert done.returncode == 1 and values == {}
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["--stage", "1", "--help"]])
def test_help_lists_options_with_defaults(run, args):
    done, _ = run(*args)
    assert done.returncode == 0 and done.stderr == ""
    assert "Shows its options." in done.stdout and "And says so in two lines." in done.stdout
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if "  --" in line}
    assert list(lines) == [
        *("--stage", "--stop-stage", "--scale", "--device", "--dl-dir", "--name"),
        *("--train-teacher", "--bare", "--kind", "--offset"),
    ]
    assert "first stage to run (default: 0)" in lines["--stage"]
    assert "auto|cpu|cuda: where to run (default: auto)" in lines["--device"]
    assert "folder with a copy # of the data (default: empty)" in lines["--dl-dir"]
    assert "(default: two words)" in lines["--name"]
    assert "what is learned: one of many (default: mvq)" in lines["--kind"]


def test_script_that_goes_to_its_own_folder_first(tmp_path):
    (tmp_path / "sub").mkdir()
    text = SCRIPT.replace("PARSER", str(PARSER))
    (tmp_path / "sub" / "script.sh").write_text(text.replace("before=1", 'cd "${0%/*}"; before=1'))
    command = ["bash", "sub/script.sh", "--stage", "5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "stage=5\n" in done.stdout, done.stderr


def test_shellcheck():
    shellcheck = shutil.which("shellcheck")
    assert shellcheck, "shellcheck is in the lock file"
    done = subprocess.run([shellcheck, "-x", PARSER], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
