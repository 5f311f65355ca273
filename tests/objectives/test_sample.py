"""Samples: bad text refused by every objective, one sample an index, packing and batches against their definition."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.objectives.causal_lm import CausalLM
from megapar.objectives.randomness import Generator
from megapar.objectives.sample import IGNORED, Sample, collate, pack
from tests.objectives.common import COMMON, OBJECTIVES, RESET, seeds, text, thousand


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bad_text_is_refused(name):
    objective, most = OBJECTIVES[name], OBJECTIVES[name].tokens_needed
    for tokens, told in [
        (text(0), "the text has 0 tokens and a sample takes 2 to .*: leave it out or join it"),
        (text(1), "the text has 1 tokens"),
        (text(most + 1), f"the text has {most + 1} tokens and a sample takes 2 to {most}: cut it into windows or raise sequence_length"),
        (np.array([1, 20]), r"token ids run from 1 to 20 and must be in \[0, 20\)"),
        (np.array([-1, 3]), "token ids run from -1 to 3"),
        (np.array([[1, 2]]), r"tokens are int64 of shape \(1, 2\) and must be integers \[n\]"),
        (np.array([1.0, 2.0]), r"tokens are float64"),
    ]:
        with pytest.raises(ValueError, match=told):
            objective(tokens, Generator(0))
    objective(text(2), Generator(0))
    assert len(objective(text(most), Generator(0)).tokens) <= objective.sequence_length


def fields(sample: Sample) -> dict[str, object]:
    return {f.name: np.asarray(getattr(sample, f.name)).tolist() for f in dataclasses.fields(sample)}


@thousand
@given(st.sampled_from(list(OBJECTIVES)), seeds, st.integers(0, 3), st.integers(0, 10**6), st.data())
def test_a_sample_is_a_function_of_its_index(name, seed, epoch, index, data):
    objective = OBJECTIVES[name]
    tokens = text(data.draw(st.integers(2, objective.tokens_needed)), index, low=0)
    first = fields(objective(tokens, Generator(seed, epoch, index, name)))
    before = tokens.copy()
    objective(tokens, Generator(seed, epoch, index + 1, name))  # another in between
    assert fields(objective(tokens.astype(np.int32), Generator(seed, epoch, index, name))) == first
    assert (tokens == before).all(), "the text is left alone"
    assert all(len(first[f]) == len(first["tokens"]) for f in first if f != "objective")  # type: ignore[arg-type]


def test_megatrons_boundaries():
    """What megatron-core 0.16.1 makes of this window with all its resets on."""
    tokens = np.array([5, 6, 0, 7, 8, 9, 0, 1, 2])
    sample = CausalLM(sequence_length=8, vocab_size=10, end_id=0, **RESET)(tokens, Generator())
    assert sample.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert (sample.targets != IGNORED).astype(int).tolist() == [1, 1, 0, 1, 1, 1, 0, 1]
    assert np.bincount(sample.segment_ids).tolist() == [3, 4, 1]
    plain = CausalLM(sequence_length=8, vocab_size=10, end_id=0)(tokens, Generator())
    assert plain.targets.tolist() == tokens[1:].tolist() and not plain.segment_ids.any()
    with pytest.raises(ValueError, match="reset_attention_mask need to know where documents end and end_id is none"):
        CausalLM(sequence_length=8, vocab_size=10, reset_attention_mask=True)


@thousand
@given(st.lists(st.tuples(st.sampled_from(list(OBJECTIVES)), st.integers(2, 8)), max_size=12), seeds)
def test_packing(documents, seed):
    samples = [OBJECTIVES[name](text(n, i, low=0), Generator(seed, i)) for i, (name, n) in enumerate(documents)]
    bins = pack(samples, 30)
    # First fit, in a loop.
    expected: list[list[Sample]] = []
    for sample in samples:
        for chosen in expected:
            if sum(len(s.tokens) for s in chosen) + len(sample.tokens) <= 30:
                chosen.append(sample)
                break
        else:
            expected.append([sample])
    assert len(bins) == len(expected)
    for packed, parts in zip(bins, expected, strict=True):
        start = segments = 0
        for part in parts:
            at = slice(start, start + len(part.tokens))
            for name in ("tokens", "targets", "position_ids"):
                assert getattr(packed, name)[at].tolist() == getattr(part, name).tolist()
            assert (packed.prefix_end[at] - start).tolist() == part.prefix_end.tolist()
            assert (packed.segment_ids[at] - segments).tolist() == part.segment_ids.tolist()
            start, segments = at.stop, int(packed.segment_ids[at].max()) + 1
        assert start == len(packed.tokens) <= 30
        assert packed.objective == "+".join(dict.fromkeys(part.objective for part in parts))


def test_collate():
    causal, prefix = Sample.of(np.arange(1, 5), "causal_lm"), Sample.of(np.arange(11, 17), "prefix_lm", 3)
    batch = collate([causal, causal], 4)
    assert batch.is_causal and batch.tokens.tolist() == [1, 2, 3, 0] * 2 and batch.position_ids.tolist() == [0, 1, 2, 0] * 2
    assert batch.targets is not None and batch.targets.tolist() == [2, 3, 4, IGNORED] * 2
    batch = collate([causal, prefix], 6)
    assert batch.segment_ids is None and batch.prefix_len is not None
    assert batch.prefix_len.tolist() == [0] * 6 + [3] * 5 + [0]
    batch = collate(pack([causal, prefix], 8), 9)
    assert batch.segment_ids is not None and batch.segment_ids.tolist() == [0] * 3 + [1] * 5 + [-1]


def test_objectives_of_a_mixture_are_numbered():
    samples = [Sample.of(np.arange(1, 5), name) for name in ("b", "a", "b")]
    ids = collate(samples, 4, ("a", "unused", "b")).objective_ids
    assert ids is not None and ids.tolist() == [2, 0, 2]
    assert collate(samples, 4).objective_ids is None
    with pytest.raises(ValueError, match=re.escape("samples are of ['b'] and the objectives are ['a']: name all of them")):
        collate(samples, 4, ("a",))


def test_refusals():
    sample = Sample.of(np.arange(6), "causal_lm")
    with pytest.raises(ValueError, match="a sample of 5 tokens does not fit into sequences of 4: cut the text or raise sequence_length"):
        pack([sample], 4)
    with pytest.raises(ValueError, match="1 samples of at most 5 tokens do not make a batch of 4"):
        collate([sample], 4)
    with pytest.raises(ValueError, match="0 samples"):
        collate([], 4)
    with pytest.raises(ValueError, match="sequence_length=0 must be 1 or more"):
        CausalLM(**{**COMMON, "sequence_length": 0})
