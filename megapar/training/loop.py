"""The training loop: samples in, checkpoints and metrics out; the same on every rank, rank 0 talks."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch

from megapar.collectives import check_same, raise_together
from megapar.failures import named_failures
from megapar.layers.attention import split_heads
from megapar.mesh import ParallelMesh, data_parallel_size
from megapar.models.pipelined import PipelinedDecoder, decoder_cuts
from megapar.objectives.causal_lm import IGNORED
from megapar.params import split
from megapar.pipeline.kinds import make_schedule
from megapar.pipeline.schedule import Schedule
from megapar.pipeline.simulate import Timeline
from megapar.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from megapar.training.config import Config
from megapar.training.config_file import micro_batch_size, precision_of, recompute_of, to_dict
from megapar.training.examples import Examples
from megapar.training.lr import learning_rate
from megapar.training.memory import MemoryPeak, memory_by_kind
from megapar.training.metrics import MetricsFile, RunProgress
from megapar.training.step import TrainStep, zero
from megapar.training.text import load_text_together

# What may differ between a run and the one that it resumes.
FREE_TO_CHANGE = {
    "run": {"resume", "out", "eval_every", "save_every", "sample_tokens", "prompt"},
    "parallel": {"timeout"},
    "recompute": {"mode", "blocks", "shard_saved_input"},
}


@dataclass(frozen=True)
class Trained:
    """Where a run ended. timeline: of its last step, on rank 0; None without a pipeline. memory: bytes of this rank, by kind."""

    model: PipelinedDecoder
    examples: Examples
    step: int
    interrupted: bool
    held_out_loss: float | None
    out: Path
    timeline: Timeline | None
    memory: dict[str, int]


def train(config: Config, mesh: ParallelMesh) -> Trained:
    """Runs the config to its end, or until a rank is interrupted.

    Raises ValueError, the same on every rank, before training starts for whatever is wrong with the config, the corpus or a checkpoint;
    RuntimeError naming the rank when one stops answering.
    """
    check_layout(config, mesh.world.size)
    with named_failures(mesh):
        for name, value in _flat(to_dict(config)).items():
            check_same(value, mesh.world, name)
        text = load_text_together(config.data, mesh)
        text.tokenizer.encode(config.run.prompt)  # refuses now what the sample at the end could not start with
        examples = Examples(text, config)
        peak = MemoryPeak(mesh.device)
        model = PipelinedDecoder(
            config.model,
            examples.vocab_size,
            mesh,
            schedule=schedule_of(config),
            split=config.parallel.split,
            sequence_length=config.data.sequence_length,
            sequence_parallel=config.parallel.sequence_parallel,
            recompute=recompute_of(config),
            seed=config.run.seed,
            optimize=zero(config.optimizer, mesh, config.parallel, precision_of(config.precision)),
        )
        step = TrainStep(model, mesh)
        run = _Run(config, mesh, examples, model, step, peak)
    # The handlers stay while a failure is named: the launcher, which sees a death too, sends SIGTERM to the others
    # (tests/training/test_interrupts.py::test_a_rank_that_dies_is_named_and_ends_the_others).
    with _interrupts() as interrupted, named_failures(mesh):
        return run.go(interrupted)


def check_layout(config: Config, world_size: int) -> None:
    """Raises ValueError unless the model can be cut over the config's ranks and they are `world_size`. Needs no process group."""
    model, tp, pp, dp = config.model, config.parallel.tp, config.parallel.pp, config.parallel.dp
    if data_parallel_size(world_size, tp=tp, pp=pp) != dp:
        layout = f"parallel.tp={tp} x parallel.dp={dp} x parallel.pp={pp}"
        raise ValueError(f"the world has {world_size} ranks and {layout} uses {tp * dp * pp}: start {tp * dp * pp}, or change --dp")
    split_heads(model.heads, model.kv_heads or model.heads, tp)
    split(model.ffn_size, tp, what="model.ffn_size")
    cuts = decoder_cuts(model, config.data.vocab_size, schedule_of(config), config.parallel.split, config.data.sequence_length)
    recompute_of(config).check(min(stop - start for start, stop in cuts), tp, config.parallel.sequence_parallel)


