"""Where a gradient is accumulated.

Without `MainGrads` a parameter behaves as in plain PyTorch: its gradient arrives in `.grad`. With it, whoever computes a gradient has
`accumulate(param, write)` call `write` with the place to add it, so that a weight gradient goes from the GEMM straight into fp32
`param.main_grad`, with no temporary in the weight's dtype. Gradients that autograd itself delivers are moved there by a hook, and `.grad`
is cleared. Under a `Deferral` what `accumulate` is given is computed later: that is the W of a pipeline's split backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megapar.params import spec_of
from megapar.transport import start_all_reduce

Write = Callable[[Tensor, float], object]
"""Called with (tensor, beta): writes tensor = beta * tensor + gradient."""


def accumulate(param: Tensor, write: Write) -> bool:
    """Has `write` add a gradient to the parameter's main_grad: now, or, under a `Deferral`, when that is run.

    False, and nothing is called, for a parameter without main_grad, whose gradient autograd delivers.
    """
    if not has_main_grad(param):
        return False
    waiting = _waiting(param)
    if waiting is None:
        _write_now(param, write)
    else:
        waiting.append(lambda: _write_now(param, write))
    return True


def has_main_grad(param: Tensor) -> bool:
    """Whether the parameter's gradient goes to a main_grad, which may not exist yet: `MainGrads` may make it at the first write."""
    return getattr(param, "_main_grads", None) is not None


def is_deferred(param: Tensor) -> bool:
    """Whether `accumulate` would keep its `write` for later: what only that needs is then not worth starting."""
    return _waiting(param) is not None


def _waiting(param: Tensor) -> list[Callable[[], None]] | None:
    deferral: Deferral | None = getattr(param, "_deferral", None)
    return None if deferral is None else deferral.waiting


def _write_now(param: Any, write: Write) -> None:
    # beta is 0 for the first write since `MainGrads.zero`, which therefore clears nothing in memory (test_grads.py::test_accumulate).
    main_grads: MainGrads = param._main_grads
    target = main_grads.target(param)
    beta = 1.0 if param._main_grad_written else 0.0
    param._main_grad_written = True
    write(target, beta)
    main_grads.written(param)


def add(param: Tensor, grad: Tensor) -> None:
    """Adds a gradient to the parameter's main_grad."""
    _write_now(param, lambda main_grad, beta: put(main_grad, beta, grad))


def put(tensor: Tensor, beta: float, grad: Tensor) -> None:
    """The `Write` of a gradient that is there already."""
    if beta:
        tensor.add_(grad)
    else:
        tensor.copy_(grad)


class Deferral:
    """Puts off the gradients of some parameters that have a main_grad: computing those whose layers hand them to `accumulate`, and adding
    those that autograd delivers (norm gains and other vectors).

    `with deferral.collect() as waiting: backward` computes the other gradients; calling what is in `waiting`, in its order, the rest.
    Until then the tensors that it needs are kept.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.waiting: list[Callable[[], None]] | None = None
        for param in params:
            param._deferral = self  # type: ignore[attr-defined]

    @contextmanager
    def collect(self) -> Iterator[list[Callable[[], None]]]:
        waiting = self.waiting = []
        try:
            yield waiting
        finally:
            self.waiting = None


class MainGrads:
    """Persistent gradients, fp32 by default, of the parameters that require one; summed over micro-batches.

    `zero()` before the first micro-batch, `finish()` after the last one; between them, any number of backwards. Gradients are *sums*:
    nothing here divides.
    """

    def __init__(self, params: Iterable[nn.Parameter], dtype: torch.dtype = torch.float32) -> None:
        self.params: list[Any] = [p for p in dict.fromkeys(params) if p.requires_grad]
        self._hooks: list[RemovableHandle] = []
        for param in self.params:
            if has_main_grad(param):
                raise ValueError(f"a parameter of shape {tuple(param.shape)} already has a main_grad: detach() the other MainGrads first")
        for param in self.params:
            param._main_grads = self
            self._hooks.append(param.register_post_accumulate_grad_hook(_move_grad))
        self.dtype = dtype
        self.allocate()
        self.zero()

    def allocate(self) -> None:
        """Makes the gradients' memory."""
        for param in self.params:
            param.main_grad = torch.empty_like(param, dtype=self.dtype, requires_grad=False)

    def target(self, param: Any) -> Tensor:
        """Where the next write to a gradient goes."""
        main_grad: Tensor = param.main_grad
        return main_grad

    def written(self, param: Any) -> None:
        """Called after each write."""

    def zero(self) -> None:
        """Makes the next write to each main_grad overwrite it."""
        for param in self.params:
            param.grad = None
            param._main_grad_written = False
        self._finished = False

    @torch.no_grad()
    def finish(self) -> None:
        """Completes the sums: parameters that no backward reached get zeros, partial gradients are summed over their axis, those of tied
        weights over the stages that use them.

        A rank that used a parameter and one that did not take part in the same collectives: the order is the parameters'.
        """
        if self._finished:
            raise ValueError("finish() was called twice, which would sum partial gradients twice: call zero() before the next micro-batch")
        self._finished = True
        sums = []
        for param in self.params:
            spec = spec_of(param)
            if not param._main_grad_written:
                add(param, torch.zeros((), dtype=param.main_grad.dtype, device=param.device).expand_as(param))
            for axis in () if spec is None else (spec.grad_sum, spec.tie):
                if axis is not None and axis.size > 1:
                    sums.append(start_all_reduce(param.main_grad, axis))
        for pending in sums:
            pending.wait()

    def detach(self) -> None:
        """Gives the parameters back to plain PyTorch."""
        for hook in self._hooks:
            hook.remove()
        for param in self.params:
            del param.main_grad, param._main_grad_written, param._main_grads


def _move_grad(param: Tensor) -> None:
    # The hook fires also when a backward returned None for this parameter because it had written main_grad itself: .grad is then None
    # (tests/test_grads.py::test_hook_after_none).
    grad, param.grad = param.grad, None
    if grad is not None:
        # Under a Deferral it waits as the others do: a micro-batch's gradients are written together, before any of the next one's
        # (tests/zero/test_composition.py::test_windows_of_a_pipeline).
        accumulate(param, lambda main_grad, beta: put(main_grad, beta, grad))
