"""Kernels compiled for GPUs that are not there: what the tests of this folder share.

Each test file lists, as calls on meta tensors, everything that dispatch can choose for its op: the first few are what `make test` compiles
for sm_90, all of them for every architecture is `.ci/run`'s (`-m every_config` or not). A pure test draws other shapes and asserts that
what they would launch is among what the list launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megapar.ops.triton.ahead_of_time import Compiled, compile_launch
from megapar.ops.triton.launch import A100, H100, Launch, Target, recording

T4, B200 = Target(75, 40), Target(100, 148)
TARGETS = {75: T4, 80: A100, 90: H100, 100: B200}
Call = Callable[[], Any]


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(call: Call, arch: int) -> list[Launch]:
    """What `call` would launch."""
    with recording(TARGETS[arch]) as recorded:
        call()
    return recorded


def compiled(call: Call, arch: int) -> list[Compiled]:
    """One for each launch."""
    return [compile_launch(launch, arch) for launch in launches(call, arch)]


def config(launch: Launch) -> tuple[Any, ...]:
    """What is compiled apart: the kernel, its options, and each argument's dtype, value None apart from a tensor."""
    types = tuple(str(x.dtype) if isinstance(x, Tensor) else type(x).__name__ for x in launch.args)
    return launch.kernel.__name__, types, tuple(sorted(launch.options.items()))


def every_config(calls: dict[str, Call], subset: Sequence[str], *, least: int = 80) -> Any:
    """Parametrizes a test by `call` and `arch`: the `subset` for sm_90, and the rest, for each architecture from `least` on, marked."""
    cases = []
    for name, call in calls.items():
        for arch in TARGETS:
            if arch >= least:
                marks = () if arch == 90 and name in subset else (pytest.mark.every_config,)
                cases.append(pytest.param(call, arch, id=f"{name}-sm_{arch}", marks=marks))
    return pytest.mark.parametrize(("call", "arch"), cases)


def assert_lean(kernel: Compiled) -> None:
    """Nothing that should be in a register is in memory."""
    assert (kernel.spills, kernel.local, kernel.stack) == (0, 0, 0), f"{kernel.name} for sm_{kernel.arch} spills: {kernel}"


def assert_full_width(kernel: Compiled, loads: int, stores: int) -> None:
    """That many loads and stores of global memory are of 128 bits, and none is of fewer."""
    wide = kernel.count(r"LDG\.E(\.\w+)*\.128"), kernel.count(r"STG\.E(\.\w+)*\.128")
    every = kernel.count("LDG"), kernel.count("STG")
    assert wide == every == (loads, stores), f"{kernel.name} for sm_{kernel.arch}: {kernel.instructions}"


def assert_narrow(kernel: Compiled, loads: int, stores: int) -> None:
    """At most that many loads and stores of global memory, of single numbers of a row, are of fewer than 128 bits."""
    narrow = (kernel.count(r"LDG(?!.*\.128)"), kernel.count(r"STG(?!.*\.128)"))
    assert narrow[0] <= loads and narrow[1] <= stores, f"{kernel.name} for sm_{kernel.arch}: {kernel.instructions}"


def assert_listed(call: Call, listed: Sequence[Call]) -> None:
    """Whatever `call` launches, some call of the list launches too."""
    known = {config(x) for other in listed for x in launches(other, 80)}
    missing = [config(x) for x in launches(call, 80) if config(x) not in known]
    assert not missing, f"not compiled by any test: {missing[0]}"
