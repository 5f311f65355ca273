"""One stage of the pipeline: its module's forwards and backwards, and what has to be kept between them.

A forward keeps the graph's edge into its output, not the output: the tensor is free as soon as it has been sent. The backward may be
split: `input_gradients` leaves the weight gradients to `weight_gradients`, through `grads.Deferral`, without a walk of the autograd graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megapar.grads import Deferral, has_main_grad
from megapar.params import spec_of
from megapar.pipeline.schedule import Schedule
from megapar.pipeline.wire import Payload, described, takes_gradient

LossFunction = Callable[[Any, Any], tuple[Tensor, "int | Tensor"]]
"""Called with the last stage's output and the micro-batch: the fp32 sum of its losses, 0-d, and how many were summed."""


@dataclass
class _Kept:
    """Of a micro-batch between its forward and its last backward. inputs: leaves, whose gradients the stage before waits for."""

    inputs: tuple[Tensor, ...]
    edges: tuple[GradientEdge | None, ...]
    waiting: list[Callable[[], None]] = field(default_factory=list)


class Stage:
    """`module` as global stage `index` of `stages`.

    inputs: makes the argument of the first stage of a micro-batch; stages are then called with one argument. None: they are called with
    (what the stage before returned, the micro-batch), the first one with None for the former.
    """

    def __init__(self, module: nn.Module, index: int, stages: int, inputs: Callable[[Any], Any] | None) -> None:
        self.module, self.index, self.inputs = module, index, inputs
        self.is_first, self.is_last = index == 0, index == stages - 1
        self.deferral: Deferral | None = None
        self._kept: dict[int, _Kept] = {}

    def check_ties(self, ends_apart: bool) -> None:
        """Raises ValueError if a weight of the stage is tied to another stage's and its gradient would not be summed. ends_apart: whether
        the first and the last stage are on the first and the last rank (`mesh.pp_ends`), over which a tie sums."""
        for name, param in self.module.named_parameters():
            spec = spec_of(param)
            if spec is None or spec.tie is None or not param.requires_grad:
                continue
            if not ends_apart:
                raise ValueError(
                    f"{name} of stage {self.index} is tied to another stage's, and their gradients are summed over the first and the last "
                    "rank, where the schedule does not place the first and the last stage: take one that does, or no tied weights"
                )
            if not has_main_grad(param):
                raise ValueError(
                    f"{name} of stage {self.index} is tied to another stage's, and only MainGrads sums the gradients of both: "
                    "give it the parameters before making the runner"
                )

    def defer(self) -> None:
        """Prepares for split backwards. Raises ValueError if a matrix of the stage cannot have its gradient computed later."""
        for name, param in self.module.named_parameters():
            spec = spec_of(param)
            able = spec is not None and spec.defers and has_main_grad(param)
            if param.requires_grad and param.dim() > 1 and not able:
                raise ValueError(
                    f"the schedule splits backwards, and {name} of stage {self.index} cannot have its gradient computed later: "
                    "give the parameters to MainGrads and the stage megapar's layers, or take a schedule without W"
                )
        self.deferral = Deferral(self.module.parameters())

    def evaluate(self, received: Payload | None, micro_batch: Any, loss_fn: LossFunction | None) -> tuple[Payload | None, Any]:
        """As `forward`, without gradients. Without a loss function the last stage returns its output too."""
        with torch.no_grad():
            output = self._call(received, micro_batch)
            if loss_fn is not None and self.is_last:
                return None, check_loss(loss_fn(output.value, micro_batch))
            return output, None

    def forward(self, microbatch: int, received: Payload | None, micro_batch: Any, loss_fn: LossFunction) -> tuple[Payload | None, Any]:
        """(what the next stage gets, None); the last stage: (None, (loss, count))."""
        leaves: tuple[Tensor, ...] = ()
        if received is not None:
            parts = tuple(part.detach().requires_grad_(takes_gradient(part.dtype)) for part in received.tensors)
            leaves = tuple(part for part in parts if part.requires_grad)
            received = Payload(parts, received.is_tuple)
        with torch.enable_grad():
            output = self._call(received, micro_batch)
            found = check_loss(loss_fn(output.value, micro_batch)) if self.is_last else None
        ends = output.tensors if found is None else (found[0],)
        edges = tuple(get_gradient_edge(end) if end.requires_grad else None for end in ends if takes_gradient(end.dtype))
        self._kept[microbatch] = _Kept(leaves, edges)
        return (None, (found[0].detach(), found[1])) if found is not None else (output, None)

    def backward(self, microbatch: int, gradients: tuple[Tensor, ...]) -> Payload:
        """All gradients; returns those of the stage's input. `gradients`: of its floating-point outputs, or the seed of its loss."""
        return self._backward(self._kept.pop(microbatch), gradients)

    def input_gradients(self, microbatch: int, gradients: tuple[Tensor, ...]) -> Payload:
        """As `backward`, without what `weight_gradients` is left to compute."""
        assert self.deferral is not None
        kept = self._kept[microbatch]
        with self.deferral.collect() as kept.waiting:
            found = self._backward(kept, gradients)
        kept.inputs, kept.edges = (), ()
        return found

    def weight_gradients(self, microbatch: int) -> None:
        """The second half of `input_gradients`."""
        with torch.no_grad():
            waiting = self._kept.pop(microbatch).waiting
            while waiting:
                waiting.pop(0)()  # and what it kept is free

    def forget(self) -> None:
        """Drops what a step that failed has left."""
        self._kept.clear()

    def _backward(self, kept: _Kept, gradients: tuple[Tensor, ...]) -> Payload:
        pairs = [(edge, grad) for edge, grad in zip(kept.edges, gradients, strict=True) if edge is not None]
        if pairs:
            torch.autograd.backward([edge for edge, _ in pairs], [grad for _, grad in pairs])
        return Payload(tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in kept.inputs), True)

    def _call(self, received: Payload | None, micro_batch: Any) -> Payload:
        if self.inputs is None:
            value = self.module(None if received is None else received.value, micro_batch)
        else:
            value = self.module(self.inputs(micro_batch) if received is None else received.value)
        return Payload.of(value, f"stage {self.index}")


