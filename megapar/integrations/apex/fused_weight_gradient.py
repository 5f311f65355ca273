"""The functions of NVIDIA apex's extension `fused_weight_gradient_mlp_cuda`, on `linear_weight_grad_`: gradient accumulation fusion.

    d_weight += d_output^T input      in d_weight's dtype; sums are fp32

Raises ValueError for dtypes, shapes and devices that do not fit together, where apex would read and write beyond its tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megapar.ops.linear import linear_weight_grad


@torch.no_grad()
def wgrad_gemm_accum_fp32(input: Tensor, d_output: Tensor, d_weight: Tensor) -> None:
    """input [..., in], d_output [..., out], both fp32, bf16 or fp16; d_weight [out, in], fp32, usually `weight.main_grad`."""
    if d_weight.dtype != torch.float32:
        raise ValueError(f"d_weight has dtype {d_weight.dtype} and must be float32: convert it, or call wgrad_gemm_accum_fp16")
    _accumulate(input, d_output, d_weight)


@torch.no_grad()
def wgrad_gemm_accum_fp16(input: Tensor, d_output: Tensor, d_weight: Tensor) -> None:
    """The same with a d_weight in the inputs' bf16 or fp16."""
    if d_weight.dtype not in (torch.bfloat16, torch.float16) or d_weight.dtype != input.dtype:
        raise ValueError(f"d_weight has dtype {d_weight.dtype} and input {input.dtype}: both must be bfloat16, or both float16")
    _accumulate(input, d_output, d_weight)


def _accumulate(input: Tensor, d_output: Tensor, d_weight: Tensor) -> None:
    for name, x in (("input", input), ("d_output", d_output)):
        if x.device != d_weight.device:
            raise ValueError(f"{name} is on {x.device} and d_weight on {d_weight.device}: move one")
    linear_weight_grad(d_output, input, out=d_weight, beta=1.0)
