"""A copy of the checkout to run run.sh in, and what tests look at afterwards."""

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d ")


def copy_checkout(target: Path) -> Path:
    """Tracked files and new ones that git does not ignore; the environment is shared."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    (target / ".venv").symlink_to(ROOT / ".venv")
    return target


def copy_run(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, symlinks=True)
    return target


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run_sh(folder: Path, *args: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(folder / "run.sh"), *args],
        cwd=cwd or folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def begun_steps(done: subprocess.CompletedProcess) -> list[str]:
    return re.findall(r"^\S+ (\S+): begins$", done.stderr, re.MULTILINE)


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line on stderr beside the log."""
    assert done.returncode != 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if not LOG_LINE.match(line)]
    assert len(lines) == 1, done.stderr
    return lines[0]


def files_under(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Time of the last change and size of every file."""
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_size)
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }
