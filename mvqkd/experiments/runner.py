"""Runs what a grid has not done yet, in any number of processes and hosts at once."""

from __future__ import annotations

import heapq
import logging
import os
import shutil
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
from mvqkd.experiments.plan import PlannedStep, plan_of
from mvqkd.files import locked, read_json, read_json_lines
from mvqkd.report.costs import CostSettings, cost_of
from mvqkd.report.table import NOT_MEASURED, format_bytes

LABEL_STEPS = ("embeddings", "quantizer", "labels")
# How the steps begin whose outputs go to data/.
IN_DATA = ("corpus", "manifests", "features", "tokens", "noise", "labels-", "more-")
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


def processes_here() -> int:
    """Of this job, on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def threads_each(num_jobs: int) -> int:
    """CPU threads of each of ``num_jobs`` students at once, in each process of this host."""
    return max(1, len(os.sched_getaffinity(0)) // (processes_here() * num_jobs))


def students_at_once(num_jobs: int, device: str) -> int:
    """How many are trained side by side, of all processes, where each has ``num_jobs``; on a CPU no
    more than have a core each, which is what rates are of."""
    _, num_processes = place_in_job()
    here = processes_here()
    on_host = here * num_jobs
    if device == "cpu":
        on_host = min(on_host, len(os.sched_getaffinity(0)))
    return max(1, on_host * num_processes // here)


def state_of(places: Places, student: Student) -> str | None:
    """What one that has been trained and decoded was made from; None where it has not. Whether
    that is what its confs say now `plans_of` knows."""
    stamps = [places.exp / "stamps" / f"{step}-{student.name}" for step in ("student", "decode")]
    # Of one that is trained anew the stamp of the old decoding is still there.
    decoded = places.exp / student.name / "decoded.json"
    if not decoded.exists() or not all(stamp.exists() for stamp in stamps):
        return None
    return "".join(stamp.read_text() for stamp in stamps)


def plans_of(
    grid: GridSettings, places: Places, options: RunOptions
) -> dict[str, list[PlannedStep]]:
    """By the name of each student, the steps of run.sh that it needs, in their order.

    Raises:
      RecipeError: run.sh refuses one of its calls.
    """
    alike: dict[tuple[str, str], list[Student]] = defaultdict(list)
    for student in students_of(grid):
        alike[student.cell.labels, student.cell.untranscribed_parts].append(student)
    env = environment_alone(os.environ)
    plans = {}
    for students in alike.values():
        steps = plan_of(run_command(grid, places, students, options), env)
        own = {name for student in students for name in student.steps}
        for student in students:
            plans[student.name] = [
                step for step in steps if step.name not in own or step.name in student.steps
            ]
    return plans


def with_done_since(
    grid: GridSettings,
    places: Places,
    plans: Mapping[str, Sequence[PlannedStep]],
    before: Mapping[str, str | None],
) -> dict[str, list[PlannedStep]]:
    """``plans``, in which the steps are done of students that have been trained since, by whichever
    process.

    Args:
      before: by name, the states of students that had been trained with other confs.
    """
    done = {
        step.name
        for student in students_of(grid)
        if state_of(places, student) not in (None, before.get(student.name))
        for step in plans[student.name]
    }
    return {
        name: [replace(step, done=step.done or step.name in done) for step in steps]
        for name, steps in plans.items()
    }


def _step_seconds(places: Places, step: str) -> float | None:
    path = places.exp / "stamps" / f"{step}.seconds"
    return float(path.read_text()) if path.exists() else None


def measured_seconds(places: Places, student: Student, device: str) -> tuple[float, float] | None:
    """Training and decoding of one that is done; None where it is not known of this device."""
    training, decoding = (_step_seconds(places, step) for step in student.steps)
    if training is None or decoding is None or state_of(places, student) is None:
        return None
    again = f"remove {places.exp}/stamps/student-{student.name}, then run again"
    settings = read_json(places.exp / student.name / "settings.json", again)
    if not settings["device"].startswith(device):
        return None
    # Of one that was killed the step's time is that of its last call; its log knows all of it.
    log = places.exp / student.name / "log.jsonl"
    if log.exists() and log.stat().st_size:
        entries = read_json_lines(log, again)
        training = max(training, entries[-1]["seconds"])
    return training, decoding


@dataclass(frozen=True)
class Disk:
    """What is left takes of one file system, in bytes."""

    folder: Path
    needed: float
    free: float

    def in_words(self) -> str:
        return (
            f"{format_bytes(self.needed)} on the disk of {self.folder}, where "
            f"{format_bytes(self.free)} are free"
        )


@dataclass(frozen=True)
class Estimate:
    """What is left will take."""

    left: list[Student]
    # None: nothing is known of the time of any student that is left.
    seconds: float | None
    # Of the students that are left, those whose kind has been measured here.
    num_measured: int
    # Of the students that are left, those that were done, with other confs; or whose data are gone,
    # and may be made again as they were.
    out_of_date: list[Student]
    # Where it goes to, one or two.
    disks: list[Disk]
    # Steps of whose time, or of whose disk, nothing is known: no part of the sums.
    unknown_time: list[str]
    unknown_disk: list[str]

    @staticmethod
    def _hours(seconds: float) -> str:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02d} min"

    def progress(self, total: int) -> str:
        text = f"{total - len(self.left)} of {total} students are done"
        if self.left and self.seconds is not None:
            text += f", about {self._hours(self.seconds)} left"
            if self.unknown_time:
                text += f", without {len(self.unknown_time)} steps: {NOT_MEASURED}"
        return text

    def in_words(self, total: int, rates_from: str) -> str:
        text = f"{total - len(self.left)} of {total} students are done"
        if not self.left:
            return text
        others = f"the other {len(self.left)}"
        if self.out_of_date:
            others += f" ({len(self.out_of_date)} of them done before their confs or data changed)"
        if self.seconds is None:
            text += f"; the time of {others}: {NOT_MEASURED}"
        else:
            basis = f"{self.num_measured} of them by times measured here"
            if self.num_measured < len(self.left):
                basis += f", the others by rates of {rates_from}"
            text += f"; {others} will take {self._hours(self.seconds)} ({basis})"
            if self.unknown_time:
                text += f", without {', '.join(self.unknown_time)}: {NOT_MEASURED}"
        text += f"; disk: {' and '.join(disk.in_words() for disk in self.disks)}"
        if self.unknown_disk:
            kinds = dict.fromkeys(name.split("-")[0] for name in self.unknown_disk)
            text += f", without {', '.join(kinds)}: {NOT_MEASURED}"
        return text

    def check_disks(self) -> None:
        """
        Raises:
          RecipeError: there is less room than what is left takes.
        """
        for disk in self.disks:
            if disk.needed > disk.free:
                raise RecipeError(
                    f"{disk.folder}: what is left takes {format_bytes(disk.needed)}, and "
                    f"{format_bytes(disk.free)} are free; make room, or give fewer of --seeds"
                )


def estimate(
    grid: GridSettings,
    places: Places,
    num_at_once: int,
    plans: Mapping[str, Sequence[PlannedStep]],
    costs: CostSettings,
    device: str = "cpu",
) -> Estimate:
    """
    Args:
      num_at_once: students that are trained side by side, of all processes.
      plans: as `plans_of` gives them.
      costs: rates, of what is measured nowhere here.
      device: cpu or cuda, where students are trained.
    """
    students = students_of(grid)
    to_do = {
        student.name: [step for step in plans[student.name] if not step.done]
        for student in students
    }
    left = [s for s in students if {step.name for step in to_do[s.name]} & {*s.steps}]
    seconds = _Seconds(places, costs, device)
    for student in students:
        if student not in left:
            seconds.learn(student, plans[student.name])
    took: dict[str, float | None] = {}
    num_bytes: dict[str, float | None] = {}
    for student in left:
        for step in to_do[student.name]:
            if step.name not in took:
                took[step.name] = seconds.of(student, step)
                num_bytes[step.name] = _bytes_left(student, step, places, costs)
    own = {name for student in left for name in student.steps if name in took}
    unknown = [name for name, one in took.items() if one is None]
    return Estimate(
        left,
        None if own and own <= {*unknown} else _last_end(left, to_do, took, num_at_once),
        sum(student.like in seconds.measured for student in left),
        [student for student in left if state_of(places, student) is not None],
        _disks(places, num_bytes),
        unknown,
        [name for name, one in num_bytes.items() if one is None],
    )


class _Seconds:
    """What steps take: as like ones have taken here, else by rates."""

    def __init__(self, places: Places, costs: CostSettings, device: str) -> None:
        self._places, self._costs, self._device = places, costs, device
        # By what students are like: of their training and of their decoding, pairs of what was
        # measured and what the rates say.
        self.measured: dict[str, list[list[tuple[float, float | None]]]] = {}

    def _by_rates(self, student: Student, step: PlannedStep) -> float | None:
        name = step.name
        if name in student.steps:
            name = f"{name.split('-')[0]}-{student.like}"
        return cost_of(name, step.words, self._costs, self._device).seconds

    def learn(self, student: Student, steps: Sequence[PlannedStep]) -> None:
        measured = measured_seconds(self._places, student, self._device)
        if measured is None:
            return
        pairs = self.measured.setdefault(student.like, [[], []])
        for step in steps:
            if step.name in student.steps:
                place = student.steps.index(step.name)
                pairs[place].append((measured[place], self._by_rates(student, step)))

    def of(self, student: Student, step: PlannedStep) -> float | None:
        by_rates = self._by_rates(student, step)
        if step.name in student.steps:
            if student.like not in self.measured:
                return by_rates
            pairs = self.measured[student.like][student.steps.index(step.name)]
            taken = mean(measured for measured, _ in pairs)
            # Like ones may have more epochs or speech, which the rates know.
            if by_rates is None or any(rated is None for _, rated in pairs):
                return taken
            return taken * by_rates / mean(rated for _, rated in pairs)
        if by_rates is not None:
            return by_rates
        kind = next((kind for kind in LABEL_STEPS if step.name.startswith(f"{kind}-")), None)
        # Of another set of labels.
        stamps = self._places.exp / "stamps"
        others = [] if kind is None else [*stamps.glob(f"{kind}-*.seconds")]
        return mean(float(path.read_text()) for path in others) if others else None


def _last_end(
    left: Sequence[Student],
    to_do: Mapping[str, Sequence[PlannedStep]],
    seconds: Mapping[str, float | None],
    num_at_once: int,
) -> float:
    """Of students that begin in turn, each when one of ``num_at_once`` before it has ended, and of
    the steps that they need first: who comes to one makes it, and others wait for it."""
    ends = [0.0] * num_at_once
    made: dict[str, float] = {}
    for student in left:
        now = ends[0]
        for step in to_do[student.name]:
            if step.name not in made:
                made[step.name] = now + (seconds[step.name] or 0.0)
            now = max(now, made[step.name])
        heapq.heapreplace(ends, now)
    return max(ends)


def _bytes_left(
    student: Student, step: PlannedStep, places: Places, costs: CostSettings
) -> float | None:
    own = step.name in student.steps
    name = f"{step.name.split('-')[0]}-{student.like}" if own else step.name
    num_bytes = cost_of(name, step.words, costs).bytes
    stamp = places.exp / "stamps" / step.name
    if num_bytes is not None and step.name == student.steps[0] and not stamp.exists():
        # One that was killed has checkpoints already. What was made with other confs stays beside
        # the new until that is whole.
        there = (places.exp / student.name).glob("*.pt")
        num_bytes = max(0.0, num_bytes - sum(path.stat().st_size for path in there))
    return num_bytes


def _disks(places: Places, num_bytes: Mapping[str, float | None]) -> list[Disk]:
    needed = {places.exp: 0.0, places.data: 0.0}
    for step, one in num_bytes.items():
        needed[places.data if step.startswith(IN_DATA) else places.exp] += one or 0.0
    of_devices: dict[int, Disk] = {}
    for folder, wanted in needed.items():
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        device, free = there.stat().st_dev, shutil.disk_usage(there).free
        known = of_devices.get(device)
        of_devices[device] = Disk(
            known.folder if known else folder, wanted + (known.needed if known else 0.0), free
        )
    disks = list(of_devices.values())
    return [disk for disk in disks if disk.needed] or disks[:1]


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
    n-th, by its place in the job. One that has failed in another process meanwhile is not tried
    again.

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
    told, began = threading.Lock(), time.time()

    def run_one(number: int, student: Student) -> None:
        mine_anyway = number % size == rank
        with taken(folder / f"{student.name}.lock", mine_anyway) as mine:
            if not mine:
                logging.info(f"{student.name}: in the hands of another process")
                return
            before = state_of(places, student)
            mark = folder / f"{student.name}.failed"
            if mark.exists() and mark.stat().st_mtime >= began:
                how, status = "failed in another process", 1
            else:
                status = call(student, num_threads)
                how = f"failed, status {status}"
                # One that a signal has ended others may take over.
                if 0 < status < 128:
                    mark.touch()
        with told:
            if status != 0:
                failed.append(student.name)
                logging.info(f"{student.name}: {how}")
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


def wait_for_others(grid: GridSettings, places: Places) -> None:
    """Until no process of the grid has a student in hand: a launcher ends all of its processes when
    one says that it has failed."""
    for student in students_of(grid):
        with locked(places.exp / "grids" / "locks" / f"{student.name}.lock"):
            pass


def check_recipe() -> None:
    """
    Raises:
      RecipeError: this is not the recipe's folder.
    """
    if not Path("run.sh").is_file():
        raise RecipeError("run.sh: not here; call from the recipe's folder")
