"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mvqkd.errors import RecipeError, reason_of

# No space left on the device, quota exceeded, file larger than allowed.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def written_aside(path: Path | str, first_stays: bool = False) -> Iterator[Path]:
    """Give a temporary name beside ``path``; it takes the place of ``path`` on success.

    The temporary name keeps the suffixes of ``path`` (lhotse chooses a format by
    them). What it names may be a file or a folder. What killed processes of this
    machine have left of ``path`` is removed.

    Args:
      first_stays: a ``path`` that is there already, perhaps written by another process since,
        is kept. Of files alone.

    Raises:
      RecipeError: the disk is full; nothing is left of what was half-written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    host = platform.node()
    for stale in path.parent.glob(f".part-{glob.escape(host)}-*-{glob.escape(path.name)}"):
        pid = stale.name[len(f".part-{host}-") : -len(f"-{path.name}")]
        if pid.isdecimal() and not _is_alive(int(pid)):
            _remove(stale)
    aside = path.with_name(f".part-{host}-{os.getpid()}-{path.name}")
    _remove(aside)
    try:
        yield aside
        if path.is_dir():
            _remove(path)
        if not first_stays:
            os.replace(aside, path)
        elif not path.exists():
            _link(aside, path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise RecipeError(
            f"{path}: cannot be written ({os.strerror(error.errno)}); make room on that disk and "
            "start again: what is done is kept"
        ) from error
    finally:
        _remove(aside)


@contextlib.contextmanager
def locked(path: Path | str, stays: bool = True) -> Iterator[None]:
    """Wait for the lock ``path`` and hold it meanwhile; where the file system has no locks, do
    without.

    Args:
      stays: whether ``path`` is left; else who held it removes it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("w") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            if not stays and not _is_at(path, file):
                continue  # removed by who held it: the next to come makes another
            try:
                yield
            finally:
                if not stays:
                    path.unlink(missing_ok=True)
            return


def _is_at(path: Path, file: IO) -> bool:
    """Whether ``path`` still names the open ``file``."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _link(aside: Path, path: Path) -> None:
    try:
        os.link(aside, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(aside, path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def require(path: Path | str, remedy: str) -> Path:
    """``path`` if it exists and is not empty.

    Raises:
      RecipeError: otherwise; the message ends with ``remedy``.
    """
    path = Path(path)
    if not path.exists():
        raise RecipeError(f"{path}: no such file or folder; {remedy}")
    empty = not any(path.iterdir()) if path.is_dir() else path.stat().st_size == 0
    if empty:
        raise RecipeError(f"{path}: empty; {remedy}")
    return path


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__}, not an object")
    return value


def read_json(path: Path | str, remedy: str, if_damaged: str | None = None) -> dict[str, Any]:
    """The JSON object in ``path``.

        read_json(exp_dir / "decoded.json", "run stage 7")

    Args:
      if_damaged: the remedy for a file that is there and cannot be read; None: to remove it, then
        ``remedy``.

    Raises:
      RecipeError: it is missing, empty or damaged; the message ends with the remedy.
    """
    path = require(path, remedy)
    try:
        return _json_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{path}: cannot be read as JSON ({reason_of(error)}); "
            f"{if_damaged or f'remove it, then {remedy}'}"
        ) from error


def read_json_lines(path: Path | str, remedy: str) -> list[dict[str, Any]]:
    """The JSON objects in ``path``, one a line; at least one.

    Raises:
      RecipeError: it is missing, empty or damaged; the message ends with ``remedy``.
    """
    path = require(path, remedy)
    try:
        return [_json_object(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{path}: a line cannot be read as JSON ({reason_of(error)}); {remedy}"
        ) from error
