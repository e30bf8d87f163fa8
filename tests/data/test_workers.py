"""Work in forked processes: order, failures, and that nothing waits for ever."""

import multiprocessing
import os
import signal

import pytest

from mvqkd.data.workers import map_in_processes
from mvqkd.errors import RecipeError


def test_results_come_in_the_order_of_the_jobs():
    assert list(map_in_processes(lambda x: x * x, range(7), 3)) == [x * x for x in range(7)]


def test_no_jobs():
    assert list(map_in_processes(str, [], 2)) == []


def test_each_job_has_a_process_of_its_own():
    pids = list(map_in_processes(lambda _: os.getpid(), range(4), 1))
    assert len(set(pids)) == 4 and os.getpid() not in pids


def test_jobs_run_beside_each_other():
    barrier = multiprocessing.get_context("fork").Barrier(3)
    # Each comes back only when all three are there.
    list(map_in_processes(lambda _: barrier.wait(60), range(3), 3))


def wait_for_ever(_):
    signal.pause()


def test_first_error_is_raised_and_no_process_is_left():
    def work(x):
        if x == 1:
            raise RecipeError("file: broken; mend it")
        wait_for_ever(x)

    with pytest.raises(RecipeError, match=r"^file: broken; mend it") as caught:
        list(map_in_processes(work, range(4), 2))
    assert "in work" in caught.value.__notes__[0]
    assert multiprocessing.active_children() == []


def test_killed_worker_is_named():
    with pytest.raises(RecipeError, match=r"ended before its work was done \(exit code -9; "):
        list(map_in_processes(lambda _: os.kill(os.getpid(), signal.SIGKILL), range(2), 1))
    assert multiprocessing.active_children() == []


def test_workers_end_with_who_asked_for_them():
    results = map_in_processes(lambda x: x or wait_for_ever(x), [1, 0], 2)
    assert next(results) == 1
    results.close()
    assert multiprocessing.active_children() == []


def test_signals_of_an_entry_script_are_not_handled_in_workers():
    handler = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("handled"))
    try:
        with pytest.raises(RecipeError, match="exit code -15"):
            list(map_in_processes(lambda _: os.kill(os.getpid(), signal.SIGTERM), [0], 1))
        # Ctrl-C reaches the whole group; who asked ends the workers.
        list(map_in_processes(lambda _: os.kill(os.getpid(), signal.SIGINT), [0], 1))
    finally:
        signal.signal(signal.SIGTERM, handler)
