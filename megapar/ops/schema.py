"""Every op of megapar, declared once: `torch.ops.megapar.<name>`. Bodies are compiled (csrc/) or written in Triton; the formula of each,
its cost, its fake kernel and its plain PyTorch reference stand in `megapar/ops/<name>.py`.

An op whose name ends in `_` writes into the arguments marked `(a!)` and returns nothing.
"""

from __future__ import annotations

import torch

SCHEMAS = {
    "cpu_isa": "() -> str",
    "swiglu": "(Tensor gate_up) -> Tensor",
    "swiglu_backward": "(Tensor dy, Tensor gate_up) -> Tensor",
    "grad_norm_": "(Tensor(a!) total, Tensor[] grads, bool count_zeros=False) -> ()",
    "step_state_": (
        "(Tensor(a!) scalars, Tensor(b!) counters, Tensor total, Tensor count, int[] rows, float[] beta1, float[] beta2, float? max_norm,"
        " float growth_factor, float backoff_factor, int growth_interval, int hysteresis, float min_scale) -> ()"
    ),
    "adamw_": (
        "(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] masters, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor scalars,"
        " Tensor counters, int[] rows, *, float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled=True,"
        " int? seed=None, int[] ids=[], int[] places=[]) -> ()"
    ),
}

LIBRARY = torch.library.Library("megapar", "DEF")
for _name, _signature in SCHEMAS.items():
    LIBRARY.define(_name + _signature)
