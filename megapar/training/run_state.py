"""Where a run is: what a checkpoint says of it beside weights, moments and the optimizer's own progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megapar.training.recovery import Event, Watch

COUNTS = ("step", "samples", "updates", "applied_samples")


@dataclass
class RunState:
    """step: attempted ones. samples: used by them. updates, applied_samples: of the steps that were applied, which the rates count.

    skips: steps that recovery did not apply. rollbacks: of the whole run, also those of lines that were abandoned.
    """

    step: int = 0
    samples: int = 0
    updates: int = 0
    applied_samples: int = 0
    skips: list[Event] = field(default_factory=list)
    rollbacks: list[Event] = field(default_factory=list)

    def advance(self, batch_size: int, applied: bool) -> None:
        """Past a step."""
        self.step += 1
        self.samples += batch_size
        self.updates += applied
        self.applied_samples += applied * batch_size

    def to_dict(self, watch: Watch) -> dict[str, Any]:
        """Plain data, with the steps that `watch` compares with."""
        counts = {name: getattr(self, name) for name in COUNTS}
        events = {name: [event.to_dict() for event in getattr(self, name)] for name in ("skips", "rollbacks")}
        return {**counts, **events, "history": [list(pair) for pair in watch.history]}

    @staticmethod
    def from_dict(told: Mapping[str, Any], watch: Watch) -> RunState:
        """Also fills `watch`."""
        watch.history.clear()
        watch.history.extend((float(loss), float(norm)) for loss, norm in told["history"])
        state = RunState()
        for name in COUNTS:
            setattr(state, name, int(told[name]))
        state.skips, state.rollbacks = ([Event.from_dict(event) for event in told[name]] for name in ("skips", "rollbacks"))
        return state
