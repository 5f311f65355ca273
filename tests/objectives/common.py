"""What the tests of objectives share: text, every objective, and their inverses from nothing but ids."""

import itertools
from collections.abc import Iterable

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from megapar.objectives.causal_lm import CausalLM
from megapar.objectives.denoising import Denoising
from megapar.objectives.fim import FillInTheMiddle
from megapar.objectives.prefix_lm import PrefixLM
from megapar.objectives.sample import IGNORED, Ids, Sample
from megapar.objectives.spans import SpanNoise
from megapar.objectives.ul2 import UL2, Denoiser, ul2_denoisers

VOCAB, END = 20, 0
MASK, PRE, SUF, MID, R, S, X = range(VOCAB, VOCAB + 7)
SENTINELS = range(90, 30, -1)
MODEL_VOCAB = 91
MODES = {"R": (R,), "S": (S,), "X": (X,)}

thousand = settings(max_examples=1000, deadline=None)
seeds = st.integers(0, 2**40)
noises = st.builds(
    lambda ratio, above, lengths, placement: SpanNoise(
        ratio=ratio, mean_span=max(1.0, ratio / (1 - ratio)) + above, lengths=lengths, placement=placement
    ),
    st.floats(0.01, 0.9),
    st.sampled_from([0.0, 0.5, 2.0, 7.0, 63.0]),
    st.sampled_from(["composition", "poisson"]),
    st.sampled_from(["uniform", "t5"]),
)


def text(n: int, seed: int = 0, low: int = 1) -> Ids:
    return np.random.default_rng(seed).integers(low, VOCAB, n)


def whole(sample: Sample) -> list[int]:
    """The s + 1 ids that a sample was made of, and that every target is the next of them."""
    ids = [*sample.tokens.tolist(), int(sample.targets[-1])]
    assert all(target in (IGNORED, ids[i + 1]) for i, target in enumerate(sample.targets.tolist()))
    return ids


def joined(parts: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


def rejoined(inputs: list[int], targets: list[int]) -> list[int]:
    """The text of T5's inputs and targets: each sentinel replaced by what follows it in the targets. Sentinels are known by their ids."""
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token in SENTINELS:
            assert token not in spans, "each sentinel once"
            spans[token] = current = []
        else:
            current.append(token)
    found = [token for token in inputs if token in SENTINELS]
    assert found == list(spans) == list(SENTINELS[: len(found)]), "in order, the same on both sides"
    return joined(spans.get(token, [token]) for token in inputs)


COMMON = {"sequence_length": 24, "vocab_size": VOCAB}
FIM_IDS = {"prefix_id": PRE, "suffix_id": SUF, "middle_id": MID, "end_id": END}
RESET = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
OBJECTIVES = {
    "causal": CausalLM(**COMMON),
    "causal, documents": CausalLM(**COMMON, end_id=END, **RESET),
    "prefix": PrefixLM(**COMMON),
    "fim": FillInTheMiddle(**COMMON, **FIM_IDS, level="token", rate=1.0),
    "fim, documents": FillInTheMiddle(**COMMON, **FIM_IDS, level="token", rate=1.0, **RESET),
    **{
        style: Denoising(**COMMON, end_id=END, style=style, mask_id=MASK, sentinels=SENTINELS, noise=SpanNoise(ratio=0.3, mean_span=2))
        for style in ("sentinel", "infill", "mask", "replace", "delete")
    },
    **{
        denoiser.name: UL2(**COMMON, end_id=END, modes=MODES, sentinels=SENTINELS, denoisers=(denoiser,))
        for denoiser in (*ul2_denoisers(), Denoiser(name="S quarter", mode="S", target_ratio=0.25))
    },
}
