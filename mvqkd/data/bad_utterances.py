"""Utterances that are left out because something is wrong with them: how many may be, and which."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from mvqkd.errors import RecipeError
from mvqkd.files import written_aside


def check_bad(bad: Mapping[str, str], num_cuts: int, max_bad_share: float, conf: str) -> None:
    """
    Args:
      bad: what is wrong with cuts that are left out, by id; of ``num_cuts`` in all.
      conf: where ``max_bad_share`` is set.

    Raises:
      RecipeError: they are too many.
    """
    if len(bad) > max_bad_share * num_cuts:
        raise RecipeError(
            f"{next(iter(bad.values()))} ({len(bad)} of {num_cuts} utterances are bad, more than "
            f"max_bad_share = {max_bad_share} of {conf})"
        )


def list_bad(bad: Mapping[str, str], path: Path) -> None:
    """Leave in ``path`` what was wrong with the cuts that were left out; no file if with none."""
    if not bad:
        path.unlink(missing_ok=True)
        return
    with written_aside(path) as aside:
        aside.write_text("".join(f"{reason}\n" for reason in bad.values()))
    logging.warning(f"{len(bad)} bad utterances left out, listed in {path}")
