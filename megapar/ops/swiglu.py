"""SwiGLU (arXiv:2002.05202): y = silu(gate) * up, silu(z) = z / (1 + exp(-z)).

Moves 3 t f elements forward (read gate and up, write y) and 5 t f backward.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2 f], the gate first, to [..., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
