"""The proof that a schedule runs: every action once, in an order in which nothing waits for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

from megapar.pipeline.schedule import COMPUTE, RECEIVES, SENDS, SHARDING, Action, Place, Schedule, live_activations, marked

Event = tuple[str, int, int | None]
"""What an action may wait for: its kind (I stands for B too), stage and micro-batch, or `post RECV_F`: a receive has been reached."""


def check(schedule: Schedule, limit: int | Sequence[int] | None = None) -> list[int]:
    """Proves the schedule and returns each rank's peak of live activations (see `Schedule.peak_activations`).

    Every stage has, for every micro-batch, F and B or F, I, W, each once and on its own rank; none has a backward, or all have
    (evaluation). If anything is sent, all that crosses ranks is, and every SEND has its RECV. If anything is sharded, a stage computes only
    between its UNSHARD and RESHARD, and has a REDUCE_GRAD after its last weight gradient, none without a new one. Replayed with
    *rendezvous* sends, the strictest there are (a SEND ends only when the other rank has reached its RECV, one action at a time), every
    rank reaches its end.
    `limit`: the most live activations allowed, of every rank or for each.

    ValueError: a sentence and the table, the failing action marked.
    """
    _check_once(schedule)
    if schedule.has(SHARDING):
        _check_sharding(schedule)
    for _ in replay(schedule):
        pass
    for rank, actions in enumerate(schedule.ranks):
        allowed = limit[rank] if isinstance(limit, Sequence) else limit
        for index, live in enumerate(live_activations(actions)):
            if allowed is not None and live > allowed:
                sentence = f"{actions[index]} is the activation number {live} that rank {rank} keeps, {allowed} are allowed"
                raise ValueError(marked(sentence, schedule.ranks, [(rank, index)]))
    return schedule.peak_activations()


def replay(schedule: Schedule) -> Iterator[Place]:
    """Rank and index of every action, in an order in which they can run, with rendezvous sends.

    ValueError where the ranks wait for one another for ever: the actions that they stand at are marked.
    """
    ranks, at = schedule.ranks, [0] * len(schedule.ranks)
    needs, happened = dependencies(schedule), set[Event]()
    waiting: dict[Event, list[int]] = {}
    awake = list(range(len(ranks)))[::-1]
    while awake:
        rank = awake.pop()
        actions = ranks[rank]
        while at[rank] < len(actions):
            action = actions[at[rank]]
            if action.kind in RECEIVES:
                _happen(("post " + action.kind, action.stage, action.microbatch), happened, waiting, awake)
            missing = next((event for event in needs(action) if event not in happened), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            yield rank, at[rank]
            at[rank] += 1
            _happen(("I" if action.kind == "B" else action.kind, action.stage, action.microbatch), happened, waiting, awake)
    stuck = [(rank, index) for rank, index in enumerate(at) if index < len(ranks[rank])]
    if stuck:
        waits = {rank: event for event, sleepers in waiting.items() for rank in sleepers}
        words = "; ".join(f"rank {rank} at {ranks[rank][index]} waits for {_said(waits[rank])}" for rank, index in stuck)
        raise ValueError(marked(f"deadlock: {words}", ranks, stuck))


def _happen(event: Event, happened: set[Event], waiting: dict[Event, list[int]], awake: list[int]) -> None:
    happened.add(event)
    awake += waiting.pop(event, [])


def _said(event: Event) -> str:
    kind, stage, microbatch = event
    if kind.startswith("post "):
        return f"{Action(kind[5:], stage, microbatch)} to be reached"
    return str(Action(kind, stage, microbatch)) + (" (or B)" if kind == "I" else "")


def dependencies(schedule: Schedule) -> Callable[[Action], list[Event]]:
    """The function that says what must have happened before an action can run. In a schedule without sends an action waits for the
    other rank's action itself."""
    ranks, last = schedule.stage_to_rank, schedule.stages - 1
    communicates = schedule.has(SENDS + RECEIVES)

    def arrival(kind: str, stage: int, neighbour: int, microbatch: int | None) -> Event:
        if communicates and ranks[stage] != ranks[neighbour]:
            return ("RECV_F" if kind == "F" else "RECV_B", stage, microbatch)
        return (kind, neighbour, microbatch)

    def needs(action: Action) -> list[Event]:
        kind, stage, microbatch = action
        if kind == "F":
            return [arrival("F", stage, stage - 1, microbatch)] if stage > 0 else []
        if kind in ("I", "B"):
            events: list[Event] = [("F", stage, microbatch)]
            if stage < last:
                events.append(arrival("I", stage, stage + 1, microbatch))
            return events
        if kind == "W":
            return [("I", stage, microbatch)]
        if kind == "SEND_F":
            return [("F", stage, microbatch), ("post RECV_F", stage + 1, microbatch)]
        if kind == "SEND_B":
            return [("I", stage, microbatch), ("post RECV_B", stage - 1, microbatch)]
        if kind == "RECV_F":
            return [("SEND_F", stage - 1, microbatch)]
        return [("SEND_B", stage + 1, microbatch)] if kind == "RECV_B" else []

    return needs


