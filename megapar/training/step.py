"""One optimizer step: gradients summed over micro-batches, divided once, clipped by the true global norm, applied by AdamW."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megapar.grads import MainGrads
from megapar.mesh import ParallelMesh
from megapar.models.decoder import Decoder
from megapar.objectives.causal_lm import causal_lm_loss
from megapar.optim.grad_norm import sum_of_squares
from megapar.params import named_specs
from megapar.training.config import OptimizerConfig
from megapar.transport import start_all_reduce

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
        self.model, self.mesh, self.max_norm = model, mesh, config.max_norm
        self.grads = MainGrads(model.parameters())
        decayed: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for _, param, spec in named_specs(model):
            decayed[spec.decay].append(param)
        groups = [{"params": decayed[True], "weight_decay": config.weight_decay}, {"params": decayed[False], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self._loss, self._count = torch.zeros((), device=mesh.device), 0

    def accumulate(self, inputs: Tensor, targets: Tensor) -> None:
        """Forward and backward of one micro-batch, int64 [b, s] each; gradients and losses are sums."""
        loss, count = causal_lm_loss(self.model, inputs.to(self.mesh.device), targets.to(self.mesh.device))
        loss.backward()
        self._loss += loss.detach()
        self._count += count

    def update(self, lr: float, stop: bool) -> StepResult:
        """Applies the accumulated gradients. Raises ValueError on every rank for a count of 0 and for a gradient that is not finite."""
        if self._count == 0:
            raise ValueError("the step counted 0 tokens and has nothing to divide by: give it samples with targets")
        self.grads.finish()
        # One all-reduce for the norm and for what all ranks must agree on.
        squares = sum_of_squares(self.grads.params, self.mesh)
        shared = torch.stack([squares, squares.new_tensor(float(stop))])
        if self.mesh.tp.size > 1:
            shared = start_all_reduce(shared, self.mesh.tp).wait()
        grad_norm = float(shared[0].sqrt()) / self._count
        loss = float(self._loss) / self._count
        if not torch.isfinite(shared[0]):
            raise ValueError(f"the gradient norm is {grad_norm} and the loss {loss}: lower optimizer.lr, or check the data")
        clip = min(1.0, self.max_norm / (grad_norm + 1e-6)) if self.max_norm is not None else 1.0
        torch._foreach_mul_([p.main_grad for p in self.grads.params], clip / self._count)
        for param in self.grads.params:
            param.grad = param.main_grad
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        result = StepResult(loss, grad_norm, self._count, bool(shared[1] > 0))
        self.grads.zero()
        self._loss, self._count = torch.zeros((), device=self.mesh.device), 0
        return result

    def tensors(self) -> dict[str, dict[nn.Parameter, Tensor]]:
        """What a checkpoint holds: weights, and moments laid out like them (zeros before the first step)."""
        moments: dict[str, dict[nn.Parameter, Tensor]] = {kind: {} for kind in MOMENTS}
        for param in self.grads.params:
            state = self.optimizer.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                state.update({kind: torch.zeros_like(param) for kind in MOMENTS})
            for kind in MOMENTS:
                moments[kind][param] = state[kind]
        return {"weight": {p: p for p in self.model.parameters()}, **moments}

    def set_applied_steps(self, steps: int) -> None:
        """Tells AdamW how many updates the loaded moments have seen."""
        for state in self.optimizer.state.values():
            state["step"].fill_(steps)
