"""The step's two passes over shards: sums of squares for the norm, and AdamW."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megapar.mesh import ParallelMesh
from megapar.ops.adamw import Noise, adamw_
from megapar.ops.grad_norm import grad_norm_
from megapar.ops.step_state import StepState
from megapar.optim.noise import Place, place_of
from megapar.params import Interval, ParamSpec, seed_of
from megapar.transport import start_all_reduce
from megapar.zero.buckets import GradBuckets
from megapar.zero.layout import boxes


@dataclass(frozen=True)
class Shard:
    """What a rank updates of a parameter: elements `interval` of it. tensors: weight, gradient, both moments, and a master if there is one,
    flat, from that element on."""

    spec: ParamSpec
    interval: Interval
    tensors: Sequence[Tensor]

    def parts(self, noisy: bool) -> Iterator[tuple[int, int, int, Place]]:
        """(start in the shard, size, id, place) of what is updated at once: all of it, or for the noise each box of a logical tensor."""
        start, stop = self.interval
        if not noisy and stop > start:
            yield 0, stop - start, 0, (0, 1, 1)
        for piece, at in boxes(self.spec, start, stop) if noisy else ():
            yield at - start, piece.numel, seed_of(piece.name), place_of(piece)


@dataclass(frozen=True)
class StepResult:
    """Of one step, 0-d tensors on the device: the norm of the mean gradient before clipping, the loss scale of the next backward, and 1 if
    the step was skipped. count: of all ranks. shared: what `step` was given of that name, summed over all ranks."""

    grad_norm: Tensor
    loss_scale: Tensor
    skipped: Tensor
    count: Tensor
    shared: Tensor


def step_totals(grads: GradBuckets, specs: Sequence[ParamSpec], mesh: ParallelMesh, count: Any, shared: Sequence[float | Tensor]) -> Tensor:
    """Of all ranks, float64: sum of squares, elements that are not finite, zeros (not counted); the count; what is shared.

    Shards are summed one by one, in the parameters' order: every bucket size and stage has the same bits. One all-reduce.
    """
    total = torch.zeros(3, dtype=torch.float64, device=mesh.device)
    owned = []
    for index, spec in enumerate(specs):
        start, stop = grads.layout.interval(index, mesh.dp.rank)
        if spec.owner and stop > start:
            owned.append(grads.shards[index][: stop - start])
    grad_norm_(total, owned)
    mine = [
        # A number is filled in on the device: a copy from the host would wait for it.
        value.detach().to(total).reshape(1) if isinstance(value, Tensor) else total.new_full((1,), float(value))
        for value in (count, *shared)
    ]
    if mesh.tp.rank:  # the ranks of tp have seen the same samples
        mine[0] = torch.zeros_like(mine[0])
    told = torch.cat([total, *mine])
    wide = [axis for axis in (mesh.tp, mesh.dp, mesh.pp) if axis.size > 1]
    for axis in wide if len(wide) == 1 else [mesh.world] if wide else []:
        told = start_all_reduce(told, axis).wait()
    told[1] += ~(told[3] > 0)  # a count of 0 skips the step where the host does not look at it
    return told


def foreseen(told: Tensor, loss_scale: Tensor) -> StepResult:
    """What a step with these totals returns if it is not applied."""
    norm, overflow = told[0].sqrt() / (loss_scale * told[3]), told[1] > 0
    norm = norm.masked_fill(overflow & norm.isfinite(), float("nan"))
    return StepResult(norm, loss_scale.clone(), torch.ones_like(norm), told[3], told[4:])


def apply_adamw(shards: Sequence[Shard], state: StepState, row: int, options: dict[str, Any], seed: int | None) -> None:
    """One pass over all of them. row: theirs in the state. options: of adamw_."""
    entries: list[list[Tensor]] = []
    ids: list[int] = []
    places: list[Place] = []
    for shard in shards:
        for at, size, tensor_id, place in shard.parts(seed is not None):
            entries.append([tensor[at : at + size] for tensor in shard.tensors])
            ids.append(tensor_id)
            places.append(place)
    if not entries:
        return
    weights, grads, first, second, *masters = (list(column) for column in zip(*entries, strict=True))
    noise = None if seed is None else Noise(seed, ids, places)
    adamw_(weights, grads, masters[0] if masters else [], first, second, state, [row] * len(weights), **options, noise=noise)
