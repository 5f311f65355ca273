"""The gradient norm as compiled: registers, 128 bits a load, shared memory for sums over warps alone."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megapar.ops.triton.grad_norm import grad_norm_
from tests.aot.common import assert_lean, compiled, config, every_config, launches, meta

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def norm(*dtypes, numels=(5000,), zeros=False, offset=0):
    grads = [meta(n + offset, dtype=dtype)[offset:] for n in numels for dtype in dtypes]
    grad_norm_(meta(3, dtype=torch.float64), grads, zeros)


CASES = {f"{name}{'-zeros' * zeros}": (name, zeros) for name, zeros in itertools.product(DTYPES, (False, True))}
CALLS = {name: lambda case=case: norm(DTYPES[case[0]], zeros=case[1]) for name, case in CASES.items()}


def check(call, arch):
    name, _ = next(CASES[name] for name in CALLS if CALLS[name] is call)
    kernels = compiled(call, arch)
    assert [kernel.name for kernel in kernels] == ["sums_kernel", "tensors_kernel", "total_kernel"]
    for kernel in kernels:
        assert_lean(kernel)
        assert kernel.shared <= 8 * kernel.num_warps, "what a sum over the warps takes, and no tile goes through it"
    # The squares, for 16 bits once more in fp64, and the counts.
    passes, width = (2, 2) if name == "fp32" else (3, 1)
    wide = kernels[0].count(r"LDG\.E(\.\w+)*\.128")
    assert wide % width == 0 and wide // width >= passes, kernels[0].instructions
    assert kernels[0].occupancy() >= 0.5


@every_config(CALLS, ["fp32", "bf16"])
def test_compiled(call, arch):
    check(call, arch)


@pytest.mark.every_config
@pytest.mark.parametrize("name", [name for name in CASES if "bf16" not in name])
def test_compiled_for_turing(name):
    check(CALLS[name], 75)


@pytest.mark.every_config
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", DTYPES)
def test_tensors_that_are_not_aligned(name, arch):
    kernel = compiled(lambda: norm(DTYPES[name], offset=1), arch)[0]
    assert_lean(kernel)
    assert kernel.count(r"LDG\.E(\.\w+)*\.128") == 0


@given(st.lists(st.sampled_from(list(DTYPES.values())), min_size=1), st.lists(st.integers(0, 10**7), min_size=1, max_size=5), st.booleans())
def test_list_is_complete(dtypes, numels, zeros):
    listed = {config(x) for call in CALLS.values() for x in launches(call, 80)}
    found = launches(lambda: norm(*dtypes, numels=numels, zeros=zeros), 80)
    assert {config(x) for x in found} <= listed
    assert len(found) == (2 + len(set(dtypes)) if any(numels) else 0)
