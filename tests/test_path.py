"""path.sh, which makes the environment; by a Python that only notes what it is asked for."""

import os
import shutil
import subprocess

import pytest

from tests.recipe_copy import ROOT

# Makes environments whose pip appends its options to `calls`, and then does what `pip.sh` says.
PYTHON = """#!/usr/bin/env bash
[[ $1 == -c ]] && exit 0
echo "$*" >>{folder}/calls
[[ "$1 $2 $3" == "-m venv --clear" ]] || exit 1
rm -rf "$4"
mkdir -p "$4/bin"
cat >"$4/bin/pip" <<'END'
#!/usr/bin/env bash
echo "pip $*" >>{folder}/calls
. {folder}/pip.sh
END
chmod +x "$4/bin/pip"
"""


@pytest.fixture
def recipe(tmp_path):
    folder = tmp_path / "recipe"
    folder.mkdir()
    for name in ("path.sh", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def source(recipe, tmp_path):
    """Sources path.sh, where pip does as told; returns the process and the calls that it made."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python3.11"
    python.write_text(PYTHON.format(folder=tmp_path))
    python.chmod(0o755)
    calls = tmp_path / "calls"
    env = {key: value for key, value in os.environ.items() if key != "MVQKD_PYTHON"}
    env["PATH"] = f"{tmp_path}/bin:{env['PATH']}"

    def source(pip="true", words=". ./path.sh && echo $VIRTUAL_ENV ${PATH%%:*} ${PYTHONPATH%%:*}"):
        (tmp_path / "pip.sh").write_text(pip + "\n")
        calls.write_text("")
        done = subprocess.run(
            ["bash", "-c", words], cwd=recipe, env=env, capture_output=True, text=True
        )
        return done, calls.read_text().splitlines()

    return source


def made(recipe):
    """The calls that make the environment: torch comes first."""
    environment = recipe / ".venv"
    return [
        f"-m venv --clear {environment}",
        f"pip install --no-input -r {environment}/torch.txt",
        f"pip install --no-input -r {recipe}/requirements.lock",
    ]


def test_makes_the_environment_once_and_when_the_lock_file_changes(recipe, source):
    done, calls = source()
    assert done.returncode == 0 and calls == made(recipe)
    assert done.stdout.split() == [f"{recipe}/.venv", f"{recipe}/.venv/bin", str(recipe)]
    assert "(once)" in done.stderr
    assert (recipe / ".venv/torch.txt").read_text().startswith("torch==")
    again, calls = source()
    assert calls == [] and (again.returncode, again.stdout, again.stderr) == (0, done.stdout, "")
    with (recipe / "requirements.lock").open("a") as file:
        file.write("# another\n")
    assert source()[1] == made(recipe)
    assert source()[1] == []


@pytest.mark.parametrize("number", [1, 2])
def test_install_that_fails_is_not_taken_as_whole(recipe, source, number):
    second = '[[ "$*" != *requirements.lock ]] || '
    fails = "echo no such wheel; exit 1"
    done, calls = source(fails if number == 1 else second + f"{{ {fails}; }}")
    assert done.returncode != 0 and calls == made(recipe)[: 1 + number]
    assert "no such wheel" in done.stderr
    assert "path.sh: the packages of requirements.lock could not" in done.stderr.splitlines()[-1]
    assert source()[1] == made(recipe)
    assert source()[1] == []


def test_install_that_is_killed_is_not_taken_as_whole(recipe, source):
    # The shell that installs, and the one that sources, too.
    done, _ = source(
        "kill -KILL $PPID $(cut -d' ' -f4 /proc/$PPID/stat)", words=". ./path.sh; true"
    )
    assert done.returncode == -9
    assert (recipe / ".venv/bin/pip").exists()
    assert source()[1] == made(recipe)
    assert source()[1] == []


def test_leaves_a_linked_environment_as_it_is(recipe, tmp_path):
    environment = tmp_path / "other"
    environment.mkdir()
    (environment / "lock-hash").write_text("of another lock\n")
    (recipe / ".venv").symlink_to(environment)
    done = subprocess.run(["bash", "-c", ". ./path.sh"], cwd=recipe, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.splitlines() == [
        "path.sh: .venv is a link, to an environment made from another requirements.lock; "
        "remove the link, and call again"
    ]
    assert [path.name for path in environment.iterdir()] == ["lock-hash"]
