"""What the tests of the memory-bound ops share: inputs at the edges of vectors and blocks, comparison with fp64 within a given bound.

The same tests run on the compiled CPU kernels; on Triton's, which its interpreter takes on (tests/ops/test_interpreted.py); and with
MEGAPAR_TEST_DEVICE=cuda on a GPU.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megapar.ops import dispatch

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of rounding to a dtype."""
FP32 = UNIT[torch.float32]
LEAST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
"""Smallest positive number of a dtype: rounding may be off by half of it."""
DTYPES = tuple(UNIT)
WIDTHS = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 80, 127, 129, 1025)
"""Around one vector of 16 and the four that a loop takes at a time."""
ROWS = (0, 1, 2, 15, 16, 17, 33, 130)
"""Around the 16 rows of a block; 130 is more than two blocks, which are of different sizes then."""
DEVICE = os.environ.get("MEGAPAR_TEST_DEVICE") or "cpu"
kernels_only = pytest.mark.skipif(dispatch.FORCED == "reference", reason="checks and range that the kernels alone have")
cpu_only = pytest.mark.skipif(
    dispatch.INTERPRETED or DEVICE != "cpu" or dispatch.FORCED == "reference", reason="about the compiled CPU kernels"
)
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="about CPU tensors")


def drawn(*shape: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in fp32, of a CPU generator: the same on every device."""
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE)


def integers(low: int, high: int, *shape: int, seed: int) -> Tensor:
    """int64 in [low, high), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, device="cpu").to(DEVICE)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return (shift + scale * x).to(device=DEVICE, dtype=dtype)


def examples(n: int) -> int:
    """Of hypothesis: fewer where each takes the interpreter's time."""
    return max(n // 6, 10) if dispatch.INTERPRETED else n


def strided(x: Tensor) -> Tensor:
    """The same values, with gaps between the elements of the last dimension."""
    wide = torch.stack([x, torch.full_like(x, torch.nan)], -1)
    return wide[..., 0]


def assert_within(got: Tensor, exact: Tensor, bound: Tensor | float, what: str = "") -> None:
    """|got - exact| <= bound plus one rounding to got's dtype, elementwise; not finite exactly where `exact`, rounded, is not."""
    rounded = exact.to(got.dtype)
    finite = rounded.isfinite()
    assert torch.equal(got[~finite].nan_to_num(nan=7.0), rounded[~finite].nan_to_num(nan=7.0)), f"{what}: inf or nan elsewhere"
    error = (got.double() - exact).abs()
    allowed = bound + UNIT[got.dtype] * (exact.abs() + bound) + LEAST[got.dtype]
    wrong = finite & ~(error <= allowed)
    assert not wrong.any(), f"{what}: error {error[wrong].max():.3e}, {(error / allowed)[wrong].max():.3g} times the bound"


def each_number_of_threads(run: Callable[[], Sequence[Tensor]]) -> None:
    """Asserts that the results are the same bits on 1, 2 and 3 threads."""
    if dispatch.INTERPRETED or DEVICE != "cpu":
        pytest.skip("no threads of torch's take part")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def check_op(name: str, *args: Any) -> None:
    """torch.library.opcheck: schema, mutation, fake kernel."""
    torch.library.opcheck(getattr(torch.ops.megapar, name).default, args)
