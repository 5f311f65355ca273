"""Recovery's decisions: pure functions of numbers that all ranks have."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.training.config import RecoveryConfig
from megapar.training.recovery import Event, Watch, is_valid
from megapar.training.run_state import RunState

QUIET = [(4.0, 1.0), (4.2, 1.2), (3.9, 0.9), (4.1, 1.1)]


def watched(policy: RecoveryConfig, past: list[tuple[float, float]] = QUIET) -> Watch:
    watch = Watch(policy)
    for loss, norm in past:
        assert watch.judge(loss, norm, False) is None
    return watch


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
def test_what_is_not_finite_gets_its_action_whatever_spikes_get(value, action):
    for loss, norm, name in ((value, 1.0, "loss"), (4.0, value, "gradient norm")):
        watch = watched(RecoveryConfig(non_finite=action))
        verdict = watch.judge(loss, norm, False)
        assert verdict.action == action and verdict.reason == f"the {name} is {value}"
        assert list(watch.history) == QUIET


def test_an_overflow_is_the_loss_scales_business_but_a_loss_that_is_not_finite_is_not():
    watch = watched(RecoveryConfig(non_finite="rollback"))
    assert watch.judge(4.0, math.inf, True) is None
    assert list(watch.history) == QUIET, "an overflow says nothing about the steps to come"
    assert watch.judge(math.nan, math.inf, True).action == "rollback"


def test_a_spike_is_so_many_deviations_above_the_mean_and_no_less():
    losses = [loss for loss, _ in QUIET]
    limit = statistics.fmean(losses) + 3 * statistics.pstdev(losses)
    policy = RecoveryConfig(spike="skip", window=8, sigma=3.0)
    assert watched(policy).judge(limit + 1e-9, 1.0, False).action == "skip"
    assert watched(policy).judge(limit - 1e-9, 1.0, False) is None
    assert watched(policy).judge(-50.0, 1.0, False) is None, "only what is above is far"
    norms = [norm for _, norm in QUIET]
    far = statistics.fmean(norms) + 3 * statistics.pstdev(norms) + 1e-9
    assert "gradient norm" in watched(policy).judge(4.0, far, False).reason


def test_a_factor_is_of_the_median():
    policy = RecoveryConfig(spike="rollback", window=8, sigma=None, factor=2.0)
    assert watched(policy).judge(8.1 + 1e-9, 1.0, False).action == "rollback"
    assert watched(policy).judge(8.1 - 1e-9, 1.0, False) is None
    assert watched(policy).judge(4.0, 2.1 + 1e-9, False).action == "rollback"


def test_spikes_need_half_a_window_of_steps_before_them():
    policy = RecoveryConfig(spike="skip", window=8)
    assert watched(policy, QUIET[:3]).judge(1e9, 1.0, False) is None
    assert watched(policy, QUIET).judge(1e9, 1.0, False) is not None
    assert watched(RecoveryConfig(window=8)).judge(1e9, 1.0, False) is None, "spikes are ignored unless told otherwise"


def test_a_spike_that_was_seen_is_not_what_later_steps_are_compared_with():
    watch = watched(RecoveryConfig(spike="skip", window=8))
    for _ in range(20):
        assert watch.judge(1e9, 1.0, False) is not None


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), max_size=40), st.integers(2, 9))
def test_a_run_that_is_resumed_judges_as_the_one_that_went_on(steps, window):
    policy = RecoveryConfig(spike="skip", window=window, sigma=2.0)
    on, again = Watch(policy), Watch(policy)
    for loss, norm in steps:
        state = RunState.from_dict(RunState().to_dict(again), again)  # through a checkpoint at every step
        assert state == RunState()
        assert on.judge(loss, norm, False) == again.judge(loss, norm, False)
    assert len(on.history) <= window


def test_a_checkpoint_is_valid_while_no_later_rollback_went_behind_it():
    rollbacks = [Event(50, "rollback", "", (0, 1), 40), Event(60, "rollback", "", (0, 1), 20)]
    assert is_valid(20, 0, rollbacks) and is_valid(20, 1, rollbacks)
    assert not is_valid(30, 0, rollbacks), "the second one went behind it"
    assert not is_valid(45, 0, rollbacks[:1]) and is_valid(45, 1, rollbacks[:1]), "of the line before and after the first"
    assert is_valid(999, 2, rollbacks)


def test_a_state_comes_back_from_plain_data():
    watch = watched(RecoveryConfig())
    event = Event(7, "rollback", "why", (96, 104), 5)
    state = RunState(9, 72, 8, 64, 2, [event])
    again = Watch(RecoveryConfig())
    assert RunState.from_dict(state.to_dict(watch), again) == state and again.history == watch.history
