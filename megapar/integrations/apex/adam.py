"""Adam of NVIDIA apex's extension `amp_C`, with its signatures, on `adamw_`: what amp_c.py says of its functions goes for these.

The scalars of a step are computed where noop_flag, step and inv_scale are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megapar.integrations.apex.amp_c import Lists, check, check_number
from megapar.ops.adamw import adamw_
from megapar.ops.step_state import StepState


@torch.no_grad()
def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """[g, p, m, v]: a step of Adam (mode 0, L2) or AdamW (mode 1) on p, m and v, except where noop is set. `step` counts from 1.

    m and v: fp32, or both bf16 where p is; g and p any of fp32, bf16 and fp16.
    """
    lists = check(noop_flag, tensor_lists, ("g", "p", "m", "v"))
    state = _state(noop_flag, torch.full_like(noop_flag, step), beta1, beta2, bias_correction, None)
    _adam([*lists, []], state, lr, (beta1, beta2), epsilon, mode, weight_decay)


@torch.no_grad()
def multi_tensor_adam_capturable(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    lr: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inv_scale: Tensor,
) -> None:
    """`multi_tensor_adam` with lr (fp32), step (int32) and inv_scale (fp32) in numbers on the device. g becomes g * inv_scale."""
    lists = check(noop_flag, tensor_lists, ("g", "p", "m", "v"))
    _capturable([*lists, []], noop_flag, lr, (beta1, beta2), epsilon, step, mode, bias_correction, weight_decay, inv_scale)


@torch.no_grad()
def multi_tensor_adam_capturable_master(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    lr: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inv_scale: Tensor,
) -> None:
    """[g, p, m, v, p_master]: `multi_tensor_adam_capturable` of the fp32 p_master, which p then is, rounded."""
    lists = check(noop_flag, tensor_lists, ("g", "p", "m", "v", "p_master"))
    if any(master.dtype != torch.float32 for master in lists[4]):
        found = ", ".join(sorted({str(master.dtype) for master in lists[4]}))
        raise ValueError(f"p_master has dtypes {found} and must be float32: convert it")
    _capturable(lists, noop_flag, lr, (beta1, beta2), epsilon, step, mode, bias_correction, weight_decay, inv_scale)


def _state(noop_flag: Tensor, step: Tensor, beta1: float, beta2: float, bias_correction: int, inv_scale: Tensor | None) -> StepState:
    """What `adamw_` reads, computed where the numbers are."""
    scalars = torch.zeros(6, dtype=torch.float64, device=noop_flag.device)
    # Never `scalars[0] = 1.0`: on a GPU that copies from the host, which a CUDA graph cannot capture.
    scalars[0].copy_(torch.ones_like(scalars[0]) if inv_scale is None else inv_scale.reshape(()))
    scalars[2].copy_(noop_flag.reshape(()) != 0)
    t = step.double().reshape(())
    ones = torch.ones_like(t)
    corrections = [1 / (1 - beta1**t), (1 - beta2**t).rsqrt()] if bias_correction else [ones, ones]
    return StepState(scalars, torch.stack([t, *corrections])[None])


def _capturable(
    lists: list[list[Tensor]],
    noop_flag: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    epsilon: float,
    step: Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inv_scale: Tensor,
) -> None:
    for x, name, dtype in ((lr, "lr", torch.float32), (step, "step", torch.int32), (inv_scale, "inv_scale", torch.float32)):
        check_number(x, name, dtype, noop_flag)
    for i, g in enumerate(lists[0]):
        if any(stride == 0 and n > 1 for stride, n in zip(g.stride(), g.shape, strict=True)):
            raise ValueError(f"g[{i}] has strides {g.stride()} and is written in place: make it contiguous")
    state = _state(noop_flag, step, *betas, bias_correction, inv_scale)
    _adam(lists, state, lr, betas, epsilon, mode, weight_decay)
    factor = state.grad_scale.masked_fill(state.skip != 0, 1.0).float()
    for g in lists[0]:
        # Of the gradient's dimensions, so that a product with a 16-bit one is computed in fp32.
        torch.mul(g, factor.reshape((1,) * g.dim()), out=g)


def _adam(
    lists: list[list[Tensor]], state: StepState, lr: float | Tensor, betas: tuple[float, float], epsilon: float, mode: int, decay: float
) -> None:
    """lists: g, p, m, v, masters. A master of a parameter that is fp32 itself is the parameter that is updated."""
    if mode not in (0, 1):
        raise ValueError(f"mode={mode} must be 0 (L2) or 1 (decoupled weight decay): choose one")
    masters: list[Any] = list(lists[4]) or [None] * len(lists[0])
    rows = [_dense(tensors) for tensors in zip(*lists[:4], masters, strict=True)]
    options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": epsilon, "weight_decay": decay, "decoupled": mode == 1}
    copies = [(p, master) for _, p, _, _, master in rows if master is not None and p.dtype == torch.float32]
    for wanted in (True, False):
        chosen = [row for row in rows if (row[4] is not None and row[1].dtype != torch.float32) is wanted]
        if not chosen:
            continue
        gs, ps, ms, vs, kept = (list(column) for column in zip(*chosen, strict=True))
        weights = ps if wanted else [p if master is None else master for p, master in zip(ps, kept, strict=True)]
        adamw_(weights, gs, kept if wanted else [], ms, vs, state, [0] * len(chosen), **options)
    for p, master in copies:
        p.copy_(torch.where(state.skip != 0, p, master))


def _dense(tensors: Sequence[Any]) -> list[Any]:
    """The same elements with the parameter's longest stride first: `adamw_` takes a channels_last parameter as a contiguous one."""
    p = tensors[1]
    if p.is_contiguous():
        return list(tensors)
    order = sorted(range(p.dim()), key=lambda d: -p.stride(d))
    return [None if x is None else x.permute(order) for x in tensors]
