"""Prefix LM: the cut, the off-by-one at it, refusals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.objectives.prefix_lm import PrefixLM
from megapar.objectives.randomness import Generator
from megapar.objectives.sample import IGNORED, Sample, collate
from tests.objectives.common import COMMON, R, seeds, text, thousand, whole


def test_known_value():
    """t5's and seqio's golden case, without their shift: split 3 of 8 has losses on the 5 tokens after it."""
    sample = Sample.of(np.array([9, 1, 2, 3, 4, 5, 6, 7]), "prefix_lm", 3)
    assert sample.tokens.tolist() == [9, 1, 2, 3, 4, 5, 6]
    assert sample.targets.tolist() == [IGNORED, IGNORED, 3, 4, 5, 6, 7]
    batch = collate([sample], 7)
    sees = batch.attention_mask()[0, 0].int().sum(1).tolist()
    assert sees == [3, 3, 3, 4, 5, 6, 7], "the first suffix token is predicted by the prefix's last, and seen by no token of the prefix"


@thousand
@given(st.integers(2, 24), seeds, st.sampled_from([(), (R,), (R, 1)]), st.sampled_from([None, 0.25, 0.999, 0.001]))
def test_inputs_and_targets_are_the_text(n, seed, mode, target_ratio):
    objective = PrefixLM(**{**COMMON, "sequence_length": 23 + len(mode)}, mode=mode, target_ratio=target_ratio)
    assert objective.tokens_needed == 24
    tokens = text(n, seed)
    sample = objective(tokens, Generator(seed))
    prefix = int(sample.prefix_end[0])
    assert whole(sample) == [*mode, *tokens.tolist()]
    assert 1 <= prefix - len(mode) <= n - 1
    assert sample.targets.tolist() == [IGNORED] * (prefix - 1) + [*mode, *tokens.tolist()][prefix:]
    if target_ratio is not None:
        assert n - (prefix - len(mode)) == min(max(round(n * target_ratio), 1), n - 1)


def test_cuts_are_uniform():
    tokens = text(11)
    cuts = np.bincount([PrefixLM(**COMMON)(tokens, Generator(i)).prefix_end[0] for i in range(2000)], minlength=11)
    assert cuts[0] == 0 and len(cuts) == 11
    assert ((cuts[1:] - 200) ** 2 / 200).sum() < 9 + 5 * 18**0.5


@pytest.mark.parametrize(
    "settings,told",
    [
        ({"sequence_length": 2, "mode": (1, 2)}, "sequence_length=2 is too short for 2 tokens of text: give 3 or more"),
        ({"target_ratio": 0.0}, "target_ratio=0.0 must be between 0 and 1"),
        ({"target_ratio": float("nan")}, "target_ratio=nan must be"),
    ],
)
def test_refusals(settings, told):
    with pytest.raises(ValueError, match=told):
        PrefixLM(**{**COMMON, **settings})
