"""Cross-entropy's parts: statistics of any cut of the vocabulary join to the whole's."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar.ops.cross_entropy import cross_entropy_grad, cross_entropy_join, cross_entropy_loss, cross_entropy_statistics

OPTIONS = {"vocab_size": 9, "label_smoothing": 0.2, "z_loss": 0.01}
logit = st.one_of(st.floats(-50, 50), st.sampled_from([1e4, -1e4, -torch.inf]))


def statistics(z: torch.Tensor, target: torch.Tensor, edges: list[int], smoothing: float) -> torch.Tensor:
    """[parts, 4, t] with the vocabulary cut at `edges`."""
    parts = []
    for a, b in zip([0, *edges], [*edges, z.shape[1]], strict=True):
        inside = (target >= a) & (target < b)
        parts.append(cross_entropy_statistics(z[:, a:b], torch.where(inside, target - a, -1), smoothing))
    return torch.stack(parts)


@settings(deadline=None)
@given(st.lists(logit, min_size=9, max_size=9), st.integers(0, 8), st.sets(st.integers(1, 8), max_size=4))
def test_any_cut(row, y, edges):
    z, target = torch.tensor([row], dtype=torch.float64), torch.tensor([y])
    lse, at_target, total = cross_entropy_join(statistics(z, target, sorted(edges), 0.2))
    torch.testing.assert_close(lse, z.logsumexp(-1), rtol=1e-13, atol=1e-13)
    assert torch.equal(at_target, z[:, y])
    torch.testing.assert_close(total, z.sum(-1), rtol=1e-12, atol=2e-10)  # 9 x 9e4 x 2^-52: terms of 1e4 cancel


@settings(deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=9, max_size=9), st.integers(0, 8), st.booleans())
def test_gradient(row, y, ignored):
    z = torch.tensor([row], dtype=torch.float64, requires_grad=True)
    target, ignore = torch.tensor([y]), torch.tensor([ignored])
    lse, at_target, total = cross_entropy_join(statistics(z, target, [], 0.2))
    loss = cross_entropy_loss(lse, at_target, total, ignore, **OPTIONS)
    (expected,) = torch.autograd.grad(loss.sum() * 3, z)
    lse, dloss = lse.detach(), torch.tensor([3.0], dtype=torch.float64)
    got = cross_entropy_grad(dloss, z.detach(), target, lse, ignore, **OPTIONS)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_statistics_of_16_bits_are_fp32():
    z = torch.zeros(1, 5000, dtype=torch.bfloat16)
    parts = cross_entropy_statistics(z, torch.tensor([7]), 0.1)
    assert parts.dtype == torch.float32 and parts[1].item() == 5000.0, "a bf16 sum of ones stops at 256"


def test_ignored_rows_may_hold_anything():
    z = torch.tensor([[torch.inf, torch.nan, 0.0]])
    index, ignored = torch.tensor([-1]), torch.tensor([True])
    lse, at_target, total = cross_entropy_join(cross_entropy_statistics(z, index, 0.1)[None])
    assert cross_entropy_loss(lse, at_target, total, ignored, **OPTIONS).tolist() == [0.0]
    assert cross_entropy_grad(torch.tensor([torch.nan]), z, index, lse, ignored, **OPTIONS).tolist() == [[0.0] * 3]
