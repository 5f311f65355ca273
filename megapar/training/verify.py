"""The proof that a model in parallel is the model alone: outputs, loss and raw gradients of one step, against bounds.

    fp32          |error| <= max(4 x the one-process fp32 error against fp64, 1e-6 x the largest of its kind)
    bf16, fp16    ||error|| <= max(2 x the one-process error against fp64 of the same weights, one rounding of as many elements)

Raw gradients, because a loss curve forgives and AdamW hides a wrong scale. Each rank compares its own boxes of every logical tensor
with those of the model that it also built alone, so that copies which differ between ranks are found too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megapar.collectives import gather_json, raise_together
from megapar.mesh import ParallelMesh
from megapar.optim.precision import PARAMETERS
from megapar.params import Piece
from megapar.pipeline.schedule import Schedule
from megapar.training.verify_steps import Found, boxes, run_alone, run_pipelined, run_sharded
from megapar.training.verify_subject import SEED, Build, Subject


@dataclass(frozen=True)
class Check:
    """The worst error over all ranks of one thing that must agree, and what it may be."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound and math.isfinite(self.error)


def verify(
    subject: Subject, mesh: ParallelMesh, schedule: Schedule | None = None, zero_stage: int | None = None, precision: str = "fp32"
) -> list[Check]:
    """Runs the step alone in fp64, alone in `precision` and in parallel, and compares. The same list on every rank.

    schedule: of the pipeline, for a mesh that has one; each replica's step then has its number of micro-batches, otherwise 1, and 2 with
    several replicas. zero_stage: of the ZeroOptimizer that a mesh with several replicas, or another precision, needs. Raises ValueError,
    on every rank, for models that are not one.
    """
    dp, dtype = mesh.dp, PARAMETERS[precision]
    if zero_stage is None and (dp.size > 1 or precision != "fp32"):
        zero_stage = 1
    alone = _seeded(subject.build, ParallelMesh.alone(mesh.device))
    stages = _stages(subject, mesh, schedule)
    each = schedule.microbatches if schedule is not None else 1 if dp.size == 1 else 2
    inputs = []
    for microbatch in range(each * dp.size):
        torch.manual_seed(SEED + microbatch)  # building may have drawn differently often
        inputs.append(subject.inputs(alone, microbatch))
    initial, weights = _whole(boxes([alone], lambda p: p)), boxes(stages, lambda p: p)
    raise_together(_difference(initial, weights, mesh), mesh.world)
    first = Check("initial weights", max((_largest(box - initial[p.name][p.index]) for p, box in weights), default=0.0), 0.0)
    alone = alone.to(dtype)
    exact, single = (run_alone(model, subject, inputs) for model in (copy.deepcopy(alone).double(), alone))
    assert exact.outputs is not None
    width, mine = exact.outputs[-1].shape[-1], inputs[dp.rank :: dp.size]
    if zero_stage is not None:
        spread = run_sharded(stages, subject, mine, mesh, schedule, width, zero_stage, precision)
    elif schedule is not None:
        spread = run_pipelined(stages, subject, mine, mesh, schedule, width)
    else:
        spread = run_alone(stages[0], subject, mine, mesh, width)
    last = (each - 1) * dp.size + dp.rank
    return _worst_of_ranks([first, *_compare(exact, single, spread, last, dtype)], mesh)


