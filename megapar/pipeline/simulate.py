"""When every action of a schedule starts and ends, given what the stages cost: makespan, bubble, activations.

Ranks do their actions in order, one at a time, each as soon as what it needs has arrived. Communication is overlapped: it takes time
between two ranks, not on them, and messages do not slow one another down. So a start is the longest path to it, and nothing that becomes
cheaper or goes away can make the whole longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megapar.pipeline.check import Event, dependencies, replay
from megapar.pipeline.schedule import COMPUTE, RECEIVES, SENDS, Action, Schedule


@dataclass(frozen=True)
class Costs:
    """Time (in any unit) of F, I and W, the same for all stages or one number for each, and of a message to another rank. B is I + W."""

    forward: float | Sequence[float] = 1.0
    input_gradient: float | Sequence[float] = 1.0
    weight_gradient: float | Sequence[float] = 1.0
    communication: float = 0.0

    def by_stage(self, stages: int) -> dict[str, list[float]]:
        """For F, I, W and B the time of each stage. ValueError if there are not so many numbers, or one is negative or not finite."""
        table = {}
        for name, kind in (("forward", "F"), ("input_gradient", "I"), ("weight_gradient", "W")):
            value = getattr(self, name)
            numbers = list(value) if isinstance(value, Sequence) else [value] * stages
            if len(numbers) != stages:
                raise ValueError(f"{name} has {len(numbers)} costs, there are {stages} stages: give one number, or one for each stage")
            table[kind] = numbers
        if not all(0 <= number < float("inf") for number in [*table["F"], *table["I"], *table["W"], self.communication]):
            raise ValueError(f"{self} has a cost that is negative or not finite: a cost is a time")
        return table | {"B": [i + w for i, w in zip(table["I"], table["W"], strict=True)]}


@dataclass(frozen=True)
class Span:
    """An action and when it started and ended."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When each rank did what; simulated here, or measured by a run."""

    ranks: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """From the first start to the last end."""
        spans = [span for spans in self.ranks for span in spans]
        return max((span.end for span in spans), default=0.0) - min((span.start for span in spans), default=0.0)

    @property
    def work(self) -> list[float]:
        """Time that each rank computes."""
        return [sum(span.end - span.start for span in spans if span.action.kind in COMPUTE) for spans in self.ranks]

    @property
    def bubble(self) -> float:
        """Time that the ranks idle, as a fraction of the time that they compute: (p - 1) / m for 1F1B."""
        work = sum(self.work)
        return len(self.ranks) * self.makespan / work - 1 if work else 0.0

    @property
    def idle(self) -> float:
        """The share of the makespan that the ranks idle: bubble / (1 + bubble)."""
        return self.bubble / (1 + self.bubble)


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Times a schedule, with or without its sends. SEND and RECV spans are the message's time on the wire, beside the rank's computing;
    sharding actions take none. ValueError if the schedule deadlocks, or does not fit the costs."""
    costs = Costs() if costs is None else costs
    durations, ranks = costs.by_stage(schedule.stages), schedule.stage_to_rank
    needs, communicates = dependencies(schedule), schedule.has(SENDS)
    free = [0.0] * len(schedule.ranks)
    ended: dict[Event, float] = {}
    spans: list[list[Span]] = [[] for _ in schedule.ranks]
    for rank, index in replay(schedule):
        action = schedule.ranks[rank][index]
        kind, stage, microbatch = action
        if kind in RECEIVES:
            ((sent_kind, sender, _),) = needs(action)
            sent = ended[sent_kind, sender, microbatch]
            ended[action] = sent
            spans[rank].append(Span(action, sent - costs.communication, sent))
            continue
        start = free[rank]
        if kind in COMPUTE:
            for event in needs(action):
                crosses = not communicates and ranks[event[1]] != rank
                start = max(start, ended[event] + costs.communication * crosses)
            free[rank] = end = start + durations[kind][stage]
        else:
            end = start + (costs.communication if kind in SENDS else 0.0)
        ended["I" if kind == "B" else kind, stage, microbatch] = end
        spans[rank].append(Span(action, start, end))
    return Timeline(tuple(tuple(of_rank) for of_rank in spans))


def measured_costs(timeline: Timeline, stages: int) -> Costs:
    """What each stage's F, I and W took on average in a timeline, in its unit; a B counts as I. Messages are taken to cost nothing."""
    found: dict[str, list[list[float]]] = {kind: [[] for _ in range(stages)] for kind in "FIW"}
    for span in (span for spans in timeline.ranks for span in spans):
        kind = "I" if span.action.kind == "B" else span.action.kind
        if kind in found:
            found[kind][span.action.stage].append(span.end - span.start)
    forward, input_gradient, weight_gradient = ([sum(times) / max(1, len(times)) for times in found[kind]] for kind in "FIW")
    return Costs(forward, input_gradient, weight_gradient)
