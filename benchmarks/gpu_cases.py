"""One case for each op and pass: its inputs, megapar's way, the peers' ways, and the least that it must move and compute.

`benchmarks/gpu.py` times them on a GPU; `benchmarks/gpu_static.py` gives megapar's way meta tensors and compiles what it would launch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.plain_llama import rotate_half
from megapar.ops import schema
from megapar.ops.rope import rope_angles
from megapar.ops.step_state import StepState

BF16, F32 = torch.bfloat16, torch.float32
EPS, D = 1e-6, 128
Inputs = dict[str, Any]
Way = Callable[[Inputs], Any]


@dataclass(frozen=True)
class Sizes:
    """t tokens, hidden h, ffn f, vocabulary v, heads of D elements; `tensors` parameters of `numel` elements for the optimizer."""

    t: int = 8192
    h: int = 4096
    f: int = 11008
    v: int = 32000
    q_heads: int = 32
    kv_heads: int = 8
    tensors: int = 64
    numel: int = 1 << 22

    @property
    def parameters(self) -> int:
        return self.tensors * self.numel


@dataclass(frozen=True)
class Case:
    """make: inputs on a device. bytes, flops: the least for one call. peers: the same work by torch; compared with ours before timing."""

    title: str
    make: Callable[[str], Inputs]
    ours: Way
    bytes: int
    flops: int = 0
    peers: dict[str, Way] = field(default_factory=dict)


def op(name: str, *args: Any, **options: Any) -> Any:
    """The op on a real device; on meta tensors its Triton body, whose launches are then recorded."""
    first = next(x for x in args if isinstance(x, Tensor | list))
    device = (first[0] if isinstance(first, list) else first).device
    if device.type != "meta":
        return getattr(torch.ops.megapar, name).default(*args, **options)
    return getattr(importlib.import_module(f"megapar.ops.triton.{schema.FILES[name]}"), name)(*args, **options)


def _normal(device: str, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device=device, dtype=F32).to(dtype)


def norm_cases(n: Sizes) -> list[Case]:
    """Norms of a sum, bf16, and their backward with the gradient of the sum."""
    t, h = n.t, n.h
    moved = 8 * t * h

    def make(device: str) -> Inputs:
        inputs: Inputs = {name: _normal(device, t, h) for name in ("x", "residual", "dy")}
        return inputs | {"w": _normal(device, h), "b": _normal(device, h), "rstd": torch.ones(t, device=device)}

    def torch_rms_norm(i: Inputs) -> tuple[Tensor, Tensor]:
        s = i["x"] + i["residual"]
        return F.rms_norm(s, (h,), i["w"], EPS), s

    def torch_layer_norm(i: Inputs) -> tuple[Tensor, Tensor]:
        s = i["x"] + i["residual"]
        return F.layer_norm(s, (h,), i["w"], i["b"], EPS), s

    def rms_norm(i: Inputs) -> Any:
        return op("rms_norm", i["x"], i["w"], EPS, i["residual"])[:2]

    def rms_norm_backward(i: Inputs) -> Any:
        return op("rms_norm_backward", i["dy"], i["residual"], i["x"], i["w"], i["rstd"])

    def layer_norm(i: Inputs) -> Any:
        return op("layer_norm", i["x"], i["w"], i["b"], EPS, i["residual"])[:2]

    def layer_norm_backward(i: Inputs) -> Any:
        return op("layer_norm_backward", i["dy"], i["residual"], i["x"], i["w"], i["rstd"], i["rstd"])

    return [
        Case("rms_norm, residual", make, rms_norm, moved, 0, {"torch": torch_rms_norm}),
        Case("rms_norm_backward", make, rms_norm_backward, moved),
        Case("layer_norm, residual", make, layer_norm, moved, 0, {"torch": torch_layer_norm}),
        Case("layer_norm_backward", make, layer_norm_backward, moved),
    ]


def row_cases(n: Sizes) -> list[Case]:
    """The other ops around the GEMMs, bf16."""
    t, h, f, v, d = n.t, n.h, n.f, n.v, D
    heads = n.q_heads + 2 * n.kv_heads

    def rope(device: str) -> Inputs:
        cos, sin = rope_angles(torch.arange(t, device=device), d, 1e4)
        return {"qkv": _normal(device, t, heads * d), "cos": cos, "sin": sin}

    def logits(device: str) -> Inputs:
        inputs: Inputs = {"z": _normal(device, t, v), "index": torch.randint(0, v, (t,), device=device)}
        ignored = torch.zeros(t, dtype=torch.bool, device=device)
        return inputs | {"ignored": ignored, "lse": torch.full((t,), 11.0, device=device), "dloss": torch.ones(t, device=device)}

    def gate_up(device: str) -> Inputs:
        return {"x": _normal(device, t, 2 * f), "dy": _normal(device, t, f)}

    def rows(device: str) -> Inputs:
        return {"x": _normal(device, t, h), "rows": torch.arange(t, device=device)}

    def torch_rope(i: Inputs) -> tuple[Tensor, ...]:
        q, k, z = i["qkv"].view(1, t, heads, d).transpose(1, 2).split([n.q_heads, n.kv_heads, n.kv_heads], 1)
        cos, sin = (torch.cat([x, x], -1).to(q.dtype) for x in (i["cos"], i["sin"]))
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin, z.contiguous()

    def torch_swiglu(i: Inputs) -> Tensor:
        gate, up = i["x"].chunk(2, -1)
        return F.silu(gate) * up

    def rope_qkv(i: Inputs) -> Any:
        return op("rope_qkv", i["qkv"], i["cos"], i["sin"], 1, n.q_heads, n.kv_heads)

    def cross_entropy_grad(i: Inputs) -> Any:
        return op("cross_entropy_grad", i["dloss"], i["z"], i["index"], i["lse"], i["ignored"], v, 0.0, 0.0)

    return [
        Case("swiglu", gate_up, lambda i: op("swiglu", i["x"]), 6 * t * f, 0, {"torch": torch_swiglu}),
        Case("swiglu_backward", gate_up, lambda i: op("swiglu_backward", i["dy"], i["x"]), 10 * t * f),
        Case("rope_qkv", rope, rope_qkv, 4 * t * heads * d, 0, {"torch": torch_rope}),
        Case("cross_entropy_statistics", logits, lambda i: op("cross_entropy_statistics", i["z"], i["index"], False), 2 * t * v),
        Case("cross_entropy_grad", logits, cross_entropy_grad, 4 * t * v),
        Case("dropout", rows, lambda i: op("dropout", i["x"], i["rows"], 1, 0.1, 0), 4 * t * h),
    ]


def linear_cases(n: Sizes) -> list[Case]:
    """The GEMMs, bf16; torch's are cuBLAS."""
    t, h, f = n.t, n.h, n.f

    def make(device: str) -> Inputs:
        return {
            "x": _normal(device, t, h), "w": _normal(device, f, h), "dy": _normal(device, t, f), "gate_up": _normal(device, 2 * f, h),
            "main_grad": torch.zeros(f, h, device=device), "z": _normal(device, t, h),
        }  # fmt: skip

    flops, moved = 2 * t * h * f, 2 * (t * h + h * f + t * f)

    def torch_swiglu(i: Inputs) -> Tensor:
        gate, up = F.linear(i["x"], i["gate_up"]).chunk(2, -1)
        return F.silu(gate) * up

    def into_main_grad(i: Inputs) -> Tensor:
        op("linear_weight_grad_", i["main_grad"], i["dy"], i["x"], 0.0)
        return i["main_grad"]

    return [
        Case(
            "linear", make, lambda i: op("linear", i["x"], i["w"], None, "none", False)[0], moved, flops,
            {"torch": lambda i: F.linear(i["x"], i["w"])},
        ),
        Case(
            "linear, gelu", make, lambda i: op("linear", i["x"], i["w"], None, "gelu", True)[0], moved + 2 * t * f, flops,
            {"torch": lambda i: F.gelu(F.linear(i["x"], i["w"]), approximate="tanh")},
        ),
        Case(
            "linear, swiglu", make, lambda i: op("linear", i["x"], i["gate_up"], None, "swiglu", True)[0],
            2 * (t * h + 2 * f * h + 3 * t * f), 2 * flops, {"torch": torch_swiglu},
        ),
        Case(
            "linear_input_grad", make, lambda i: op("linear_input_grad", i["dy"], i["w"], None, "none"), moved, flops,
            {"torch": lambda i: i["dy"] @ i["w"]},
        ),
        Case("linear_input_grad, gelu", make, lambda i: op("linear_input_grad", i["dy"], i["w"], i["z"], "gelu"), moved + 2 * t * h, flops),
        Case(
            "linear_weight_grad_, fp32", make, into_main_grad, 2 * (t * h + t * f) + 4 * h * f, flops,
            {"torch": lambda i: (i["dy"].t() @ i["x"]).float()},
        ),
    ]  # fmt: skip


