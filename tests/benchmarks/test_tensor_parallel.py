"""Contenders of a parallel block have one loss and send what they must."""

from functools import partial

import pytest
import torch

from benchmarks import tensor_parallel
from benchmarks.common import count, interleaved

TINY = tensor_parallel.Sizes(b=2, s=8, hidden=32, heads=4, ffn=48, vocab=40, layers=1)
EAGER = [name + variant for name in ("megapar", "DTensor") for variant in ("", ", sequence-parallel")]


def tensor_parallel_once() -> tuple[dict[str, float], dict[str, int], bool]:
    found = tensor_parallel.contenders(TINY, [*EAGER, tensor_parallel.PLAIN])
    values = tensor_parallel.losses(found, TINY)
    tensor_parallel.check(values)
    seconds = interleaved(found, partial(tensor_parallel.draw, TINY), repeats=1, inner=1, warmup=0)
    sent = {c.name: count(c, tensor_parallel.draw(TINY, -1)).sent for c in found}
    return values, sent, bool((seconds[0, :, :-1] > 0).all())


def test_tensor_parallel(ranks):
    for values, sent, timed in ranks.run(2, tensor_parallel_once):
        assert list(values) == [*EAGER, tensor_parallel.PLAIN]
        assert timed
        assert sent["megapar"] >= 5 * 4 * TINY.b * TINY.s * TINY.hidden  # the embedding's all-reduce and the block's four
        assert sent[tensor_parallel.PLAIN] == 0


def test_check_of_losses():
    with pytest.raises(AssertionError, match="b: loss"):
        tensor_parallel.check({"a": 1.0, "b": 1.0001})


def test_bars_of_sequence_parallelism():
    assert [v.holds for v in tensor_parallel.verdicts(TINY, EAGER, torch.tensor([[1.0, 1.0, 1.4, 1.2]]))] == [True, False]
