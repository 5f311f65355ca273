"""The prefetcher: the same batches as without, made while the caller computes, errors where they belong, and a clean end."""

import threading
import time

import pytest

from megapar.training.prefetch import Prefetcher


class Maker:
    """Remembers what it made, and in which threads. Waits for `gate`; fails for a first sample of 13."""

    def __init__(self) -> None:
        self.made, self.threads, self.gate = [], set(), threading.Event()
        self.gate.set()

    def __call__(self, first, count):
        self.gate.wait(10)
        self.made.append((first, count))
        self.threads.add(threading.get_ident())
        if first == 13:
            raise ValueError("sample 13 cannot be read")
        return f"{first}+{count}"


def test_ahead_or_not_batches_are_the_same_and_made_once_by_one_thread():
    maker = Maker()
    with Prefetcher(maker) as data:
        assert data.get([(0, 2), (2, 2)]) == ["0+2", "2+2"]
        data.ahead([(4, 2), (6, 2)])
        data.ahead([(6, 2), (8, 2)])
        assert data.get([(4, 2), (8, 2), (10, 2)]) == ["4+2", "8+2", "10+2"]
        assert data.get([(6, 2)]) == ["6+2"]
    assert maker.made == [(0, 2), (2, 2), (4, 2), (6, 2), (8, 2), (10, 2)]
    assert len(maker.threads) == 1 and threading.get_ident() not in maker.threads


def test_they_are_made_while_the_caller_computes():
    def slow(first, count):
        time.sleep(0.2)
        return first

    with Prefetcher(slow) as data:
        data.get([(0, 1)])
        assert data.waited >= 0.2
        before = data.waited
        start = time.perf_counter()
        data.ahead([(1, 1)])
        assert time.perf_counter() - start < 0.1, "ahead does not wait"
        time.sleep(0.6)
        data.get([(1, 1)])
        assert data.waited - before < 0.1


def test_an_error_comes_with_the_step_that_needs_the_samples_and_only_then():
    maker = Maker()
    with Prefetcher(maker) as data:
        data.ahead([(12, 1), (13, 1), (14, 1)])
        assert data.get([(12, 1)]) == ["12+1"]
        with pytest.raises(ValueError, match="sample 13 cannot be read"):
            data.get([(13, 1), (14, 1)])
        assert data.get([(15, 1)]) == ["15+1"]
        with pytest.raises(ValueError, match="sample 13"):
            data.get([(13, 1)])
        assert maker.made.count((13, 1)) == 2, "an error is not kept for the next time"


def test_after_a_reset_nothing_of_before_is_given_or_under_way():
    maker = Maker()
    with Prefetcher(maker) as data:
        maker.gate.clear()
        data.ahead([(0, 1), (1, 1), (2, 1)])
        threading.Timer(0.1, maker.gate.set).start()
        data.reset()
        under_way = list(maker.made)
        assert len(under_way) <= 1
        assert data.get([(2, 1)]) == ["2+1"]
        assert maker.made == [*under_way, (2, 1)]


def test_it_stops_cleanly_with_work_left():
    maker, before = Maker(), threading.active_count()
    data = Prefetcher(maker)
    maker.gate.clear()
    data.ahead([(number, 1) for number in range(50)])
    threading.Timer(0.1, maker.gate.set).start()
    data.close()
    data.close()
    assert len(maker.made) <= 1
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
