"""TokenBatch: shapes refused, masks against a loop over query and key."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar.batch import TokenBatch


def test_of():
    tokens = torch.arange(6).view(2, 3).t()  # b 3, s 2, not contiguous
    batch = TokenBatch.of(tokens)
    assert (batch.b, batch.s, batch.t) == (3, 2, 6)
    assert batch.tokens.tolist() == [0, 3, 1, 4, 2, 5]
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 0, 1]
    assert batch.is_causal


@pytest.mark.parametrize(
    "make,told",
    [
        (lambda: TokenBatch.of(torch.zeros(3, dtype=torch.int64)), r"tokens have shape \(3,\) and must be \[b, s\]"),
        (lambda: TokenBatch.of(torch.zeros(0, 3, dtype=torch.int64)), r"shape \(0, 3\)"),
        (lambda: TokenBatch.of(torch.zeros(2, 3, dtype=torch.int32)), r"dtype torch.int32 and must be ids of dtype torch.int64"),
        (lambda: batch_of(tokens=torch.zeros(2, 3, dtype=torch.int64)), r"tokens have shape \(2, 3\) and must be \[b \* s\] = \[6\]"),
        (lambda: batch_of(position_ids=torch.zeros(3, dtype=torch.int64)), r"position_ids have shape \(3,\)"),
        (lambda: batch_of(segment_ids=torch.zeros(2, 3, dtype=torch.int64)), r"segment_ids have shape \(2, 3\)"),
        (lambda: batch_of(prefix_len=torch.zeros(3, dtype=torch.int64)), r"prefix_len has shape \(3,\) and must be \[2\] or \[6\]"),
    ],
)
def test_refusals(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def batch_of(**changed: torch.Tensor) -> TokenBatch:
    ids = torch.zeros(6, dtype=torch.int64)
    return TokenBatch(2, 3, **{"tokens": ids, "position_ids": ids} | changed)


def may_attend(batch: TokenBatch, b: int, i: int, j: int) -> bool:
    """The rule, for query i and key j of sequence b."""
    if batch.segment_ids is not None and batch.segment_ids[b * batch.s + i] != batch.segment_ids[b * batch.s + j]:
        return False
    if batch.prefix_len is None:
        return j <= i
    ends = batch.prefix_len.tolist()
    end_i, end_j = (ends[b], ends[b]) if len(ends) == batch.b else (ends[b * batch.s + i], ends[b * batch.s + j])
    return j <= i or (i < end_i and j < end_j)


@settings(deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 6), st.booleans(), st.sampled_from(["none", "a sequence", "a token"]))
def test_mask(data, b, s, segmented, prefixed):
    segment_ids = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=b * s, max_size=b * s))) if segmented else None
    prefixes = {"none": 0, "a sequence": b, "a token": b * s}[prefixed]
    prefix_len = torch.tensor(data.draw(st.lists(st.integers(0, s), min_size=prefixes, max_size=prefixes))) if prefixes else None
    ids = torch.zeros(b * s, dtype=torch.int64)
    batch = TokenBatch(b, s, ids, ids, segment_ids, prefix_len)
    assert batch.is_causal is (segment_ids is None and prefix_len is None)
    mask = batch.attention_mask()
    assert mask.shape == (b, 1, s, s) and mask.dtype == torch.bool
    assert mask[:, 0].tolist() == [[[may_attend(batch, n, i, j) for j in range(s)] for i in range(s)] for n in range(b)]
    spans, index = batch.attention_spans(), torch.arange(s)
    if spans is not None:
        assert spans.dtype == torch.int32 and spans.shape == (b, s, 2)
        assert torch.equal((index >= spans[..., :1]) & (index < spans[..., 1:]), mask[:, 0])
    else:
        holes = mask[:, 0, :, 1:] & ~mask[:, 0, :, :-1]
        assert (holes.sum(-1) + mask[:, 0, :, 0] > 1).any(), "spans would have said it"


@pytest.mark.parametrize(
    ("segments", "prefixes", "said"),
    [
        ([0, 0, 1, 1, 1, -1], None, [[0, 1], [0, 2], [2, 3], [2, 4], [2, 5], [5, 6]]),
        (None, [4], [[0, 4], [0, 4], [0, 4], [0, 4], [0, 5], [0, 6]]),
        ([0, 0, 1, 1, 1, 1], [2, 2, 5, 5, 5, 5], [[0, 2], [0, 2], [2, 5], [2, 5], [2, 5], [2, 6]]),
        ([0, 0, 1, 1, 1, 1], [4], [[0, 2], [0, 2], [2, 4], [2, 4], [2, 5], [2, 6]]),
        ([0, 0, 1, 1, 0, 0], None, None),
        (None, [2, 2, 5, 5, 5, 5], [[0, 5], [0, 5], [0, 5], [0, 5], [0, 5], [0, 6]]),
        (None, [3, 3, 3, 3, 0, 0], [[0, 3], [0, 3], [0, 3], [0, 4], [0, 5], [0, 6]]),
        (None, [2, 2, 0, 5, 5, 5], None),
    ],
)
def test_spans(segments, prefixes, said):
    ids = torch.zeros(6, dtype=torch.int64)
    mask = [None if x is None else torch.tensor(x) for x in (segments, prefixes)]
    spans = TokenBatch(1, 6, ids, ids, *mask).attention_spans()
    assert spans is None if said is None else spans.tolist() == [said]


def test_memo_makes_once():
    batch, made = batch_of(), []
    assert [batch.memo("key", lambda: made.append(1) or len(made)) for _ in range(3)] == [1, 1, 1]
    assert batch.memo("other", lambda: 5) == 5
    assert batch.attention_mask() is batch.attention_mask()
    assert batch_of().memo("key", lambda: 9) == 9, "one batch, one memo"
    assert replace(batch, segment_ids=batch.tokens).memo("key", lambda: 9) == 9, "also where one is made of another"
