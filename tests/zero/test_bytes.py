"""What crosses the wire, in elements and bytes that each rank sends.

Psi parameters, n ranks, m micro-batches, times (n - 1) / n: stages 0 to 2 move 2 Psi with one reduction a step, (m + 1) Psi with one each
micro-batch; stage 3, which gathers weights for every forward and backward, (2 m + 1) Psi and 3 m Psi.
"""

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed import Work

from megapar import ParallelMesh, transport
from megapar.mesh import Axis
from tests.zero.common import wrapped
from tests.zero.test_memory import PSI, WIDTH, Blocks

SMALL = 16
"""Elements: the step's few numbers are not counted."""


def sent(case: dict[str, Any], m: int) -> dict[str, int]:
    """Elements by dtype that this rank sends in a step, the second one, after `overlap` has learnt what to expect."""
    mesh = ParallelMesh()
    model = Blocks()
    optimizer = wrapped(model, mesh, **{"precision": "bf16", "bucket_bytes": 3 * 4 * WIDTH * WIDTH, **case})
    found: Counter[str] = Counter()
    real = transport.start_send

    def start_send(x: Tensor, axis: Axis, rank: int, tag: int) -> Work:
        if x.numel() > SMALL:
            found[str(x.dtype).removeprefix("torch.")] += x.numel()
        return real(x, axis, rank, tag)

    for _ in range(2):
        found.clear()
        # As between hosts, not through shared memory.
        with mock.patch.object(transport, "start_send", start_send), mock.patch.object(transport, "_memory", lambda *_, **__: None):
            for i in range(m):
                optimizer.backward(model(torch.randn(2, WIDTH).to(optimizer.precision.param)).float().sum(), last=i == m - 1)
            optimizer.step(4)
    return dict(found)


M = 3
CASES: list[tuple[dict[str, Any], dict[str, int]]] = [
    # Gradients travel as fp32, weights as bf16; a stage that shards nothing gathers the sums instead of the weights.
    ({"stage": 0}, {"float32": 2}),
    ({"stage": 1}, {"float32": 1, "bfloat16": 1}),
    ({"stage": 2}, {"float32": 1, "bfloat16": 1}),
    ({"stage": 0, "reduce_every": "micro_batch"}, {"float32": M + 1}),
    ({"stage": 1, "reduce_every": "micro_batch"}, {"float32": M, "bfloat16": 1}),
    ({"stage": 2, "reduce_every": "micro_batch"}, {"float32": M, "bfloat16": 1}),
    ({"stage": 3}, {"float32": 1, "bfloat16": 2 * M}),
    ({"stage": 3, "reduce_every": "micro_batch"}, {"float32": M, "bfloat16": 2 * M}),
    ({"stage": 3, "reshard_every": "step"}, {"float32": 1, "bfloat16": 1}),
    ({"stage": 3, "overlap": False}, {"float32": 1, "bfloat16": 2 * M}),
    ({"stage": 1, "gather_ahead": True}, {"float32": 1, "bfloat16": 1}),
    ({"stage": 2, "payload": torch.bfloat16}, {"bfloat16": 2}),
    ({"stage": 3, "payload": torch.bfloat16, "reduce_every": "micro_batch"}, {"bfloat16": 3 * M}),
    ({"stage": 1, "precision": "fp32"}, {"float32": 2}),
]


@pytest.mark.parametrize("n", [2, 4])
def test_elements_sent(ranks, n):
    for case, multiples in CASES if n == 2 else CASES[1::3]:
        expected = {dtype: multiple * PSI * (n - 1) // n for dtype, multiple in multiples.items()}
        assert ranks.run(n, sent, case, M) == [expected] * n, case


def test_alone_sends_nothing(ranks):
    for case, _ in CASES[::4]:
        assert ranks.run(1, sent, case, M) == [{}]
