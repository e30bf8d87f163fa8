"""Run what a grid of students has not done yet, and gather what it has.

Alone, or in any number of processes and hosts at once, which share the students:

    python3 local/experiment.py --config egs/mini/conf/grids/kinds.yaml --num_jobs 2
    torchrun --nnodes 2 --nproc-per-node 1 ... local/experiment.py --config ...
    local/slurm_array.sh 16 --gpus-per-task=1 -- python3 local/experiment.py --config ...
"""

from __future__ import annotations

import fcntl
import logging
import sys
from dataclasses import dataclass

from mvqkd import cli
from mvqkd.data.shards import place_in_job
from mvqkd.errors import RecipeError
from mvqkd.experiments.grid import GridSettings, Places, places_of, students_of, write_confs
from mvqkd.experiments.runner import Calls, check_recipe, estimate, run_grid
from mvqkd.report.grids import collect_grid
from mvqkd.report.table import write_results_json


@dataclass
class Settings(GridSettings):
    """The grid, and how it is run."""

    device: str = "auto"
    # Students at once in each process, which share the cores.
    num_jobs: int = 1
    # Only say how long it would take.
    plan: bool = False


def write_results(settings: Settings, places: Places) -> None:
    """One process at a time, so that none overwrites what another has found since."""
    path = places.results(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = " ".join(["python3", *sys.argv])
        write_results_json(path, collect_grid(settings, places, command))


def main(settings: Settings) -> None:
    check_recipe()
    if settings.num_jobs < 1:
        raise RecipeError(f"--num_jobs {settings.num_jobs}: give at least 1")
    places = places_of(settings)
    _, num_processes = place_in_job()
    left = estimate(settings, places, settings.num_jobs * num_processes)
    total = len(students_of(settings))
    logging.info(f"{settings.name}: {left.in_words(total, settings.rates.measured)}")
    if settings.plan:
        return
    write_confs(settings, places)
    calls = Calls(settings, places, settings.device, places.exp / "grids" / settings.name / "logs")
    failed = run_grid(
        settings, places, calls, settings.num_jobs, lambda: write_results(settings, places)
    )
    write_results(settings, places)
    logging.info(f"{settings.name}: results in {places.results(settings)}")
    if failed:
        raise RecipeError(
            f"{places.exp}/grids/{settings.name}/logs/{failed[0]}.log: {len(failed)} students "
            f"failed, {', '.join(failed)}; mend what it says and call again"
        )


if __name__ == "__main__":
    cli.run(main, Settings)
