"""The scalars of an optimizer step, on the parameters' device: what the update of every parameter reads, computed once, without the host.

    grad_norm  = sqrt(sum of squares) / (loss scale * count)             of the mean, unscaled gradient
    grad_scale = min(1, max_norm / (grad_norm + 1e-6)) / (loss scale * count)
    skip       = an element of a gradient is inf or nan
    step      += 1, step_scale = 1 / (1 - beta1^step), root_scale = 1 / sqrt(1 - beta2^step)      where not skipped

and then the loss scale of the next step (arXiv:1710.03740, section 3.2): times `backoff_factor`, not below `min_scale`, when `hysteresis`
steps were skipped since the last one that was not, and for each further one; times `growth_factor` after `growth_interval` steps without.
All in fp64, a few dozen numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megapar.ops.dispatch import use_reference_on

FIELDS = ("grad_scale", "grad_norm", "skip", "loss_scale", "growth", "hysteresis")


@dataclass(frozen=True)
class LossScaling:
    """How a dynamic loss scale moves. Raises ValueError for factors on the wrong side of 1 and numbers that are not positive."""

    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    hysteresis: int = 1
    min_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.growth_factor >= 1:
            raise ValueError(f"growth_factor={self.growth_factor} must be at least 1: raise it")
        if not 0 < self.backoff_factor <= 1:
            raise ValueError(f"backoff_factor={self.backoff_factor} must lie in (0, 1]: change it")
        for name in ("growth_interval", "hysteresis", "min_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0: raise it")


@dataclass(frozen=True)
class StepState:
    """What `step_state_` writes and `adamw_` reads; each property is a view.

    scalars: float64 [6], see FIELDS. counters: float64 [n, 3], rows of (step, step_scale, root_scale): parameters that have always been
    updated together may share one.
    """

    scalars: Tensor
    counters: Tensor

    @staticmethod
    def create(rows: int, *, loss_scale: float = 1.0, hysteresis: int = 1, device: torch.device | str | None = None) -> StepState:
        """Before the first step. Raises ValueError unless loss_scale is positive and finite."""
        if not 0 < loss_scale < float("inf"):
            raise ValueError(f"loss_scale={loss_scale} must be positive and finite: change it")
        start = [1 / loss_scale, 0.0, 0.0, loss_scale, 0.0, float(hysteresis)]
        counters = torch.zeros(rows, 3, dtype=torch.float64, device=device)
        return StepState(torch.tensor(start, dtype=torch.float64, device=device), counters)

    @property
    def grad_scale(self) -> Tensor:
        """What gradients are multiplied by, an fp32 number."""
        return self.scalars[0]

    @property
    def grad_norm(self) -> Tensor:
        return self.scalars[1]

    @property
    def skip(self) -> Tensor:
        """1 where the step is not to be taken, else 0."""
        return self.scalars[2]

    @property
    def loss_scale(self) -> Tensor:
        """Of the next backward."""
        return self.scalars[3]

    @property
    def applied_steps(self) -> Tensor:
        """[n]: how many steps each row's parameters have taken."""
        return self.counters[:, 0]

    def progress(self, *, scale: bool = True) -> dict[str, float]:
        """What is to be saved, as plain numbers: the most steps applied and, with `scale`, where the loss scale is."""
        told = dict(zip(FIELDS[3:], self.scalars[3:].tolist(), strict=True)) if scale else {}
        return {"applied_steps": max(self.applied_steps.tolist(), default=0.0), **told}

    def restore(self, progress: Mapping[str, float], *, scale: bool = True) -> None:
        """Goes on from what `progress` told, for all rows; what it did not tell stays."""
        self.applied_steps.fill_(progress["applied_steps"])
        self.skip.zero_()
        for place, name in enumerate(FIELDS[3:], 3):
            if scale and name in progress:
                self.scalars[place] = progress[name]


def step_state_(
    state: StepState,
    total: Tensor,
    count: Tensor,
    *,
    rows: Sequence[int],
    betas: Sequence[tuple[float, float]],
    max_norm: float | None = None,
    scaling: LossScaling | None = None,
) -> None:
    """Advances `state` by one step. No work that depends on a tensor's size, and on a GPU no wait for it.

    total: float64 [3] from `grad_norm_`. count: float64, one number: what the gradients are sums over. rows: those of the parameters that
    have a gradient, with betas of each. scaling: None keeps the loss scale. Raises ValueError for max_norm <= 0, for a row that is
    there twice, and for count <= 0 where it is on the CPU.
    """
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be above 0: leave it out to not clip")
    if len(set(rows)) != len(rows):
        raise ValueError(f"rows={list(rows)} must name each row once, a step advances it once: drop what is there twice")
    how = scaling or LossScaling()
    moving = (how.growth_factor, how.backoff_factor, 0 if scaling is None else how.growth_interval, how.hysteresis, how.min_scale)
    run = step_state_reference if use_reference_on(state.scalars.device.type) else torch.ops.megapar.step_state_.default
    run(state.scalars, state.counters, total, count, list(rows), [b for b, _ in betas], [b for _, b in betas], max_norm, *moving)


def step_state_reference(
    scalars: Tensor,
    counters: Tensor,
    total: Tensor,
    count: Tensor,
    rows: Sequence[int],
    beta1: Sequence[float],
    beta2: Sequence[float],
    max_norm: float | None,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    hysteresis: int,
    min_scale: float,
) -> None:
    """The formula on tensors of no dimensions."""
    if count.device.type == "cpu" and not count > 0:
        raise ValueError(f"count={float(count)} must be above 0, gradients are divided by it: give it samples with targets")
    scale = 1 / (scalars[3] * count.reshape(()))
    norm = total[0].sqrt() * scale
    clip = torch.ones_like(norm) if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    skip = (total[1] > 0) | ~total[0].isfinite()
    scalars[0], scalars[1], scalars[2] = (clip * scale).float().double(), norm, skip.double()
    if growth_interval:
        left = torch.where(skip, scalars[5] - 1, float(hysteresis))
        growth = torch.where(skip, 0.0, scalars[4] + 1)
        grown = (scalars[3] * growth_factor).float().double()
        raised = torch.where((growth >= growth_interval) & grown.isfinite(), grown, scalars[3])
        lowered = (scalars[3] * backoff_factor).float().double().clamp(min=min_scale)
        scalars[3] = torch.where(skip, torch.where(left <= 0, lowered, scalars[3]), raised)
        scalars[4], scalars[5] = torch.where(growth >= growth_interval, 0.0, growth), left
    if not rows:
        return
    at = torch.tensor(rows, device=counters.device)
    betas = [torch.tensor(b, dtype=torch.float64, device=counters.device) for b in (beta1, beta2)]
    step = counters[at, 0] + 1
    # 1 - beta^step, which a power near 1 has few digits of.
    rest = [-torch.expm1(step * torch.log1p(beta - 1)) for beta in betas]
    advanced = torch.stack([step, 1 / rest[0], rest[1].rsqrt()], -1)
    counters[at] = torch.where(skip, counters[at], advanced)


@torch.library.register_fake("megapar::step_state_")
def _(scalars: Tensor, counters: Tensor, *rest: object) -> None:
    return None
