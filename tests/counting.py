"""Counts what goes over the wire: `with counted() as calls: ...` leaves, by name, how often torch.distributed was asked for it."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist

from megapar import collectives

COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single", "barrier"),
    *("broadcast", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "gather", "send", "recv", "isend", "irecv"),
    "new_group",
)
# megapar keeps torch's names, old or new, under its own.
RENAMED = {"_all_gather": "all_gather", "_reduce_scatter": "reduce_scatter"}


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """The Counter fills while the block runs; what is never called has no entry, so that `not calls` means silence."""
    calls: Counter[str] = Counter()

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return real(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, counting(name, getattr(dist, name))))
        for name, common in RENAMED.items():
            stack.enter_context(mock.patch.object(collectives, name, counting(common, getattr(collectives, name))))
        yield calls
