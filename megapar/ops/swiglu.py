"""SwiGLU (arXiv:2002.05202): y = silu(gate) * up, silu(z) = z / (1 + exp(-z)).

    d_gate = dy * up * s (1 + gate (1 - s)),  s = 1 / (1 + exp(-gate))
    d_up   = dy * silu(gate)

Moves 3 t f elements forward (read gate and up, write y) and 5 t f backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapar.ops.dispatch import use_reference


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2 f], the gate first, to [..., f]."""
    return _SwiGLU.apply(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The formula, in at least fp32, rounded once."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)


def swiglu_backward_reference(dy: Tensor, gate_up: Tensor) -> Tensor:
    """dy [..., f] to the gradient of gate_up."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(wide).chunk(2, dim=-1)
    dy, s = dy.to(wide), gate.sigmoid()
    return torch.cat([dy * up * s * (1 + gate * (1 - s)), dy * gate * s], -1).to(gate_up.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu_reference(gate_up) if use_reference(gate_up) else torch.ops.megapar.swiglu.default(gate_up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        run = swiglu_backward_reference if use_reference(dy) else torch.ops.megapar.swiglu_backward.default
        return run(dy, gate_up)


@torch.library.register_fake("megapar::swiglu")
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.register_fake("megapar::swiglu_backward")
def _(dy: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)
