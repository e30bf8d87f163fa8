"""Work in forked processes, for what a core can do alone."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

from mvqkd.errors import RecipeError

Job = TypeVar("Job")
Result = TypeVar("Result")


def _work(function: Callable[[Job], Result], job: Job, writer: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C the parent hears, and ends all
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        answer = (function(job), None)
    except Exception as error:
        error.add_note(f"In a worker process:\n{traceback.format_exc()}")
        answer = (None, error)
    writer.send(answer)


def _received(reader: Connection, process: BaseProcess) -> Result:
    with reader:
        try:
            result, error = reader.recv()
        except EOFError:
            process.join()
            raise RecipeError(
                f"a worker process ended before its work was done (exit code {process.exitcode}; "
                "-9 is what a machine short of memory does); run again, with fewer of them"
            ) from None
    process.join()
    if error is not None:
        raise error
    return result


def map_in_processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], num_workers: int
) -> Iterator[Result]:
    """What ``function`` gives for each of ``jobs``, in order; each in a process of its own.

    The processes share no lock and no queue, so any of them may be killed at any time: with a
    pool that is ended while a worker writes its answer, the parent waits for ever.

    Args:
      num_workers: processes at a time; at least one.

    Raises:
      RecipeError: a process was killed.
      Exception: what ``function`` raised, first of all that did; no process is left running.
    """
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    results: dict[int, Result] = {}
    started = 0
    try:
        for number in range(len(jobs)):
            while number not in results:
                while len(running) < max(1, num_workers) and started < len(jobs):
                    reader, writer = context.Pipe(duplex=False)
                    with writer:  # the worker's copy is then the only one
                        process = context.Process(
                            target=_work, args=(function, jobs[started], writer), daemon=True
                        )
                        process.start()
                    running[reader] = started, process
                    started += 1
                for reader in wait(list(running)):
                    done, process = running.pop(reader)
                    results[done] = _received(reader, process)
            yield results.pop(number)
    finally:
        for reader, (_, process) in running.items():
            process.kill()
            process.join()
            reader.close()
