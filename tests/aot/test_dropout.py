"""Dropout's kernel as compiled: registers, and 128 bits an access."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megapar.ops.triton.dropout import dropout, dropout_kernel
from tests.aot.common import assert_lean, assert_listed, assert_narrow, compiled, every_config, meta

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (128, 256, 512, 4096, 4097)


def run(t: int, h: int, dtype: torch.dtype, key: int = 1 << 40, p: float = 0.1, column: int = 0) -> None:
    dropout(meta(t, h, dtype=dtype), meta(t, dtype=torch.int64), key, p, column)


CALLS = {f"{str(dtype)[6:]}-{h}": lambda dtype=dtype, h=h: run(64, h, dtype) for dtype in DTYPES for h in WIDTHS}
TWO_ROWS = [CALLS[f"float32-{h}"] for h in WIDTHS if h < 1024]
ODD = [CALLS[name] for name in CALLS if name.endswith("4097")]


@every_config(CALLS, ["bfloat16-4096", "bfloat16-128"], least=75)
def test_compiled(call, arch):
    (kernel,) = compiled(call, arch)
    assert_lean(kernel)
    assert kernel.occupancy() == 1 or call in ODD
    if call not in ODD:
        # The key of a row; in a tile of narrow rows a thread's two vectors of fp32 lie in two.
        assert_narrow(kernel, 2 if call in TWO_ROWS else 1, 0)


@given(
    st.integers(1, 300),
    st.integers(1, 70000),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 1, -1, 16, 2**31, 2**63 - 1, -(2**63)]),
    st.sampled_from([0.0, 2.0**-32, 0.5, 1 - 2.0**-53]),
    st.sampled_from([0, 1, 2**31, 2**32 - 70000]),
)
def test_list_is_complete(t, h, dtype, key, p, column):
    assert_listed(lambda: run(t, h, dtype, key, p, column), list(CALLS.values()))


def test_no_key_or_rate_is_compiled_apart():
    """An integer's type is that of its value unless the signature says it, and its value counts where it is 1 or divisible by 16."""
    types = {parameter.name: (parameter.annotation_type, parameter.do_not_specialize) for parameter in dropout_kernel.params}
    assert all(types[name] == ("i64", True) for name in ("key", "first", "least"))
