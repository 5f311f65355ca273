"""AdamW as compiled: registers, 128 bits an access, no conversion of layouts, one square root and one division an element."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megapar.ops.triton.adamw import adamw_
from tests.aot.common import assert_lean, compiled, config, every_config, launches, meta

F32, BF16, FP16, INT16 = torch.float32, torch.bfloat16, torch.float16, torch.int16
KINDS = [(F32, None), (BF16, None), (FP16, None), (BF16, F32), (FP16, F32), (BF16, INT16)]
NAMES = {F32: "fp32", BF16: "bf16", FP16: "fp16", INT16: "remainder", None: "none"}
SCALAR_DIVISION = 3
"""Reciprocals that the one 64-bit division of a chunk's place costs."""


def update(weight, master, grad, moment, drawn, *, numels=(5000,), offset=0):
    def column(dtype):
        return [meta(n + offset, dtype=dtype)[offset:] for n in numels]

    state = meta(6, dtype=torch.float64), meta(1, 3, dtype=torch.float64)
    lists = column(weight), column(grad), column(master) if master else [], column(moment), column(moment)
    noise = {"seed": 1, "ids": [0] * len(numels)} if drawn else {}
    adamw_(*lists, *state, [0] * len(numels), lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, **noise)


def rounds(weight, master, moment) -> bool:
    """Whether there is anything to draw for, and it is not refused."""
    kept = {moment} if master else {moment, weight}
    return BF16 in kept and FP16 not in kept


CASES = {}
for (w, m), g, s in itertools.product(KINDS, (F32, BF16, FP16), (F32, BF16)):
    for drawn in (False, True) if rounds(w, m, s) else (False,):
        CASES[f"{NAMES[w]}-{NAMES[m]}-{NAMES[g]}-{NAMES[s]}{'-drawn' * drawn}"] = (w, m, g, s, drawn)
CALLS = {name: lambda case=case: update(*case) for name, case in CASES.items()}
SUBSET = ["fp32-none-fp32-fp32", "bf16-fp32-bf16-fp32", "bf16-remainder-bf16-fp32", "bf16-remainder-bf16-bf16-drawn"]


def check(call, arch):
    weight, master, grad, moment, drawn = next(CASES[name] for name in CALLS if CALLS[name] is call)
    (kernel,) = compiled(call, arch)
    assert_lean(kernel)
    assert kernel.layouts == 0 and kernel.shared == 0
    stored = [moment, moment, weight, *([master] if master else [])]
    loaded = [grad, moment, moment, *([master] if master is F32 else [weight, master] if master else [weight])]
    loads, stores = (sum(dtype.itemsize // 2 for dtype in streams) for streams in (loaded, stored))
    # Those of a thread's eight elements. The tile at a tensor's end, an element a thread in two halves, has two narrow ones of each stream.
    assert kernel.count(r"LDG\.E(\.\w+)*\.128") == loads, kernel.instructions
    assert kernel.count(r"STG\.E(\.\w+)*\.128") == stores and kernel.count("STG") == stores + 2 * len(stored), kernel.instructions
    assert kernel.count(r"MUFU\.(SQRT|RSQ)") == 8 + 2
    assert kernel.count(r"MUFU\.RCP") == 8 + 2 + SCALAR_DIVISION * drawn
    assert kernel.occupancy() >= (0.375 if drawn else 0.5)


@every_config(CALLS, SUBSET)
def test_compiled(call, arch):
    check(call, arch)


@pytest.mark.every_config
@pytest.mark.parametrize("name", [name for name in CASES if "bf16" not in name and "remainder" not in name])
def test_compiled_for_turing(name):
    check(CALLS[name], 75)


@pytest.mark.every_config
@pytest.mark.parametrize("name", SUBSET)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_tensors_that_are_not_aligned(name, arch):
    (kernel,) = compiled(lambda: update(*CASES[name], offset=1), arch)
    assert_lean(kernel)
    assert kernel.count(r"(LDG|STG)\.E(\.\w+)*\.128") == 0 and kernel.layouts == 0


@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(1, 10**7), min_size=1, max_size=5), st.booleans())
def test_list_is_complete(name, numels, drawn):
    """A seed changes nothing where nothing is kept in bf16 alone."""
    weight, master, grad, moment, _ = CASES[name]
    if drawn and weight is FP16 and not master:
        return
    listed = {config(x) for x in launches(CALLS[name], 80)}
    if drawn:
        listed |= {config(x) for x in launches(CALLS.get(name.removesuffix("-drawn") + "-drawn", CALLS[name]), 80)}
    case = (weight, master, grad, moment, drawn or CASES[name][-1])
    assert {config(x) for x in launches(lambda: update(*case, numels=numels), 80)} <= listed


def test_one_launch_a_combination():
    assert len(launches(lambda: update(BF16, INT16, BF16, F32, False, numels=(1, 5000, 0, 10**6)), 90)) == 1
    assert launches(lambda: update(BF16, INT16, BF16, F32, False, numels=(0,)), 90) == []
