"""What rank 0 tells of a run while it goes: metrics.jsonl, the terminal and, if asked for, TensorBoard. Elsewhere nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapar.collectives import raise_together
from megapar.mesh import ParallelMesh
from megapar.training.checkpoint.save import Saved
from megapar.training.config import Config
from megapar.training.config_file import to_dict
from megapar.training.examples import Part
from megapar.training.metrics import MetricsFile, Record, RunProgress
from megapar.training.recovery import Event
from megapar.training.run_state import RunState
from megapar.training.tensorboard import TensorBoardSink


class Journal:
    """Of a run of `steps` that goes on from `state`. Raises ValueError on every rank if run.out cannot hold it.

    Later nothing is raised: what could not be written is said once, and training goes on.
    """

    def __init__(self, config: Config, mesh: ParallelMesh, steps: int, state: RunState) -> None:
        self._metrics: MetricsFile | None = None
        self._events: TensorBoardSink | None = None
        self._progress: RunProgress | None = None
        self._failed = False
        error: Exception | None = None
        if mesh.world.rank == 0:
            out = Path(config.run.out)
            try:
                self._metrics = MetricsFile(out / "metrics.jsonl", state.step, [event.to_dict() for event in state.rollbacks])
                (out / "config.json").write_text(json.dumps(to_dict(config), indent=2), encoding="utf-8")
                self._events = TensorBoardSink(out / "tensorboard", state.step) if config.run.tensorboard else None
                self._progress = RunProgress(steps, state.step)
            except (OSError, ValueError) as caught:
                error = ValueError(f"run.out={out} cannot hold the metrics of this run ({caught}): give another --out")
        raise_together(error, mesh.world)
        if self._metrics is not None and self._metrics.damaged:
            self.say(f"metrics.jsonl had {self._metrics.damaged} damaged lines, which are left out; as it was, it is metrics.jsonl.damaged")

    def say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.say(text)

    def _log(self, record: Record) -> None:
        try:
            if self._metrics is not None:
                self._metrics.log(record)
            if self._events is not None:
                self._events.log(record)
        except OSError as error:
            if not self._failed:
                self.say(f"metrics of step {record['step']} could not be written ({error}): training goes on, some will be missing")
            self._failed = True

    def step(self, record: Record, eta: float) -> None:
        """One that was tried. eta: seconds left."""
        self._log(record)
        if self._progress is not None:
            self._progress.step(record, eta)

    def evaluated(self, step: int, part: Part, loss: float, each: Mapping[str, float]) -> None:
        """The loss of a part of the text, and by objective if there are several."""
        self._log({"step": step, f"{part}_loss": loss} | ({part: dict(each)} if len(each) > 1 else {}))
        told = ", ".join(f"{name} {value:.4f}" for name, value in each.items()) if len(each) > 1 else ""
        self.say(f"step {step}  {part.replace('_', '-')} loss {loss:.4f} nats a token" + (f" ({told})" if told else ""))

    def resumed(self, step: int, changed: Mapping[str, list[Any]], seconds: float) -> None:
        """A run that goes on, maybe with another config. seconds: that loading took."""
        self._log({"step": step, "resumed": {"from": step, "changed": dict(changed), "seconds": seconds}})
        self.say(f"resumed at step {step}, loaded in {seconds:.1f} s")
        for key, (was, now) in changed.items():
            self.say(f"   {key} was {was} and is {now}")

    def saved(self, saved: Saved | None, step: int) -> None:
        """How a save ended, at the end of `step`; None: there was none."""
        if saved is None:
            return
        told = {"step": saved.step, "stall": saved.stall, "seconds": saved.seconds, "bytes": saved.bytes, "error": saved.error}
        self._log({"step": step, "checkpoint": told})
        if saved.error and saved.path is not None:
            self.say(saved.error)
        elif saved.error:
            self.say(f"checkpoint of step {saved.step} FAILED, training goes on, earlier ones stay: {saved.error}")
        else:
            took = f"{saved.bytes / 1e6:.0f} MB in {saved.seconds:.1f} s, of which training waited {1e3 * saved.stall:.0f} ms"
            self.say(f"checkpoint of step {saved.step} is on disk: {took}")

    def recovery(self, event: Event) -> None:
        """What was done about a step that went wrong."""
        self._log({"step": event.step, "recovery": event.to_dict()})
        if event.to_step is not None and self._events is not None:
            self._events.go_back(event.to_step)
        first, stop = event.samples
        done = {
            "stop": "the run stops",
            "skip": f"samples {first} to {stop - 1} had no effect",
            "rollback": f"back to step {event.to_step}, and on without samples {first} to {stop - 1}",
        }
        self.say(f"step {event.step}: {event.reason}: {done[event.action]}")

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        if self._events is not None:
            self._events.close()
        if self._progress is not None:
            self._progress.close()
