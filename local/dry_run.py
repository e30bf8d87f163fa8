"""Print what the stages would run, and what it would cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mvqkd import cli
from mvqkd.report.costs import CostSettings, plan_text


@dataclass
class Settings(CostSettings):
    """Rates, and the steps."""

    # Lines of a step's name, todo or done, and its command.
    plan: Path = Path("/dev/stdin")
    # Students that are trained side by side.
    num_jobs: int = 1
    # Whether there is a GPU that the steps would take.
    gpu: bool = False
    # Steps whose rates are of others than these.
    unmeasured: list[str] = field(default_factory=list)


def main(settings: Settings) -> None:
    for name in settings.unmeasured:
        settings.steps.pop(name, None)
    device = "cuda" if settings.gpu else "cpu"
    print(plan_text(settings.plan.read_text(), settings, settings.num_jobs, device), end="")


if __name__ == "__main__":
    cli.run(main, Settings)
