"""In which formats a model trains: weights, gradients, masters, moments; and how the loss is scaled where fp16 would underflow.

    fp32   4 bytes a parameter of weight, 4 of main_grad, 8 of moments
    bf16   2 of weight, 4 of main_grad, 8 of moments, and 4 of fp32 master or 2 of 16-bit remainder
    fp16   2 of weight, 4 of main_grad, 8 of moments, 4 of master; the loss is scaled (arXiv:1710.03740, section 3.2)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from megapar.ops.adamw import split
from megapar.ops.step_state import LossScaling

Master = Literal["fp32", "remainder"] | None
PARAMETERS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LossScaler:
    """What backward is seeded with, so that small gradients survive fp16; the step divides by it again, in fp32.

    init_scale: of the first step; at most 2^24 is usual. dynamic: how it moves; None keeps it. A step whose gradients are not finite is
    skipped, by all ranks. Raises ValueError for a scale that is not positive and finite, or below dynamic.min_scale.
    """

    init_scale: float = 2.0**16
    dynamic: LossScaling | None = field(default_factory=LossScaling)

    def __post_init__(self) -> None:
        if not 0 < self.init_scale < float("inf"):
            raise ValueError(f"init_scale={self.init_scale} must be positive and finite: 65536 is the default")
        if self.dynamic is not None and self.init_scale < self.dynamic.min_scale:
            raise ValueError(f"init_scale={self.init_scale} is below min_scale={self.dynamic.min_scale}: raise it, or lower the other")

    @staticmethod
    def static(scale: float) -> LossScaler:
        """Always the same scale."""
        return LossScaler(scale, None)


@dataclass(frozen=True)
class Precision:
    """Formats of parameters, main_grad, moments and masters.

    master: "fp32", a copy; "remainder", 16 bits that make a bf16 weight fp32; None, the weight itself is updated. scaler: None leaves the
    loss as it is. Raises ValueError for what does not go together.
    """

    param: torch.dtype = torch.bfloat16
    main_grad: torch.dtype = torch.float32
    moments: torch.dtype = torch.float32
    master: Master = "fp32"
    scaler: LossScaler | None = None

    def __post_init__(self) -> None:
        name = str(self.param).removeprefix("torch.")
        if self.param not in PARAMETERS.values():
            raise ValueError(f"parameters cannot be {name}: use float32, bfloat16 or float16")
        if self.master not in (None, "fp32", "remainder"):
            raise ValueError(f"master={self.master} must be None, 'fp32' or 'remainder': choose one")
        if self.main_grad not in (torch.float32, self.param):
            raise ValueError(f"main_grad={self.main_grad} must be torch.float32 or the parameters' {self.param}: choose one")
        if self.moments not in (torch.float32, torch.bfloat16):
            raise ValueError(f"moments={self.moments} must be torch.float32 or torch.bfloat16: choose one")
        if self.master == "remainder" and self.param != torch.bfloat16:
            raise ValueError(f"master='remainder' splits bfloat16 and parameters are {name}: use 'fp32', or bfloat16 parameters")
        if self.master == "fp32" and self.param == torch.float32:
            raise ValueError("master='fp32' would copy parameters that are fp32 themselves: leave it None")
        if self.param == torch.float16 and self.scaler is None:
            raise ValueError("float16 gradients underflow without a loss scale: give scaler=LossScaler(), or train in bfloat16")

    @staticmethod
    def of(name: str | Precision, *, master: Literal["default"] | Master = "default") -> Precision:
        """The usual one for "fp32", "bf16" or "fp16", or a given one. Raises ValueError for another name."""
        if isinstance(name, Precision):
            return name if master == "default" else replace(name, master=master)
        if name not in PARAMETERS:
            raise ValueError(f'precision="{name}" is not known: use "fp32", "bf16" or "fp16", or a Precision')
        usual = {
            "fp32": {"param": torch.float32, "master": None},
            "bf16": {},
            "fp16": {"param": torch.float16, "scaler": LossScaler()},
        }
        made = Precision(**usual[name])  # type: ignore[arg-type]
        return made if master == "default" else replace(made, master=master)

    def convert(self, values: Tensor) -> Tensor:
        """Values to the parameters' format, as the update rounds them: with a remainder, ties away from zero."""
        return split(values.float())[0] if self.master == "remainder" else values.to(self.param)

    @property
    def dynamic(self) -> LossScaling | None:
        """How the loss scale moves, if it does."""
        return None if self.scaler is None else self.scaler.dynamic

    @property
    def first_scale(self) -> dict[str, Any]:
        """What `StepState.create` is to be told of the loss scale."""
        if self.scaler is None:
            return {}
        return {"loss_scale": self.scaler.init_scale} | ({} if self.dynamic is None else {"hysteresis": self.dynamic.hysteresis})
