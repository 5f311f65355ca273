"""When a rank computed what: the measured timeline."""

from __future__ import annotations

import time
from typing import Any

import torch

from megapar.pipeline.schedule import Action
from megapar.pipeline.simulate import Span


class Recorder:
    """The spans of one rank's step. On CUDA the times are the device's (events on the current stream), else the host's.

    Ranks start together, at the exchange that opens a step: each counts from there, so clocks of several hosts need not agree.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._origin: Any = None
        self._spans: list[tuple[Action, Any, Any]] = []

    def start(self) -> None:
        """Forgets the step before."""
        self._spans.clear()
        self._origin = self.now()

    def now(self) -> Any:
        """A moment, for `add`."""
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, action: Action, begin: Any) -> None:
        """`action` began then, and ends now."""
        self._spans.append((action, begin, self.now()))

    def told(self) -> list[tuple[str, float, float]]:
        """JSON for the other ranks: (action, start, end) in seconds since the start."""
        if self._on_device:
            torch.cuda.synchronize()
        return [(str(action), self._since_start(begin), self._since_start(end)) for action, begin, end in self._spans]

    def _since_start(self, moment: Any) -> float:
        return float(self._origin.elapsed_time(moment)) / 1e3 if self._on_device else float(moment - self._origin)

    @staticmethod
    def spans_from(told: list[tuple[str, float, float]]) -> tuple[Span, ...]:
        """A rank's spans of what it told."""
        return tuple(Span(Action.parse(text), start, end) for text, start, end in told)
