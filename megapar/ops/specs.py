"""What the host knows of a tensor without reading it, and what lists of tensors must keep to: the words of csrc/cpu's bindings.

Each check is a function of plain values, so that it can be cached by them, and tried on tensors larger than any memory. Each raises
ValueError: the value, the rule, the fix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megapar.ops.checks import FLOATS, named, require


class Spec(NamedTuple):
    """A tensor. address: in bytes."""

    address: int
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(x: Tensor) -> Spec:
        return Spec(x.data_ptr(), x.dtype, x.device, x.shape, x.stride())

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return self.numel == 0
            expected *= size
        return True

    @property
    def extent(self) -> tuple[int, int]:
        """Its first address, and the one past its last."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.address, self.address + (last + 1) * self.dtype.itemsize


Specs = tuple[Spec, ...]


def check_rates(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    """AdamW's numbers are in their ranges."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        require(value >= 0, f"{name}={value:g} must not be negative: raise it")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        require(0 <= value < 1, f"{name}={value:g} must lie in [0, 1): change it")


def check_gradient(x: Spec, name: str = "a gradient") -> None:
    """A dtype of the kernels."""
    require(
        x.dtype in FLOATS,
        f"{name} has dtype {named(x.dtype)} and the kernels know float32, bfloat16 and float16: convert it, or use"
        " MEGAPAR_BACKEND=reference",
    )


def check_lr_scale(x: Spec, device: torch.device) -> None:
    """One float64 number on the device."""
    require(
        x.dtype == torch.float64 and x.numel == 1 and x.device == device,
        f"lr_scale is {named(x.dtype)} of shape {list(x.shape)} on {x.device} and must be one float64 number on {device}: convert it",
    )


def check_adamw(
    lists: tuple[Specs, Specs, Specs, Specs, Specs],
    scalars: Spec,
    counters: Spec,
    rows: Sequence[int],
    drawn: bool,
    ids: Sequence[int],
    places: Sequence[int],
) -> None:
    """lists: weights, grads, masters or nothing, exp_avgs, exp_avg_sqs. drawn: whether there is a seed."""
    weights, grads, masters, exp_avgs, exp_avg_sqs = lists
    n = len(weights)
    require(
        len(grads) == len(exp_avgs) == len(exp_avg_sqs) == len(rows) == n
        and len(masters) in (0, n)
        and len(places) in (0, 3 * n)
        and (not drawn or len(ids) == n),
        f"there are {n} weights, {len(grads)} grads, {len(masters)} masters, {len(exp_avgs)} exp_avgs, {len(exp_avg_sqs)} exp_avg_sqs,"
        f" {len(rows)} rows, {len(ids)} ids and {len(places)} numbers in places: give one of each per weight (masters may be empty;"
        " places hold three)",
    )
    device = weights[0].device if weights else scalars.device
    check_doubles(scalars, 6, "scalars", "[6]", device)
    require(scalars.numel == 6, _not_doubles(scalars, "scalars", "[6]"))
    check_doubles(counters, 3, "counters", "[n, 3]", device)
    held = counters.numel // 3
    for i, row in enumerate(rows):
        _check_tensors(weights[i], grads[i], masters[i] if masters else None, exp_avgs[i], exp_avg_sqs[i], i, device)
        require(0 <= row < held, f"row {row} must lie in [0, {held}), the rows of counters")
        if drawn:
            _check_noise(weights[i], bool(masters), i, places[3 * i : 3 * i + 3])


def _check_tensors(weight: Spec, grad: Spec, master: Spec | None, exp_avg: Spec, exp_avg_sq: Spec, i: int, device: torch.device) -> None:
    check_gradient(weight, "a weight")
    check_gradient(grad)
    moment = exp_avg.dtype
    require(
        moment in (torch.float32, torch.bfloat16) and exp_avg_sq.dtype == moment,
        f"exp_avgs[{i}] has dtype {named(moment)} and exp_avg_sqs[{i}] {named(exp_avg_sq.dtype)}: both must be float32, or both bfloat16",
    )
    outputs = [("weights", weight), ("exp_avgs", exp_avg), ("exp_avg_sqs", exp_avg_sq)]
    if master is not None:
        outputs.append(("masters", master))
        require(
            (master.dtype == torch.float32 and weight.dtype != torch.float32)
            or (master.dtype == torch.int16 and weight.dtype == torch.bfloat16),
            f"masters[{i}] has dtype {named(master.dtype)} and weights[{i}] {named(weight.dtype)}: a master is float32 for a 16-bit"
            " weight, or int16 (a remainder) for a bfloat16 one",
        )
    require(
        grad.shape == weight.shape,
        f"grads[{i}] has shape {list(grad.shape)} and weights[{i}] {list(weight.shape)}: they must be equal",
    )
    require(grad.device == device, f"grads[{i}] is on {grad.device} and weights[0] on {device}: move one")
    for a, (name, x) in enumerate(outputs):
        require(x.device == device, f"{name}[{i}] is on {x.device} and weights[0] on {device}: move one")
        require(
            x.shape == weight.shape,
            f"{name}[{i}] has shape {list(x.shape)} and weights[{i}] {list(weight.shape)}: they must be equal",
        )
        require(x.contiguous, f"{name}[{i}] has strides {list(x.strides)} and is written in place: make it contiguous")
        for other_name, other in [("grads", grad), *outputs[:a]]:
            _check_apart(x, other, f"{name}[{i}]", f"{other_name}[{i}]")


def _check_apart(x: Spec, other: Spec, name: str, other_name: str) -> None:
    if x.numel == 0 or x.device.type == "meta":
        return
    (begin, end), (other_begin, other_end) = x.extent, other.extent
    require(end <= other_begin or other_end <= begin, f"{name} shares memory with {other_name} and is written: give each its own")


def _check_noise(weight: Spec, has_master: bool, i: int, place: Sequence[int]) -> None:
    require(
        has_master or weight.dtype != torch.float16,
        f"weights[{i}] is float16 and stochastic rounding knows bfloat16: give it a float32 master, or no seed",
    )
    if place:
        base, columns, stride = place
        require(
            base >= 0 and 0 < columns <= stride,
            f"places[{i}] is base {base}, columns {columns} and stride {stride}: base must not be negative, and 0 < columns <= stride",
        )


def check_doubles(x: Spec, columns: int, name: str, shape: str, device: torch.device) -> None:
    """Contiguous float64 in rows of `columns`."""
    require(x.dtype == torch.float64 and x.contiguous and x.numel % columns == 0, _not_doubles(x, name, shape))
    require(x.device == device, f"{name} is on {x.device} and the other tensors on {device}: move one")


def _not_doubles(x: Spec, name: str, shape: str) -> str:
    return f"{name} is {named(x.dtype)} of shape {list(x.shape)} and must be contiguous float64 {shape}: see StepState"


def check_total(total: Spec) -> None:
    """Three float64 numbers, contiguous."""
    require(
        total.dtype == torch.float64 and total.numel == 3 and total.contiguous,
        f"total is {named(total.dtype)} of shape {list(total.shape)} and must be contiguous float64 [3]: make one",
    )


def check_gradients(grads: Specs, device: torch.device) -> None:
    """device: where they are to be."""
    for grad in grads:
        check_gradient(grad)
        require(grad.device == device, f"a gradient is on {grad.device} and total on {device}: move one")


def check_step_state(
    scalars: Spec, counters: Spec, total: Spec, count: Spec, rows: Sequence[int], beta1: Sequence[float], beta2: Sequence[float]
) -> None:
    """What `step_state_` is given fits together; a row in range for each pair of betas."""
    for x, columns, name in ((scalars, 6, "scalars"), (counters, 3, "counters"), (total, 3, "total"), (count, 1, "count")):
        check_doubles(x, columns, name, f"[..., {columns}]", scalars.device)
    require(
        (scalars.numel, total.numel, count.numel) == (6, 3, 1),
        f"scalars, total and count have {scalars.numel}, {total.numel} and {count.numel} numbers and must have 6, 3 and 1: see StepState",
    )
    require(
        len(beta1) == len(beta2) == len(rows),
        f"rows has {len(rows)} entries, beta1 {len(beta1)} and beta2 {len(beta2)}: give one of each per row",
    )
    held = counters.numel // 3
    for row in rows:
        require(0 <= row < held, f"row {row} must lie in [0, {held}), the rows of counters: correct it")
