"""Micro-batches made ahead: while a step computes, a thread makes the samples of the next one.

A thread is enough: the step holds the interpreter only between its kernels. All samples are made by that one thread, those that were not
asked for ahead too, so what makes them need not be safe for threads; and as each is a function of its request, none depends on time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from megapar.batch import TokenBatch

Request = tuple[int, int]
"""(first sample, how many)."""


class Prefetcher:
    """`make(first, count)` in a thread of its own. An error of it is raised by the `get` that needs those samples, not before.

    waited: seconds that all calls of `get` took.
    """

    def __init__(self, make: Callable[[int, int], TokenBatch]) -> None:
        self._make, self.waited = make, 0.0
        self._thread = ThreadPoolExecutor(1, "samples")
        self._asked: dict[Request, Future[TokenBatch]] = {}

    def ahead(self, requests: Iterable[Request]) -> None:
        """Has these made, after those that were asked for before, and does not wait for them. A later `get` takes them."""
        for request in requests:
            if request not in self._asked:
                self._asked[request] = self._thread.submit(self._make, *request)

    def get(self, requests: Sequence[Request]) -> list[TokenBatch]:
        """The batches of these requests, which are different ones."""
        start = time.perf_counter()
        self.ahead(requests)
        # All of them first: after an error none of this step's is left, and asked for again they are made again.
        made = [self._asked.pop(request) for request in requests]
        try:
            return [future.result() for future in made]
        finally:
            self.waited += time.perf_counter() - start

    def reset(self) -> None:
        """Forgets what was asked for ahead, and waits for the batch that is being made: `make` may then be changed."""
        asked, self._asked = self._asked, {}
        for future in asked.values():
            future.cancel()
        # The one thread takes this up after what it is at.
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Ends the thread, after the batch that it is making. A second call does nothing."""
        self._asked.clear()
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
