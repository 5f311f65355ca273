"""One optimizer step of a decoder: micro-batches through its pipeline, then the update, and what all ranks then know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megapar.batch import TokenBatch
from megapar.mesh import ParallelMesh
from megapar.models.pipelined import PipelinedDecoder
from megapar.objectives.causal_lm import IGNORED, token_loss
from megapar.optim.precision import Precision
from megapar.training.config import OptimizerConfig, ParallelConfig
from megapar.transport import start_all_reduce
from megapar.zero.optimizer import ZeroOptimizer
from megapar.zero.setup import AdamW
from megapar.zero.update import StepResult as ZeroResult

Judge = Callable[[float, float], bool]


@dataclass(frozen=True)
class StepResult:
    """loss: mean nats a token of the step, with z-loss. grad_norm: of the mean loss, before clipping. loss_scale: of the next step.
    skipped: whether nothing was updated. flags: what `update` was given, summed over all ranks. objectives: the mean loss of each of a
    mixture's objectives that had a target."""

    loss: float
    grad_norm: float
    tokens: int
    loss_scale: float
    skipped: bool
    flags: tuple[float, ...]
    objectives: Mapping[str, float] = field(default_factory=dict)


Sums = dict[str, tuple[float, int]]
"""(sum of the losses in nats, how many), by objective."""


def zero(
    config: OptimizerConfig,
    mesh: ParallelMesh,
    parallel: ParallelConfig | None = None,
    precision: Precision | None = None,
    *,
    load_later: bool = False,
) -> Callable[[Sequence[nn.Module]], ZeroOptimizer]:
    """What `PipelinedDecoder(optimize=)` makes a run's optimizer with. load_later: no initial weights are drawn."""
    parallel = parallel or ParallelConfig()
    options: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "update": AdamW(config.lr, config.betas, config.eps, config.weight_decay),
        "precision": precision or Precision.of("fp32"),
        "max_norm": config.max_norm,
        "reduce_every": parallel.reduce_every,
        "reshard_every": parallel.reshard_every,
        "gather_ahead": True,
        "load_later": load_later,
    }
    return lambda stages: ZeroOptimizer(stages, mesh, **options)


class TrainStep:
    """`accumulate` micro-batches of a decoder that has an optimizer, once or more often, then `update`.

    z_loss: times log(Z)^2 of every token is added to the loss that is trained. objectives: a mixture's, by the batches' `objective_ids`.
    """

    def __init__(self, model: PipelinedDecoder, mesh: ParallelMesh, z_loss: float = 0.0, objectives: Sequence[str] = ()) -> None:
        assert model.optimizer is not None
        self.model, self.mesh, self.optimizer, self.z_loss, self.objectives = model, mesh, model.optimizer, z_loss, tuple(objectives)
        self._forget()

    def _forget(self) -> None:
        self._loss, self._count, self._table = torch.zeros((), device=self.mesh.device), 0, self._empty_table()

    def _empty_table(self) -> Tensor:
        """float64 [objectives, 2]: sums of losses, and how many."""
        return torch.zeros(len(self.objectives), 2, dtype=torch.float64, device=self.mesh.device)

    def accumulate(self, batches: Sequence[TokenBatch], last: bool = True) -> None:
        """Forwards and backwards of as many micro-batches as the model's schedule has; all are sums. last: of the step."""
        with self.optimizer.accumulating(len(batches), last):
            loss = partial(self.loss, table=self._table, z_loss=self.z_loss)
            totals = self.model.runner.step(batches, loss, loss_scale=self.optimizer.loss_scale)
        self._loss += totals.loss
        self._count += int(totals.count)

    def evaluate(self, batches: Sequence[TokenBatch]) -> tuple[float, int, Sums]:
        """(sum of the losses, how many, both by objective) of any number of micro-batches of all replicas; the same on every rank."""
        table = self._empty_table()
        totals = self.model.runner.evaluate(batches, partial(self.loss, table=table))
        found = torch.cat([table.new_tensor([[float(totals.loss), float(totals.count)]]), table])
        for axis in (self.mesh.pp, self.mesh.dp):
            if axis.size > 1:
                found = start_all_reduce(found, axis).wait()
        (loss, count), *each = found.tolist()
        return loss, int(count), {name: (part, int(n)) for name, (part, n) in zip(self.objectives, each, strict=True)}

    def loss(self, output: Tensor, batch: TokenBatch, table: Tensor, z_loss: float = 0.0) -> tuple[Tensor, int]:
        """The loss function of the last stage. What each objective of a mixture has of it is added to `table`."""
        stage, scale = self.model.stages[-1], self.optimizer.loss_scale
        if batch.objective_ids is None or batch.targets is None or not len(table):
            return token_loss(stage, output, batch, scale, z_loss)
        losses = torch.empty(batch.t, device=output.device)
        found = token_loss(stage, output, batch, scale, z_loss, losses)
        rows = torch.stack([losses.double(), (batch.targets != IGNORED).double()]).view(2, batch.b, batch.s).sum(2)
        # No index_add_, whose order is open on CUDA; and what is not finite stays where it is.
        which = nn.functional.one_hot(batch.objective_ids, len(table)).T.bool()
        table += rows.T.where(which[..., None], 0).sum(1)
        return found

    def update(
        self, lr: float, flags: Sequence[float] = (), *, weight_decay: float | None = None, judge: Judge | None = None
    ) -> StepResult:
        """Applies the accumulated gradients. flags: what all ranks get the sums of. weight_decay: of the matrices, if it changes.

        judge: given loss and gradient norm, the same on every rank, says whether they are applied. Without one ValueError is raised, on
        every rank, for a gradient that is not finite and no loss scale that could move. Also for a count of 0.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            if weight_decay is not None and group["weight_decay"] > 0:
                group["weight_decay"] = weight_decay

        def accept(found: ZeroResult) -> bool:
            return judge is None or judge(self._mean_loss(found), float(found.grad_norm))

        # One all-reduce for the norm, for what all ranks must agree on, and for what only the last stage knows.
        first = self.mesh.tp.rank == 0
        shared = [float(self._loss) * first, *flags, *(self._table * first).flatten()]
        told = self.optimizer.step(self._count, shared=shared, accept=accept)
        loss, grad_norm, skipped = self._mean_loss(told), float(told.grad_norm), bool(told.skipped)
        scaler = self.optimizer.precision.scaler
        if skipped and judge is None and (scaler is None or scaler.dynamic is None):
            raise ValueError(f"the gradient norm is {grad_norm} and the loss {loss}: lower optimizer.lr, or check the data")
        self._forget()
        rest = told.shared[1:].tolist()
        table = zip(self.objectives, rest[len(flags) :: 2], rest[len(flags) + 1 :: 2], strict=True)
        objectives = {name: total / count for name, total, count in table if count}
        return StepResult(loss, grad_norm, int(told.count), float(told.loss_scale), skipped, tuple(rest[: len(flags)]), objectives)

    @staticmethod
    def _mean_loss(found: ZeroResult) -> float:
        return float(found.shared[0]) / float(found.count)
