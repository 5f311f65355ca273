"""What benchmarks/zero.py trains, how, and what it asks of those who do it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from benchmarks.plain_llama import Llama, seeded
from megapar.optim.precision import PARAMETERS

Data = list[tuple[Tensor, Tensor]]
"""A rank's micro-batches of (inputs, targets), int64 [b, s]."""
OURS, TORCH, DEEPSPEED, ALONE = "megapar", "torch", "DeepSpeed", "alone"
COMPILED, AUTOCAST = ", compiled", ", autocast"
ALL_OURS = [f"{OURS} {stage}" for stage in range(4)]
PEERS = [*(f"{TORCH} {kind}" for kind in ("DDP", "ZeRO-1", "FSDP2 2", "FSDP2 3")), *(f"{DEEPSPEED} {stage}" for stage in (1, 2, 3))]


@dataclass(frozen=True)
class Sizes:
    layers: int = 4
    hidden: int = 384
    heads: int = 6
    ffn: int = 1024
    vocab: int = 4096
    b: int = 2
    s: int = 128
    micro_batches: int = 2


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    reduce_every: "micro_batch" keeps gradients sharded between micro-batches, where a contender can choose.
    deepspeed: the folder that holds it.
    """

    sizes: Sizes = field(default_factory=Sizes)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    reduce_every: Literal["step", "micro_batch"] = "step"
    lr: float = 1e-4
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_norm: float = 1.0
    deepspeed: str = ""

    @property
    def dtype(self) -> torch.dtype:
        return PARAMETERS[self.precision]

    @property
    def adamw(self) -> dict[str, Any]:
        return {"lr": self.lr, "eps": self.eps, "weight_decay": self.weight_decay}

    def draw(self, repeat: int, rank: int) -> Data:
        """A step's tokens, others on every rank."""
        generator = torch.Generator().manual_seed(1000 * (repeat + 10) + rank)
        sizes = self.sizes
        tokens = torch.randint(0, sizes.vocab, (sizes.micro_batches, sizes.b, sizes.s + 1), generator=generator)
        return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


class Trainer(Protocol):
    def backward(self, data: Data) -> None:
        """Forward and backward of all micro-batches, with as much of the reduction as the contender does there."""

    def update(self) -> Tensor | float:
        """The rest of the step; the gradient's norm before it is clipped."""

    def weights(self) -> dict[str, Tensor]:
        """The whole weights in fp32, the masters where there are some, by megapar's names."""


def train(trainer: Trainer, data: Data) -> None:
    """One step."""
    trainer.backward(data)
    trainer.update()


def plain_model(case: Case) -> Llama:
    """In fp32, of weights that bf16 can hold, so that all masters begin alike."""
    sizes = case.sizes
    return seeded(sizes.vocab, sizes.hidden, sizes.heads, sizes.ffn, sizes.layers).bfloat16().float()
