"""Batches made in a thread while others are trained on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

# Seconds between two looks at whether what waits for a place in the queue is still wanted.
_LOOK = 0.1
_END = object()


def ahead(items: Iterable[T], number: int) -> Iterator[T]:
    """``items``, in their order, made in a thread up to ``number`` before they are asked for.

    The thread starts with the first that is asked for and ends with the last, with the iterator
    (its ``close``, or when nothing holds it), and with the program, whatever has become of the
    iterator; one item that is being made is finished before. An error comes where the item would
    have come.
    """
    made: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(number)
    stopped = threading.Event()

    def hand_over(item: Any, error: BaseException | None = None) -> bool:
        # A program that ends waits for its threads once its main thread is done.
        while not stopped.is_set() and threading.main_thread().is_alive():
            try:
                made.put((item, error), timeout=_LOOK)
                return True
            except queue.Full:
                pass
        return False

    def make() -> None:
        try:
            for item in items:
                if not hand_over(item):
                    return
        except BaseException as error:
            hand_over(None, error)
        else:
            hand_over(_END)

    thread = threading.Thread(target=make, name="prefetch")
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
