"""Strategies that several tests of the pipeline draw from."""

from hypothesis import strategies as st

from megapar.pipeline.simulate import Costs


@st.composite
def layouts(draw, largest: int = 24):
    """pp, chunks, micro-batches, group."""
    pp, chunks, microbatches = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, largest))
    return pp, chunks, microbatches, draw(st.none() | st.integers(pp, 2 * pp + 2))


@st.composite
def costs_of(draw, stages: int, lowest: float = 0.0):
    """A cost for each stage, or for all alike; sometimes with communication."""
    cost = st.floats(lowest, 3.0, allow_subnormal=False)
    numbers = [draw(cost | st.lists(cost, min_size=stages, max_size=stages)) for _ in range(3)]
    return Costs(*numbers, communication=draw(st.sampled_from([0.0, 0.05, 1.5])))
