"""Learning rate: linear warm-up, then cosine decay (arXiv:1608.03983)."""

from __future__ import annotations

import math


def learning_rate(step: int, *, steps: int, lr: float, min_lr: float, warmup: float) -> float:
    """The rate of update `step` (0 to steps - 1).

    The first w = round(warmup * steps) updates rise linearly, from lr / w to lr; the rest follow half a cosine from lr, which update w
    still gets, to min_lr at the last one.
    """
    rising = round(warmup * steps)
    if step < rising:
        return lr * (step + 1) / rising
    progress = (step - rising) / max(1, steps - 1 - rising)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
