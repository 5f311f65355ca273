"""The one runtime that executes any schedule: a loop over this rank's actions.

Sends are started and forgotten, receives are posted one computation ahead of need and waited for where they are used: weaker than the
rendezvous with which `check` proves a schedule, so what passes there cannot deadlock here. Gradients are sums: nothing here divides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megapar.collectives import check_same, gather_json, raise_together
from megapar.failures import leave, named_failures
from megapar.mesh import Axis, ParallelMesh
from megapar.pipeline.orders import forward_only
from megapar.pipeline.passes import prepared, receives_ahead, with_communication
from megapar.pipeline.recorder import Recorder
from megapar.pipeline.schedule import COMPUTE, RECEIVES, SENDS, Action, Schedule
from megapar.pipeline.simulate import Timeline
from megapar.pipeline.stage import LossFunction, Stage, defer_where_split, make_stages
from megapar.pipeline.wire import Incoming, Payload, Wire, signature
from megapar.transport import host_device, start_all_gather


@dataclass
class StepTotals:
    """What the last stage's loss function summed over the micro-batches: zeros on ranks that do not hold that stage."""

    loss: Tensor
    count: int | Tensor = 0


class PipelineRunner:
    """This rank's chunks of a model, and the schedule that they run by.

    chunks: a module for each stage that `schedule` places on this rank, in the order of the stages. Stage s is called as
        chunk(x, micro_batch), x being what stage s - 1 returned, None for the first stage: one tensor, or a tuple of 1 to 16.
    schedule: with its sends, or without (they are added). It is proven before anything runs.
    inputs: for chunks that take one argument, plain nn.Modules: the first is called with inputs(micro_batch), the others with x.
    sharding: called with each UNSHARD, RESHARD and REDUCE_GRAD of the schedule, which must have none if it is not given.

    Gradients arrive in `.grad`, or in `main_grad` where `grads.MainGrads` was given the parameters, which schedules with W need. Every rank
    of the mesh makes the runner together. Raises ValueError on every pipeline rank for chunks that do not fit the schedule, a schedule
    that fails its proof or differs between ranks, and weights whose gradients a W cannot defer. After an error in a step the runner is
    broken: every rank ends with the first failing rank's error.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        mesh: ParallelMesh,
        schedule: Schedule,
        *,
        inputs: Callable[[Any], Any] | None = None,
        sharding: Callable[[Action], None] | None = None,
    ) -> None:
        self.mesh, self.sharding = mesh, sharding
        self._broken = ""
        self._proven: dict[Schedule, tuple[Schedule, str]] = {}  # by what was given: what is executed, and its sha256
        self._take(schedule, lambda proven: make_stages(chunks, proven, mesh.pp.rank, inputs))
        self.wire = Wire(mesh.pp, self.schedule.stage_to_rank, mesh.device)
        self._evaluations: dict[int, Schedule] = {}
        self._recorder = Recorder(mesh.device)

    def set_schedule(self, schedule: Schedule) -> None:
        """From the next step on `schedule`: another number of micro-batches, or another order, of the same stages on the same ranks.

        Every rank of the mesh calls it. A schedule is proven once: one that was there before costs one exchange of 8 bytes. Raises
        ValueError as the constructor does, and for stages on other ranks, on every rank, and what was there stays.
        """
        self._refuse_broken()
        self._take(schedule, self._same_stages)

    def _take(self, schedule: Schedule, stages_of: Callable[[Schedule], dict[int, Stage]]) -> None:
        """Makes `schedule` the runner's, once no rank has refused it and all were given the same."""
        error: Exception | None = None
        try:
            if schedule not in self._proven:
                proven = prepared(schedule, self.mesh.pp.size, self.sharding is not None)
                self._proven[schedule] = proven, hashlib.sha256(str(proven).encode()).hexdigest()
            proven, digest = self._proven[schedule]
            stages = stages_of(proven)
        except Exception as caught:  # whatever it is, the other ranks must hear of it
            error = caught
        if not _all_say(None if error else digest, self.mesh.world):
            raise_together(error, self.mesh.world)
            check_same(digest, self.mesh.world, "the schedule's sha256")
        self.schedule, self.stages = proven, stages

    def _same_stages(self, schedule: Schedule) -> dict[int, Stage]:
        """Those that there are, which can do what the schedule asks."""
        here, there = self.schedule.stage_to_rank, schedule.stage_to_rank
        if there != here:
            raise ValueError(f"the schedule places stages on ranks {list(there)} and they are on {list(here)}: make one for these")
        defer_where_split(self.stages.values(), schedule)
        return self.stages

    def step(self, micro_batches: Sequence[Any], loss_fn: LossFunction, *, loss_scale: float | Tensor = 1.0) -> StepTotals:
        """Forwards and backwards of one step; gradients are added to what is there.

        micro_batches: as many as the schedule has, the same list on every rank of a pipeline. Shapes may differ from one to the next.
        loss_fn(output, micro_batch): the fp32 sum of the losses, and how many they are; called on the last stage. loss_scale: the seed
        of its backward. Raises ValueError on every rank, before anything is computed, for lists that differ or do not fit the schedule.
        """
        return self._execute("step", self.schedule, micro_batches, loss_fn, loss_scale)[0]

    def evaluate(self, micro_batches: Sequence[Any], loss_fn: LossFunction) -> StepTotals:
        """Forwards alone, without gradients, of any number of micro-batches, the same list on every rank of a pipeline."""
        return self._execute("evaluate", None, micro_batches, loss_fn, None)[0]

    def forward(self, micro_batch: Any) -> Any:
        """What the last stage returns for a micro-batch, without gradients; None on ranks that do not hold it."""
        return self._execute("forward", None, [micro_batch], None, None)[1]

    def timeline(self) -> Timeline:
        """What every rank did in the last `step` and when, in seconds since its start. All ranks of the pipeline call it."""
        return Timeline(tuple(self._recorder.spans_from(told) for told in gather_json(self._recorder.told(), self.mesh.pp)))

    @property
    def is_last(self) -> bool:
        """Whether this rank holds the last stage."""
        return self.schedule.stage_to_rank[-1] == self.mesh.pp.rank

    def _forward_schedule(self, microbatches: int) -> Schedule:
        if microbatches not in self._evaluations:
            self._evaluations[microbatches] = with_communication(forward_only(self.schedule.stage_to_rank, microbatches))
        return self._evaluations[microbatches]

    def _execute(
        self,
        what: str,
        schedule: Schedule | None,
        micro_batches: Sequence[Any],
        loss_fn: LossFunction | None,
        loss_scale: float | Tensor | None,
    ) -> tuple[StepTotals, Any]:
        """Runs `schedule`, or forwards alone. what: the method that was called."""
        self._refuse_broken()
        with named_failures(self.mesh):
            try:
                signed = self._agree(what, None if schedule is None else schedule.microbatches, micro_batches)
            except ValueError as error:
                if self.mesh.dp.size > 1:  # ranks of other pipelines, which share layers with this one, were not in the exchange
                    leave(self.mesh, error, what)
                raise
            schedule = schedule or self._forward_schedule(len(signed))
            step = _Step(self, schedule, micro_batches, signed, loss_fn, loss_scale)
            with self._failing(step):
                step.run()
        return step.totals, step.output

    def _refuse_broken(self) -> None:
        if self._broken:
            raise RuntimeError(f"an earlier step of this runner failed ({self._broken}): start the ranks again")

    def _agree(self, what: str, wanted: int | None, micro_batches: Sequence[Any]) -> list[Hashable]:
        """The signature of each micro-batch, once all ranks have said that theirs are the same."""
        error: Exception | None = None
        signed: list[Hashable] = []
        count = len(micro_batches) if isinstance(micro_batches, Sequence) else None
        try:
            if count is None:
                raise ValueError(f"{what} was given a {type(micro_batches).__name__} as micro-batches: give a list of them")
            if count == 0 or count != (wanted or count):
                raise ValueError(f"{what} was given {count} micro-batches and takes {wanted or '1 or more'}: give as many")
            signed = [signature(micro_batch) for micro_batch in micro_batches]
        except Exception as caught:  # whatever it is, the other ranks must hear of it
            error = caught
        # With tp alone beside it, ranks that share a layer are told too; else the pipeline, whose messages are the fastest way.
        axis = self.mesh.world if self.mesh.dp.size == 1 < self.mesh.tp.size else self.mesh.pp
        if not _all_say(None if error else (what, signed), axis):
            check_same(what, axis, "the method that is called")
            check_same(count, axis, "the number of micro-batches")
            raise_together(error, axis)
            check_same([str(s) for s in signed], axis, "what the micro-batches look like")
        return signed

    @contextmanager
    def _failing(self, step: _Step) -> Any:
        """Lets no rank wait for one that failed: it leaves word and closes its connections, which ends the waits of its neighbours."""
        try:
            yield
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {error}"  # not the error, whose traceback keeps the step's tensors
            for stage in self.stages.values():
                stage.forget()
            leave(self.mesh, error, str(step.action))
            raise


