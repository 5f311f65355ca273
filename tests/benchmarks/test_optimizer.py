"""The optimizer phase, ours and torch's, on a few tensors; its bars."""

from typing import Any

import pytest

from benchmarks import optimizer
from benchmarks.common import interleaved


def optimizer_once() -> dict[str, Any]:
    sizes = [(64, 33), (65,), (1000, 64)]
    found = {}
    for layout in [*optimizer.LAYOUTS, optimizer.ALONE]:
        contenders = [c for c in optimizer.contenders(layout, sizes, 1) if c.name != optimizer.COMPILED]
        errors = optimizer.check(contenders)
        allocations = {c.name: optimizer.largest_allocation(c) for c in contenders}
        contenders += optimizer.limits(1000, 1)
        seconds = interleaved(contenders, optimizer.draw, repeats=1, inner=1, warmup=0)[0].tolist()
        told = {"names": [c.name for c in contenders], "seconds": seconds, "allocations": allocations, "errors": errors}
        found[layout.name] = {**told, "parameters": 64 * 33 + 65 + 64000}
    return found


def test_optimizer(ranks):
    (found,) = ranks.run(1, optimizer_once)
    layouts = [*optimizer.LAYOUTS, optimizer.ALONE]
    for layout in layouts:
        told = found[layout.name]
        assert len(told["errors"]) == 2 and told["allocations"][optimizer.OURS] < 4096
        assert optimizer.grid(layout, told).rows[0][0] == optimizer.OURS
    # Ours moves 34 bytes in the time in which triad moves 12: 34 / 12 of its bytes a second.
    even = {
        "names": [optimizer.OURS, optimizer.EAGER, optimizer.TRIAD],
        "seconds": [[1.0, 2.0, 1.0]],
        "parameters": 1,
        "allocations": {optimizer.OURS: 0},
    }
    norm = {"names": [optimizer.OURS, "torch"], "seconds": [[1.0, 14.0]]}
    verdicts = optimizer.verdicts([(layouts[0], even)], even, norm)
    assert [v.holds for v in verdicts] == [True, True, True, False]
    assert verdicts[0].ratio == pytest.approx(34 / 12) and verdicts[2].ratio == 2
