"""The scalars of a step: the kernel and the plain PyTorch body against arithmetic on Python floats, and the loss scale's life."""

import decimal
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar.ops import step_state as module
from megapar.ops.step_state import FIELDS, LossScaling, StepState, step_state_, step_state_reference
from tests.row_ops import on_cpu

BODIES: list[Callable[..., None]] = [torch.ops.megapar.step_state_.default, step_state_reference]
BETAS = [(0.9, 0.999), (0.0, 0.5), (0.95, 0.99)]


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def run(body: Callable[..., None], state: StepState, total: Any, count: float = 1.0, rows: Any = (0,), **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "use_reference_on", lambda device: body is step_state_reference)
        step_state_(state, doubles(*total), doubles(count), rows=rows, betas=[BETAS[r] for r in rows], **options)


@pytest.mark.parametrize("body", BODIES)
@settings(max_examples=60, deadline=None)
@given(
    squares=st.floats(0, 1e60), count=st.sampled_from([1.0, 3.0, 12345.0]), scale=st.sampled_from([1.0, 65536.0, 3.0]),
    max_norm=st.sampled_from([None, 1e-3, 1.0, 1e30]), steps=st.integers(1, 4),
)  # fmt: skip
def test_numbers_of_a_step(body, squares, count, scale, max_norm, steps):
    state = StepState.create(3, loss_scale=scale)
    for _ in range(steps):
        run(body, state, (squares, 0, 0), count, rows=(0, 2), max_norm=max_norm)
    norm = math.sqrt(squares) / (scale * count)
    clip = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
    assert float(state.grad_norm) == pytest.approx(norm, rel=1e-14)
    assert float(state.grad_scale) == pytest.approx(clip / (scale * count), rel=2**-24)
    assert float(state.grad_scale) == float(state.grad_scale.float()), "an fp32 number"
    assert (float(state.skip), float(state.loss_scale)) == (0, scale)
    assert state.applied_steps.tolist() == [steps, 0, steps]
    for row in (0, 2):
        expected = [1 / (1 - BETAS[row][0] ** steps), 1 / math.sqrt(1 - BETAS[row][1] ** steps)]
        assert state.counters[row, 1:].tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("steps", [1, 2, 3, 31, 1000, 12345, 999_999, 1_000_000])
def test_bias_corrections_far_along(body, steps):
    """Within 1e-14 of 1 - beta^n to 60 digits, also where the power is so near 1 that fp64 would have few digits left of the rest; 40
    parameters, each in a row of its own."""
    betas = [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 1 - 1e-6, 1 - 1e-9, 1 - 2.0**-53] * 4
    state = StepState.create(len(betas) + 1)
    state.counters[:, 0] = float(steps - 1)
    rows = list(range(len(betas), 0, -1))
    total, count = doubles(1, 0, 0), doubles(1)
    body(state.scalars, state.counters, total, count, rows, betas, betas[::-1], None, 2.0, 0.5, 0, 1, 1.0)
    with decimal.localcontext(prec=60):
        exact = {beta: 1 - decimal.Decimal(beta) ** steps for beta in betas}
        expected = [[float(1 / exact[a]), float(1 / exact[b].sqrt())] for a, b in zip(betas, betas[::-1], strict=True)]
    found = state.counters[rows]
    torch.testing.assert_close(found[:, 1:], torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    assert found[:, 0].unique().tolist() == [steps] and state.counters[0].tolist() == [steps - 1, 0, 0]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("total", [(math.nan, 1, 0), (math.inf, 2, 0), (4.0, 1, 0), (math.inf, 0, 0)])
def test_what_is_not_finite_skips(body, total):
    state = StepState.create(1, loss_scale=8.0)
    run(body, state, (1.0, 0, 0))
    before = state.counters.clone()
    run(body, state, total)
    assert float(state.skip) == 1 and float(state.loss_scale) == 8
    assert torch.equal(state.counters, before)
    run(body, state, (1.0, 0, 0))
    assert float(state.skip) == 0 and float(state.applied_steps[0]) == 2


@pytest.mark.parametrize("body", BODIES)
def test_growth(body):
    state, how = StepState.create(1, loss_scale=4.0, hysteresis=2), LossScaling(growth_interval=3, hysteresis=2)
    scales = []
    for bad in (0, 0, 0, 0, 1, 0, 0, 0):
        run(body, state, (1.0, bad, 0), scaling=how)
        scales.append(float(state.loss_scale))
    assert scales == [4, 4, 8, 8, 8, 8, 8, 16], "a skipped step starts the count again"


@pytest.mark.parametrize("body", BODIES)
def test_backoff_waits_for_hysteresis_and_stops_at_min_scale(body):
    state, how = StepState.create(1, loss_scale=16.0, hysteresis=2), LossScaling(hysteresis=2, min_scale=3.0)
    scales = []
    for bad in (1, 0, 1, 1, 1, 1, 1, 0, 1):
        run(body, state, (1.0, bad, 0), scaling=how)
        scales.append(float(state.loss_scale))
    assert scales == [16, 16, 16, 8, 4, 3, 3, 3, 3], "the finite steps in between start the hysteresis again"


@pytest.mark.parametrize("body", BODIES)
def test_the_scale_does_not_grow_out_of_fp32(body):
    state = StepState.create(1, loss_scale=2.0**127)
    run(body, state, (1.0, 0, 0), scaling=LossScaling(growth_interval=1))
    assert float(state.loss_scale) == 2.0**127


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), max_size=30), st.integers(1, 4), st.integers(1, 3))
def test_both_bodies_agree(finite, interval, hysteresis):
    how = LossScaling(growth_interval=interval, hysteresis=hysteresis, growth_factor=1.7, backoff_factor=0.3, min_scale=0.1)
    states = [StepState.create(1, loss_scale=5.0, hysteresis=hysteresis) for _ in BODIES]
    for ok in finite:
        for body, state in zip(BODIES, states, strict=True):
            run(body, state, (2.0, not ok, 0), scaling=how, max_norm=0.5)
    torch.testing.assert_close(states[0].scalars, states[1].scalars, rtol=1e-15, atol=0)
    torch.testing.assert_close(states[0].counters, states[1].counters, rtol=1e-14, atol=0)