def _compare(exact: Found, single: Found, spread: Found, last: int, dtype: torch.dtype) -> list[Check]:
    """The checks of output (`last`: the number of this rank's last micro-batch), loss and gradients."""
    assert exact.outputs is not None and single.outputs is not None and exact.loss is not None and single.loss is not None
    output = None if spread.outputs is None else spread.outputs[-1]
    checks = [_check("output", exact.outputs[last], single.outputs[last], output, dtype)]
    checks.append(_check("loss", exact.loss, single.loss, spread.loss, dtype))
    true, near = _whole(exact.gradients), _whole(single.gradients)
    largest = max(_largest(g) for g in true.values())
    whole = math.sqrt(sum(_norm(g) ** 2 for g in true.values()) / sum(g.numel() for g in true.values()))
    errors: dict[str, list[float]] = {name: [0.0] for name in true}
    size = _largest if dtype == torch.float32 else _norm
    for piece, box in spread.gradients:
        errors[piece.name].append(size(box.double() - true[piece.name][piece.index]))
    for name, gradient in true.items():
        error, alone = errors[name], size(near[name].double() - gradient)
        if dtype == torch.float32:
            checks.append(Check(f"gradient {name}", max(error), max(4 * alone, 1e-6 * largest)))
        else:
            floor = torch.finfo(dtype).eps * whole * math.sqrt(gradient.numel())
            checks.append(Check(f"gradient {name}", math.hypot(*error), max(2 * alone, floor)))
    return checks


def _check(name: str, true: Tensor, near: Tensor, far: Tensor | None, dtype: torch.dtype) -> Check:
    size, times = (_largest, 4) if dtype == torch.float32 else (_norm, 2)
    floor = (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps) * size(true)
    return Check(name, 0.0 if far is None else size(far.double() - true.double()), max(times * size(near.double() - true.double()), floor))


def _largest(difference: Tensor) -> float:
    return _finite(float(difference.abs().max())) if difference.numel() else 0.0


def _norm(difference: Tensor) -> float:
    return _finite(float(difference.double().norm()))


def _finite(error: float) -> float:
    return error if error == error else float("inf")


def _seeded(build: Build, mesh: ParallelMesh) -> nn.Module:
    """The model in eval mode: dropout draws anew in each layout and would hide everything else."""
    torch.manual_seed(SEED)
    return build(mesh).to(mesh.device).eval()


def _stages(subject: Subject, mesh: ParallelMesh, schedule: Schedule | None) -> list[nn.Module]:
    """The whole model, or this rank's stages of it."""
    if schedule is None:
        return [_seeded(subject.build, mesh)]
    build_stage, stages = subject.build_stage, schedule.stages
    if build_stage is None:
        raise ValueError("a pipeline needs build_stage(mesh, stage, stages) beside build, which returns a stage: define it, or lower --pp")
    mine = [stage for stage, rank in enumerate(schedule.stage_to_rank) if rank == mesh.pp.rank]
    return [_seeded(lambda mesh, stage=stage: build_stage(mesh, stage, stages), mesh) for stage in mine]  # type: ignore[misc]


def _whole(held: list[tuple[Piece, Tensor]]) -> dict[str, Tensor]:
    """The logical tensors of a model that is alone."""
    whole: dict[str, Tensor] = {}
    for piece, box in held:
        whole.setdefault(piece.name, box.new_zeros(piece.shape))[piece.index] = box
    return whole


def _difference(alone: Mapping[str, Tensor], parallel: list[tuple[Piece, Tensor]], mesh: ParallelMesh) -> ValueError | None:
    """Why the two are not one model, if their parameters say so: those of all pipeline ranks together."""
    told = gather_json([(piece.name, piece.shape) for piece, _ in parallel], mesh.pp)
    shapes = {name: tuple(shape) for of_rank in told for name, shape in of_rank}
    for name in sorted(shapes.keys() ^ alone.keys()):
        where = "in parallel" if name in shapes else "alone"
        return ValueError(f'the model has a parameter "{name}" only {where}: build the same one from the same seed for every mesh')
    for name, shape in shapes.items():
        if tuple(alone[name].shape) != shape:
            both = f"{tuple(alone[name].shape)} alone and {shape} in parallel"
            return ValueError(f'parameter "{name}" has shape {both}: build the same model')
    return None


def _worst_of_ranks(checks: list[Check], mesh: ParallelMesh) -> list[Check]:
    errors = gather_json([check.error for check in checks], mesh.world)
    return [replace(check, error=max(column)) for check, column in zip(checks, zip(*errors, strict=True), strict=True)]
