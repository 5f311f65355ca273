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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapar.collectives import gather_json, gather_last, raise_together
from megapar.layers.embedding import VocabParallelEmbedding
from megapar.layers.parallelize import Role, parallelize
from megapar.mesh import ParallelMesh
from megapar.params import Piece, named_specs

Build = Callable[[ParallelMesh], nn.Module]
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
    """What is verified: a way to build the model on a mesh, the step's inputs, and a loss of (output, *inputs)."""

    build: Build
    inputs: Callable[[nn.Module], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]


def verify(subject: Subject, mesh: ParallelMesh) -> list[Check]:
    """Runs the step alone in fp64, alone in fp32 and in parallel, and compares. The same list on every rank."""
    alone, parallel = (_seeded(subject.build, m) for m in (ParallelMesh.alone(mesh.device), mesh))
    torch.manual_seed(SEED)  # the two may have drawn differently often
    inputs = subject.inputs(alone)
    initial, weights = _whole(alone, lambda p: p), _boxes(parallel, lambda p: p)
    raise_together(_difference(initial, weights), mesh.world)
    exact, single = (_Step(model, subject, inputs) for model in (copy.deepcopy(alone).double(), alone))
    spread = _Step(parallel, subject, inputs, mesh, exact.output.shape[-1])
    checks = [Check("initial weights", max(_distance(box, initial[p.name][p.index]) for p, box in weights), 0.0)]
    for name in ("output", "loss"):
        true, near, far = (getattr(step, name) for step in (exact, single, spread))
        checks.append(Check(name, _distance(far, true), max(4 * _distance(near, true), 1e-6 * float(true.abs().max()))))
    true_gradients, near_gradients = (_whole(step.model, lambda p: p.grad) for step in (exact, single))
    floor = 1e-6 * max(float(g.abs().max()) for g in true_gradients.values())
    worst: dict[str, float] = {}
    for piece, box in _boxes(parallel, lambda p: p.grad):
        worst[piece.name] = max(worst.get(piece.name, 0.0), _distance(box, true_gradients[piece.name][piece.index]))
    for name, true in true_gradients.items():
        checks.append(Check(f"gradient {name}", worst.get(name, 0.0), max(4 * _distance(near_gradients[name], true), floor)))
    return _worst_of_ranks(checks, mesh)


class _Step:
    """Output and loss of one forward, and the gradients that its backward leaves in the model."""

    def __init__(
        self, model: nn.Module, subject: Subject, inputs: tuple[Tensor, ...], mesh: ParallelMesh | None = None, width: int = 0
    ) -> None:
        dtype = next(model.parameters()).dtype
        output = model(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))
        output = output if isinstance(output, Tensor) else output.logits if hasattr(output, "logits") else output[0]
        if mesh is not None and output.shape[-1] != width:
            # The model leaves its output cut over tp, as a vocabulary-parallel head does.
            edges = [0, *accumulate(gather_json(output.shape[-1], mesh.tp))]
            output = gather_last(output, mesh.tp, list(pairwise(edges)))
        loss = subject.loss(output, *inputs)
        loss.backward()
        self.model, self.output, self.loss = model, output.detach(), loss.detach()


def language_model_loss(output: Tensor, tokens: Tensor) -> Tensor:
    """Sum of next-token cross-entropies: logits [b, s, v] or [b * s, v], tokens int64 [b, s]."""
    return F.cross_entropy(output.reshape(tokens.numel(), -1), tokens.roll(-1, 1).reshape(-1), reduction="sum")


def random_tokens(model: nn.Module) -> tuple[Tensor, ...]:
    """int64 [2, 15] tokens of the vocabulary of the model's first embedding. Raises ValueError if it has none."""
    for module in model.modules():
        if isinstance(module, (nn.Embedding, VocabParallelEmbedding)):
            tokens = torch.randint(0, module.num_embeddings, (2, 15), generator=torch.Generator().manual_seed(SEED))
            return (tokens.to(next(model.parameters()).device),)
    raise ValueError("the model has no embedding to take tokens for: define inputs() -> tuple of tensors beside build")


def load_subject(target: str, sequence_parallel: bool) -> Subject:
    """The subject that `module:build` names.

    `build(mesh)` makes the model itself (and takes sequence_parallel= if asked for it); `build()` makes a plain one, which `parallelize`
    cuts by `plan` of the same module or by its own tp_plan. The module may define `inputs()` and `loss(output, *inputs)`. Raises
    ValueError for a target that is not there.
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
    inputs = (lambda model: tuple(given())) if given is not None else random_tokens
    return Subject(_builder(build, getattr(module, "plan", None), sequence_parallel), inputs, getattr(module, "loss", language_model_loss))


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


def _boxes(model: nn.Module, value: Callable[[nn.Parameter], Tensor | None]) -> list[tuple[Piece, Tensor]]:
    """What this rank holds of each logical tensor; zeros for a gradient that never came."""
    found: list[tuple[Piece, Tensor]] = []
    for _, param, spec in named_specs(model):
        local = value(param)
        found.extend((piece, view.detach()) for piece, view in spec.views(torch.zeros_like(param) if local is None else local))
    return found


def _whole(model: nn.Module, value: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """The logical tensors of a model that is alone."""
    whole: dict[str, Tensor] = {}
    for piece, box in _boxes(model, value):
        whole.setdefault(piece.name, box.new_zeros(piece.shape))[piece.index] = box
    return whole


def _difference(alone: Mapping[str, Tensor], parallel: list[tuple[Piece, Tensor]]) -> ValueError | None:
    """Why the two are not one model, if their parameters say so."""
    shapes = {piece.name: piece.shape for piece, _ in parallel}
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