@pytest.mark.parametrize("body", BODIES)
def test_no_rows(body):
    state = StepState.create(0)
    run(body, state, (4.0, 0, 0), rows=())
    assert float(state.grad_norm) == 2


def test_views_are_named_as_they_lie():
    state = StepState(doubles(0, 1, 2, 3, 4, 5), torch.zeros(1, 3, dtype=torch.float64))
    assert [float(getattr(state, name)) for name in FIELDS[:4]] == [0, 1, 2, 3]


@on_cpu  # a GPU's count is not read
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("count", [0.0, -1.0, math.nan])
def test_nothing_counted(body, count):
    state = StepState.create(1)
    before = state.scalars.clone()
    with pytest.raises(ValueError, match=r"count=.* must be above 0"):
        run(body, state, (1.0, 0, 0), count)
    assert torch.equal(state.scalars, before)


def test_a_row_twice():
    with pytest.raises(ValueError, match=r"rows=\[0, 1, 0\] must name each row once"):
        run(BODIES[0], StepState.create(2), (1.0, 0, 0), rows=(0, 1, 0))


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_bad_max_norm(max_norm):
    with pytest.raises(ValueError, match=r"max_norm=.* must be above 0"):
        run(BODIES[0], StepState.create(1), (1.0, 0, 0), max_norm=max_norm)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("growth_factor", 0.5),
        ("backoff_factor", 0.0),
        ("backoff_factor", 1.5),
        ("growth_interval", 0),
        ("hysteresis", 0),
        ("min_scale", 0.0),
    ],
)
def test_bad_scaling(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must"):
        LossScaling(**{name: value})


def test_other_refusals():
    op, state = BODIES[0], StepState.create(1)
    rest = (None, 2.0, 0.5, 0, 1, 1.0)
    with pytest.raises(ValueError, match=r"row 1 must lie in \[0, 1\)"):
        op(state.scalars, state.counters, doubles(1, 0, 0), doubles(1), [1], [0.9], [0.9], *rest)
    with pytest.raises(ValueError, match="rows has 1 entries, beta1 0"):
        op(state.scalars, state.counters, doubles(1, 0, 0), doubles(1), [0], [], [0.9], *rest)
    with pytest.raises(ValueError, match="scalars is Float"):
        op(state.scalars.float(), state.counters, doubles(1, 0, 0), doubles(1), [0], [0.9], [0.9], *rest)
    with pytest.raises(ValueError, match=r"loss_scale=0\.0 must be positive"):
        StepState.create(1, loss_scale=0.0)


def test_opcheck():
    state = StepState.create(2)
    arguments = (state.scalars, state.counters, doubles(1, 0, 0), doubles(1), [1], [0.9], [0.9], 1.0, 2.0, 0.5, 1, 1, 1.0)
    torch.library.opcheck(torch.ops.megapar.step_state_.default, arguments)
