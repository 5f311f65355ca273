"""One optimizer step: gradients summed over micro-batches, divided once, clipped by the true global norm, applied by AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megapar.batch import TokenBatch
from megapar.mesh import ParallelMesh
from megapar.models.pipelined import PipelinedDecoder
from megapar.objectives.causal_lm import token_loss
from megapar.ops.adamw import adamw_
from megapar.ops.step_state import StepState, step_state_
from megapar.optim.grad_norm import gradient_totals, summed
from megapar.params import named_specs
from megapar.training.config import OptimizerConfig
from megapar.transport import start_all_reduce

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    """loss: mean nats a token of the step.
    grad_norm: of the mean loss, before clipping. stop: whether any rank asked to stop after this step."""

    loss: float
    grad_norm: float
    tokens: int
    stop: bool


class TrainStep:
    """A decoder's gradients and optimizer. `accumulate` micro-batches, once or more often, then `update`."""

    def __init__(self, model: PipelinedDecoder, config: OptimizerConfig, mesh: ParallelMesh) -> None:
        self.model, self.config, self.mesh, self.grads = model, config, mesh, model.grads
        self._decay = {param: config.weight_decay if spec.decay else 0.0 for _, param, spec in named_specs(model.stages)}
        self._moments = {kind: {p: torch.zeros_like(p, requires_grad=False) for p in self.grads.params} for kind in MOMENTS}
        self._state = StepState.create(1, device=mesh.device)
        self._loss, self._count = torch.zeros((), device=mesh.device), 0

    def accumulate(self, batches: Sequence[TokenBatch]) -> None:
        """Forwards and backwards of as many micro-batches as the model's schedule has; gradients and losses are sums."""
        totals = self.model.runner.step(batches, self.loss)
        self._loss += totals.loss
        self._count += int(totals.count)

    def evaluate(self, batches: Sequence[TokenBatch]) -> tuple[float, int]:
        """(sum of the losses, how many) of any number of micro-batches, the same on every rank."""
        totals = self.model.runner.evaluate(batches, self.loss)
        found = torch.tensor([float(totals.loss), float(totals.count)], dtype=torch.float64, device=self.mesh.device)
        if self.mesh.pp.size > 1:
            found = start_all_reduce(found, self.mesh.pp).wait()
        return float(found[0]), int(found[1])

    def loss(self, output: Tensor, batch: TokenBatch) -> tuple[Tensor, int]:
        """The loss function of the last stage."""
        return token_loss(self.model.stages[-1], output, batch)

    @torch.no_grad()
    def update(self, lr: float, stop: bool) -> StepResult:
        """Applies the accumulated gradients. Raises ValueError on every rank for a count of 0 and for a gradient that is not finite."""
        self.grads.finish()
        # One all-reduce for the norm, for what all ranks must agree on, and for what only the last stage knows.
        total, mine = gradient_totals(self.grads.params, self.mesh), self.mesh.tp.rank == 0
        told = total.new_tensor([float(stop), float(self._count) * mine, float(self._loss) * mine])
        shared = summed(torch.cat([total, told]), self.mesh)
        stopped, tokens, loss_sum = shared[3:].tolist()
        if tokens == 0:
            raise ValueError("the step counted 0 tokens and has nothing to divide by: give it samples with targets")
        betas = self.config.betas
        step_state_(self._state, shared[:3], total.new_tensor(tokens), rows=[0], betas=[betas], max_norm=self.config.max_norm)
        grad_norm, loss = float(self._state.grad_norm), loss_sum / tokens
        if self._state.skip:
            raise ValueError(f"the gradient norm is {grad_norm} and the loss {loss}: lower optimizer.lr, or check the data")
        for decay in sorted(set(self._decay.values())):
            self._apply([p for p in self.grads.params if self._decay[p] == decay], lr, decay)
        result = StepResult(loss, grad_norm, int(tokens), stopped > 0)
        self.grads.zero()
        self._loss, self._count = torch.zeros((), device=self.mesh.device), 0
        return result

    def _apply(self, params: list[Any], lr: float, weight_decay: float) -> None:
        grads, (first, second) = [p.main_grad for p in params], ([self._moments[kind][p] for p in params] for kind in MOMENTS)
        options: dict[str, Any] = {"lr": lr, "betas": self.config.betas, "eps": self.config.eps, "weight_decay": weight_decay}
        adamw_(params, grads, [], first, second, self._state, [0] * len(params), **options)

    def tensors(self) -> dict[str, dict[nn.Parameter, Tensor]]:
        """What a checkpoint holds: weights, and moments laid out like them (zeros before the first step)."""
        return {"weight": {p: p for stage in self.model.stages for p in stage.parameters()}, **self._moments}

    def set_applied_steps(self, steps: int) -> None:
        """Tells AdamW how many updates the loaded moments have seen."""
        self._state.applied_steps.fill_(steps)
