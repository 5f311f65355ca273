"""Dropout: the mask is a function of (seed, layer, site, sample, position, feature) alone, and looks random in each of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapar.ops import dispatch
from megapar.ops.dropout import dropout, dropout_key, dropout_reference, dropout_rows
from tests.row_ops import (
    DEVICE,
    DTYPES,
    ROWS,
    WIDTHS,
    check_op,
    each_number_of_threads,
    examples,
    integers,
    kernels_only,
    normal,
    strided,
)

KEY = dropout_key(1, 2, 3)
of_the_hash = pytest.mark.skipif(
    dispatch.INTERPRETED, reason="statistics of the hash, to which test_is_its_reference ties each body; minutes in the interpreter"
)


def rows_of(t: int, s: int = 7) -> Tensor:
    at = torch.arange(t)
    return dropout_rows(at // s, at % s)


@settings(deadline=None, max_examples=examples(120))
@given(
    st.sampled_from(ROWS),
    st.sampled_from(WIDTHS),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 2.0**-32, 0.1, 0.5, 0.999, 1 - 2.0**-53]),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([0, 5, 2**31 - 3, 2**32 - 2000]),
    st.booleans(),
)
def test_is_its_reference(t, h, dtype, p, key, column, dense):
    """Bit for bit: integers decide, and one product is rounded."""
    x, rows = normal(t, h, dtype=dtype), rows_of(t)
    x = (x if dense else strided(x)).detach().requires_grad_()
    y = dropout(x, p, rows, key, column)
    assert torch.equal(y, dropout_reference(x.detach(), rows, key, p, column))
    dy = normal(t, h, dtype=dtype, seed=1)
    y.backward(dy)
    assert torch.equal(x.grad, dropout_reference(dy, rows, key, p, column))


def kept(t: int, h: int, p: float = 0.5, rows: Tensor | None = None, key: int = KEY, column: int = 0) -> Tensor:
    return dropout(torch.ones(t, h), p, rows_of(t) if rows is None else rows, key, column) > 0


def test_rows_keep_their_masks_wherever_they_are():
    """Any order of the rows, any cut of the features, any layout of the leading dimensions."""
    whole, rows = kept(20, 50), rows_of(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0), device="cpu").to(DEVICE)
    assert torch.equal(kept(20, 50, rows=rows[order]), whole[order])
    assert torch.equal(torch.cat([kept(20, 13), kept(20, 37, column=13)], 1), whole)
    folded = dropout(torch.ones(4, 5, 50), 0.5, rows.view(4, 5), KEY)
    assert torch.equal(folded > 0, whole.view(4, 5, 50))


def test_every_part_of_the_key_counts():
    parts = [dropout_key(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (2**63, 0, 0), (-1, 0, 0))]
    assert len(set(parts)) == len(parts) and all(-(2**63) <= key < 2**63 for key in parts)
    sample, position = torch.arange(100).repeat_interleave(100), torch.arange(100).repeat(100)
    assert len(dropout_rows(sample, position).unique()) == 10000, "(0, 1) and (1, 0) are two tokens"


def correlation(a: Tensor, b: Tensor) -> float:
    """Standard deviations from what independent masks that keep half have in common."""
    return float(((a == b).double().mean() - 0.5) * 2 * a.numel() ** 0.5)


@of_the_hash
def test_neighbours_are_independent():
    """Of seed, layer, site, sample, position, feature: 13 comparisons, each beyond 5 sigma once in 1.7 million."""
    whole = kept(700, 1000)
    for key in (dropout_key(2, 2, 3), dropout_key(1, 3, 3), dropout_key(1, 2, 4), dropout_key(2, 1, 3)):
        assert abs(correlation(whole, kept(700, 1000, key=key))) < 5, key
    for by in (1, 2, 7, 64, 512):
        assert abs(correlation(whole[by:], whole[:-by])) < 5, f"rows {by} apart"
    for by in (1, 2, 16, 256):
        assert abs(correlation(whole[:, by:], whole[:, :-by])) < 5, f"columns {by} apart"


@of_the_hash
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate(p):
    """Chi-square of the counts by row and by column, each within 5 sigma of its degrees of freedom; and the rate of all."""
    t, h = 1500, 1100
    mask = kept(t, h, p).double()
    assert abs(float(mask.mean()) - (1 - p)) < 5 * (p * (1 - p) / (t * h)) ** 0.5
    for dim, n, cells in ((1, h, t), (0, t, h)):
        chi2 = float(((mask.sum(dim) - n * (1 - p)).square() / (n * p * (1 - p))).sum())
        assert abs(chi2 - cells) < 5 * (2 * cells) ** 0.5, f"dim {dim}: {chi2:.0f} for {cells} degrees of freedom"


@of_the_hash
def test_avalanche():
    """Each bit of the row's key and of the column flips half of the hash: half of the masks at p = 1/2, which is its highest bit."""
    rows = integers(-(2**62), 2**62, 4000, seed=0)
    base = kept(4000, 16, rows=rows)
    for bit in range(64):
        flipped = rows ^ (1 << bit if bit < 63 else -(2**63))
        assert abs(correlation(base, kept(4000, 16, rows=flipped))) < 5.5, f"bit {bit} of the row"
    for bit in range(4, 31):
        assert abs(correlation(base, kept(4000, 16, rows=rows, column=1 << bit))) < 5.5, f"bit {bit} of the column"


def test_scale_and_zeros():
    x = torch.full((50, 40), 3.0)
    y = dropout(x, 0.25, rows_of(50), KEY)
    assert set(y.unique().tolist()) == {0.0, 4.0}
    assert torch.equal(dropout(x, 0.0, rows_of(50), KEY), x)
    x[:] = torch.nan
    assert int(dropout(x, 0.25, rows_of(50), KEY).isnan().sum()) == int((y > 0).sum()), "what is dropped is 0 whatever it was"


def test_threads():
    x, rows = normal(1003, 258, dtype=torch.bfloat16), rows_of(1003)
    each_number_of_threads(lambda: (dropout(x, 0.3, rows, KEY),))


def test_gradcheck_of_the_wiring():
    x = normal(3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.3, rows_of(3), KEY), x)


def test_opcheck():
    check_op("dropout", normal(3, 20, dtype=torch.bfloat16), rows_of(3), KEY, 0.3, 5)


@kernels_only
@pytest.mark.parametrize(
    "change,told",
    [
        ({"p": 1.0}, "p=1 must lie in [0, 1): lower it"),
        ({"p": -0.1}, "p=-0.1 must lie in [0, 1)"),
        ({"p": float("nan")}, "p=nan must lie in [0, 1)"),
        ({"rows": torch.arange(3)}, "rows has shape [3] and dtype Long: give one int64 for each of the 4 rows of x"),
        ({"rows": torch.arange(4).int()}, "rows has shape [4] and dtype Int"),
        ({"column": -1}, "column=-1 and the 8 columns behind it must lie in [0, 2^32)"),
        ({"column": 2**32 - 7}, "column=4294967289 and the 8 columns"),
    ],
)
def test_refusals(change, told):
    arguments = {"x": torch.ones(4, 8), "p": 0.5, "rows": torch.arange(4), "key": KEY, "column": 0}
    with pytest.raises(ValueError) as caught:
        dropout(**arguments | change)
    assert told in str(caught.value)
