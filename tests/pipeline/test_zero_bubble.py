"""Split backwards: never slower than what is split, at no more memory, close to the best there is."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megapar.pipeline.check import check
from megapar.pipeline.orders import interleaved_1f1b, one_f_one_b
from megapar.pipeline.passes import with_communication
from megapar.pipeline.schedule import Action, Schedule
from megapar.pipeline.simulate import Costs, simulate
from megapar.pipeline.zero_bubble import split_backward, zero_bubble
from tests.pipeline.common import costs_of, layouts


@settings(max_examples=250, deadline=None)
@given(st.data(), layouts(16))
def test_never_slower_and_never_more_memory(data, layout) -> None:
    pp, chunks, microbatches, group = layout
    costs = data.draw(costs_of(pp * chunks))
    whole = interleaved_1f1b(pp, chunks, microbatches, group)
    split = split_backward(whole, costs)
    most = max(whole.peak_activations())
    check(split, limit=most)
    check(with_communication(split, costs))
    for before, after in zip(whole.ranks, split.ranks, strict=True):
        assert [a._replace(kind="I") if a.kind == "B" else a for a in before] == [a for a in after if a.kind != "W"]
    assert simulate(split, costs).makespan <= simulate(whole, costs).makespan * (1 + 1e-12)


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 8), st.integers(0, 16), st.integers(1, 5), st.integers(0, 5), st.integers(0, 5))
def test_bubble_is_the_formula(pp, more, weight, forward_more, input_more) -> None:
    microbatches = pp + more
    costs = Costs(weight + forward_more, weight + input_more, weight)  # W <= F, as in every transformer: the paper's case
    makespan = simulate(zero_bubble(pp, 1, microbatches, costs=costs), costs).makespan
    times = costs.forward + costs.input_gradient, costs.weight_gradient
    assert makespan == microbatches * sum(times) + (pp - 1) * (times[0] - times[1])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 8), st.tuples(*[st.integers(1, 9)] * 3))
def test_bubble_for_any_costs(pp, more, times) -> None:
    """Nothing is there to fill with when the first rank waits (pp - 1) I for its first gradient, and the last (pp - 1) F for its first
    input: a W above F or I does not help."""
    forward, input_gradient, weight = times
    makespan = simulate(zero_bubble(pp, 1, pp + more, costs=Costs(*times)), Costs(*times)).makespan
    assert makespan == (pp + more) * sum(times) + (pp - 1) * max(forward, input_gradient, forward + input_gradient - weight)


@settings(max_examples=100, deadline=None)
@given(layouts(12), st.tuples(*[st.integers(1, 3)] * 3))
def test_ragged_is_no_longer_than_the_next_multiple_of_the_group(layout, times) -> None:
    pp, chunks, microbatches, group = layout
    group, costs = (group or pp) if chunks > 1 else pp, Costs(*times)
    whole = -(-microbatches // group) * group
    ragged = simulate(zero_bubble(pp, chunks, microbatches, group, costs=costs), costs).makespan
    assert ragged <= simulate(zero_bubble(pp, chunks, whole, group, costs=costs), costs).makespan


def placements(actions: list[Action], limit: int) -> Iterator[tuple[Action, ...]]:
    """Every list of a rank with these F and I in this order, the W of each after its I, at most `limit` activations. W of one stage are
    alike, so they come in the order of their I."""

    def grow(index: int, owed: list[Action], live: int, done: tuple[Action, ...]) -> Iterator[tuple[Action, ...]]:
        if index == len(actions) and not owed:
            yield done
        if owed:
            yield from grow(index, owed[1:], live - 1, (*done, owed[0]))
        if index < len(actions) and not (actions[index].kind == "F" and live == limit):
            action = actions[index]
            more = [action._replace(kind="W")] if action.kind == "I" else []
            yield from grow(index + 1, owed + more, live + (action.kind == "F"), (*done, action))

    return grow(0, [], 0, ())


def least_makespan(schedule: Schedule, costs: Costs, limit: int) -> float:
    """By trying all placements of W."""
    orders = [[a._replace(kind="I") if a.kind == "B" else a for a in actions] for actions in schedule.ranks]
    lists = [list(placements(order, limit)) for order in orders]
    return min(simulate(Schedule(ranks, schedule.stage_to_rank), costs).makespan for ranks in itertools.product(*lists))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2)]))
def test_close_to_the_best_placement(data, layout) -> None:
    pp, microbatches = layout
    costs = data.draw(costs_of(pp, lowest=0.5))
    whole = one_f_one_b(pp, microbatches)
    best = least_makespan(whole, costs, max(whole.peak_activations()))
    assert best * (1 - 1e-12) <= simulate(split_backward(whole, costs), costs).makespan <= best * 1.05


@settings(max_examples=4, deadline=None)
@given(st.tuples(*[st.integers(1, 4)] * 3))
@example((1, 1, 1))
def test_close_to_the_best_placement_of_three_on_three(times) -> None:
    whole, costs = one_f_one_b(3, 3), Costs(*times)
    best = least_makespan(whole, costs, max(whole.peak_activations()))
    assert best <= simulate(split_backward(whole, costs), costs).makespan <= best * 1.05


def least_makespan_of_any_order(pp: int, microbatches: int, costs: Costs, limit: int) -> float:
    """Over every order of F, I and W on every rank that keeps at most `limit` activations: branch and bound over schedules in time.
    Micro-batches are alike, so each kind takes them in order; a state is how many of each a rank has done."""
    durations = costs.by_stage(pp)
    work = [microbatches * (durations["F"][s] + durations["I"][s] + durations["W"][s]) for s in range(pp)]
    best = sum(work)
    seen: dict[tuple, list[tuple]] = {}

    def ready(done: dict[str, list[list[float]]], rank: int, kind: str) -> float | None:
        m = len(done[kind][rank])
        before = {"F": [("F", rank - 1)], "I": [("F", rank), ("I", rank + 1)], "W": [("I", rank)]}[kind]
        near = [(k, r) for k, r in before if 0 <= r < pp]
        if any(m >= len(done[k][r]) for k, r in near):
            return None
        return max((done[k][r][m] + costs.communication * (r != rank) for k, r in near), default=0.0)

    def grow(done: dict[str, list[list[float]]], free: list[float], left: list[float]) -> None:
        nonlocal best
        if max(f + rest for f, rest in zip(free, left, strict=True)) >= best - 1e-12:
            return
        if not any(left):
            best = max(free)
            return
        counts = tuple(len(done[k][r]) for k in "FIW" for r in range(pp))
        times = (*free, *(end for k in "FI" for r in range(pp) for end in done[k][r]))
        if any(all(a <= b for a, b in zip(other, times, strict=True)) for other in seen.get(counts, [])):
            return
        seen.setdefault(counts, []).append(times)
        starts = []
        for rank in range(pp):
            for kind in "IFW":
                full = kind == "F" and len(done["F"][rank]) - len(done["W"][rank]) == limit
                at = None if full or len(done[kind][rank]) == microbatches else ready(done, rank, kind)
                if at is not None:
                    starts.append((max(at, free[rank]), rank, kind))
        soonest = min(start + durations[kind][rank] for start, rank, kind in starts)
        for start, rank, kind in sorted(starts):
            if start >= soonest:  # something else could have been done before: that branch has it
                continue
            end = start + durations[kind][rank]
            done[kind][rank].append(end)
            freed, rest = [*free], [*left]
            freed[rank], rest[rank] = end, max(0.0, left[rank] - durations[kind][rank])
            if all(len(done[k][rank]) == microbatches for k in "FIW"):
                rest[rank] = 0.0
            grow(done, freed, rest)
            done[kind][rank].pop()

    grow({k: [[] for _ in range(pp)] for k in "FIW"}, [0.0] * pp, work)
    return best


@settings(max_examples=150, deadline=None)
@given(st.tuples(*[st.floats(1.0, 2.0)] * 3), st.sampled_from([0.0, 0.1]), st.integers(1, 3), st.integers(1, 3))
def test_close_to_the_best_of_any_order(times, communication, pp, microbatches) -> None:
    """The order of F and I is not the split's to choose, but where stages cost alike that of 1F1B is best; with messages nearly."""
    costs = Costs(*times, communication=communication)
    whole = one_f_one_b(pp, microbatches)
    best = least_makespan_of_any_order(pp, microbatches, costs, max(whole.peak_activations()))
    split = simulate(split_backward(whole, costs), costs).makespan
    assert best * (1 - 1e-12) <= split <= best * (1.05 if communication else 1 + 1e-12)


def test_limit() -> None:
    """More room lets more weight gradients wait for a bubble; less than the schedule has already is refused."""
    costs = Costs(1, 1, 1, 1)
    whole = one_f_one_b(3, 8)
    tight, loose = split_backward(whole, costs), split_backward(whole, costs, limit=6)
    assert (max(check(tight)), max(check(loose))) == (3, 5)
    assert (simulate(tight, costs).makespan, simulate(loose, costs).makespan) == (36, 33)
    with pytest.raises(ValueError, match="limit=2 live activations is less than the schedule has"):
        split_backward(whole, costs, limit=2)


def test_what_is_split_is_f_and_b() -> None:
    with pytest.raises(ValueError, match="only a schedule of F and B"):
        split_backward(zero_bubble(2, 1, 2))
    with pytest.raises(ValueError, match="only a schedule of F and B"):
        split_backward(with_communication(one_f_one_b(2, 2)))
