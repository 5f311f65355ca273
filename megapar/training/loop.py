"""The training loop: samples in, checkpoints and metrics out; the same on every rank, rank 0 talks."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from megapar.batch import TokenBatch
from megapar.collectives import check_same, gather_json
from megapar.failures import named_failures, together
from megapar.mesh import ParallelMesh
from megapar.models.pipelined import PipelinedDecoder
from megapar.objectives.causal_lm import IGNORED
from megapar.pipeline.simulate import Timeline
from megapar.training.config import Config
from megapar.training.config_file import to_dict
from megapar.training.examples import Examples, Part
from megapar.training.journal import Journal
from megapar.training.layout import check_layout
from megapar.training.memory import MemoryPeak, memory_by_kind
from megapar.training.metrics import Record
from megapar.training.prefetch import Prefetcher
from megapar.training.recovery import Event, Verdict, Watch
from megapar.training.resume import flat
from megapar.training.run_checkpoints import RunCheckpoints, resumes
from megapar.training.sections import (
    batches_of,
    micro_batch_size,
    policy_of,
    precision_of,
    rates_of,
    recompute_of,
    schedule_of,
    steps_of,
    with_dp,
)
from megapar.training.step import StepResult, Sums, TrainStep, zero
from megapar.training.text import load_text_together
from megapar.transport import host_device, start_all_reduce


@dataclass(frozen=True)
class Trained:
    """Where a run ended. saved: whether its last step is in a checkpoint. test_loss: None without data.test. timeline: of its last step, on
    rank 0; None without a pipeline. memory: bytes of this rank, by kind."""

    model: PipelinedDecoder
    examples: Examples
    step: int
    interrupted: bool
    saved: bool
    held_out_loss: float | None
    test_loss: float | None
    out: Path
    timeline: Timeline | None
    memory: dict[str, int]


def train(config: Config, mesh: ParallelMesh) -> Trained:
    """Runs the config to its end, or until a rank is interrupted.

    Raises ValueError, the same on every rank, before training starts for whatever is wrong with the config, the corpus or a checkpoint,
    and later for a step that recovery stops at; RuntimeError naming the rank when one stops answering.
    """
    config = with_dp(config, mesh.world.size)
    check_layout(config, mesh.world.size)
    with named_failures(mesh):
        for name, value in flat(to_dict(config)).items():
            check_same(value, mesh.world, name)
        text = load_text_together(config.data, mesh)
        text.tokenizer.encode(config.run.prompt)  # refuses now what the sample at the end could not start with
        examples = Examples(text, config)
        examples.check(config)
        peak = MemoryPeak(mesh.device)
        model = PipelinedDecoder(
            config.model,
            examples.vocab_size,
            mesh,
            schedule=schedule_of(config, batches_of(config).batch_at(0)),
            split=config.parallel.split,
            sequence_length=config.data.sequence_length,
            sequence_parallel=config.parallel.sequence_parallel,
            recompute=recompute_of(config),
            seed=config.run.seed,
            optimize=zero(config.optimizer, mesh, config.parallel, precision_of(config.precision), load_later=resumes(config)),
        )
        run = _Run(config, mesh, examples, TrainStep(model, mesh, config.optimizer.z_loss, examples.mixture), peak)
    # The handlers stay while a failure is named: the launcher, which sees a death too, sends SIGTERM to the others
    # (tests/training/test_interrupts.py::test_a_rank_that_dies_is_named_and_ends_the_others).
    with _interrupts() as interrupted, together(mesh, "training"):
        return run.go(interrupted)


def evaluate(step: TrainStep, examples: Examples, count: int, part: Part = "held_out") -> Sums:
    """The sums over every target of a part of the text; `count` samples in a micro-batch.

    The replicas take turns, and all of them run as many micro-batches: one that has none left takes one without targets.
    """
    found: Sums = {}
    # Not as many as a step has, which may change: sums are taken in one order
    # (test_reshard.py::test_a_batch_that_grows_across_a_stop_and_another_world_takes_each_sample_once).
    together, dp = 2 * step.model.runner.schedule.stages, step.mesh.dp
    waiting = (batch.to(step.mesh.device) for batch in examples.evaluation(part, count))
    while some := list(islice(waiting, together * dp.size)):
        while len(some) % dp.size:
            some.append(replace(some[0], targets=torch.full_like(some[0].tokens, IGNORED)))
        loss, counted, each = step.evaluate(some[dp.rank :: dp.size])
        for name, (more, n) in (each or {examples.objective.name: (loss, counted)}).items():
            total, before = found.get(name, (0.0, 0))
            found[name] = (total + more, before + n)
    return {name: sums for name, sums in found.items() if sums[1]}


class _Run:
    """The state of `train`."""

    def __init__(self, config: Config, mesh: ParallelMesh, examples: Examples, step: TrainStep, peak: MemoryPeak) -> None:
        self.config, self.mesh, self.examples, self.train_step, self.peak = config, mesh, examples, step, peak
        self.model, self.steps, self.size = step.model, steps_of(config), micro_batch_size(config)
        self.rates, self.policy = rates_of(config), policy_of(config)
        self.watch = Watch(self.policy)
        self.out = Path(config.run.out)
        self.checkpoints = RunCheckpoints(config, mesh, examples, step.optimizer, self.watch)
        self.prefetch = Prefetcher(examples.batch)
        try:
            begin = time.perf_counter()
            self.state, changed = self.checkpoints.resume()
            self.journal = Journal(config, mesh, self.steps, self.state)
        except BaseException:
            self._close()
            raise
        parameters = sum(p.numel() for p in self.model.grads.params)
        self.journal.say(examples.text.description)
        self.journal.say(f"the run reads it {examples.epochs(self.rates.batches.samples_after(self.steps)):.2f} times")
        self.journal.say(f"{mesh}, {torch.get_num_threads()} threads a rank, {parameters:,} parameters on this rank")
        if self.state.step:
            self.journal.resumed(self.state.step, changed, time.perf_counter() - begin)

    def go(self, interrupted: list[bool]) -> Trained:
        run, stopped, saved, loss, test_loss = self.config.run, False, False, None, None
        try:
            if 0 < self.state.step < self.steps and self._evaluates():
                self._evaluate()  # the run that stopped here may not have come to it
            while self.state.step < self.steps and not stopped:
                step = self.state.step
                stopped = self._step(interrupted)
                done, last = self.state.step, stopped or self.state.step == self.steps
                if run.save_every and done > step and (done % run.save_every == 0 or last):
                    self.journal.saved(self.checkpoints.save(self.state), done)
                if not last and done > step and self._evaluates():
                    self._evaluate()
            ended = self.checkpoints.finish()
            self.journal.saved(ended, self.state.step)
            saved = bool(run.save_every) and self.checkpoints.newest == self.state.step
            memory = memory_by_kind(self.train_step.optimizer, self.peak)
            if not stopped:
                loss = self._evaluate()
                test_loss = self._evaluate("test") if len(self.examples.text.test) else None
        finally:
            self._close()
            self.journal.close()
        timeline = self.model.runner.timeline() if self.mesh.pp.size > 1 else None
        return Trained(self.model, self.examples, self.state.step, stopped, saved, loss, test_loss, self.out, timeline, memory)

    def _close(self) -> None:
        self.prefetch.close()
        self.checkpoints.close()

    def _step(self, interrupted: list[bool]) -> bool:
        """Trains one step, or rolls back because of it; whether any rank was interrupted."""
        state, start, waited = self.state, time.perf_counter(), self.prefetch.waited
        batch_size = self.rates.batches.batch_at(state.samples)
        lr, weight_decay = self.rates.at(state.updates, state.applied_samples, batch_size)
        batches, error, stop = self._batches(batch_size, interrupted)
        if error:
            self._recover(Verdict(self.policy.data_error, error), batch_size, "correct the data")
            return stop
        if self.model.runner.schedule.microbatches != len(batches):
            self.model.set_schedule(schedule_of(self.config, batch_size))
        self.train_step.accumulate(batches)
        self.checkpoints.saver.before_update()
        verdict: Verdict | None = None

        def judge(loss: float, grad_norm: float) -> bool:
            nonlocal verdict
            verdict = self.watch.judge(loss, grad_norm, self.train_step.optimizer.precision.dynamic is not None)
            return verdict is None

        flags = [float(bool(interrupted)), self.checkpoints.saver.ended]
        result = self.train_step.update(lr, flags, weight_decay=weight_decay, judge=judge)
        rates = {"lr": lr, "batch_size": batch_size, "samples": state.samples + batch_size}
        rates["data_seconds"] = self.prefetch.waited - waited
        if self.config.optimizer.weight_decay_end is not None:
            rates["weight_decay"] = weight_decay
        self._log(result, rates, time.perf_counter() - start, verdict)
        stops, ended = result.flags
        self.journal.saved(self.checkpoints.commit_if(ended == self.mesh.world.size), state.step + 1)
        if verdict is None:
            state.advance(batch_size, applied=not result.skipped)
        else:
            self._recover(verdict, batch_size)
        return stops > 0

    def _batches(self, batch_size: int, interrupted: list[bool]) -> tuple[list[TokenBatch], str, bool]:
        """This replica's micro-batches of the next step; and the same on every rank: why one rank has none, whether one was interrupted."""
        world, error, batches, after = self.mesh.world, "", [], self.state.samples + batch_size
        try:
            batches = [batch.to(self.mesh.device) for batch in self.prefetch.get(self._requests(self.state.samples, batch_size))]
            self.prefetch.ahead(self._requests(after, self.rates.batches.batch_at(after)))
        except (ValueError, OSError, IndexError) as caught:
            error = f"rank {world.rank} has no samples: {type(caught).__name__}: {caught}"
        flags = torch.tensor([float(bool(error)), float(bool(interrupted))], device=host_device(world))
        failed, stops = (start_all_reduce(flags, world).wait() if world.size > 1 else flags).tolist()
        if failed:
            error = next(told for told in gather_json(error, world) if told)
        return batches, error, stops > 0

    def _requests(self, first: int, batch_size: int) -> list[tuple[int, int]]:
        """(first sample, how many) of this replica's micro-batches of a step."""
        rank, replicas = self.mesh.dp.rank, self.mesh.dp.size
        return [(start, self.size) for start in range(first + rank * self.size, first + batch_size, replicas * self.size)]

    def _log(self, result: StepResult, rates: dict[str, float], seconds: float, verdict: Verdict | None) -> None:
        record: Record = {"step": self.state.step + 1, "loss": result.loss, "grad_norm": result.grad_norm, **rates, "tokens": result.tokens}
        record |= {"tokens_per_second": result.tokens / seconds, "seconds": seconds, "peak_bytes": self.peak.bytes()}
        if self.train_step.optimizer.precision.scaler is not None:
            record["loss_scale"] = result.loss_scale
        if result.objectives:
            record["objectives"] = dict(result.objectives)
        if result.skipped:
            record |= {"skipped": 1, "reason": "overflow" if verdict is None else verdict.reason}
        self.journal.step(record, (self.steps - self.state.step - 1) * seconds)

    def _recover(self, verdict: Verdict, batch_size: int, advice: str = "lower optimizer.lr") -> None:
        """Does what recovery decided about the step that has just been tried."""
        state, action, reason = self.state, verdict.action, verdict.reason
        if action == "skip" and state.skipped >= self.policy.max_skips:
            action, reason = "stop", f"{reason}, and the {state.skipped} steps before it were skipped"
        event = Event(state.step + 1, action, reason, self.examples.numbers(state.samples, batch_size))
        if action != "skip":
            self.journal.saved(self.checkpoints.finish(), state.step)
        if action == "rollback":
            self.prefetch.reset()
            self.state, event = self.checkpoints.roll_back(state, reason, batch_size)
        self.journal.recovery(event)
        if event.action == "stop":
            first, stop = event.samples
            raise ValueError(f"step {event.step}, samples {first} to {stop - 1}: {event.reason}: {advice}, or see [recovery]")
        if event.action == "skip":
            state.advance(batch_size, applied=False, rejected=True)

    def _evaluates(self) -> bool:
        every = self.config.run.eval_every
        return every > 0 and self.state.step % every == 0

    def _evaluate(self, part: Part = "held_out") -> float:
        found = evaluate(self.train_step, self.examples, self.size, part)
        self.train_step.optimizer.release()
        losses = {name: total / count for name, (total, count) in found.items()}
        loss = sum(total for total, _ in found.values()) / sum(count for _, count in found.values())
        self.journal.evaluated(self.state.step, part, loss, losses)
        return loss


@contextmanager
def _interrupts() -> Iterator[list[bool]]:
    """A list that Ctrl-C or SIGTERM makes non-empty: the step under way ends first, on all ranks. A second Ctrl-C does not wait."""
    asked: list[bool] = []

    def handle(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