def make_stages(chunks: Sequence[nn.Module], schedule: Schedule, rank: int, inputs: Callable[[Any], Any] | None) -> dict[int, Stage]:
    """The stages that the schedule gives to a pipeline rank, by global index, made of the modules in `chunks`. ValueError for chunks
    that do not fit, tied weights whose gradients would not be summed, and weights whose gradients a W cannot compute."""
    places = [stage for stage, holder in enumerate(schedule.stage_to_rank) if holder == rank]
    if len(chunks) != len(places):
        raise ValueError(f"rank {rank} has {len(chunks)} chunks and the schedule gives it stages {places}: give {len(places)} chunks")
    stages = {place: Stage(chunk, place, schedule.stages, inputs) for place, chunk in zip(places, chunks, strict=True)}
    ends, last = schedule.stage_to_rank, len(schedule.ranks) - 1
    for stage in stages.values():
        stage.check_ties(ends_apart=last > 0 and {ends[0], ends[-1]} == {0, last})
    defer_where_split(stages.values(), schedule)
    return stages


def defer_where_split(stages: Iterable[Stage], schedule: Schedule) -> None:
    """Prepares the stages for the schedule's W, if it has any."""
    if schedule.has("W"):
        for stage in stages:
            stage.defer()


def check_loss(found: Any) -> tuple[Tensor, int | Tensor]:
    """What a loss function returned, if it is (fp32 scalar, count). Raises ValueError otherwise."""
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor)):
        raise ValueError(f"loss_fn returned {described(found)} and must return (sum of the losses, how many): return the two")
    loss, count = found
    if loss.dim() != 0 or loss.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"loss_fn returned a loss of shape {tuple(loss.shape)}, {loss.dtype}, and must return an fp32 scalar: sum in fp32")
    if not isinstance(count, (int, Tensor)) or (isinstance(count, Tensor) and (count.dim() != 0 or takes_gradient(count.dtype))):
        raise ValueError(f"loss_fn returned the count {count!r} and must return a whole number: how many losses were summed")
    return loss, count
