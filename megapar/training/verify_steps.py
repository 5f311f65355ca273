"""The ways in which `megapar verify` runs a step: one model in plain PyTorch, layers over tp, a pipeline, ZeRO over dp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from megapar.collectives import gather_json, gather_last
from megapar.grads import MainGrads
from megapar.mesh import ParallelMesh
from megapar.optim.precision import LossScaler, Precision
from megapar.params import Piece, named_specs
from megapar.pipeline.passes import with_sharding
from megapar.pipeline.runtime import PipelineRunner
from megapar.pipeline.schedule import Schedule
from megapar.training.verify_subject import Subject
from megapar.zero.layout import boxes as boxes_of_range
from megapar.zero.optimizer import ZeroOptimizer

Inputs = Sequence[tuple[Tensor, ...]]
FP16_SCALE = 2.0**8
"""Of the loss in fp16: enough for gradients of a small model, and far from overflow."""


@dataclass(frozen=True)
class Found:
    """What a step came to on this rank. gradients: of its boxes. outputs, of its micro-batches, and loss, of all, are None where the
    pipeline leaves them to another rank."""

    gradients: list[tuple[Piece, Tensor]]
    outputs: list[Tensor] | None
    loss: Tensor | None


def boxes(model: Sequence[nn.Module], value: Callable[[Any], Tensor | None]) -> list[tuple[Piece, Tensor]]:
    """What this rank holds of each logical tensor; zeros for a gradient that never came."""
    found: list[tuple[Piece, Tensor]] = []
    for _, param, spec in named_specs(model):
        local = value(param)
        found.extend((piece, view.detach()) for piece, view in spec.views(torch.zeros_like(param) if local is None else local))
    return found


def run_alone(model: nn.Module, subject: Subject, inputs: Inputs, mesh: ParallelMesh | None = None, width: int = 0) -> Found:
    """The step of one model, or of layers over tp, in plain PyTorch."""
    dtype, losses, outputs = next(model.parameters()).dtype, [], []
    scale = FP16_SCALE if dtype == torch.float16 else 1.0
    for given in inputs:
        output = _whole_output(_call(model, given, dtype), mesh, width)
        loss = subject.loss(output, *given)
        loss.backward(torch.full_like(loss, scale))
        losses.append(loss.detach())
        outputs.append(output.detach())
    gradients = [(piece, grad / scale) for piece, grad in boxes([model], lambda p: p.grad)]
    return Found(gradients, outputs, torch.stack(losses).sum())


def run_pipelined(
    stages: Sequence[nn.Module], subject: Subject, inputs: Inputs, mesh: ParallelMesh, schedule: Schedule, width: int
) -> Found:
    """The step of a pipeline, its gradients in main_grad."""
    main_grads = MainGrads(param for stage in stages for param in stage.parameters())
    runner = PipelineRunner(stages, mesh, schedule)
    outputs: list[Tensor] = []
    totals = runner.step(inputs, _loss_of(subject, mesh, width, outputs))
    main_grads.finish()
    gradients = boxes(stages, lambda p: p.main_grad)
    return Found(gradients, outputs, totals.loss) if runner.is_last else Found(gradients, None, None)


def run_sharded(
    stages: Sequence[nn.Module],
    subject: Subject,
    inputs: Inputs,
    mesh: ParallelMesh,
    schedule: Schedule | None,
    width: int,
    stage: int,
    precision: str,
) -> Found:
    """The step of a ZeroOptimizer, in a pipeline if there is a schedule; `inputs` are those of this rank's replica."""
    how = Precision.of(precision) if precision != "fp16" else Precision(torch.float16, scaler=LossScaler.static(FP16_SCALE))
    optimizer = ZeroOptimizer(stages, mesh, stage=stage, precision=how, max_norm=None)
    outputs: list[Tensor] = []
    loss_fn, is_last = _loss_of(subject, mesh, width, outputs), True
    if schedule is None:
        loss = torch.zeros((), device=mesh.device)
        for number, given in enumerate(inputs):
            found, _ = loss_fn(_call(stages[0], given, how.param), given)
            optimizer.backward(found, last=number == len(inputs) - 1)
            loss += found.detach()
    else:
        sharded = with_sharding(schedule, 1)
        runner = PipelineRunner(stages, mesh, sharded, sharding=optimizer.actions(schedule.stage_to_rank))
        with optimizer.accumulating(len(inputs)):
            loss = runner.step(inputs, loss_fn, loss_scale=optimizer.loss_scale).loss
        is_last = runner.is_last
    optimizer.grads.finish()
    gradients = [(piece, grad / float(optimizer.loss_scale)) for piece, grad in _shards(optimizer)]
    total = torch.tensor(sum(gather_json(float(loss), mesh.dp)))
    return Found(gradients, outputs, total) if is_last else Found(gradients, None, None)


def _shards(optimizer: ZeroOptimizer) -> list[tuple[Piece, Tensor]]:
    """This rank's parts of the summed gradients."""
    found: list[tuple[Piece, Tensor]] = []
    for index, (spec, shard) in enumerate(zip(optimizer.sharded.specs, optimizer.grads.shards, strict=True)):
        start, stop = optimizer.layout.interval(index, optimizer.mesh.dp.rank)
        for piece, at in boxes_of_range(spec, start, stop):
            found.append((piece, shard[at - start : at - start + piece.numel].view(piece.box)))
    return found


def _call(model: nn.Module, given: tuple[Tensor, ...], dtype: torch.dtype) -> Any:
    return model(*(x.to(dtype) if x.is_floating_point() else x for x in given))


def _loss_of(subject: Subject, mesh: ParallelMesh, width: int, outputs: list[Tensor]) -> Callable[[Any, Any], tuple[Tensor, int]]:
    def loss_fn(output: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, int]:
        whole = _whole_output(output, mesh, width)
        outputs.append(whole.detach())
        return subject.loss(whole, *given), 1

    return loss_fn


def _whole_output(output: Any, mesh: ParallelMesh | None, width: int) -> Tensor:
    """The tensor that the model returned, its last dimension joined where the model leaves it cut over tp."""
    found: Tensor = output if isinstance(output, Tensor) else output.logits if hasattr(output, "logits") else output[0]
    if mesh is None or found.shape[-1] == width:
        return found
    edges = [0, *accumulate(gather_json(found.shape[-1], mesh.tp))]
    return gather_last(found, mesh.tp, list(pairwise(edges)))