def optimizer_cases(n: Sizes) -> list[Case]:
    """The optimizer phase: norm, scalars, update; bytes a parameter as in megapar/ops/adamw.py."""

    def make(master: torch.dtype, grad: torch.dtype) -> Callable[[str], Inputs]:
        def inputs(device: str) -> Inputs:
            def some(dtype: torch.dtype) -> list[Tensor]:
                return [torch.zeros(n.numel, device=device, dtype=dtype) for _ in range(n.tensors)]

            grads = [_normal(device, n.numel, dtype=grad) for _ in range(n.tensors)]
            state, total = StepState.create(1, device=device), torch.zeros(3, dtype=torch.float64, device=device)
            lists = [some(BF16), grads, some(master), some(F32), some(F32)]
            return {"lists": lists, "state": state, "total": total, "one": torch.ones(1, dtype=torch.float64, device=device)}

        return inputs

    def adamw(i: Inputs) -> None:
        options = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
        op("adamw_", *i["lists"], i["state"].scalars, i["state"].counters, [0] * n.tensors, **options)

    def norm(i: Inputs) -> None:
        op("grad_norm_", i["total"], i["lists"][1])

    def step_state(i: Inputs) -> None:
        s = i["state"]
        op("step_state_", s.scalars, s.counters, i["total"], i["one"], [0], [0.9], [0.95], 1.0, 2.0, 0.5, 0, 1, 1.0)

    def get_total_norm(i: Inputs) -> Tensor:
        return torch.nn.utils.get_total_norm(i["lists"][1])

    def fused(i: Inputs) -> None:
        _, grads, masters, first, second = i["lists"]
        steps = i.setdefault("steps", [torch.ones((), device=g.device) for g in grads])
        wide = i.setdefault("wide", [g.float() for g in grads])
        options = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "maximize": False}
        torch._fused_adamw_(masters, wide, first, second, [], steps, **options)

    p = n.parameters
    return [
        Case("adamw_, bf16 gradient, fp32 master", make(F32, BF16), adamw, 28 * p, 0, {"torch fused, fp32": fused}),
        Case("adamw_, fp32 gradient, fp32 master", make(F32, F32), adamw, 30 * p),
        Case("adamw_, bf16 gradient, remainder", make(torch.int16, BF16), adamw, 26 * p),
        Case("grad_norm_, bf16", make(F32, BF16), norm, 2 * p, 0, {"torch get_total_norm": get_total_norm}),
        Case("grad_norm_, fp32", make(F32, F32), norm, 4 * p, 0, {"torch get_total_norm": get_total_norm}),
        Case("step_state_", make(F32, BF16), step_state, 0),
    ]


def all_cases(sizes: Sizes) -> list[Case]:
    return [*optimizer_cases(sizes), *linear_cases(sizes), *norm_cases(sizes), *row_cases(sizes)]
