"""Print what the stages would run, and what it would cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mvqkd import cli
from mvqkd.report.costs import CostSettings, Teacher, plan_text, with_teacher


@dataclass
class Settings(CostSettings):
    """Rates, and the steps."""

    # Lines of a step's name, todo or done, and its command.
    plan: Path = Path("/dev/stdin")
    # Students that are trained side by side.
    num_jobs: int = 1
    # Whether there is a GPU that the steps would take.
    gpu: bool = False
    # own, made or other: the recipe's, the same trained anew, or another.
    teacher: Teacher = "own"


def main(settings: Settings) -> None:
    device = "cuda" if settings.gpu else "cpu"
    rates = with_teacher(settings, settings.teacher)
    print(plan_text(settings.plan.read_text(), rates, settings.num_jobs, device), end="")


if __name__ == "__main__":
    cli.run(main, Settings)
