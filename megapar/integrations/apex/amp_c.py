"""The functions of NVIDIA apex's extension `amp_C`, with its signatures, on megapar's ops: CPU and GPU tensors. Those of Adam: adam.py.

Each takes (chunk_size, noop_flag, tensor_lists, ...). chunk_size is ignored, the ops cut lists as they need. noop_flag is one int32 number
on the tensors' device, which becomes 1 where a function finds an inf or nan. tensor_lists hold one tensor of each parameter; dtypes may
differ within a list and sizes may exceed 2^31. Lists may be empty. Nothing waits for a GPU, so all can be captured in a CUDA graph.

Raises ValueError for lists that do not fit together, before anything is written. docs/apex.md says where apex itself does otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megapar.ops.grad_norm import grad_norm_

Lists = Sequence[Sequence[Tensor]]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, scale: float) -> None:
    """[in, out]: out = in * scale, computed in fp32; noop where an input is not finite. Both may be one list."""
    ins, outs = check(noop_flag, tensor_lists, ("in", "out"), FLOATS)
    # A copy to a narrower dtype would round, and overflow, before it is scaled.
    narrow = [torch.promote_types(x.dtype, out.dtype) != out.dtype for x, out in zip(ins, outs, strict=True)]
    staged = [x.to(torch.float32, copy=True) if n else out for x, out, n in zip(ins, outs, narrow, strict=True)]
    copies = [(out, x) for x, out, n in zip(ins, outs, narrow, strict=True) if not n and out is not x]
    if copies:
        torch._foreach_copy_([out for out, _ in copies], [x for _, x in copies])
    found = torch.zeros((), device=noop_flag.device)
    torch._amp_foreach_non_finite_check_and_unscale_(staged, found, torch.full_like(found, scale))  # both in one pass
    for s, out, n in zip(staged, outs, narrow, strict=True):
        if n:
            out.copy_(s)
    noop_flag.masked_fill_(found != 0, 1)


@torch.no_grad()
def multi_tensor_axpby(chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, a: float, b: float, arg_to_check: int) -> None:
    """[x, y, out]: out = a x + b y, computed in fp32; noop where x (arg_to_check 0), y (1) or either (-1) is not finite."""
    xs, ys, outs = check(noop_flag, tensor_lists, ("x", "y", "out"), FLOATS)
    if arg_to_check not in (-1, 0, 1):
        raise ValueError(f"arg_to_check={arg_to_check} must be 0 (x), 1 (y) or -1 (both): choose one")
    total = _total(noop_flag, {-1: [*xs, *ys], 0: xs, 1: ys}[arg_to_check])
    for x, y, out in zip(xs, ys, outs, strict=True):
        out.copy_(torch.add(x.float() * a, y.float(), alpha=b))
    noop_flag.masked_fill_(total[1] > 0, 1)


@torch.no_grad()
def multi_tensor_l2norm(chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, per_tensor: bool | None = None) -> tuple[Tensor, Tensor]:
    """[x]: the norm of all, fp32 [1], and where `per_tensor` that of each, fp32 [n], else [0]; noop where it is not finite.

    Sums are fp64, so that only a norm beyond fp32 overflows.
    """
    (xs,) = check(noop_flag, tensor_lists, ("x",), FLOATS)
    return _norms(noop_flag, xs, bool(per_tensor), None)


@torch.no_grad()
def multi_tensor_l2norm_mp(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, per_tensor: bool | None = None
) -> tuple[Tensor, Tensor]:
    """`multi_tensor_l2norm`, whose norms are 0 where noop was set before."""
    (xs,) = check(noop_flag, tensor_lists, ("x",), FLOATS)
    skipped = noop_flag.reshape(()) != 0
    norm, each = _norms(noop_flag, xs, bool(per_tensor), None)
    return norm.masked_fill_(skipped, 0), each.masked_fill_(skipped, 0)


@torch.no_grad()
def multi_tensor_l2norm_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, scale: float, per_tensor: bool | None = None
) -> tuple[Tensor, Tensor]:
    """[in, out]: out = in * scale, and the norms of `in`, which is not scaled, as `multi_tensor_l2norm` gives them."""
    ins, _ = check(noop_flag, tensor_lists, ("in", "out"), FLOATS)
    norms = _norms(noop_flag, ins, bool(per_tensor), None)
    multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale)
    return norms


@torch.no_grad()
def multi_tensor_unscale_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, inv_scale: Tensor, per_tensor: bool | None = None
) -> tuple[Tensor, Tensor]:
    """[x]: the norms of x * inv_scale, one fp32 number on the device; x stays as it is."""
    (xs,) = check(noop_flag, tensor_lists, ("x",), FLOATS)
    check_number(inv_scale, "inv_scale", torch.float32, noop_flag)
    return _norms(noop_flag, xs, bool(per_tensor), inv_scale)


@torch.no_grad()
def update_scale_hysteresis(
    current_scale: Tensor,
    growth_tracker: Tensor,
    hysteresis_tracker: Tensor,
    found_inf: Tensor,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    hysteresis: int,
) -> Tensor:
    """Moves a loss scale (fp32; trackers int32; one number each, on one device) as found_inf (fp32) says; returns `current_scale`.

    A step with an inf takes one from the hysteresis tracker; while that is above 0 the scale stays, then it is multiplied by
    backoff_factor. A step without restores the tracker; `growth_interval` of them in a row multiply the scale by growth_factor, unless it
    would overflow. Any found_inf but 0 counts as an inf, nan too.
    """
    check_number(current_scale, "current_scale", torch.float32, current_scale)
    check_number(growth_tracker, "growth_tracker", torch.int32, current_scale)
    check_number(hysteresis_tracker, "hysteresis_tracker", torch.int32, current_scale)
    check_number(found_inf, "found_inf", torch.float32, current_scale)
    found, scale = found_inf.reshape(()) != 0, current_scale.double().reshape(())
    left = hysteresis_tracker.reshape(()) - found.int()
    grown, streak = (scale * growth_factor).float(), growth_tracker.reshape(()) + 1
    raised = torch.where((streak == growth_interval) & grown.isfinite(), grown.double(), scale)
    moved = torch.where(found, torch.where(left > 0, scale, scale * backoff_factor), raised)
    current_scale.copy_(moved.reshape(current_scale.shape))
    growth_tracker.copy_(streak.masked_fill(found | (streak == growth_interval), 0).reshape(growth_tracker.shape))
    hysteresis_tracker.copy_(left.masked_fill(~found, hysteresis).reshape(hysteresis_tracker.shape))
    return current_scale


def check(noop_flag: Tensor, tensor_lists: Lists, names: Sequence[str], dtypes: Sequence[torch.dtype] | None = None) -> list[list[Tensor]]:
    """The lists. Raises ValueError unless there is one for each name, and their tensors fit together and to the flag."""
    check_number(noop_flag, "noop_flag", torch.int32, noop_flag)
    lists = [list(tensors) for tensors in tensor_lists]
    lengths = [len(tensors) for tensors in lists]
    if len(lists) != len(names) or len(set(lengths)) > 1:
        raise ValueError(f"tensor_lists have lengths {lengths}: give {len(names)} of one length, for {', '.join(names)}")
    for i, tensors in enumerate(zip(*lists, strict=True)):
        for name, x in zip(names, tensors, strict=True):
            if x.device != noop_flag.device:
                raise ValueError(f"{name}[{i}] is on {x.device} and noop_flag on {noop_flag.device}: move one")
            if x.shape != tensors[0].shape:
                raise ValueError(f"{name}[{i}] has shape {tuple(x.shape)} and {names[0]}[{i}] {tuple(tensors[0].shape)}: make them equal")
            if dtypes is not None and x.dtype not in dtypes:
                raise ValueError(f"{name}[{i}] has dtype {x.dtype} and must be float32, bfloat16 or float16: convert it")
    return lists


def check_number(x: Tensor, name: str, dtype: torch.dtype, other: Tensor) -> None:
    """Raises ValueError unless x is one number of the dtype on the other's device."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}={x} must be one {dtype} number on {other.device}: give it as a tensor")
    if x.dtype != dtype or x.numel() != 1 or x.device != other.device:
        found = f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
        raise ValueError(f"{name} is {found} and must be one {dtype} number on {other.device}: convert it")


def _total(noop_flag: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(3, dtype=torch.float64, device=noop_flag.device)
    grad_norm_(total, tensors)
    return total


def _norms(noop_flag: Tensor, xs: list[Tensor], per_tensor: bool, inv_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    factor = 1.0 if inv_scale is None else inv_scale.double().abs().reshape(())
    if per_tensor and xs:
        each = torch.stack(torch._foreach_norm(xs, 2, torch.float64))
        norm = each.square().sum(0, keepdim=True).sqrt()
    else:
        norm = _total(noop_flag, xs)[:1].sqrt()
        each = norm.new_empty(0)
    norm, each = ((x * factor).float() for x in (norm, each))
    noop_flag.masked_fill_(~norm.isfinite().reshape(()), 1)
    return norm, each
