"""One optimizer step: gradients summed over micro-batches, divided once, clipped by the true global norm, applied by AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megapar.grads import MainGrads
from megapar.mesh import ParallelMesh
from megapar.models.decoder import Decoder
from megapar.objectives.causal_lm import causal_lm_loss
from megapar.ops.adamw import adamw_
from megapar.ops.step_state import StepState, step_state_
from megapar.optim.grad_norm import gradient_totals, summed
from megapar.params import named_specs
from megapar.training.config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    """loss: mean nats a token of what this rank was given.
    grad_norm: of the mean loss, before clipping. stop: whether any rank asked to stop after this step."""

    loss: float
    grad_norm: float
    tokens: int
    stop: bool


class TrainStep:
    """The model's gradients and optimizer. `accumulate` each micro-batch, then `update`."""

    def __init__(self, model: Decoder, config: OptimizerConfig, mesh: ParallelMesh) -> None:
        self.model, self.config, self.mesh = model, config, mesh
        self.grads = MainGrads(model.parameters())
        self._decay = {param: config.weight_decay if spec.decay else 0.0 for _, param, spec in named_specs(model)}
        self._moments = {kind: {p: torch.zeros_like(p, requires_grad=False) for p in self.grads.params} for kind in MOMENTS}
        self._state = StepState.create(1, device=mesh.device)
        self._loss, self._count = torch.zeros((), device=mesh.device), 0

    def accumulate(self, inputs: Tensor, targets: Tensor) -> None:
        """Forward and backward of one micro-batch, int64 [b, s] each; gradients and losses are sums."""
        loss, count = causal_lm_loss(self.model, inputs.to(self.mesh.device), targets.to(self.mesh.device))
        loss.backward()
        self._loss += loss.detach()
        self._count += count

    @torch.no_grad()
    def update(self, lr: float, stop: bool) -> StepResult:
        """Applies the accumulated gradients. Raises ValueError on every rank for a count of 0 and for a gradient that is not finite."""
        if self._count == 0:
            raise ValueError("the step counted 0 tokens and has nothing to divide by: give it samples with targets")
        self.grads.finish()
        # One all-reduce for the norm and for what all ranks must agree on.
        total = gradient_totals(self.grads.params, self.mesh)
        shared = summed(torch.cat([total, total.new_tensor([float(stop)])]), self.mesh)
        count, betas = total.new_tensor(float(self._count)), self.config.betas
        step_state_(self._state, shared[:3], count, rows=[0], betas=[betas], max_norm=self.config.max_norm)
        grad_norm, loss = float(self._state.grad_norm), float(self._loss) / self._count
        if self._state.skip:
            raise ValueError(f"the gradient norm is {grad_norm} and the loss {loss}: lower optimizer.lr, or check the data")
        for decay in sorted(set(self._decay.values())):
            self._apply([p for p in self.grads.params if self._decay[p] == decay], lr, decay)
        result = StepResult(loss, grad_norm, self._count, bool(shared[3] > 0))
        self.grads.zero()
        self._loss, self._count = torch.zeros((), device=self.mesh.device), 0
        return result

    def _apply(self, params: list[Any], lr: float, weight_decay: float) -> None:
        grads, (first, second) = [p.main_grad for p in params], ([self._moments[kind][p] for p in params] for kind in MOMENTS)
        options: dict[str, Any] = {"lr": lr, "betas": self.config.betas, "eps": self.config.eps, "weight_decay": weight_decay}
        adamw_(params, grads, [], first, second, self._state, [0] * len(params), **options)

    def tensors(self) -> dict[str, dict[nn.Parameter, Tensor]]:
        """What a checkpoint holds: weights, and moments laid out like them (zeros before the first step)."""
        return {"weight": {p: p for p in self.model.parameters()}, **self._moments}

    def set_applied_steps(self, steps: int) -> None:
        """Tells AdamW how many updates the loaded moments have seen."""
        self._state.applied_steps.fill_(steps)
