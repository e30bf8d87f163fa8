"""Runs what a grid has not done yet, in any number of processes and hosts at once."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from mvqkd.data.shards import place_in_job, taken
from mvqkd.errors import RecipeError
from mvqkd.experiments.grid import (
    GridSettings,
    Places,
    RunOptions,
    Student,
    run_command,
    students_of,
)
from mvqkd.experiments.plan import plan_of
from mvqkd.files import read_json_lines
from mvqkd.report.table import NOT_MEASURED

LABEL_STEPS = ("embeddings", "quantizer", "labels")
FIRST_STEPS = ("corpus", "manifests", "features", "tokens", "teacher", "verify-teacher")
# A process's place in a job, as launchers tell it. LOCAL_RANK stays: it says which GPU to take.
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MVQKD_LAUNCH")
_PLACE += ("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE")
_PLACE_PREFIXES = ("PET_", "MASTER_", "TORCHELASTIC_", "SLURM_ARRAY_TASK_")


def environment_alone(env: Mapping[str, str]) -> dict[str, str]:
    """``env`` for what is started on its own by a process that is one of many: it is no part of
    their job, and its messages go to its own log."""
    return {
        key: value
        for key, value in env.items()
        if key not in _PLACE and not key.startswith(_PLACE_PREFIXES)
    }


def threads_each(num_jobs: int) -> int:
    """CPU threads of each of ``num_jobs`` students at once, in each process of this host."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, len(os.sched_getaffinity(0)) // (here * num_jobs))


def state_of(places: Places, student: Student) -> str | None:
    """What one that has been trained and decoded was made from; None where it has not. Whether
    that is what its confs say now `steps_to_do` knows."""
    stamps = [places.exp / "stamps" / f"{step}-{student.name}" for step in ("student", "decode")]
    # Of one that is trained anew the stamp of the old decoding is still there.
    decoded = places.exp / student.name / "decoded.json"
    if not decoded.exists() or not all(stamp.exists() for stamp in stamps):
        return None
    return "".join(stamp.read_text() for stamp in stamps)


def steps_to_do(grid: GridSettings, places: Places, options: RunOptions) -> set[str]:
    """The steps of run.sh that are missing or out of date, of all that the grid needs.

    Raises:
      RecipeError: run.sh refuses one of its calls.
    """
    alike: dict[tuple[str, str], list[Student]] = defaultdict(list)
    for student in students_of(grid):
        alike[student.cell.labels, student.cell.untranscribed_parts].append(student)
    env = environment_alone(os.environ)
    return {
        step.name
        for students in alike.values()
        for step in plan_of(run_command(grid, places, students, options), env)
        if not step.done
    }


def _step_seconds(places: Places, step: str) -> float | None:
    path = places.exp / "stamps" / f"{step}.seconds"
    return float(path.read_text()) if path.exists() else None


def measured_seconds(places: Places, student: Student) -> float | None:
    """Training and decoding of one that is done; None where it is not known."""
    training = _step_seconds(places, f"student-{student.name}")
    decoding = _step_seconds(places, f"decode-{student.name}")
    if training is None or decoding is None or state_of(places, student) is None:
        return None
    # Of one that was killed the step's time is that of its last call; its log knows all of it.
    log = places.exp / student.name / "log.jsonl"
    if log.exists() and log.stat().st_size:
        stamp = places.exp / "stamps" / f"student-{student.name}"
        entries = read_json_lines(log, f"remove {stamp}, then run again")
        training = max(training, entries[-1]["seconds"])
    return training + decoding


@dataclass(frozen=True)
class Estimate:
    """How long what is left will take."""

    left: list[Student]
    # None: neither a student is done nor are there rates.
    seconds: float | None
    # Of the students that are left, those whose kind has been measured here.
    num_measured: int
    # Of the students that are left, those that were done, with other confs.
    out_of_date: list[Student]

    def in_words(self, total: int, rates_from: str) -> str:
        text = f"{total - len(self.left)} of {total} students are done"
        if not self.left:
            return text
        others = f"the other {len(self.left)}"
        if self.out_of_date:
            others += f" (confs have changed since {len(self.out_of_date)} of them)"
        if self.seconds is None:
            return f"{text}; the time of {others}: {NOT_MEASURED}"
        hours, minutes = divmod(round(self.seconds / 60), 60)
        basis = f"{self.num_measured} of them by times measured here"
        if self.num_measured < len(self.left):
            basis += f", the others by rates of {rates_from}"
        return f"{text}; {others} will take {hours} h {minutes:02d} min ({basis})"


