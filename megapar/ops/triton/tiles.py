"""Which tile of C a program of a GEMM takes: a pure function of shape, dtype, epilogue and device, so that a choice can be tested anywhere.

Of the tiles that fit, the one whose waves take the fewest cycles for each number along K: what the tensor cores take for m n products and
the L2 cache for m + n numbers, as if neither hid the other, times the tiles of the busiest multiprocessor. Computed, not measured.

What bounds a tile:

    registers    m n / (32 num_warps) numbers a thread, once for each accumulator and each tile that the epilogue reads: 128 of 255 at most,
                 and the rest holds addresses, masks, converted pairs. Half as many accumulators before sm_90, whose mma.sync has its
                 operands in registers too. What that avoids, with Triton 3.7.1: 128 x 256 spills on sm_80; `beta target` into fp32, or
                 SwiGLU's gradient (gate and up are read), spill at 128 x 256 and 128 x 128 (tests/aot/test_linear.py). Half as many on
                 sm_100, too, where a biased sum is activated without being rounded and saved in between.
    shared       num_stages (m + n) k bytes a number, of what a program may have. Four stages hide the latency of the copies; fewer where
                 they do not fit. One large program a multiprocessor is what is meant, and three of the smallest.
    instruction  wgmma and tcgen05 take 64 rows for four warps: no tile is lower.
    vectors      rows whose width is no multiple of 16 elements are copied and stored element by element, whose addresses take registers:
                 only the smallest tile has them to spare.
    FMA          fp32 is multiplied as it is, and Triton 3.7.1 has no tensor cores on sm_75: there an operand's part of a step is in
                 registers too, so the tile is small and the step short.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megapar.ops.triton.launch import Target, ceil_div


@dataclass(frozen=True)
class Epilogue:
    """accumulators: tiles that the main loop sums. reads: tiles as large that are loaded before the result is stored. unrounded: whether a
    biased sum is activated as it is."""

    accumulators: int = 1
    reads: int = 0
    unrounded: bool = False


PLAIN, SWIGLU = Epilogue(), Epilogue(accumulators=2)
SLOPE, SWIGLU_SLOPE, ACCUMULATE = Epilogue(reads=1), Epilogue(reads=2), Epilogue(reads=1)


@dataclass(frozen=True)
class Tile:
    """m x n of C, k a step. maxnreg: registers a thread that the assembler may use; None where it is to decide."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def options(self) -> dict[str, int | None]:
        """What a launch is given."""
        sizes = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "GROUP_M": GROUP_M}
        return sizes | {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}


TENSOR_CORE = ((128, 256, 64, 8), (128, 128, 64, 8), (128, 64, 64, 8), (64, 64, 64, 4))
FMA = ((64, 64, 16, 8),)
GROUP_M = 8
"""Rows of tiles that are taken together, column by column: their part of A stays in the L2 cache while B's columns pass."""
MAX_STAGES = 4
FEW_REGISTERS = 128
"""Of a thread with 32 accumulators on sm_100: left to itself, the assembler takes 80 for a slope, and spills. On sm_80 128 would spill."""
MORE_REGISTERS = 255
"""The same where rows are no whole vectors, and each element has an address of its own: two programs a multiprocessor."""
SHARED = {75: 64, 80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
"""KiB that one program may have; 99 on the other architectures."""
FLOPS = {75: 1024, 80: 2048, 90: 4096, 100: 8192, 120: 2048}
"""Dense 16-bit FLOPs a cycle of a multiprocessor: the datasheet's peak over clock and count. Of another architecture: the one below it."""
L2_BYTES = 64
"""A cycle of a multiprocessor, from the L2 cache."""


def choose(rows: int, columns: int, dtype: torch.dtype, target: Target, epilogue: Epilogue, vectors: bool = True) -> Tile:
    """For C [rows, columns] from operands of `dtype`; `columns` are those of one accumulator where there are two.

    vectors: whether every row starts at a multiple of 16 elements, in all tensors.
    """
    found = candidates(dtype, target.arch, epilogue, vectors)
    return min(found, key=lambda tile: cycles(tile, rows, columns, dtype, target, epilogue))


def candidates(dtype: torch.dtype, arch: int, epilogue: Epilogue, vectors: bool = True) -> list[Tile]:
    """Every tile that `choose` may return for this architecture, the largest first: of equal ones it is chosen."""
    if dtype == torch.float32 or arch < 80:
        return [Tile(*size, num_stages=2) for size in FMA]
    found = []
    for m, n, k, warps in TENSOR_CORE if vectors else TENSOR_CORE[-1:]:
        numbers = m * n // (32 * warps)
        if registers_fit(numbers, arch, epilogue):
            stages = min(shared(arch) // stage_bytes(m, n, k, dtype, epilogue), MAX_STAGES)
            few = datacenter_blackwell(arch) and numbers * epilogue.accumulators <= 32
            found.append(Tile(m, n, k, warps, stages, (FEW_REGISTERS if vectors else MORE_REGISTERS) if few else None))
    return found


def datacenter_blackwell(arch: int) -> bool:
    """tcgen05; sm_120 has the mma.sync of sm_80."""
    return 100 <= arch < 120


def registers_fit(numbers: int, arch: int, epilogue: Epilogue) -> bool:
    """numbers: of one tile, a thread."""
    accumulators = numbers * epilogue.accumulators
    operands_in_registers = arch < 90 or arch >= 120
    half = operands_in_registers or (epilogue.unrounded and datacenter_blackwell(arch))
    return accumulators <= (64 if half else 128) and accumulators + numbers * epilogue.reads <= 128


def shared(arch: int) -> int:
    """Bytes of shared memory that a program may have."""
    return SHARED.get(arch, 99) * 1024


def stage_bytes(m: int, n: int, k: int, dtype: torch.dtype, epilogue: Epilogue) -> int:
    """Of shared memory for one step along K."""
    return (m + n * epilogue.accumulators) * k * dtype.itemsize


def cycles(tile: Tile, rows: int, columns: int, dtype: torch.dtype, target: Target, epilogue: Epilogue) -> float:
    """Of the busiest multiprocessor, for each number along K."""
    tiles = ceil_div(rows, tile.m) * ceil_div(columns, tile.n)
    n = tile.n * epilogue.accumulators
    flops = FLOPS[max((arch for arch in FLOPS if arch <= target.arch), default=75)]
    return ceil_div(tiles, target.sms) * (2 * tile.m * n / flops + (tile.m + n) * dtype.itemsize / L2_BYTES)