def _check_once(schedule: Schedule) -> None:
    """Every action once and where it belongs, and none that does not."""
    places: dict[Action, Place] = {}
    for rank, actions in enumerate(schedule.ranks):
        for index, action in enumerate(actions):
            if action.stage >= schedule.stages or schedule.stage_to_rank[action.stage] != rank:
                sentence = f"{action} is on rank {rank}, which does not hold stage {action.stage}"
                raise ValueError(marked(sentence, schedule.ranks, [(rank, index)]))
            if action in places and action.kind not in SHARDING:
                raise ValueError(marked(f"{action} is there twice", schedule.ranks, [places[action], (rank, index)]))
            places[action] = (rank, index)
    expected = _expected(schedule, places)
    for action in expected:
        if action not in places:
            near = [place for other, place in places.items() if other[1:] == action[1:]]
            raise ValueError(marked(f"{action} is missing on rank {schedule.stage_to_rank[action.stage]}", schedule.ranks, near[:1]))
    for action, place in places.items():
        if action.kind not in SHARDING and action not in expected:
            why = "its gradients are computed by B or by I and W" if action.kind in COMPUTE else "nothing crosses ranks there"
            raise ValueError(marked(f"{action} has no place in the schedule: {why}", schedule.ranks, [place]))


def _expected(schedule: Schedule, places: Collection[Action]) -> dict[Action, None]:
    """All but the sharding actions that a schedule with these actions must have."""
    ranks, last = schedule.stage_to_rank, schedule.stages - 1
    trains, communicates, microbatches = schedule.has(("B", "I", "W")), schedule.has(SENDS + RECEIVES), schedule.microbatches
    usual = ("B",) if schedule.has("B") else ("I", "W")
    expected: list[Action] = []
    for stage in range(schedule.stages):
        for m in range(microbatches):
            expected.append(Action("F", stage, m))
            if trains:
                b, i, w = (Action(kind, stage, m) for kind in "BIW")
                expected += [b] if b in places else [i, w] if i in places or w in places else [Action(k, stage, m) for k in usual]
            if communicates and stage < last and ranks[stage] != ranks[stage + 1]:
                expected += [Action("SEND_F", stage, m), Action("RECV_F", stage + 1, m)]
                if trains:
                    expected += [Action("SEND_B", stage + 1, m), Action("RECV_B", stage, m)]
    return dict.fromkeys(expected)


def _check_sharding(schedule: Schedule) -> None:
    """Each stage computes only with whole parameters, and all its gradients are reduced, each once."""
    shards, reduces = schedule.has(("UNSHARD", "RESHARD")), schedule.has(("REDUCE_GRAD",))
    for rank, actions in enumerate(schedule.ranks):
        whole: set[int] = set()
        fresh: Counter[int] = Counter()  # gradients computed since the last REDUCE_GRAD
        reduced: dict[int, int] = {}
        for index, (kind, stage, _) in enumerate(actions):
            problem = ""
            if kind in COMPUTE and shards and stage not in whole:
                problem = f"computes with parameters of stage {stage} that are sharded: UNSHARD them before"
            elif kind == "UNSHARD" and stage in whole:
                problem = "gathers parameters that are whole already"
            elif kind == "RESHARD" and stage not in whole:
                problem = "drops parameters that are not gathered"
            elif kind == "REDUCE_GRAD" and stage in reduced and not fresh[stage]:
                problem = "reduces gradients that were reduced already"
            if problem:
                raise ValueError(marked(f"{actions[index]} {problem}", schedule.ranks, [(rank, index)]))
            whole = whole | {stage} if kind == "UNSHARD" else whole - {stage} if kind == "RESHARD" else whole
            if kind == "REDUCE_GRAD":
                fresh[stage], reduced[stage] = 0, index
            fresh[stage] += kind in ("B", "W")
        for stage in sorted(fresh) if reduces else ():
            action = Action("REDUCE_GRAD", stage)
            if fresh[stage] and stage in reduced:
                sentence = f"{action} reduces gradients before the last {fresh[stage]} of them are computed"
                raise ValueError(marked(sentence, schedule.ranks, [(rank, reduced[stage])]))
            if fresh[stage]:
                raise ValueError(marked(f"{action} is missing on rank {rank}", schedule.ranks, []))
