"""What the bodies check, in the words of csrc/cpu/bindings.h. Each raises ValueError: the value, the rule, the fix."""

from __future__ import annotations

import torch
from torch import Tensor

NAMES = {
    torch.float32: "Float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.float64: "Double",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def named(dtype: torch.dtype) -> str:
    """As C++ spells it."""
    return NAMES.get(dtype, str(dtype))


def require(holds: bool, message: str) -> None:
    """Raises ValueError unless it holds."""
    if not holds:
        raise ValueError(message)


def check_float(x: Tensor, name: str) -> None:
    """A dtype of the kernels, and at least one dimension."""
    if x.dtype not in FLOATS:
        raise ValueError(
            f"{name} has dtype {named(x.dtype)} and the kernels know float32, bfloat16 and float16: convert it, or use"
            " MEGAPAR_BACKEND=reference"
        )
    if x.dim() == 0:
        raise ValueError(f"{name} is a single number and must have a dimension: give it as [1, ...]")


def check_same(x: Tensor, other: Tensor, name: str, other_name: str) -> None:
    """Same dtype and device."""
    if x.dtype != other.dtype:
        raise ValueError(f"{name} has dtype {named(x.dtype)} and {other_name} {named(other.dtype)}: convert one of them")
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device} and {other_name} on {other.device}: move one")


def check_target(target: Tensor, dy: Tensor, shape: list[int]) -> None:
    """The gradient of a parameter: contiguous, in fp32 or the dtype of dy."""
    require(
        target.dtype in (torch.float32, dy.dtype),
        f"target has dtype {named(target.dtype)} and must be float32 or that of dy, {named(dy.dtype)}: convert it",
    )
    require(
        list(target.shape) == shape and target.is_contiguous() and target.device == dy.device,
        f"target has shape {list(target.shape)} and strides {list(target.stride())} and must be a contiguous {shape} beside dy: give one",
    )


def check_apart(out: Tensor, x: Tensor, name: str, other_name: str) -> None:
    """An output must not share memory with an input: a kernel reads what it has already written. Also where only the ranges overlap."""
    if out.numel() == 0 or x.numel() == 0 or out.device.type == "meta":
        return
    (a, b), (c, d) = _range(out), _range(x)
    require(b <= c or d <= a, f"{name} overlaps {other_name} in memory and is written while that is read: give it its own")


def _range(x: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
