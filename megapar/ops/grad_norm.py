"""Sums of squares of gradients, the first half of clipping by the global norm.

    total += (sum of g^2, number of elements that are inf or nan, number of zeros),   over all elements of all tensors

Reads every gradient once and writes nothing: 4 bytes a parameter in fp32, 2 in bf16. Sums are fp64, per tensor and then tensor after
tensor, so that a list cut into calls has the bits of one call, for any number of threads. Squares of 16-bit gradients are first added in
fp32 lanes over 4096 elements, at most 35 roundings of 2^-24: the norm is within 1.1e-6 of its true value. For fp32 gradients all sums are
fp64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megapar.ops.dispatch import use_reference_on


def grad_norm_(total: Tensor, grads: Sequence[Tensor], *, count_zeros: bool = False) -> None:
    """Adds to `total`, float64 [3]. `grads` may mix dtypes and shapes; the zeros are counted, at some cost, on request only.

    A gradient that is not contiguous is copied first. Raises ValueError for a dtype that is no float.
    """
    # total is float64 whatever the gradients are, and the list may be empty.
    reference = use_reference_on(total.device.type) or any(grad.dtype == torch.float64 for grad in grads)
    run = grad_norm_reference if reference else torch.ops.megapar.grad_norm_.default
    run(total, list(grads), count_zeros)


def grad_norm_reference(total: Tensor, grads: Sequence[Tensor], count_zeros: bool = False) -> None:
    """The formula, in fp64."""
    for grad in grads:
        g = grad.double()
        zeros = (g == 0).sum() if count_zeros else g.new_zeros(())
        total += torch.stack([g.square().sum(), g.isfinite().logical_not().sum().double(), zeros.double()])


@torch.library.register_fake("megapar::grad_norm_")
def _(total: Tensor, grads: Sequence[Tensor], count_zeros: bool = False) -> None:
    return None
