"""The feed-forward half of a block: WG WU WD with SwiGLU (arXiv:2002.05202), or WU WD with GELU; the ffn features cut over tp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megapar.collectives import with_summed_grad
from megapar.layers.linear import ColumnParallelLinear, RowParallelLinear, Shards, check_input
from megapar.layers.linear_function import mlp
from megapar.mesh import TensorParallel, as_axis
from megapar.params import Init


class MLP(nn.Module):
    """x [t, hidden_size] to [t, hidden_size]; with `sequence_parallel` both are this rank's ceil(t / tp) tokens.

    activation: "swiglu" (gate and up in one GEMM) or "gelu" (the tanh form, as in GPT-2).
    recompute: the activation is not kept for backward, which computes it again from the pre-activation.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        *,
        activation: str = "swiglu",
        tp: TensorParallel = None,
        bias: bool = False,
        sequence_parallel: bool = False,
        init: Init | None = None,
        out_init: Init | None = None,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ("swiglu", "gelu"):
            raise ValueError(f'activation="{activation}" is not known: use "swiglu" or "gelu"')
        self.tp = axis = as_axis(tp)
        self.activation, self.recompute = activation, recompute
        parts = [Shards(ffn_size, name=name) for name in (("gate", "up") if activation == "swiglu" else ("up",))]
        common: dict[str, Any] = {"tp": axis, "bias": bias, "sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        self.expand = ColumnParallelLinear(hidden_size, parts, init=init, **common)
        self.down = RowParallelLinear(ffn_size, hidden_size, init=out_init or init, **common)

    def forward(self, x: Tensor, result: bool = True) -> Tensor:
        """result=False, in a recomputation: the last product is left out, and what is returned is not filled."""
        expand, down = self.expand, self.down
        check_input(x, expand.in_features, expand.weight, expand.sequence_parallel)
        down_bias = None if down.bias is None else with_summed_grad(down.bias)
        weights = (expand.weight, expand.bias), (down.weight, down_bias)
        return mlp(x, *weights, self.activation, self.tp, expand.sequence_parallel, recompute=self.recompute, result=result)
