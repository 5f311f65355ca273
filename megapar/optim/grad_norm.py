"""The global gradient norm of sharded parameters, and clipping by it.

    grad_norm = sqrt(sum over all elements of all logical tensors of g^2),   g <- g * min(1, max_norm / (grad_norm + 1e-6))

Every rank adds the squares of the parameters it owns, in fp64: a replicated parameter counts once, a sharded one as its parts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megapar.mesh import ParallelMesh
from megapar.params import spec_of
from megapar.transport import start_all_reduce


def gradient(param: Tensor) -> Tensor | None:
    """The parameter's main_grad where it has one, else its .grad."""
    main_grad: Tensor | None = getattr(param, "main_grad", None)
    return param.grad if main_grad is None else main_grad


@torch.no_grad()
def sum_of_squares(params: Iterable[Tensor], mesh: ParallelMesh | None) -> Tensor:
    """This rank's share of the squared gradient norm: fp64, 0-d. Raises ValueError for a sharded parameter without a mesh."""
    total: Tensor | None = None
    for param in params:
        spec, grad = spec_of(param), gradient(param)
        if mesh is None and spec is not None and spec.is_sharded:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is a shard, and its norm needs the other ranks: pass mesh= to the call"
            )
        owned = spec.owner if spec is not None else mesh is None or mesh.tp.rank == 0
        if grad is None or not owned:
            continue
        squares = torch.linalg.vector_norm(grad, dtype=torch.float64).square()
        total = squares if total is None else total + squares
    return total if total is not None else torch.zeros((), dtype=torch.float64)


@torch.no_grad()
def clip_grad_norm_(params: Iterable[Tensor], max_norm: float, *, mesh: ParallelMesh | None = None) -> Tensor:
    """Scales the gradients in place so that their global norm is at most `max_norm`; returns the norm before, fp64, 0-d.

    Stands in for torch.nn.utils.clip_grad_norm_, which would take each rank's shard for the whole. One all-reduce of a number over tp.
    Raises ValueError for a sharded parameter without `mesh`, and for max_norm <= 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be above 0: leave the call out to not clip")
    params = list(params)
    squares = sum_of_squares(params, mesh)
    if mesh is not None and mesh.tp.size > 1:
        squares = start_all_reduce(squares.to(mesh.device), mesh.tp).wait()
    norm = squares.sqrt()
    grads = [grad for grad in map(gradient, params) if grad is not None]
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(coefficient.to(device=grad.device, dtype=grad.dtype))
    return norm