def make_mesh(config: Config) -> ParallelMesh:
    """The mesh that the config asks for: on GPUs, or on the CPU where there are none or it says so."""
    device = "cpu" if config.parallel.device == "cpu" else None
    return ParallelMesh(tp=config.parallel.tp, pp=config.parallel.pp, device=device, timeout=timedelta(seconds=config.parallel.timeout))


def schedule_of(config: Config) -> Schedule:
    """The pipeline schedule of a step. Raises ValueError where the config's parts do not go together."""
    parallel, run = config.parallel, config.run
    kind = None if parallel.schedule == "auto" else parallel.schedule
    return make_schedule(kind, parallel.pp, parallel.chunks, run.batch_size // (parallel.dp * micro_batch_size(run, parallel.dp)))


def evaluate(step: TrainStep, examples: Examples, count: int) -> dict[str, tuple[float, int]]:
    """(sum of the losses in nats, how many) over every held-out target, by objective; `count` samples in a micro-batch.

    The replicas take turns, and all of them run as many micro-batches: one that has none left takes one without targets.
    """
    found: dict[str, tuple[float, int]] = {}
    together, dp = step.model.runner.schedule.microbatches, step.mesh.dp
    for name, batches in groupby(examples.held_out(count), key=lambda named: named[0]):
        waiting = iter([batch.to(step.mesh.device) for _, batch in batches])
        while some := list(islice(waiting, together * dp.size)):
            while len(some) % dp.size:
                some.append(replace(some[0], targets=torch.full_like(some[0].tokens, IGNORED)))
            (total, counted), (loss, more) = found.get(name, (0.0, 0)), step.evaluate(some[dp.rank :: dp.size])
            found[name] = (total + loss, counted + more)
    return found


class _Run:
    """The state of `train`."""

    def __init__(
        self, config: Config, mesh: ParallelMesh, examples: Examples, model: PipelinedDecoder, step: TrainStep, peak: MemoryPeak
    ) -> None:
        self.peak = peak
        self.config, self.mesh, self.examples, self.model, self.train_step = config, mesh, examples, model, step
        self.text = examples.text
        self.out = Path(config.run.out)
        self.first = self._resume() if config.run.resume else 0
        self.metrics: MetricsFile | None = None
        self.progress: RunProgress | None = None
        raise_together(self._open() if mesh.world.rank == 0 else None, mesh.world)

    def _open(self) -> Exception | None:
        """Prepares the output folder and says what the run is; what keeps rank 0 from it."""
        if not self.config.run.resume and newest_checkpoint(self.out / "checkpoints") is not None:
            return ValueError(f"run.out={self.out} holds checkpoints of an earlier run: go on with --resume, or give another --out")
        try:
            self.metrics = MetricsFile(self.out / "metrics.jsonl", self.first)
            (self.out / "config.json").write_text(json.dumps(to_dict(self.config), indent=2), encoding="utf-8")
        except (OSError, ValueError) as error:
            return ValueError(f"run.out={self.out} cannot hold the metrics of this run ({error}): give another --out")
        self.progress = RunProgress(self.config.run.steps, self.first)
        self.progress.say(self.text.description)
        parameters = sum(p.numel() for p in self.model.grads.params)
        self.progress.say(f"{self.mesh}, {torch.get_num_threads()} threads a rank, {parameters:,} parameters on this rank")
        if self.first:
            self.progress.say(f"resumed at step {self.first}")
        return None

    def go(self, interrupted: list[bool]) -> Trained:
        run, done, stopped, loss = self.config.run, self.first, False, None
        try:
            if self.first < run.steps and self._evaluates_at(self.first):
                self._evaluate(self.first)  # the run that stopped here may not have come to it
            for done in range(self.first + 1, run.steps + 1):
                stopped = self._step(done, interrupted)
                last = stopped or done == run.steps
                if run.save_every and (done % run.save_every == 0 or last):
                    self.save(done)
                if last:
                    break
                if self._evaluates_at(done):
                    self._evaluate(done)
            memory = memory_by_kind(self.train_step.optimizer, self.peak)
            loss = None if stopped else self._evaluate(done)
        finally:
            if self.metrics is not None and self.progress is not None:
                self.metrics.close()
                self.progress.close()
        timeline = self.model.runner.timeline() if self.mesh.pp.size > 1 else None
        return Trained(self.model, self.examples, done, stopped, loss, self.out, timeline, memory)

    def _step(self, done: int, interrupted: list[bool]) -> bool:
        """Trains step `done` (1 to steps); whether any rank was interrupted."""
        run, start, device = self.config.run, time.perf_counter(), self.mesh.device
        size, dp = micro_batch_size(run, self.mesh.dp.size), self.mesh.dp
        first, last = (done - 1) * run.batch_size, done * run.batch_size
        mine = range(first + dp.rank * size, last, dp.size * size)
        self.train_step.accumulate([self.examples.batch(i, size).to(device) for i in mine])
        rate = self.config.optimizer
        # Skipped steps have used data, not the rate.
        applied = done - 1 - self.train_step.optimizer.skipped_steps
        lr = learning_rate(applied, steps=run.steps, lr=rate.lr, min_lr=rate.min_lr, warmup=rate.warmup)
        result = self.train_step.update(lr, bool(interrupted))
        seconds = time.perf_counter() - start
        if self.metrics is not None and self.progress is not None:
            rest = {"tokens": result.tokens, "tokens_per_second": result.tokens / seconds, "seconds": seconds}
            rest["peak_bytes"] = self.peak.bytes()
            record = {"step": done, "loss": result.loss, "lr": lr, "grad_norm": result.grad_norm, **rest}
            if self.train_step.optimizer.precision.scaler is not None:
                record |= {"loss_scale": result.loss_scale, "skipped": int(result.skipped)}
            self.metrics.log(record)
            self.progress.step(record, (run.steps - done) * seconds)
        return result.stop

    def _evaluates_at(self, done: int) -> bool:
        every = self.config.run.eval_every
        return done > 0 and every > 0 and done % every == 0

    def _evaluate(self, done: int) -> float:
        found = evaluate(self.train_step, self.examples, micro_batch_size(self.config.run, self.mesh.dp.size))
        self.train_step.optimizer.release()
        loss = sum(total for total, _ in found.values()) / sum(count for _, count in found.values())
        if self.metrics is not None and self.progress is not None:
            each = {name: total / count for name, (total, count) in found.items()} if len(found) > 1 else {}
            self.metrics.log({"step": done, "held_out_loss": loss} | ({"held_out": each} if each else {}))
            told = ", ".join(f"{name} {value:.4f}" for name, value in each.items())
            self.progress.say(f"step {done}  held-out loss {loss:.4f} nats a token" + (f" ({told})" if told else ""))
        return loss

    def save(self, done: int) -> None:
        state = {"step": done, "config": to_dict(self.config), "corpus": self.text.corpus_sha256, "tokenizer": self.text.tokenizer.sha256}
        optimizer = self.train_step.optimizer
        state["progress"] = optimizer.progress()
        save_checkpoint(self.out / "checkpoints" / f"step-{done:08d}", optimizer.boxes(), state, self.mesh)

    def _resume(self) -> int:
        """Loads the newest checkpoint; the number of steps it has seen."""
        folder = newest_checkpoint(self.out / "checkpoints")
        check_same(None if folder is None else folder.name, self.mesh.world, "the newest checkpoint")
        if folder is None:
            raise ValueError(f"{self.out / 'checkpoints'} holds no checkpoint to resume from: leave --resume out, or check run.out")
        optimizer = self.train_step.optimizer
        state = load_checkpoint(folder, optimizer.boxes(), self.mesh, lambda state: self._accept(state, folder))
        optimizer.set_progress(state["progress"])
        optimizer.loaded()
        return int(state["step"])

    def _accept(self, state: dict[str, Any], folder: Path) -> None:
        """Raises ValueError for a checkpoint of another run, naming what differs."""
        here = {"config": _fixed(to_dict(self.config)), "corpus": self.text.corpus_sha256, "tokenizer": self.text.tokenizer.sha256}
        there = _flat({"config": _fixed(state["config"]), "corpus": state.get("corpus"), "tokenizer": state.get("tokenizer")})
        for name, told in _flat(json.loads(json.dumps(here))).items():
            if there.get(name) != told:
                now, then = f"{name.removeprefix('config.')} is {told}", f"was {there.get(name)} in {folder}"
                raise ValueError(f"{now} and {then}: a resumed run must keep it")


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    """The config without what a resumed run may change."""
    return {section: {k: v for k, v in values.items() if k not in FREE_TO_CHANGE.get(section, ())} for section, values in config.items()}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


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
