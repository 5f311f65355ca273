"""The learning rate: linear warm-up, cosine, and the closed form at the steps where an off-by-one shows."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.training.lr import learning_rate

RATE = {"steps": 101, "lr": 1.0, "min_lr": 0.1, "warmup": 0.05}


def test_warm_up_and_cosine_closed_form():
    rates = [learning_rate(i, **RATE) for i in range(101)]
    # round(0.05 * 101) = 5 rising updates, the fifth of which has the peak; update 5 has it too, then 95 steps of half a cosine.
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 95)))
    assert rates[100] == pytest.approx(0.1)


def test_middle_of_the_cosine_is_the_mean():
    rate = {"steps": 11, "lr": 3e-3, "min_lr": 1e-3, "warmup": 0.0}
    assert learning_rate(5, **rate) == pytest.approx(2e-3)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 0.9), (4, 0.0)])
def test_without_warm_up_the_first_update_has_the_peak(steps, warmup):
    assert learning_rate(0, steps=steps, lr=2e-3, min_lr=1e-4, warmup=warmup) == 2e-3


def test_two_steps_end_at_the_minimum():
    assert learning_rate(1, steps=2, lr=2e-3, min_lr=1e-4, warmup=0.0) == pytest.approx(1e-4)


@given(st.integers(1, 3000), st.floats(0, 0.999), st.floats(1e-6, 10), st.floats(0, 1))
def test_bounds_and_shape(steps, warmup, lr, ratio):
    rates = [learning_rate(i, steps=steps, lr=lr, min_lr=lr * ratio, warmup=warmup) for i in range(0, steps, max(1, steps // 50))]
    assert max(rates) <= lr * (1 + 1e-12)
    assert min(rates) >= min(lr * ratio, rates[0]) * (1 - 1e-9)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
