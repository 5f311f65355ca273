"""Counts what goes over the wire: `with counted() as calls: ...` leaves, by name, how many collectives were started.

Those of megapar.transport count once, whatever they are made of; what is asked from torch.distributed beside them counts too.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist

from megapar import transport

TRANSPORT = {"start_all_reduce": "all_reduce", "start_all_gather": "all_gather", "start_reduce_scatter": "reduce_scatter"}
OTHERS = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single", "barrier"),
    *("broadcast", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "gather", "send", "recv", "isend", "irecv"),
    "new_group",
)


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """The Counter fills while the block runs; what is never called has no entry, so that `not calls` means silence."""
    calls: Counter[str] = Counter()
    within: list[str] = []

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not within:
                calls[name] += 1
            within.append(name)
            try:
                return real(*args, **kwargs)
            finally:
                within.pop()

        return call

    users = [module for name, module in sys.modules.items() if name.startswith("megapar")]
    with contextlib.ExitStack() as stack:
        for name in OTHERS:
            stack.enter_context(mock.patch.object(dist, name, counting(name, getattr(dist, name))))
        for name, kind in TRANSPORT.items():
            wrapped = counting(kind, getattr(transport, name))
            for module in users:
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, wrapped))
        yield calls
