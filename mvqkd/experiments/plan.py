"""What a call of run.sh would do, which run.sh alone knows."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from mvqkd import cli
from mvqkd.errors import RecipeError


@dataclass(frozen=True)
class PlannedStep:
    """A step of run.sh that is asked for."""

    name: str  # as its stamp has it
    done: bool  # as it would be done now: neither confs nor what it is made from have changed
    command: str  # as a shell quotes it

    @property
    def words(self) -> list[str]:
        return shlex.split(self.command)


def read_plan(text: str) -> list[PlannedStep]:
    """
    Args:
      text: lines of a step's name, ``todo`` or ``done``, and its command.
    """
    lines = [line.split(" ", 2) for line in text.splitlines()]
    return [PlannedStep(name, state == "done", words.strip()) for name, state, words in lines]


def plan_of(command: Sequence[str], env: Mapping[str, str] | None = None) -> list[PlannedStep]:
    """What ``command``, a call of run.sh, would do; nothing is run.

    Args:
      env: of the call; None: this process's own.

    Raises:
      RecipeError: run.sh refuses the call.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan"
        # Where this is set, scripts leave their steps there and show nothing: see local/steps.sh.
        env = {**(os.environ if env is None else env), "mvqkd_plan": str(plan)}
        plan.touch()
        done = subprocess.run(
            [*command, "--dry-run", "true"],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()
            raise RecipeError(said[-1] if said else f"{shlex.join(command)}: failed; run it to see")
        return read_plan(plan.read_text())


def check_steps(steps: Iterable[PlannedStep]) -> None:
    """Read the options and confs of those that are not done as their scripts do.

    Raises:
      RecipeError: a script would refuse them; begins with the step's name.
    """
    seen = set()
    for step in steps:
        if not step.done and step.command not in seen:
            seen.add(step.command)
            _check(step)


def _check(step: PlannedStep) -> None:
    words = step.words
    # What starts the script may be a script too, but none of Python.
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        return
    script = _script(Path(words[at]).resolve())
    try:
        cli.parse(script.Settings, words[at + 1 :], words[at])
    except RecipeError as error:
        raise RecipeError(f"step {step.name}: {error}") from error


@cache
def _script(path: Path) -> ModuleType:
    name = f"step_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[name] = script  # where dataclasses look up their types
    spec.loader.exec_module(script)
    return script
