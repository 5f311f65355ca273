"""Every contender computes one gradient with Megatron's collectives, and the bars can fail."""

from functools import partial

import pytest
import torch

from benchmarks import overhead
from benchmarks.common import count, interleaved


def overhead_once() -> tuple[dict[str, float], dict[str, int], bool]:
    """Gradient errors, collectives by contender, whether all times are positive."""
    sizes = overhead.Sizes(hidden=32, ffn=48)
    found = overhead.contenders(sizes)
    errors = overhead.errors(found, sizes)
    seconds = interleaved(found, partial(overhead.draw, sizes), repeats=1, inner=1, warmup=0)
    collectives = {c.name: count(c, overhead.draw(sizes, -1)).collectives for c in found}
    return errors, collectives, bool((seconds[0] > 0).all())


@pytest.mark.parametrize("world", [1, 2])
def test_overhead(ranks, world):
    for errors, collectives, timed in ranks.run(world, overhead_once):
        assert len(errors) == 7
        assert all(0 <= error <= overhead.AGREE for error in errors.values()), errors
        assert timed
        # Megatron's scheme: two all-reduces forward, two backward.
        assert collectives["megapar"] == collectives["DTensor"] == (4 if world == 2 else 0)


def test_bars():
    names = [overhead.PLAIN, overhead.OURS, overhead.DTENSOR]
    fast, slow = torch.tensor([[1.0, 1.1, 5.0]]), torch.tensor([[1.0, 1.3, 5.0]])
    launches = dict.fromkeys(("tp=1", "tp=2", "tp=2, no wire"), (names, torch.stack([fast, slow])))
    assert [v.holds for v in overhead.verdicts(launches)] == [True, True, True]
    launches = dict.fromkeys(launches, (names, torch.stack([slow, fast])))
    assert [v.holds for v in overhead.verdicts(launches)] == [False, False, False]
