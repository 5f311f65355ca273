"""Which tile of C a program of a GEMM takes: a pure function of shape, dtype, epilogue and device, so that a choice can be tested anywhere.

Of a few tiles, the one whose waves take the fewest cycles for each step along K: the larger of what the tensor cores take for m n
products and what the L2 cache takes for m + n numbers, times the tiles that the busiest multiprocessor gets. Computed, not measured.

What bounds a tile:

    registers   m n accumulators / (32 num_warps) a thread, of 255. 128 x 256 over 8 warps is 128, and an epilogue that reads a tile as
                large as its result (`beta target`, or the z of a slope) needs as many again: it spills, so those take 128 x 128 at most.
                SwiGLU keeps two accumulators, gate and up: there n counts twice.
    shared      num_stages (m + n) k bytes a number, of what a program may have (SHARED). Four stages hide the latency; fewer where they
                do not fit.
    instruction wgmma and tcgen05 take 64 rows at least, and 64 rows for four warps: no tile is lower.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megapar.ops.triton.launch import Target, ceil_div

SHARED = {75: 64, 80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
"""KiB that one program may have; 99 on the other architectures since 8.0."""
FLOPS = {75: 1024, 80: 2048, 90: 4096, 100: 8192}
"""Dense 16-bit FLOPs a cycle of a multiprocessor: the datasheet's peak over clock and count. Of another architecture: the one below it."""
L2_BYTES = 64
"""A cycle of a multiprocessor, from the L2 cache."""
GROUP_M = 8
"""Rows of tiles that are taken together, column by column: their part of B stays in the L2 cache."""
MAX_STAGES = 4


@dataclass(frozen=True)
class Tile:
    """m x n of C, k a step; all but the name of the dimension as Triton has it."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """What a launch is given."""
        sizes = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "GROUP_M": GROUP_M}
        return sizes | {"num_warps": self.num_warps, "num_stages": self.num_stages}


EPILOGUES = ("plain", "reads", "pair")
"""plain: stores what it computed. reads: loads a tile as large first. pair: two accumulators of m x n."""
SIZES = {
    "plain": ((128, 256, 64, 8), (128, 128, 64, 8), (64, 64, 64, 4)),
    "reads": ((128, 128, 64, 8), (64, 64, 64, 4)),
    "pair": ((128, 128, 64, 8), (64, 64, 64, 4)),
}
FP32_SIZES = ((64, 64, 32, 4),)
"""No tensor core multiplies fp32 without rounding it first: the products are FMAs, of a tile that leaves registers for the operands."""


def choose(rows: int, columns: int, dtype: torch.dtype, target: Target, epilogue: str) -> Tile:
    """For C [rows, columns], one half of it where the epilogue is `pair`, from operands of `dtype`."""
    best = min(candidates(dtype, target.arch, epilogue), key=lambda tile: cycles(tile, rows, columns, dtype, target, epilogue))
    return best


def candidates(dtype: torch.dtype, arch: int, epilogue: str) -> list[Tile]:
    """Every tile that `choose` may return for this device, the largest first."""
    sizes = FP32_SIZES if dtype == torch.float32 else SIZES[epilogue]
    return [Tile(m, n, k, warps, stages(m, n, k, dtype, arch, epilogue)) for m, n, k, warps in sizes]


def stages(m: int, n: int, k: int, dtype: torch.dtype, arch: int, epilogue: str) -> int:
    """As many as fit into shared memory; two, which need no more than one step's registers, where there is no asynchronous copy."""
    if arch < 80:
        return 2
    return max(min(SHARED.get(arch, 99) * 1024 // stage_bytes(m, n, k, dtype, epilogue), MAX_STAGES), 1)


def stage_bytes(m: int, n: int, k: int, dtype: torch.dtype, epilogue: str) -> int:
    """Of shared memory for one step along K."""
    return (m + n * parts(epilogue)) * k * dtype.itemsize


def parts(epilogue: str) -> int:
    return 2 if epilogue == "pair" else 1


def cycles(tile: Tile, rows: int, columns: int, dtype: torch.dtype, target: Target, epilogue: str) -> float:
    """Of the busiest multiprocessor, for each step along K."""
    tiles = ceil_div(rows, tile.m) * ceil_div(columns, tile.n)
    wide = tile.n * parts(epilogue)
    flops = FLOPS[max((arch for arch in FLOPS if arch <= target.arch), default=75)]
    return ceil_div(tiles, target.sms) * max(2 * tile.m * wide / flops, (tile.m + wide) * dtype.itemsize / L2_BYTES)
