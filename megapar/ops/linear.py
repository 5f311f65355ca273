"""Linear: the three GEMMs of a weight `[out, in]`, and what rides along while a block of the result is in cache.

    z  = x w^T + bias,  y = act(z)          2 t in out FLOPs     act: none, gelu (tanh form), silu, swiglu (silu(gate) * up)
    dx = (dy w) * act'(z_below)             2 t in out           z_below: the pre-activation of the layer that x came from
    dw = beta dw + alpha dy^T x             2 t in out           accumulated in dw's dtype: fp32 for a main_grad whatever the inputs are
    db = beta db + sum_t dy

Sums are fp32, in one order for every thread count: a kernel never splits k over threads. 16-bit inputs multiply exactly; with AVX-512's
and AMX's products of bf16, denormal inputs count as zeros. Backward sees the z that was rounded, so forward activates that one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megapar.ops.dispatch import use_reference
from megapar.ops.swiglu import swiglu_backward_reference, swiglu_reference

ACTIVATIONS = ("none", "gelu", "silu", "swiglu")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., in] to [..., out], differentiable."""
    return _Linear.apply(x, weight, bias)


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., in] to [..., out]."""
    if use_reference(x):
        return F.linear(x, weight, bias)
    return torch.ops.megapar.linear.default(x, weight, bias, "none", False)[0]


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """[..., in] to (act(z), z), z [..., out]; for "swiglu" the first is out / 2 wide, from gate and up one after the other."""
    run = linear_activation_reference if use_reference(x) else torch.ops.megapar.linear.default
    return run(x, weight, bias, activation, True)


def linear_input_grad(dy: Tensor, weight: Tensor, z: Tensor | None = None, activation: str = "none") -> Tensor:
    """dy [..., out] to [..., in], or to the gradient of the pre-activation `z` where x was `activation` of it."""
    run = linear_input_grad_reference if use_reference(dy) else torch.ops.megapar.linear_input_grad.default
    return run(dy, weight, z, activation)


def linear_weight_grad(
    dy: Tensor, x: Tensor, out: Tensor | None = None, beta: float = 0.0, alpha: float | Tensor = 1.0, non_finite: Tensor | None = None
) -> Tensor:
    """dy [..., out], x [..., in]: alpha times the gradient [out, in], added into `out` (scaled by beta first) where given.

    alpha: a number, or one fp32 number on the device. non_finite: fp32, becomes 1 where the result holds an inf or NaN.
    """
    if out is None:
        out = dy.new_empty(dy.shape[-1], x.shape[-1])
    number, scale = (1.0, alpha) if isinstance(alpha, Tensor) else (alpha, None)
    run = linear_weight_grad_reference if use_reference(dy) else torch.ops.megapar.linear_weight_grad_.default
    run(out, dy, x, beta, number, scale, non_finite)
    return out


def linear_bias_grad(dy: Tensor, out: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """dy [..., out]: its sum over the rows, in at least fp32, added into `out` (scaled by beta first) where given."""
    if out is None:
        out = dy.new_empty(dy.shape[-1])
    run = linear_bias_grad_reference if use_reference(dy) else torch.ops.megapar.linear_bias_grad_.default
    run(out, dy, beta)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return linear_forward(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = linear_input_grad(dy, weight) if needs_x else None
        dw = linear_weight_grad(dy, x) if needs_weight else None
        return dx, dw, linear_bias_grad(dy) if needs_bias else None


def _check_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name} must be one of {', '.join(ACTIVATIONS)}: correct it")


def linear_activation_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    """The op `linear` in plain PyTorch."""
    _check_activation(activation)
    z = F.linear(x, weight, bias)
    if activation == "swiglu":
        return swiglu_reference(z), z
    return {"none": lambda z: z, "gelu": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu}[activation](z), z


def linear_input_grad_reference(dy: Tensor, weight: Tensor, z: Tensor | None, activation: str) -> Tensor:
    """The op `linear_input_grad` in plain PyTorch."""
    _check_activation(activation)
    if (z is None) != (activation == "none"):
        raise ValueError(f"activation={activation} and z must be given together: pass both or neither")
    dx = dy @ weight
    if z is None:
        return dx
    if activation == "swiglu":
        return swiglu_backward_reference(dx, z)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(dx, z, approximate="tanh")
    return torch.ops.aten.silu_backward(dx, z)


def linear_weight_grad_reference(
    out: Tensor, dy: Tensor, x: Tensor, beta: float, alpha: float, scale: Tensor | None, non_finite: Tensor | None
) -> None:
    """The op `linear_weight_grad_` in plain PyTorch."""
    # A GEMM in the inputs' 16 bits would round the sum before it reaches fp32 (tests/ops/test_linear.py::test_weight_grad_fp32).
    dy2, x2 = dy.reshape(-1, dy.shape[-1]).to(out.dtype), x.reshape(-1, x.shape[-1]).to(out.dtype)
    if scale is not None:
        alpha *= float(scale)
    torch.addmm(out, dy2.t(), x2, beta=beta, alpha=alpha, out=out)
    if non_finite is not None and not bool(out.isfinite().all()):
        non_finite.fill_(1.0)


def linear_bias_grad_reference(out: Tensor, dy: Tensor, beta: float) -> None:
    """The op `linear_bias_grad_` in plain PyTorch."""
    total = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.promote_types(out.dtype, torch.float32))
    out.mul_(beta).add_(total) if beta else out.copy_(total)


@torch.library.register_fake("megapar::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    out = weight.shape[0]
    y = x.new_empty((*x.shape[:-1], out // 2 if activation == "swiglu" else out))
    return y, x.new_empty((*x.shape[:-1], out) if save else (0,))


@torch.library.register_fake("megapar::linear_input_grad")
def _(dy: Tensor, weight: Tensor, z: Tensor | None, activation: str) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], weight.shape[1] * (2 if activation == "swiglu" else 1)))


@torch.library.register_fake("megapar::linear_weight_grad_")
def _(*_: Any) -> None: ...


@torch.library.register_fake("megapar::linear_bias_grad_")
def _(*_: Any) -> None: ...
