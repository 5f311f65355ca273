"""GEMMs of a linear layer agree with torch's before they are timed; their bars."""

import pytest
import torch

from benchmarks import linear


def linear_once() -> tuple[list[str], list[list[float]]]:
    return linear.measure(linear.Case(5, 8, 12, torch.bfloat16), 1, 1, True, False)


def test_linear(ranks):
    """Ours and torch's agree in every dtype, and are timed."""
    for dtype in linear.NAMES:
        case = linear.Case(5, 8, 12, dtype)
        linear.check(linear.contenders(1), linear.draw(case, 0))
        linear.check(linear.swiglu_contenders(1, False), linear.draw(case, 0))
    names, seconds = ranks.run(1, linear_once)[0]
    assert names == [linear.FUSED, linear.TWO, linear.EAGER]
    assert all(second > 0 for row in seconds for second in row)
    with pytest.raises(AssertionError, match="forward ours and forward torch differ"):
        broken = linear.contenders(1, ("forward",))
        broken[0].step = lambda data: linear.linear_forward(data["x"], data["weight"]) * 1.1
        linear.check(broken, linear.draw(case, 0))


def test_bars_of_linear():
    names = [f"{kind} {who}" for kind in linear.KINDS for who in ("ours", "torch")]
    case = linear.Case(10, 10, 10, torch.bfloat16)

    def found(ours: list[float]) -> linear.Found:
        rows = [[second for one in ours for second in (one, 1.4)]]
        return {str(case): (case, names, torch.tensor(rows, dtype=torch.float64))}

    assert [v.holds for v in linear.verdicts(found([1.0, 1.0, 1.0, 0.77]), None)] == [True, True, True]
    assert [v.holds for v in linear.verdicts(found([0.5, 1.0, 1.6, 0.8]), None)] == [True, False, False]
    slow = linear.verdicts(found([1.2, 1.2, 1.2, 1.2]), 2 * 2000 / 1.4 / 1e9)
    assert [v.holds for v in slow] == [False, True, False]
    assert "at the measured peak it would be 2.00" in slow[0].bar and "forward of 10 x 10 -> 10" in slow[1].bar
