"""What is done about a step that goes wrong: seen on any rank, decided alike on all.

Everything here is a function of numbers that the step's one all-reduce has made the same on every rank, so no rank has to be told.
`Watch` judges a step before its update; a step that is not accepted changes no weight. Rolling back is the loop's, with `Event`.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megapar.training.config import Action, RecoveryConfig


@dataclass(frozen=True)
class Verdict:
    """Why a step is not to be applied, and what is done."""

    action: Action
    reason: str


@dataclass
class Watch:
    """Judges steps by those before it. history: (loss, gradient norm) of the last accepted ones."""

    policy: RecoveryConfig
    history: deque[tuple[float, float]] = field(init=False)

    def __post_init__(self) -> None:
        self.history = deque(maxlen=self.policy.window)

    def judge(self, loss: float, grad_norm: float, overflow_is_answered: bool) -> Verdict | None:
        """None for a step that is to be applied, which then belongs to the history.

        overflow_is_answered: a dynamic loss scale skips a step whose gradients, not its loss, are not finite.
        """
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value) and not (name == "gradient norm" and overflow_is_answered):
                return Verdict(self.policy.non_finite, f"the {name} is {value}")
        if not math.isfinite(grad_norm):
            return None
        if self.policy.spike != "ignore" and 2 * len(self.history) >= self.policy.window:
            pasts = zip(*self.history, strict=True)
            for (name, value), past in zip((("loss", loss), ("gradient norm", grad_norm)), pasts, strict=True):
                if why := self._far(value, past):
                    return Verdict(self.policy.spike, f"the {name} is {value:.4g}, {why}")
        self.history.append((loss, grad_norm))
        return None

    def _far(self, value: float, past: tuple[float, ...]) -> str:
        """In what way a value is far above those before it; nothing if it is not."""
        mean, middle, policy = statistics.fmean(past), statistics.median(past), self.policy
        if policy.sigma is not None and value > (limit := mean + policy.sigma * statistics.pstdev(past, mean)):
            return f"above the {limit:.4g} that are {policy.sigma:g} standard deviations over the last {len(past)} steps"
        if policy.factor is not None and value > (limit := policy.factor * middle):
            return f"above the {limit:.4g} that are {policy.factor:g} times the median of the last {len(past)} steps"
        return ""


@dataclass(frozen=True)
class Event:
    """Something that recovery did at the end of `step`, about which every checkpoint written later knows. to_step: of the checkpoint that
    it went back to. samples: those that are left out from then on (skip: that were used without effect)."""

    step: int
    action: Action
    reason: str
    samples: tuple[int, int]
    to_step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "samples": list(self.samples)}

    @staticmethod
    def from_dict(told: Mapping[str, Any]) -> Event:
        return Event(int(told["step"]), told["action"], str(told["reason"]), tuple(told["samples"]), told["to_step"])


def is_valid(step: int, known: int, rollbacks: list[Event]) -> bool:
    """Whether a checkpoint of `step`, written when `known` of the run's rollbacks had happened, is of the line that goes on."""
    return all(event.to_step is not None and step <= event.to_step for event in rollbacks[known:])
