"""Run what a grid of students has not done yet, and gather what it has.

Alone, or in any number of processes and hosts at once, which share the students:

    python3 local/experiment.py --config egs/mini/conf/grids/kinds.yaml --num_jobs 2
    torchrun --nnodes 2 --nproc-per-node 1 ... local/experiment.py --config ...
    local/slurm_array.sh 16 --gpus-per-task=1 -- python3 local/experiment.py --config ...
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mvqkd import cli
from mvqkd.device import pick_device
from mvqkd.errors import RecipeError
from mvqkd.experiments.grid import (
    GridSettings,
    Places,
    RunOptions,
    Student,
    conf_files,
    places_of,
    students_of,
    write_confs,
)
from mvqkd.experiments.plan import PlannedStep, check_steps
from mvqkd.experiments.runner import (
    Calls,
    Estimate,
    check_recipe,
    estimate,
    plans_of,
    processes_here,
    run_grid,
    state_of,
    students_at_once,
    wait_for_others,
    with_done_since,
)
from mvqkd.files import locked
from mvqkd.report.confs import digest_of
from mvqkd.report.costs import CostSettings, with_teacher
from mvqkd.report.grid_page import write_grid_page
from mvqkd.report.grids import collect_grid
from mvqkd.report.table import write_results_json


@dataclass
class Settings(RunOptions, GridSettings):
    """The grid, and how it is run."""

    # Students at once in each process, which share the cores; 0: two where one process has the CPU
    # of a host, as run.sh, else one.
    num_jobs: int = 0
    # Only say what it would take.
    plan: bool = False


def write_results(
    settings: Settings,
    places: Places,
    out_of_date: Mapping[str, str],
    confs: Mapping[str, str],
) -> None:
    """One process at a time, so that none overwrites what another has found since."""
    path = places.results(settings)
    with locked(path.with_suffix(".lock")):
        command = shlex.join(["python3", *sys.argv])
        document = collect_grid(settings, places, command, settings, out_of_date, confs)
        write_results_json(path, document)
        write_grid_page(path.with_name("index.html"), settings, document)


def costs_of(settings: Settings) -> CostSettings:
    """The rates by which run.sh shows what it costs."""
    confs = [str(path) for path in conf_files(settings, "costs")]
    costs, _ = cli.parse(CostSettings, [word for path in confs for word in ("--config", path)])
    return with_teacher(costs, "other" if settings.teacher or settings.teacher_dir else "own")


def device_of(settings: Settings) -> str:
    """Also of a call that is to be made elsewhere."""
    return settings.device if settings.device != "auto" else pick_device("auto").type


def main(settings: Settings) -> None:
    check_recipe()
    if settings.num_jobs < 0 or settings.num_gpus < 1:
        raise RecipeError(
            f"--num_jobs {settings.num_jobs}, --num_gpus {settings.num_gpus}: give at least 1, or "
            "no --num_jobs"
        )
    device = device_of(settings)
    num_jobs = settings.num_jobs or (2 if device == "cpu" and processes_here() == 1 else 1)
    if settings.num_gpus > 1 and processes_here() > 1:
        raise RecipeError(
            f"--num_gpus {settings.num_gpus}: processes of one host would take the same GPUs; "
            "start one a host"
        )
    places = places_of(settings)
    write_confs(settings, places)
    plans = plans_of(settings, places, settings)
    check_steps(step for steps in plans.values() for step in steps)
    costs = costs_of(settings)

    def estimate_of(plans: Mapping[str, Sequence[PlannedStep]]) -> Estimate:
        at_once = students_at_once(num_jobs, device)
        return estimate(settings, places, at_once, plans, costs, device)

    left = estimate_of(plans)
    total = len(students_of(settings))
    logging.info(f"{settings.name}: {left.in_words(total, costs.measured)}")
    if left.out_of_date:
        names = ", ".join(student.name for student in left.out_of_date)
        logging.info(f"{settings.name}: done before their confs or data changed: {names}")
    if settings.plan:
        return
    left.check_disks()

    def states(students: Sequence[Student]) -> dict[str, str]:
        found = {student.name: state_of(places, student) for student in students}
        return {name: state for name, state in found.items() if state is not None}

    def digests(plans: Mapping[str, Sequence[PlannedStep]]) -> dict[str, str]:
        return {name: digest_of(steps) for name, steps in plans.items()}

    out_of_date, confs = states(left.out_of_date), digests(plans)
    calls = Calls(settings, places, settings, places.exp / "grids" / settings.name / "logs")

    def now() -> Estimate:
        return estimate_of(with_done_since(settings, places, plans, out_of_date))

    def when_done() -> None:
        try:
            write_results(settings, places, out_of_date, confs)
            logging.info(f"{settings.name}: {now().progress(total)}")
        except RecipeError as error:  # no reason to stop training; said again at the end
            logging.warning(f"{settings.name}: {error}")

    failed = run_grid(settings, places, calls, num_jobs, when_done)
    try:
        # Students whose data were made again as they had been are up to date after all.
        plans = plans_of(settings, places, settings)
    except RecipeError as error:  # of confs that are being edited; what failed is told below
        logging.warning(f"{settings.name}: {error}")
        plans = with_done_since(settings, places, plans, out_of_date)
    left, before = estimate_of(plans), out_of_date
    out_of_date = states(left.out_of_date)
    write_results(settings, places, out_of_date, digests(plans))
    logging.info(f"{settings.name}: results in {places.results(settings)}")
    changed = [n for n, state in out_of_date.items() if state != before.get(n) and n not in failed]
    if changed:
        names = ", ".join(changed)
        logging.info(f"{settings.name}: confs have changed meanwhile, those of {names}; call again")
    elsewhere = [s.name for s in left.left if s.name not in {*failed, *changed}]
    if elsewhere:
        logging.info(
            f"{settings.name}: other processes have {len(elsewhere)} students in hand, "
            f"{', '.join(elsewhere)}; call again when these are done"
        )
    if failed:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            wait_for_others(settings, places)
        raise RecipeError(
            f"{places.exp}/grids/{settings.name}/logs/{failed[0]}.log: {len(failed)} students "
            f"failed, {', '.join(failed)}; mend what it says and call again"
        )


if __name__ == "__main__":
    cli.run(main, Settings)
