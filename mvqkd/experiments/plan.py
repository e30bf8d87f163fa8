"""What a call of run.sh would do, which run.sh alone knows."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
