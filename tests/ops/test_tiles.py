"""The tile choice: what it says of known shapes, that its budgets hold for every shape; and that each tile computes the same product."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from megapar.ops import dispatch
from megapar.ops.triton import gemm
from megapar.ops.triton.launch import A100, H100, Target
from megapar.ops.triton.tiles import (
    ACCUMULATE,
    PLAIN,
    SLOPE,
    SWIGLU,
    SWIGLU_SLOPE,
    Epilogue,
    Tile,
    candidates,
    choose,
    cycles,
    shared,
    stage_bytes,
)
from tests.row_ops import DEVICE, DTYPES, FP32, UNIT, normal

BF16, FP16 = torch.bfloat16, torch.float16
T4, A10, B200 = Target(75, 40), Target(86, 72), Target(100, 148)
UNROUNDED, UNROUNDED_SWIGLU = Epilogue(unrounded=True), Epilogue(accumulators=2, unrounded=True)
EPILOGUES = (PLAIN, SWIGLU, SLOPE, SWIGLU_SLOPE, ACCUMULATE, UNROUNDED, UNROUNDED_SWIGLU)
any_target = st.builds(Target, st.sampled_from([75, 80, 86, 87, 89, 90, 100, 103, 120]), st.integers(1, 200))
any_epilogue, any_dtype, any_size = st.sampled_from(EPILOGUES), st.sampled_from(DTYPES), st.integers(0, 2**20)


@pytest.mark.parametrize(
    ("rows", "columns", "target", "epilogue", "size"),
    [
        (8192, 8192, H100, PLAIN, (128, 256)),
        (8192, 8192, A100, PLAIN, (128, 128)),
        (8192, 8192, H100, ACCUMULATE, (128, 128)),
        (8192, 8192, A100, ACCUMULATE, (128, 128)),
        (8192, 14336, H100, SWIGLU, (128, 128)),
        (8192, 14336, A100, SWIGLU, (128, 64)),
        (8192, 14336, B200, SWIGLU_SLOPE, (128, 64)),
        (8192, 8192, H100, UNROUNDED, (128, 256)),
        (8192, 8192, B200, PLAIN, (128, 256)),
        (8192, 8192, B200, UNROUNDED, (128, 128)),
        (8192, 8192, B200, UNROUNDED_SWIGLU, (128, 64)),
        # 64 tiles of 128 x 256 would leave half of the multiprocessors without one.
        (512, 4096, H100, PLAIN, (128, 128)),
        (1, 4096, H100, PLAIN, (64, 64)),
        (1, 4096, A100, SWIGLU, (64, 64)),
    ],
)
def test_known_shapes(rows, columns, target, epilogue, size):
    tile = choose(rows, columns, BF16, target, epilogue)
    assert (tile.m, tile.n) == size


def test_without_tensor_cores():
    assert choose(4096, 4096, FP16, T4, PLAIN) == choose(4096, 4096, torch.float32, H100, SWIGLU) == Tile(64, 64, 16, 8, 2)


@given(any_size, any_size, any_dtype, any_target, any_epilogue)
def test_budgets(rows, columns, dtype, target, epilogue):
    tile = choose(rows, columns, dtype, target, epilogue)
    assert tile.num_stages >= 2
    assert tile.num_stages * stage_bytes(tile.m, tile.n, tile.k, dtype, epilogue) <= shared(target.arch)
    numbers = tile.m * tile.n // (32 * tile.num_warps)
    assert numbers * (epilogue.accumulators + epilogue.reads) <= 128
    assert tile.m >= 64, "wgmma takes 64 rows"


@given(st.integers(1, 2**16), st.integers(1, 2**16), any_dtype, any_target, any_epilogue)
def test_least_cycles(rows, columns, dtype, target, epilogue):
    best = choose(rows, columns, dtype, target, epilogue)
    taken = [cycles(tile, rows, columns, dtype, target, epilogue) for tile in candidates(dtype, target.arch, epilogue)]
    assert cycles(best, rows, columns, dtype, target, epilogue) == min(taken)


EVERY = [(tile, epilogue) for epilogue in (PLAIN, SWIGLU, ACCUMULATE) for tile in candidates(BF16, 90, epilogue)]


@pytest.mark.skipif(not dispatch.INTERPRETED and DEVICE == "cpu", reason="Triton's kernels")
@pytest.mark.parametrize(("tile", "epilogue"), EVERY, ids=lambda x: f"{x.m}x{x.n}" if isinstance(x, Tile) else "")
def test_every_tile(tile, epilogue, monkeypatch):
    """At its edges, over more than GROUP_M tiles down: what small shapes would not choose. K products: gamma(K) |A| |B|, and a rounding."""
    monkeypatch.setattr(gemm, "choose", lambda *_: tile)
    m, n, k = 9 * tile.m + 1, tile.n + 3, tile.k + 5
    if epilogue is ACCUMULATE:
        a, b, target = normal(k, m, dtype=FP16), normal(k, n, dtype=FP16, seed=1), normal(m, n, dtype=torch.float32, seed=2)
        exact, size = a.double().t() @ b.double() + target, a.double().t().abs() @ b.double().abs() + target.abs()
        torch.ops.megapar.linear_weight_grad_(target, a, b, 1.0)
        assert ((target - exact).abs() <= (k + 2) * FP32 * size).all()
        return
    pair = epilogue is SWIGLU
    a, b = normal(m, k, dtype=FP16), normal(n * (1 + pair), k, dtype=FP16, seed=1)
    y, z = torch.ops.megapar.linear(a, b, None, "swiglu" if pair else "none", True)
    exact, size = a.double() @ b.double().t(), a.double().abs() @ b.double().t().abs()
    assert ((z - exact).abs() <= UNIT[FP16] * exact.abs() + (k + 2) * FP32 * size + 2.0**-25).all()
    gate, up = z.double().chunk(2, -1) if pair else (z.double(), None)
    y_exact = torch.nn.functional.silu(gate) * up if up is not None else gate
    assert ((y - y_exact).abs() <= 1.01 * UNIT[FP16] * y_exact.abs() + 2.0**-24).all()
