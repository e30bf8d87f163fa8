"""Refuse what a later step would refuse of its options and confs, before the first one runs."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from mvqkd import cli
from mvqkd.errors import RecipeError
from mvqkd.experiments.plan import read_plan


@dataclass
class Settings:
    """Where the steps are listed."""

    # Lines of a step's name, todo or done, and its command.
    plan: Path


def check(name: str, words: list[str]) -> None:
    """Read a step's options as its script does.

    Raises:
      RecipeError: the script would refuse them; begins with the step's name.
    """
    # What starts the script may be a script too, but none of Python.
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        return
    spec = importlib.util.spec_from_file_location(f"step_{Path(words[at]).stem}", words[at])
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # where dataclasses look up their types
    spec.loader.exec_module(script)
    try:
        cli.parse(script.Settings, words[at + 1 :], words[at])
    except RecipeError as error:
        raise RecipeError(f"step {name}: {error}") from error


def main(settings: Settings) -> None:
    for step in read_plan(settings.plan.read_text(encoding="utf-8")):
        if not step.done:
            check(step.name, step.words)


if __name__ == "__main__":
    cli.run(main, Settings)