def estimate(grid: GridSettings, places: Places, num_at_once: int, to_do: set[str]) -> Estimate:
    """
    Args:
      num_at_once: students that are trained side by side, of all processes.
      to_do: as `steps_to_do` gives it.

    Raises:
      RecipeError: the grid has rates, but none of a kind of which no student is done.
    """
    left, done = [], []
    for student in students_of(grid):
        is_left = {f"student-{student.name}", f"decode-{student.name}"} & to_do
        (left if is_left else done).append(student)
    out_of_date = [student for student in left if state_of(places, student) is not None]
    seconds_like: dict[str, list[float]] = defaultdict(list)
    for student in done:
        seconds = measured_seconds(places, student)
        if seconds is not None:
            seconds_like[student.like].append(seconds)
    num_measured = sum(student.like in seconds_like for student in left)
    if not grid.rates.students and num_measured < len(left):
        return Estimate(left, None, num_measured, out_of_date)
    needed = []
    for student in left:
        if student.like in seconds_like:
            needed.append(mean(seconds_like[student.like]))
        elif student.like in grid.rates.students:
            needed.append(grid.rates.students[student.like])
        else:
            raise RecipeError(
                f"grid {grid.name}: cell {student.cell_name}: rates.students has no "
                f"'{student.like}'; add its seconds, or say with `like` which it is like"
            )
    before = 0.0
    if left and to_do & set(FIRST_STEPS):
        before = grid.rates.first
    for labels in dict.fromkeys(student.cell.labels for student in left):
        if f"labels-{labels}" in to_do:
            before += _label_seconds(grid, places)
    # Students do not share their work, so that the longest is a bound.
    in_turns = (before + sum(needed)) / max(1, min(num_at_once, len(left)))
    return Estimate(left, max([in_turns, *needed]), num_measured, out_of_date)


def _label_seconds(grid: GridSettings, places: Places) -> float:
    """Of a further set: as those that are there have taken."""
    took = []
    for path in (places.exp / "stamps").glob("labels-*.seconds"):
        labels = path.name[len("labels-") : -len(".seconds")]
        of_steps = [_step_seconds(places, f"{step}-{labels}") for step in LABEL_STEPS]
        if None not in of_steps:
            took.append(sum(of_steps))
    return mean(took) if took else grid.rates.labels


class Calls:
    """run.sh for one student at a time and thread, ended when this process ends.

    Args:
      log_dir: what run.sh says goes to ``<student>.log`` there.
    """

    def __init__(
        self, grid: GridSettings, places: Places, options: RunOptions, log_dir: Path
    ) -> None:
        self._grid, self._places, self._options, self._log_dir = grid, places, options, log_dir
        self._running: set[subprocess.Popen] = set()
        self._lock, self._ended = threading.Lock(), False

    def __call__(self, student: Student, num_threads: int) -> int:
        self._log_dir.mkdir(parents=True, exist_ok=True)
        command = run_command(self._grid, self._places, [student], self._options)
        env = {**environment_alone(os.environ), "OMP_NUM_THREADS": str(num_threads)}
        with (self._log_dir / f"{student.name}.log").open("a") as log:
            with self._lock:
                if self._ended:
                    return 143
                process = subprocess.Popen(
                    command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
                self._running.add(process)
            status = process.wait()
        with self._lock:
            self._running.discard(process)
        return status

    def end(self) -> None:
        """What is running leaves its checkpoints, and nothing more is started."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.terminate()


def run_grid(
    grid: GridSettings,
    places: Places,
    call: Calls,
    num_jobs: int,
    when_done: Callable[[], None],
) -> list[str]:
    """``call`` each student that is not done and that no other process has in hand.

    A student in hand is locked; where the file system has no locks, each process keeps to every
    n-th, by its place in the job.

    Args:
      num_jobs: students at once in this process, which share its threads.
      when_done: called after each of them, by one thread at a time.

    Returns:
      names of students that failed; the others have been gone on with.
    """
    rank, size = place_in_job()
    students = students_of(grid)
    num_threads = threads_each(num_jobs)
    folder = places.exp / "grids" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    told = threading.Lock()

    def run_one(number: int, student: Student) -> None:
        mine_anyway = number % size == rank
        with taken(folder / f"{student.name}.lock", mine_anyway) as mine:
            if not mine:
                logging.info(f"{student.name}: in the hands of another process")
                return
            before = state_of(places, student)
            status = call(student, num_threads)
        with told:
            if status != 0:
                failed.append(student.name)
                logging.info(f"{student.name}: failed, status {status}")
            elif state_of(places, student) != before:
                logging.info(f"{student.name}: done")
                when_done()

    first = rank * len(students) // size
    order = list(enumerate(students))
    order = order[first:] + order[:first]
    with ThreadPoolExecutor(num_jobs) as pool:
        try:
            for job in [pool.submit(run_one, *numbered) for numbered in order]:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            call.end()
            raise
    return failed


def check_recipe() -> None:
    """
    Raises:
      RecipeError: this is not the recipe's folder.
    """
    if not Path("run.sh").is_file():
        raise RecipeError("run.sh: not here; call from the recipe's folder")
