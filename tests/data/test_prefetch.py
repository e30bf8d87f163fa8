"""Items made ahead in a thread."""

import subprocess
import sys
import threading

import pytest

from mvqkd.data.prefetch import ahead
from tests.conftest import ROOT


def prefetching():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_all_in_order_and_no_thread_stays():
    for number in (1, 3, 20):
        assert list(ahead(iter(range(10)), number)) == list(range(10))
    assert list(ahead(iter(()), 2)) == [] and prefetching() == []


def test_made_ahead_and_no_further():
    made, reached = [], threading.Event()

    def items():
        for number in range(10):
            made.append(number)
            if number == 3:
                reached.set()
            yield number

    iterator = ahead(items(), 2)
    assert made == [] and next(iterator) == 0
    # Two wait in the queue, and one for a place in it.
    assert reached.wait(60)
    assert made == [0, 1, 2, 3]
    iterator.close()
    assert prefetching() == [] and made == [0, 1, 2, 3]


def test_an_error_comes_in_its_place():
    def items():
        yield 1
        raise KeyError("of the second")

    iterator = ahead(items(), 4)
    assert next(iterator) == 1
    with pytest.raises(KeyError, match="of the second"):
        next(iterator)
    assert list(iterator) == [] and prefetching() == []


def test_dropped_iterator_ends_its_thread():
    iterator = ahead(iter(range(1000)), 2)
    next(iterator)
    assert len(prefetching()) == 1
    del iterator
    assert prefetching() == []


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError"])
def test_program_ends_with_an_iterator_in_use(end):
    code = f"""
import itertools, sys
from mvqkd.data.prefetch import ahead
iterator = ahead(itertools.count(), 2)
next(iterator)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == {"": 0, "sys.exit(3)": 3, "raise ValueError": 1}[end]
