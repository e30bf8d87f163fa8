"""tests/k2/run.sh: the Python that it takes, and where it cannot make its environment."""

import os
import shutil
import subprocess

import pytest

from tests.recipe_copy import ROOT


@pytest.fixture
def run(tmp_path):
    """Calls the script where python3.11 and python3.10 are the shell scripts that are given."""
    scripts = tmp_path / "tests/k2"
    scripts.mkdir(parents=True)
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / "tests/k2" / name, scripts)

    def run(**pythons):
        for name, text in pythons.items():
            python = tmp_path / "bin" / name.replace("_", ".")
            python.parent.mkdir(exist_ok=True)
            python.write_text(f"#!/bin/sh\n{text}\n")
            python.chmod(0o755)
        return subprocess.run(
            [scripts / "run.sh", "-k", "some"],
            env={**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_says_that_no_python_is_whole(tmp_path, run, missing):
    text = f'! echo "$2" | grep -q {missing}'
    done = run(python3_11=text, python3_10=text)
    assert done.returncode == 3
    assert "no Python 3.11 or 3.10 with ensurepip" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / ".venv-k2").exists()


# Makes an environment whose python tells what it is called with.
MAKES = """
[ "$1 $2" = "-m venv" ] || exit 0
mkdir -p "$3/bin"
printf '#!/bin/sh\\necho by %s: "$@"\\n' "$0" >"$3/bin/python"
chmod +x "$3/bin/python"
"""


@pytest.mark.parametrize("python", ["python3.11", "python3.10"])
def test_takes_the_newest_python_that_starts(tmp_path, run, python):
    newest = MAKES if python == "python3.11" else "echo not installed >&2; exit 127"
    done = run(python3_11=newest, python3_10=MAKES)
    assert done.returncode == 0 and done.stderr == ""
    install, test = done.stdout.splitlines()
    assert f"bin/{python}: -m pip install" in install and "-m pytest" in test
    assert test.endswith("-k some tests/k2/compare_with_k2.py tests/k2/fast_beam_search.py")
    made_by = (tmp_path / ".venv-k2/requirements.txt").read_text()
    assert made_by == (ROOT / "tests/k2/requirements.txt").read_text()
