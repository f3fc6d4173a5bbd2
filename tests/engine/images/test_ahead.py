"""Work ahead: in order, within a number of bytes, and once more alone for what found no memory."""

import threading
import weakref

import numpy as np
import pytest

from zsad.engine.images.ahead import Ahead


def test_results_come_in_the_order_of_the_items() -> None:
    first_may_end = threading.Event()

    def work(item: int, last_try: bool) -> int:
        if item == 0:
            first_may_end.wait(10)
        else:
            first_may_end.set()
        return 10 * item

    with Ahead(work, threads=2, most=9, limit=9, name="test") as ahead:
        taken = [pair for item in range(4) for pair in ahead.put(item, 1)]
        assert [*taken, *ahead.rest()] == [(0, 0), (1, 10), (2, 20), (3, 30)]


@pytest.mark.parametrize(("most", "limit", "expected"), [(2, 100, 2), (9, 30, 3), (9, 5, 1)])
def test_no_more_at_once_than_bytes_and_number_allow(most: int, limit: int, expected: int) -> None:
    at_work, largest, lock = 0, 0, threading.Lock()
    enough = threading.Event()

    def work(item: int, last_try: bool) -> None:
        nonlocal at_work, largest
        with lock:
            at_work += 1
            largest = max(largest, at_work)
            if largest == expected:
                enough.set()
        enough.wait(10)
        with lock:
            at_work -= 1

    with Ahead(work, threads=8, most=most, limit=limit, name="test") as ahead:
        for item in range(8):
            list(ahead.put(item, 10))
        list(ahead.rest())
    assert largest == expected


def test_what_found_no_memory_is_tried_again_when_the_others_hold_none() -> None:
    held: list[weakref.ref[np.ndarray]] = []

    def work(item: int, last_try: bool) -> str:
        array = np.zeros(1000)
        if not last_try:
            held.append(weakref.ref(array))
            raise MemoryError("all at once")
        assert not [reference for reference in held if reference() is not None]
        return "alone"

    with Ahead(work, threads=3, most=3, limit=100, name="test") as ahead:
        taken = [pair for item in range(3) for pair in ahead.put(item, 1)]
        assert [*taken, *ahead.rest()] == [(0, "alone"), (1, "alone"), (2, "alone")]


def test_other_errors_and_a_second_lack_of_memory_are_raised() -> None:
    def work(item: type[Exception], last_try: bool) -> None:
        raise item

    for error in (MemoryError, ValueError):
        with Ahead(work, threads=1, most=1, limit=1, name="test") as ahead:
            list(ahead.put(error, 1))
            with pytest.raises(error):
                list(ahead.rest())
