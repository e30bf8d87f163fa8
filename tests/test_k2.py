"""tests/k2/run.sh, where it cannot make its environment."""

import os
import shutil
import subprocess

import pytest

from tests.recipe_copy import ROOT


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_says_that_python_3_11_is_not_whole(tmp_path, missing):
    scripts = tmp_path / "tests/k2"
    scripts.mkdir(parents=True)
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / "tests/k2" / name, scripts)
    python = tmp_path / "bin/python3.11"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\n! echo "$2" | grep -q {missing}\n')
    python.chmod(0o755)
    done = subprocess.run(
        [scripts / "run.sh"],
        env={**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3
    assert "no Python 3.11 with ensurepip" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / ".venv-k2").exists()