class _Step:
    """One pass through a schedule."""

    def __init__(
        self,
        runner: PipelineRunner,
        schedule: Schedule,
        micro_batches: Sequence[Any],
        signed: Sequence[Hashable],
        loss_fn: LossFunction | None,
        loss_scale: float | Tensor | None,
    ) -> None:
        self.stages, self.wire, self.sharding = runner.stages, runner.wire, runner.sharding
        self.actions, self.micro_batches, self.signed = schedule.ranks[runner.mesh.pp.rank], micro_batches, signed
        self.loss_fn, self.trains = loss_fn, loss_scale is not None
        device = runner.mesh.device
        self.seed = torch.as_tensor(1.0 if loss_scale is None else loss_scale, dtype=torch.float32, device=device)
        self.totals, self.output = StepTotals(torch.zeros((), device=device)), None
        self.recorder = runner._recorder if self.trains else Recorder(device)
        self.action: Action | None = None
        self.here: dict[tuple[str, int, int], Payload] = {}  # by F or B, stage and micro-batch: what that F or B is about to be given
        self.coming: dict[Action, Incoming] = {}

    def run(self) -> None:
        # Messages without tags (NCCL's) must stay in the order of the list.
        tagged = self.wire.device.type == "cpu"
        ahead = receives_ahead(self.actions) if tagged else [[] for _ in self.actions]
        self.recorder.start()
        for action, soon in zip(self.actions, ahead, strict=True):
            self.action = action
            for receive in soon:
                if self.wire.knows(receive, self.signed[receive.microbatch or 0]):
                    self._post(receive)
            if action.kind in COMPUTE:
                self._compute(action)
            elif action.kind in RECEIVES:
                self._post(action)
            elif action.kind in SENDS:
                self._send(action)
            elif self.sharding is not None:
                self.sharding(action)
        self.wire.flush()

    def _post(self, action: Action) -> None:
        if action not in self.coming:
            self.coming[action] = self.wire.receive(action, self.signed[action.microbatch or 0])

    def _send(self, action: Action) -> None:
        kind, stage, m = action
        there = ("F", stage + 1, m or 0) if kind == "SEND_F" else ("B", stage - 1, m or 0)
        self.wire.send(action, self.here.pop(there), self.signed[m or 0])

    def _arrived(self, letter: str, stage: int, m: int) -> Payload:
        """What an F or B is given: from a stage of this rank, or over the wire."""
        receive = self.coming.pop(Action(f"RECV_{letter}", stage, m), None)
        return self.here.pop((letter, stage, m)) if receive is None else receive.arrived()

    def _compute(self, action: Action) -> None:
        kind, index, microbatch = action
        m, stage = microbatch or 0, self.stages[index]
        if kind == "F":
            received = None if stage.is_first else self._arrived("F", index, m)
            begin = self.recorder.now()
            self._forward(stage, m, received)
        elif kind == "W":
            begin = self.recorder.now()
            stage.weight_gradients(m)
        else:
            gradients = (self.seed,) if stage.is_last else self._arrived("B", index, m).tensors
            begin = self.recorder.now()
            found = (stage.backward if kind == "B" else stage.input_gradients)(m, gradients)
            if not stage.is_first:
                self.here["B", index - 1, m] = found
        self.recorder.add(action, begin)

    def _forward(self, stage: Stage, m: int, received: Payload | None) -> None:
        output: Payload | None
        if self.trains:
            assert self.loss_fn is not None
            output, found = stage.forward(m, received, self.micro_batches[m], self.loss_fn)
        else:
            output, found = stage.evaluate(received, self.micro_batches[m], self.loss_fn)
        if found is not None:
            self.totals.loss = self.totals.loss + found[0]
            self.totals.count = self.totals.count + found[1]
        elif output is not None and stage.is_last:
            self.output = output.value
        elif output is not None:
            self.here["F", stage.index + 1, m] = output


def _all_say(said: Hashable, axis: Axis) -> bool:
    """Whether all ranks say the same, and not None: the same answer on each. One exchange of 8 bytes, on the host."""
    if axis.size == 1:
        return said is not None
    digest = int.from_bytes(hashlib.sha256(repr(said).encode()).digest()[:7], "little")
    mine = torch.tensor([-1 if said is None else digest], device=host_device(axis))
    return bool((start_all_gather(mine, axis).wait() == mine).all()) and said is not None
