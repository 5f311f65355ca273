"""The scalars of a step as compiled: one program, nothing in local memory, the same for every step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megapar.ops.triton.step_state import step_state_
from tests.aot.common import TARGETS, assert_lean, compiled, config, launches, meta

F64 = torch.float64


def step(rows=1, max_norm=None, interval=0, hysteresis=1):
    state = meta(6, dtype=F64), meta(rows, 3, dtype=F64), meta(3, dtype=F64), meta(1, dtype=F64)
    betas = [0.9] * rows
    step_state_(*state, list(range(rows)), betas, betas, max_norm, 2.0, 0.5, interval, hysteresis, 1.0)


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=() if arch == 90 else pytest.mark.every_config) for arch in TARGETS])
def test_compiled(arch):
    (kernel,) = compiled(step, arch)
    assert_lean(kernel)
    assert kernel.layouts == 0 and kernel.num_warps == 1


@given(st.integers(0, 100), st.sampled_from([None, 1.0]), st.integers(0, 2**40), st.integers(1, 16))
def test_one_kernel_for_every_call(rows, max_norm, interval, hysteresis):
    (found,) = launches(lambda: step(rows, max_norm, interval, hysteresis), 90)
    assert config(found) == config(launches(step, 90)[0]) and found.grid == (1,)
