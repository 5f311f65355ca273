"""What the linear ops refuse: one sentence with the value, the rule and the fix, before anything is written."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megapar.ops import linear as ops
from tests.row_ops import DEVICE

OPS = torch.ops.megapar
BF16 = torch.bfloat16


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=DEVICE)


def refused(run: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(ValueError) as raised:
        run()
    message = str(raised.value).splitlines()[0]
    for part in parts:
        assert part in message, message
    # ... and what to do about it.
    assert re.search(r": \w+", message), message


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ((ones(2, 3, dtype=torch.int32), ones(4, 3), None, "none"), ("x has dtype Int", "float32, bfloat16 and float16")),
        ((ones(2, 3).double(), ones(4, 3).double(), None, "none"), ("x has dtype Double", "MEGAPAR_BACKEND=reference")),
        ((ones(), ones(4, 3), None, "none"), ("x is a single number",)),
        ((ones(2, 3), ones(4, 3, dtype=BF16), None, "none"), ("weight has dtype BFloat16 and x Float",)),
        ((ones(2, 3), ones(3, 4).t(), None, "none"), ("weight has shape [4, 3] and strides [1, 4]", "contiguous")),
        ((ones(2, 3), ones(3), None, "none"), ("weight has shape [3]", "[out, in]")),
        ((ones(2, 3), ones(4, 5), None, "none"), ("x is 3 wide and a weight of [4, 5] expects 5",)),
        ((ones(2, 3), ones(4, 3), None, "relu"), ("activation=relu must be one of none, gelu, silu, swiglu",)),
        ((ones(2, 3), ones(5, 3), None, "swiglu"), ("weight has 5 rows", "even")),
        ((ones(2, 3), ones(4, 3), ones(3), "none"), ("bias must be 4 numbers of Float",)),
        ((ones(2, 3), ones(4, 3), ones(4, dtype=BF16), "none"), ("bias must be 4 numbers of Float",)),
        ((ones(2, 3), ones(4, 3), ones(8)[::2], "none"), ("bias must be 4 numbers",)),
    ],
)
def test_forward(args, parts):
    refused(lambda: OPS.linear(*args, True), *parts)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ((ones(2, 4, dtype=torch.int64), ones(4, 3), None, "none"), ("dy has dtype Long",)),
        ((ones(2, 3), ones(4, 3), None, "none"), ("dy is 3 wide and a weight of [4, 3] expects 4",)),
        ((ones(2, 4), ones(4, 3, dtype=BF16), None, "none"), ("weight has dtype BFloat16 and dy Float",)),
        ((ones(2, 4), ones(4, 3), None, "tanh"), ("activation=tanh must be one of",)),
        ((ones(2, 4), ones(4, 3), None, "gelu"), ("activation=gelu and z must be given together",)),
        ((ones(2, 4), ones(4, 3), ones(2, 3), "none"), ("activation=none and z must be given together",)),
        ((ones(2, 4), ones(4, 3), ones(2, 3), "swiglu"), ("z must be 2 rows of 6",)),
        ((ones(2, 4), ones(4, 3), ones(2, 6), "gelu"), ("z must be 2 rows of 3",)),
        ((ones(2, 4), ones(4, 3), ones(2, 3, dtype=BF16), "gelu"), ("z must be 2 rows of 3 in the dtype of dy",)),
    ],
)
def test_input_grad(args, parts):
    refused(lambda: OPS.linear_input_grad(*args), *parts)


def weight_grad(target: Tensor, dy: Tensor, x: Tensor, alpha: float | Tensor = 1.0, non_finite: Tensor | None = None) -> Tensor:
    return ops.linear_weight_grad(dy, x, target, 1.0, alpha, non_finite)


@pytest.mark.parametrize(
    ("run", "parts"),
    [
        (lambda t: weight_grad(t, ones(2, 4, dtype=torch.int8), ones(2, 3)), ("dy has dtype Char",)),
        (lambda t: weight_grad(t, ones(2, 4), ones(2, 3, dtype=BF16)), ("x has dtype BFloat16 and dy Float",)),
        (lambda t: weight_grad(t, ones(2, 4), ones(5, 3)), ("dy has 2 rows and x 5",)),
        (lambda t: weight_grad(t, ones(2, 3), ones(2, 4)), ("target has shape [4, 3]", "[3, 4]")),
        (lambda t: weight_grad(ones(3, 4).t(), ones(2, 4), ones(2, 3)), ("target has shape [4, 3] and strides [1, 4]",)),
        (lambda t: weight_grad(t.to(BF16), ones(2, 4), ones(2, 3)), ("target has dtype BFloat16 and must be float32 or that of dy",)),
        (lambda t: weight_grad(t, ones(2, 4), ones(2, 3), ones(2)), ("scale must be one float32 number",)),
        (lambda t: weight_grad(t, ones(2, 4), ones(2, 3), ones(1, dtype=torch.float64)), ("scale must be one float32",)),
        (lambda t: weight_grad(t, ones(2, 4), ones(2, 3), 1.0, ones(2)), ("non_finite must be one float32 number",)),
        (lambda t: weight_grad(t, ones(2, 4), ones(2, 3), 1.0, ones(1, dtype=BF16)), ("non_finite must be one float32",)),
        (lambda t: ops.linear_bias_grad(ones(2, 4, dtype=torch.bool), t[:, 0].clone()), ("dy has dtype Bool",)),
        (lambda t: ops.linear_bias_grad(ones(2, 3), t[:, 0].clone(), 1.0), ("target has shape [4]", "[3]")),
        (lambda t: ops.linear_bias_grad(ones(2, 4), t[:, 0], 1.0), ("target has shape [4] and strides [3]",)),
        (lambda t: ops.linear_bias_grad(ones(2, 4), ones(4, dtype=torch.float16)), ("target has dtype Half",)),
    ],
)
def test_gradients_of_parameters(run, parts):
    target = torch.full((4, 3), 7.0, device=DEVICE)
    refused(lambda: run(target), *parts)
    assert target.eq(7.0).all()


def test_outputs_apart_from_inputs():
    memory = torch.arange(48.0, device=DEVICE)
    kept = memory.clone()
    dy, x = memory[:8].view(2, 4), memory[8:14].view(2, 3)
    for name, start in (("dy", 4), ("x", 13)):
        refused(lambda s=start: weight_grad(memory[s : s + 12].view(4, 3), dy, x), f"target overlaps {name} in memory")
    refused(lambda: ops.linear_bias_grad(dy, memory[6:10]), "target overlaps dy")
    refused(lambda: ops.linear_bias_grad(dy, memory[3:7]), "target overlaps dy")
    assert torch.equal(memory, kept)
    assert weight_grad(memory[14:26].view(4, 3), dy, x).isfinite().all(), "neighbours do not overlap"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_refuses_too(dtype):
    """An activation without its z would give the gradient of another function."""
    dy, weight, z = ones(2, 4, dtype=dtype), ones(4, 3, dtype=dtype), ones(2, 3, dtype=dtype)
    refused(lambda: ops.linear_input_grad(dy, weight, None, "gelu"), "activation=gelu and z must be given together")
    refused(lambda: ops.linear_input_grad(dy, weight, z, "none"), "activation=none and z must be given together")
    for run in (lambda: ops.linear_activation(z, weight, None, "relu"), lambda: ops.linear_input_grad(dy, weight, z, "relu")):
        refused(run, "activation=relu must be one of none, gelu, silu, swiglu")
