"""Where a run is: what a checkpoint says of it beside weights, moments and the optimizer's own progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megapar.training.recovery import Event, Watch

COUNTS = ("step", "samples", "updates", "applied_samples", "skipped")


@dataclass
class RunState:
    """step: attempted ones. samples: used by them. updates, applied_samples: of the steps that were applied, which the rates count.

    skipped: steps in a row, up to now, that recovery did not apply. rollbacks: of the whole run, also those of lines that were left.
    """

    step: int = 0
    samples: int = 0
    updates: int = 0
    applied_samples: int = 0
    skipped: int = 0
    rollbacks: list[Event] = field(default_factory=list)

    def advance(self, batch_size: int, *, applied: bool, rejected: bool = False) -> None:
        """Past a step. rejected: by recovery, which an overflow's is not."""
        self.step += 1
        self.samples += batch_size
        self.updates += applied
        self.applied_samples += applied * batch_size
        self.skipped = self.skipped + 1 if rejected else 0

    def to_dict(self, watch: Watch) -> dict[str, Any]:
        """Plain data, with the steps that `watch` compares with."""
        counts: dict[str, Any] = {name: getattr(self, name) for name in COUNTS}
        rollbacks = [event.to_dict() for event in self.rollbacks]
        return {**counts, "rollbacks": rollbacks, "history": [list(pair) for pair in watch.history]}

    @staticmethod
    def from_dict(told: Mapping[str, Any], watch: Watch) -> RunState:
        """Also fills `watch`."""
        watch.history.clear()
        watch.history.extend((float(loss), float(norm)) for loss, norm in told["history"])
        state = RunState(rollbacks=[Event.from_dict(event) for event in told["rollbacks"]])
        for name in COUNTS:
            setattr(state, name, int(told[name]))
        return state
