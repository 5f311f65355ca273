"""What a pipeline's sharding actions do to its stages' weights and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megapar.zero.buckets import GradBuckets
from megapar.zero.gather import Gathers


def actions_of(grads: GradBuckets, gathers: Gathers, chunk_of: Mapping[int, int], ahead: bool) -> Callable[[Any], None]:
    """chunk_of: this rank's chunk, by its stage. ahead: whether UNSHARD starts to gather; else blocks do when they run."""

    def act(action: Any) -> None:
        chunk = chunk_of[action.stage]
        if action.kind == "REDUCE_GRAD":
            grads.end_window(chunk)
        elif action.kind == "UNSHARD" and ahead:
            gathers.start(gathers.units[chunk][0])
        elif action.kind == "RESHARD":
            for unit in gathers.units[chunk]:
                gathers.free(unit)

    return act
