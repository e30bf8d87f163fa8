"""Whether the confs that results came from are those that are there now."""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from mvqkd.errors import RecipeError
from mvqkd.experiments.grid import GridSettings, Places, RunOptions, write_confs
from mvqkd.experiments.plan import PlannedStep, plan_of
from mvqkd.experiments.runner import plans_of


def conf_digests(command: str) -> dict[str, str]:
    """By the name of each student that ``command``, a call of run.sh, trains and decodes: a hash of
    what its conf files say, and those of the steps before students; comments are no part of it.

    Unlike a stamp it is the same on every host. Empty where run.sh refuses the call, and of any
    other command.
    """
    words = shlex.split(command)
    if words[:1] != ["./run.sh"]:
        return {}
    try:
        steps = plan_of(words)
    except (RecipeError, OSError):
        return {}
    shared = [s for s in steps if not s.name.startswith(("student-", "decode-", "report"))]
    students = [s.name.removeprefix("student-") for s in steps if s.name.startswith("student-")]
    return {
        name: digest_of([*shared, *(s for s in steps if s.name in _steps_of(name))])
        for name in students
    }


def grid_digests(grid: GridSettings, options: RunOptions) -> dict[str, str]:
    """The same by the name of each student of a grid, whose confs are written elsewhere for it.

    Args:
      options: by which it was run. Empty where run.sh refuses them.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = Places(Path(folder) / "exp", Path(folder) / "data")
        try:
            write_confs(grid, places)
            plans = plans_of(grid, places, options)
        except (RecipeError, OSError):
            return {}
        return {name: digest_of(steps) for name, steps in plans.items()}


def _steps_of(student: str) -> tuple[str, str]:
    return f"student-{student}", f"decode-{student}"


def digest_of(steps: Sequence[PlannedStep]) -> str:
    """Of what the conf files of ``steps`` say, in their order."""
    digest = hashlib.sha256()
    for step in steps:
        for option, path in itertools.pairwise(step.words):
            if option == "--config":
                content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
                digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:12]
