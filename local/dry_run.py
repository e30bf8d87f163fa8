"""Print what the stages would run, and what it would cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mvqkd import cli
from mvqkd.report.costs import CostSettings, plan_text


@dataclass
class Settings(CostSettings):
    """Rates, and the steps."""

    # Lines of a step's name, todo or done, and its command.
    plan: Path = Path("/dev/stdin")


def main(settings: Settings) -> None:
    print(plan_text(settings.plan.read_text(), settings), end="")


if __name__ == "__main__":
    cli.run(main, Settings)
