"""The proof that a model in parallel is the model alone: outputs, loss and raw gradients of one step, against bounds.

    |error| <= max(4 x the one-process fp32 error against fp64, 1e-6 x the largest of its kind)

Raw gradients, because a loss curve forgives and AdamW hides a wrong scale. Each rank compares its own boxes of every logical tensor
with those of the model that it also built alone, so that copies which differ between ranks are found too.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapar.collectives import gather_json, gather_last, raise_together
from megapar.grads import MainGrads
from megapar.layers.embedding import VocabParallelEmbedding
from megapar.layers.parallelize import Role, parallelize
from megapar.mesh import ParallelMesh
from megapar.params import Piece, named_specs
from megapar.pipeline.runtime import PipelineRunner
from megapar.pipeline.schedule import Schedule

Build = Callable[[ParallelMesh], nn.Module]
BuildStage = Callable[[ParallelMesh, int, int], nn.Module]
SEED = 0


@dataclass(frozen=True)
class Check:
    """The worst error over all ranks of one thing that must agree, and what it may be."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound and math.isfinite(self.error)


@dataclass(frozen=True)
class Subject:
    """What is verified: a way to build the model on a mesh, the inputs of micro-batch m, and a loss of (output, *inputs).

    build_stage(mesh, stage, stages): for a pipeline, a stage of the same model, called as stage(what the one before returned, inputs); the
    last one returns what the model does.
    """

    build: Build
    inputs: Callable[[nn.Module, int], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    build_stage: BuildStage | None = None


@dataclass(frozen=True)
class Found:
    """What a step came to on this rank. gradients: of its boxes. output (of the last micro-batch) and loss are None where the pipeline
    leaves them to another rank."""

    gradients: list[tuple[Piece, Tensor]]
    output: Tensor | None
    loss: Tensor | None


def verify(subject: Subject, mesh: ParallelMesh, schedule: Schedule | None = None) -> list[Check]:
    """Runs the step alone in fp64, alone in fp32 and in parallel, and compares. The same list on every rank.

    `schedule`: of the pipeline, for a mesh that has one; the step then has its number of micro-batches.
    """
    alone = _seeded(subject.build, ParallelMesh.alone(mesh.device))
    stages = _stages(subject, mesh, schedule)
    inputs = []
    for microbatch in range(1 if schedule is None else schedule.microbatches):
        torch.manual_seed(SEED + microbatch)  # building may have drawn differently often
        inputs.append(subject.inputs(alone, microbatch))
    initial, weights = _whole(_boxes([alone], lambda p: p)), _boxes(stages, lambda p: p)
    raise_together(_difference(initial, weights, mesh), mesh.world)
    exact, single = (_alone(model, subject, inputs) for model in (copy.deepcopy(alone).double(), alone))
    assert exact.output is not None and exact.loss is not None and single.output is not None and single.loss is not None
    if schedule is None:
        spread = _alone(stages[0], subject, inputs, mesh, exact.output.shape[-1])
    else:
        spread = _pipelined(stages, subject, inputs, mesh, schedule, exact.output.shape[-1])
    checks = [Check("initial weights", max((_distance(box, initial[p.name][p.index]) for p, box in weights), default=0.0), 0.0)]
    for name in ("output", "loss"):
        true, near, far = (getattr(step, name) for step in (exact, single, spread))
        bound = max(4 * _distance(near, true), 1e-6 * float(true.abs().max()))
        checks.append(Check(name, 0.0 if far is None else _distance(far, true), bound))
    true_gradients, near_gradients = (_whole(step.gradients) for step in (exact, single))
    floor = 1e-6 * max(float(g.abs().max()) for g in true_gradients.values())
    worst: dict[str, float] = {}
    for piece, box in spread.gradients:
        worst[piece.name] = max(worst.get(piece.name, 0.0), _distance(box, true_gradients[piece.name][piece.index]))
    for name, true in true_gradients.items():
        checks.append(Check(f"gradient {name}", worst.get(name, 0.0), max(4 * _distance(near_gradients[name], true), floor)))
    return _worst_of_ranks(checks, mesh)


def _alone(model: nn.Module, subject: Subject, inputs: list[tuple[Tensor, ...]], mesh: ParallelMesh | None = None, width: int = 0) -> Found:
    """The step of one model in plain PyTorch."""
    dtype, losses, output = next(model.parameters()).dtype, [], torch.empty(0)
    for given in inputs:
        output = _whole_output(model(*(x.to(dtype) if x.is_floating_point() else x for x in given)), mesh, width)
        loss = subject.loss(output, *given)
        loss.backward()
        losses.append(loss.detach())
    return Found(_boxes([model], lambda p: p.grad), output.detach(), torch.stack(losses).sum())


def _pipelined(
    stages: list[nn.Module], subject: Subject, inputs: list[tuple[Tensor, ...]], mesh: ParallelMesh, schedule: Schedule, width: int
) -> Found:
    """The step of a pipeline, its gradients in main_grad."""
    main_grads = MainGrads(param for stage in stages for param in stage.parameters())
    runner = PipelineRunner(stages, mesh, schedule)
    outputs: list[Tensor] = []

    def loss_fn(output: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, int]:
        whole = _whole_output(output, mesh, width)
        outputs.append(whole.detach())
        return subject.loss(whole, *given), 1

    totals = runner.step(inputs, loss_fn)
    main_grads.finish()
    gradients = _boxes(stages, lambda p: p.main_grad)  # type: ignore[attr-defined]
    return Found(gradients, outputs[-1], totals.loss) if runner.is_last else Found(gradients, None, None)


def _whole_output(output: Any, mesh: ParallelMesh | None, width: int) -> Tensor:
    """The tensor that the model returned, its last dimension joined where the model leaves it cut over tp."""
    found: Tensor = output if isinstance(output, Tensor) else output.logits if hasattr(output, "logits") else output[0]
    if mesh is None or found.shape[-1] == width:
        return found
    edges = [0, *accumulate(gather_json(found.shape[-1], mesh.tp))]
    return gather_last(found, mesh.tp, list(pairwise(edges)))


def language_model_loss(output: Tensor, tokens: Tensor) -> Tensor:
    """Sum of next-token cross-entropies: logits [b, s, v] or [b * s, v], tokens int64 [b, s]."""
    return F.cross_entropy(output.reshape(tokens.numel(), -1), tokens.roll(-1, 1).reshape(-1), reduction="sum")


def random_tokens(model: nn.Module, microbatch: int) -> tuple[Tensor, ...]:
    """int64 [2, 15] tokens of the vocabulary of the model's first embedding; every third micro-batch is shorter. Raises ValueError if it
    has none."""
    for module in model.modules():
        if isinstance(module, (nn.Embedding, VocabParallelEmbedding)):
            generator = torch.Generator().manual_seed(SEED + microbatch)
            tokens = torch.randint(0, module.num_embeddings, (2, 11 if microbatch % 3 == 2 else 15), generator=generator)
            return (tokens.to(next(model.parameters()).device),)
    raise ValueError("the model has no embedding to take tokens for: define inputs() -> tuple of tensors beside build")


def load_subject(target: str, sequence_parallel: bool) -> Subject:
    """The subject that `module:build` names.

    `build(mesh)` makes the model itself (and takes sequence_parallel= if asked for it); `build()` makes a plain one, which `parallelize`
    cuts by `plan` of the same module or by its own tp_plan. The module may define `inputs()` and `loss(output, *inputs)`, and for a
    pipeline has to define `build_stage(mesh, stage, stages)`, which takes sequence_parallel= if asked for it. Raises ValueError for a
    target that is not there.
    """
    module_name, _, function = target.partition(":")
    function = function or "build"
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # it stays, for what build imports when it is called
    try:
        module: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{target}: no module {error.name} here or installed: write module:build, as in my_model:build") from error
    build = getattr(module, function, None)
    if not callable(build):
        raise ValueError(f'{target}: module {module_name} has no function "{function}": define it, it returns the model')
    given = getattr(module, "inputs", None)
    inputs = (lambda model, microbatch: tuple(given())) if given is not None else random_tokens
    loss, build_stage = getattr(module, "loss", language_model_loss), getattr(module, "build_stage", None)
    if build_stage is not None and sequence_parallel:
        if "sequence_parallel" not in inspect.signature(build_stage).parameters:
            raise ValueError("--sequence-parallel needs build_stage(mesh, stage, stages, sequence_parallel): add it, or drop the flag")
        build_stage = partial(build_stage, sequence_parallel=True)
    return Subject(_builder(build, getattr(module, "plan", None), sequence_parallel), inputs, loss, build_stage)


def _builder(build: Callable[..., nn.Module], plan: Mapping[str, Role] | None, sequence_parallel: bool) -> Build:
    parameters = dict(inspect.signature(build).parameters)
    if sequence_parallel and "sequence_parallel" not in parameters:
        raise ValueError("--sequence-parallel needs build(mesh, sequence_parallel): parallelize does not shard tokens, leave the flag out")
    options = {"sequence_parallel": sequence_parallel} if parameters.pop("sequence_parallel", None) else {}
    if "mesh" in parameters or any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values()):
        return lambda mesh: build(mesh, **options)
    return lambda mesh: parallelize(build(), mesh, plan) if mesh.world.size > 1 else build()


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


def _boxes(model: Sequence[nn.Module], value: Callable[[nn.Parameter], Tensor | None]) -> list[tuple[Piece, Tensor]]:
    """What this rank holds of each logical tensor; zeros for a gradient that never came."""
    found: list[tuple[Piece, Tensor]] = []
    for _, param, spec in named_specs(model):
        local = value(param)
        found.extend((piece, view.detach()) for piece, view in spec.views(torch.zeros_like(param) if local is None else local))
    return found


def _whole(boxes: list[tuple[Piece, Tensor]]) -> dict[str, Tensor]:
    """The logical tensors of a model that is alone."""
    whole: dict[str, Tensor] = {}
    for piece, box in boxes:
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


def _distance(found: Tensor, true: Tensor) -> float:
    difference = float((found.double() - true.double()).abs().max()) if true.numel() else 0.0
    return difference if difference == difference else float("inf")


def _worst_of_ranks(checks: list[Check], mesh: ParallelMesh) -> list[Check]:
    errors = gather_json([check.error for check in checks], mesh.world)
    return [replace(check, error=max(column)) for check, column in zip(checks, zip(*errors, strict=True), strict=True)]
