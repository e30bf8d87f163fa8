"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mvqkd.errors import RecipeError


@contextlib.contextmanager
def written_aside(path: Path | str) -> Iterator[Path]:
    """Give a temporary name beside ``path``; it takes the place of ``path`` on success.

    The temporary name keeps the suffixes of ``path`` (lhotse chooses a format by
    them). What it names may be a file or a folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".part-{os.getpid()}-{path.name}")
    _remove(aside)
    try:
        yield aside
        if path.is_dir():
            _remove(path)
        os.replace(aside, path)
    finally:
        _remove(aside)


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
