"""Refuse what a later step would refuse of its options and confs, before the first one runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mvqkd import cli
from mvqkd.experiments.plan import check_steps, read_plan


@dataclass
class Settings:
    """Where the steps are listed."""

    # Lines of a step's name, todo or done, and its command.
    plan: Path


def main(settings: Settings) -> None:
    check_steps(read_plan(settings.plan.read_text(encoding="utf-8")))


if __name__ == "__main__":
    cli.run(main, Settings)
