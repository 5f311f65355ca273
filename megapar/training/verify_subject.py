"""What `megapar verify` compares: a model that can be built alone and in parallel, its inputs and its loss."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapar.layers.embedding import VocabParallelEmbedding
from megapar.layers.parallelize import Role, parallelize
from megapar.mesh import ParallelMesh

Build = Callable[[ParallelMesh], nn.Module]
BuildStage = Callable[[ParallelMesh, int, int], nn.Module]
SEED = 0


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


def language_model_loss(output: Tensor, tokens: Tensor) -> Tensor:
    """Sum of next-token cross-entropies: logits [b, s, v] or [b * s, v], tokens int64 [b, s]."""
    wide = torch.promote_types(output.dtype, torch.float32)
    return F.cross_entropy(output.reshape(tokens.numel(), -1).to(wide), tokens.roll(-1, 1).reshape(-1), reduction="sum")


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
