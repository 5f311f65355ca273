"""Passes over a schedule: the sends and receives between ranks, and the sharding of parameters and gradients."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from megapar.pipeline.check import check, replay
from megapar.pipeline.schedule import COMPUTE, RECEIVES, SENDS, SHARDING, Action, Schedule
from megapar.pipeline.simulate import Costs, simulate


def prepared(schedule: Schedule, pp: int, shards: bool) -> Schedule:
    """The schedule as it is executed: proven, with its sends. Raises ValueError for one that does not suit `pp` ranks."""
    if len(schedule.ranks) != pp:
        raise ValueError(f"the schedule has {len(schedule.ranks)} ranks and the mesh pp={pp}: make one for {pp}, or another mesh")
    idle = sorted(set(range(pp)) - set(schedule.stage_to_rank))
    if idle:
        raise ValueError(f"the schedule gives rank {idle[0]} no stage: give every rank one, or use fewer ranks")
    if schedule.has(SHARDING) and not shards:
        raise ValueError("the schedule has sharding actions and the runner nobody to do them: give it sharding=, or a schedule without")
    if not schedule.has(("B", "I")):
        raise ValueError("the schedule has no backward, so it trains nothing: PipelineRunner.evaluate makes its own of forwards")
    if not schedule.has(SENDS + RECEIVES):
        check(schedule)
        schedule = with_communication(schedule)
    check(schedule)
    return schedule


def with_communication(schedule: Schedule, costs: Costs | None = None) -> Schedule:
    """Adds SEND and RECV wherever the neighbouring stage is on another rank. Two stages of one rank hand over in place.

    A send follows its F, I or B. Its receive stands where the other rank is at that time, by a simulation with `costs`: early enough to be
    posted ahead of need. It can't deadlock, even if a send blocked until its receive is reached and ranks did one thing at a time: all
    lists are parts of one sequence in which a send and its receive are neighbours. For the same reason the messages between two ranks
    have one order on both, which a transport without tags needs. ValueError if there are sends already, or the schedule deadlocks.
    """
    if schedule.has(SENDS + RECEIVES):
        raise ValueError("the schedule has sends and receives already: give the one without, schedule.only(COMPUTE)")
    timeline = simulate(schedule, costs)
    lists: list[list[Action]] = [[] for _ in schedule.ranks]
    on_the_way: list[tuple[float, int, Action, Action]] = []  # when it is sent, a running number, SEND and RECV

    def deliver(until: float) -> None:
        while on_the_way and on_the_way[0][0] <= until:
            *_, send, receive = heapq.heappop(on_the_way)
            for action in (send, receive):
                lists[schedule.stage_to_rank[action.stage]].append(action)

    # Of starts at one time, the replay's order is kept: with a cost of 0 an action and what waits for it start together.
    order = sorted(replay(schedule), key=lambda place: timeline.ranks[place[0]][place[1]].start)
    for number, (rank, index) in enumerate(order):
        span = timeline.ranks[rank][index]
        deliver(span.start)
        lists[rank].append(span.action)
        pair = _messages(schedule, span.action)
        if pair:
            heapq.heappush(on_the_way, (span.end, number, *pair))
    deliver(float("inf"))
    return Schedule(tuple(tuple(actions) for actions in lists), schedule.stage_to_rank)


def _messages(schedule: Schedule, action: Action) -> tuple[Action, Action] | None:
    """The SEND and RECV of what an action computed; None if it stays on the rank."""
    kind, stage, microbatch = action
    if kind not in ("F", "I", "B"):
        return None
    letter, there = ("F", stage + 1) if kind == "F" else ("B", stage - 1)
    holder = schedule.stage_to_rank
    if not 0 <= there < schedule.stages or holder[there] == holder[stage]:
        return None
    return Action("SEND_" + letter, stage, microbatch), Action("RECV_" + letter, there, microbatch)


def receives_ahead(actions: Sequence[Action]) -> list[list[Action]]:
    """For each action of one rank the receives to post before it starts, so that they are there when it ends.

    Those of the F, I or B that comes next, posted while this one computes. The gradient of an output is not received before that output
    is computed. Only for transports with tags: a message may overtake those before it in the list.
    """
    ahead: list[list[Action]] = [[] for _ in actions]
    computing = [index for index, action in enumerate(actions) if action.kind in COMPUTE]
    for before, after in pairwise(computing):
        _, stage, microbatch = actions[before]
        own = Action("RECV_B", stage, microbatch)
        ahead[before] = [a for a in actions[before + 1 : after] if a.kind in RECEIVES and (a != own or actions[before].kind != "F")]
    return ahead


def with_sharding(schedule: Schedule, prefetch: int, *, every_micro_batch: bool = False) -> Schedule:
    """Adds UNSHARD, RESHARD and REDUCE_GRAD, for parameters and gradients that are sharded over data-parallel ranks.

    Whole are the parameters of the stage that computes and of the `prefetch` different stages that the rank computes next; the others are
    dropped. A rank's peak is prefetch + 1 stages, and from prefetch = chunks - 1 on every stage is gathered once a step. REDUCE_GRAD
    follows the stage's last B or W, with `every_micro_batch` each of them. All data-parallel ranks of a pipeline rank have the same list,
    so their collectives have one order.
    """
    if prefetch < 0:
        raise ValueError(f"prefetch={prefetch} is negative: 0 gathers a stage right before it is used")
    if schedule.has(SHARDING):
        raise ValueError("the schedule has sharding actions already: give the one without")
    return Schedule(tuple(_shard(actions, prefetch, every_micro_batch) for actions in schedule.ranks), schedule.stage_to_rank)


def _shard(actions: Sequence[Action], prefetch: int, every_micro_batch: bool) -> tuple[Action, ...]:
    """One rank of `with_sharding`."""
    left = Counter(a.stage for a in actions if a.kind in ("B", "W"))
    wanted = _next_stages(actions, prefetch + 1)
    whole: list[int] = []
    sharded: list[Action] = []
    for index, action in enumerate(actions):
        if action.kind in COMPUTE:
            sharded += [Action("RESHARD", stage) for stage in whole if stage not in wanted[index]]
            sharded += [Action("UNSHARD", stage) for stage in wanted[index] if stage not in whole]
            whole = [stage for stage in whole if stage in wanted[index]] + [stage for stage in wanted[index] if stage not in whole]
        sharded.append(action)
        if action.kind in ("B", "W"):
            left[action.stage] -= 1
            if left[action.stage] == 0 or every_micro_batch:
                sharded.append(Action("REDUCE_GRAD", action.stage))
    return (*sharded, *(Action("RESHARD", stage) for stage in whole))


def _next_stages(actions: Sequence[Action], count: int) -> list[list[int]]:
    """For each action the first `count` different stages that it and those after it compute, in that order."""
    following: list[int] = []
    stages = []
    for action in reversed(actions):
        if action.kind in COMPUTE:
            following = [action.stage, *(stage for stage in following if stage != action.stage)]
        stages.append(following[:count])
    return stages[::-1]
