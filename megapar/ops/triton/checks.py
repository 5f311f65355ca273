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
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def named(dtype: torch.dtype) -> str:
    """As C++ spells it."""
    return NAMES.get(dtype, str(dtype))


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def check_float(x: Tensor, name: str) -> None:
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
