"""The backward split in two, so that weight gradients fill the bubbles (Qi et al. 2023, arXiv:2401.10241).

Only the gradient of a stage's input (I) is waited for by another rank. The gradient of its weights (W) may come at any time after, at the
price of keeping the micro-batch's activations until then. Forwards and input gradients keep the order of the schedule that is split, so
this is ZB-H1 for 1F1B: from m >= pp on, each rank idles (pp - 1) max(F, I, F + I - W) instead of (pp - 1) (F + I + W).
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

from megapar.pipeline.check import Event, check, dependencies
from megapar.pipeline.orders import interleaved_1f1b
from megapar.pipeline.schedule import Action, Schedule
from megapar.pipeline.simulate import Costs, simulate

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of a W that must fit into a bubble. None of them is best for all costs; all five cost microseconds an action."""


def zero_bubble(
    pp: int, chunks: int, microbatches: int, group: int | None = None, *, costs: Costs | None = None, limit: int | None = None
) -> Schedule:
    """`interleaved_1f1b`, which is 1F1B with one chunk, with its backwards split by `split_backward`."""
    return split_backward(interleaved_1f1b(pp, chunks, microbatches, group), costs, limit)


def split_backward(schedule: Schedule, costs: Costs | None = None, limit: int | None = None) -> Schedule:
    """Replaces each B by I and, where the simulation has a bubble, W.

    `costs` are the simulation's. `limit` is the number of live activations that no rank may exceed; by default the most that any rank of
    the given schedule has, so that the memory of the fullest rank does not grow. Several ways to place W are simulated and the fastest is
    returned. One of them is W right after I, so it is never slower than the given schedule.

    ValueError if there is more than F and B in the schedule, if it deadlocks, or if `limit` is below what it has already.
    """
    costs = Costs() if costs is None else costs
    if any(a.kind not in ("F", "B") for actions in schedule.ranks for a in actions):
        raise ValueError("only a schedule of F and B can be split: give the one without sends and sharding, and add those after")
    needed = max(check(schedule))
    limit = needed if limit is None else limit
    if limit < needed:
        raise ValueError(f"limit={limit} live activations is less than the schedule has before it is split: give {needed} or more")
    at_once = Schedule(tuple(tuple(part for a in actions for part in _halves(a)) for actions in schedule.ranks), schedule.stage_to_rank)
    choices = [at_once, *(_fill(schedule, costs, limit, share) for share in _SHARES)]
    return min(choices, key=lambda choice: simulate(choice, costs).makespan)


def _halves(action: Action) -> tuple[Action, ...]:
    return (action._replace(kind="I"), action._replace(kind="W")) if action.kind == "B" else (action,)


@dataclass
class _Rank:
    """A rank while its list grows: what is left of its F and I, which W it owes, since when it is free, how many activations it keeps."""

    todo: deque[Action]
    owed: deque[Action] = field(default_factory=deque)
    done: list[Action] = field(default_factory=list)
    free: float = 0.0
    live: int = 0


def _fill(schedule: Schedule, costs: Costs, limit: int, share: float) -> Schedule:
    """Runs the schedule in time. A rank whose next F or I is not there yet, or is an F beyond the limit, does the oldest W that it owes,
    if at least this share of it fits until then."""
    durations, holder, needs = costs.by_stage(schedule.stages), schedule.stage_to_rank, dependencies(schedule)
    ranks = [_Rank(deque(_halves(a)[0] for a in actions)) for actions in schedule.ranks]
    ended: dict[Event, float] = {}

    def arrival(rank: int) -> float | None:
        """When the rank's next F or I can start; None while that can't be known, since what it waits for has not started."""
        times = [0.0]
        for event in needs(ranks[rank].todo[0]):
            if event not in ended:
                return None
            times.append(ended[event] + costs.communication * (holder[event[1]] != rank))
        return max(times)

    queue = [(0.0, rank) for rank in range(len(ranks))]
    asleep: list[int] = []
    while queue:
        _, rank = heapq.heappop(queue)
        own = ranks[rank]
        at = arrival(rank) if own.todo else None
        if not own.todo and not own.owed:
            continue
        full = bool(own.todo) and own.todo[0].kind == "F" and own.live == limit
        fits = bool(own.owed) and (at is None or (own.free < at and own.free + share * durations["W"][own.owed[0].stage] <= at))
        if full or fits:
            action, start = own.owed.popleft(), own.free
        elif at is None:
            asleep.append(rank)
            continue
        else:
            action, start = own.todo.popleft(), max(own.free, at)
        own.free = ended[action] = start + durations[action.kind][action.stage]
        own.done.append(action)
        own.live += (action.kind == "F") - (action.kind == "W")
        if action.kind == "I":
            own.owed.append(action._replace(kind="W"))
        heapq.heappush(queue, (own.free, rank))
        for sleeper in [other for other in asleep if arrival(other) is not None]:
            asleep.remove(sleeper)
            heapq.heappush(queue, (ranks[sleeper].free, sleeper))
    return Schedule(tuple(tuple(own.done) for own in ranks), holder)
