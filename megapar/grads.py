"""Where a gradient is accumulated.

Without `MainGrads` a parameter behaves as in plain PyTorch: its gradient arrives in `.grad`. With it, whoever computes a gradient asks
`target(param)` for the place to add it, so that a weight gradient goes from the GEMM straight into fp32 `param.main_grad`, with no
temporary in the weight's dtype. Gradients that autograd itself delivers are moved there by a hook, and `.grad` is cleared.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megapar.params import spec_of
from megapar.transport import start_all_reduce


def target(param: Tensor) -> tuple[Tensor | None, float]:
    """(tensor, beta): the caller must write `tensor = beta * tensor + gradient` now. (None, 0) for a parameter without main_grad.

    beta is 0 for the first write since `MainGrads.zero`, which therefore clears nothing in memory.
    """
    main_grad: Tensor | None = getattr(param, "main_grad", None)
    if main_grad is None:
        return None, 0.0
    beta = 1.0 if param._main_grad_written else 0.0  # type: ignore[attr-defined]
    param._main_grad_written = True  # type: ignore[attr-defined]
    return main_grad, beta


def add(param: Tensor, grad: Tensor) -> Tensor | None:
    """Adds a gradient to the parameter's main_grad and returns None, or returns it for autograd to deliver if there is none."""
    main_grad, beta = target(param)
    if main_grad is None:
        return grad
    if beta:
        main_grad.add_(grad)
    else:
        main_grad.copy_(grad)
    return None


class MainGrads:
    """Persistent gradients, fp32 by default, of the parameters that require one; summed over micro-batches.

    `zero()` before the first micro-batch, `finish()` after the last one; between them, any number of backwards. Gradients are *sums*:
    nothing here divides.
    """

    def __init__(self, params: Iterable[nn.Parameter], dtype: torch.dtype = torch.float32) -> None:
        self.params: list[Any] = [p for p in dict.fromkeys(params) if p.requires_grad]
        self._hooks: list[RemovableHandle] = []
        for param in self.params:
            if getattr(param, "main_grad", None) is not None:
                raise ValueError(f"a parameter of shape {tuple(param.shape)} already has a main_grad: detach() the other MainGrads first")
        for param in self.params:
            param.main_grad = torch.empty_like(param, dtype=dtype, requires_grad=False)
            self._hooks.append(param.register_post_accumulate_grad_hook(_move_grad))
        self.zero()

    def zero(self) -> None:
        """Makes the next write to each main_grad overwrite it."""
        for param in self.params:
            param.grad = None
            param._main_grad_written = False
        self._finished = False

    @torch.no_grad()
    def finish(self) -> None:
        """Completes the sums: parameters that no backward reached get zeros, partial gradients are summed over their axis.

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
            if spec is not None and spec.grad_sum is not None and spec.grad_sum.size > 1:
                sums.append(start_all_reduce(param.main_grad, spec.grad_sum))
        for pending in sums:
            pending.wait()

    def detach(self) -> None:
        """Gives the parameters back to plain PyTorch."""
        for hook in self._hooks:
            hook.remove()
        for param in self.params:
            del param.main_grad, param._main_grad_written


def _move_grad(param: Tensor) -> None:
    # The hook fires also when a backward returned None for this parameter because it had written main_grad itself: .grad is then None
    # (tests/test_grads.py::test_hook_after_none).
    if param.grad is not None:
        add(param, param.grad)
        param.grad = None
