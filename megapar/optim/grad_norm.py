"""The global gradient norm of sharded parameters, and clipping by it.

    grad_norm = sqrt(sum over all elements of all logical tensors of g^2),   g <- g * min(1, max_norm / (grad_norm + 1e-6))

Every rank adds the squares of the parameters it owns, in fp64: a replicated parameter counts once, a sharded one as its parts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megapar.mesh import ParallelMesh
from megapar.ops.grad_norm import grad_norm_
from megapar.params import spec_of
from megapar.transport import start_all_reduce


def gradient(param: Tensor) -> Tensor | None:
    """The parameter's main_grad where it has one, else its .grad."""
    main_grad: Tensor | None = getattr(param, "main_grad", None)
    return param.grad if main_grad is None else main_grad


def check_whole(params: Iterable[Tensor], mesh: ParallelMesh | None) -> None:
    """Raises ValueError for a sharded parameter without a mesh."""
    for param in params:
        spec = spec_of(param)
        if mesh is None and spec is not None and spec.is_sharded:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is a shard, and its norm needs the other ranks: pass mesh= to the call"
            )


@torch.no_grad()
def gradient_totals(params: Iterable[Tensor], mesh: ParallelMesh | None) -> Tensor:
    """This rank's share of what `grad_norm_` sums, float64 [3]. Raises ValueError for a sharded parameter without a mesh."""
    params = list(params)
    check_whole(params, mesh)
    owned = []
    for param in params:
        spec, grad = spec_of(param), gradient(param)
        owner = spec.owner if spec is not None else mesh is None or mesh.tp.rank == 0
        if grad is not None and owner:
            owned.append(grad)
    device = mesh.device if mesh is not None else owned[0].device if owned else None
    total = torch.zeros(3, dtype=torch.float64, device=device)
    grad_norm_(total, owned)
    return total


def summed(total: Tensor, mesh: ParallelMesh | None) -> Tensor:
    """`total` of all ranks of a model, mesh.tp x mesh.pp: one all-reduce of a few numbers (two in a mesh that has all of tp, pp and dp)."""
    if mesh is None:
        return total
    axes = (mesh.world,) if mesh.dp.size == 1 and mesh.pp.size > 1 else (mesh.tp, mesh.pp)
    for axis in axes:
        if axis.size > 1:
            total = start_all_reduce(total, axis).wait()
    return total


@torch.no_grad()
def clip_grad_norm_(params: Iterable[Tensor], max_norm: float, *, mesh: ParallelMesh | None = None) -> Tensor:
    """Scales the gradients in place so that their global norm is at most `max_norm`; returns the norm before, fp64, 0-d.

    Stands in for torch.nn.utils.clip_grad_norm_, which would take each rank's shard for the whole. One all-reduce of a number over tp.
    Raises ValueError for a sharded parameter without `mesh`, and for max_norm <= 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be above 0: leave the call out to not clip")
    params = list(params)
    norm = summed(gradient_totals(params, mesh), mesh)[0].sqrt()
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for param in params:
        grad = gradient(param)
        if grad is not None:
            grad.mul_(coefficient.to(device=grad.device, dtype=grad.dtype))
    return norm
