"""torch.utils.checkpoint for a function that can leave out what only its result needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def checkpointed(function: Callable[..., Tensor], *args: Any, preserve_rng_state: bool = True) -> Tensor:
    """`function(*args, result=True)`; what it saves for backward is dropped, and computed anew by `function(*args, result=False)`.

    torch ends a recomputation when all that was saved is there again. An autograd function saves when its forward returns, so one that
    ends in a product and an all-reduce would repeat both for nobody: with `result=False` it may return a tensor that it never filled.
    """
    again = False

    def run(*inputs: Any) -> Tensor:
        nonlocal again
        result, again = not again, True
        return function(*inputs, result=result)

    out: Tensor = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    return out
