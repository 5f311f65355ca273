"""Tiles of the kernels that compute element by element, whose rows may be narrow."""

from __future__ import annotations

import triton

NUM_WARPS = 4


def tile(width: int) -> tuple[int, int]:
    """(rows, columns) of a program: always 1024 elements, 8 a thread, which is a 128-bit access of 16 bits; several rows where they are
    narrow, so that at least half of the lanes have work from 65 columns on."""
    block = min(max(triton.next_power_of_2(width), 128), 1024)
    return 1024 // block, block
