"""Results that are saved as they come, and gone on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mvqkd.errors import RecipeError
from mvqkd.files import read_json, written_aside


def go_on(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run with these settings has saved; None: there was none.

    Args:
      settings: JSON values that all of its results depend on.
    Raises:
      RecipeError: the file is damaged, or of other settings.
    """
    if not path.exists():
        return None
    remedy = "give another --out-dir, or remove the file"
    found = read_json(path, remedy, remedy)
    for key, value in settings.items():
        if found.get(key) != value:
            raise RecipeError(
                f"{path}: made with {key} {found.get(key)}, this run with {value}; {remedy}"
            )
    return found


def save(folder: Path, document: dict[str, Any], table: str) -> None:
    """Leave ``results.json`` and ``table.md`` in ``folder``."""
    for name, text in (("results.json", json.dumps(document, indent=1)), ("table.md", table)):
        with written_aside(folder / name) as aside:
            aside.write_text(text + "\n", encoding="utf-8")
