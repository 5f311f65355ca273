"""What can be wrong with a step: each is refused before anything is computed or sent."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from megapar.zero.setup import Listed
from megapar.zero.weights import Weights


def check_loss(loss: Tensor) -> None:
    """Raises ValueError unless `backward` can start from it."""
    if loss.dim() != 0 or not loss.requires_grad or loss.dtype not in (torch.float32, torch.float64):
        what = f"{loss.dtype} of shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
        raise ValueError(f"backward was given a loss that is {what}, and needs an fp32 scalar that the model computed: sum losses in fp32")


def check_given(has_values: bool, what: str) -> None:
    """Raises ValueError for what is done with weights that are still to be loaded."""
    if not has_values:
        raise ValueError(f"{what} needs weights and load_later=True left them to be loaded: load_state_dict, or boxes(), then loaded()")


def check_count(count: Any) -> None:
    """Raises ValueError unless a step can be told so what its losses are sums over."""
    if not isinstance(count, (Real, Tensor)) or isinstance(count, bool) or (isinstance(count, Tensor) and count.numel() != 1):
        raise ValueError(f"step was given the count {count!r} and needs a number: how many losses this rank's sums are sums over")
    if isinstance(count, Real) and not 0 <= float(count) < float("inf"):
        raise ValueError(f"step was given the count {count} and gradients are divided by it: it must be 0 or more, and finite")


def check_scale(scale: Tensor, skipped: Tensor, least: float) -> None:
    """Raises ValueError if the step before was skipped at the least loss scale there is. Waits for that step."""
    if float(skipped) and float(scale) <= least:
        raise ValueError(
            f"the loss scale is at its minimum of {least:g} and gradients still are not finite: "
            "lower the learning rate, check the data, or train in bf16"
        )


class Untouched:
    """Notices what is done to the parameters beside the optimizer, which its masters or shards would undo, or never see."""

    def __init__(self, chunks: Sequence[nn.Module], found: Listed, weights: Weights) -> None:
        self.chunks, self.weights = chunks, weights
        self._known = dict(zip(found.params, found.entries, strict=True))
        self.remember()

    def remember(self) -> None:
        """What the parameters are like now is right."""
        self._versions = [param._version for param in self._known]

    def check(self) -> None:
        """Raises ValueError, naming the first parameter that was added, frozen, removed, moved, converted or written since, or that has a
        gradient which no step sees."""
        now = dict.fromkeys(param for chunk in self.chunks for param in chunk.parameters() if param.requires_grad)
        for param in now:
            if param not in self._known:
                name = next(name for chunk in self.chunks for name, other in chunk.named_parameters() if other is param)
                raise ValueError(f"{name} requires a gradient and the optimizer does not know it: wrap the model after its last change")
        for index, (param, entry) in enumerate(self._known.items()):
            if param not in now:
                raise ValueError(f"{entry.name} was frozen or removed after the model was wrapped: wrap it after its last change")
            if param.grad is not None:
                raise ValueError(f"{entry.name} has a .grad, which the step would ignore: gradients arrive by optimizer.backward, clear it")
            if not self.weights.has(index):
                raise ValueError(f"{entry.name} was moved or converted after the model was wrapped: wrap it after its last change")
            if param._version != self._versions[index]:
                raise ValueError(f"{entry.name} was written after the model was wrapped, and the step would undo it: load weights before")
