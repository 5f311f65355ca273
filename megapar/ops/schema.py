"""Every op of megapar, declared once: `torch.ops.megapar.<name>`. Bodies are compiled (csrc/) or written in Triton; the formula of each,
its cost, its fake kernel and its plain PyTorch reference stand in `megapar/ops/<name>.py`.

An op whose name ends in `_` writes into the arguments marked `(a!)` and returns nothing.
"""

from __future__ import annotations

import torch

SCHEMAS = {
    "cpu_isa": "() -> str",
    "linear": "(Tensor x, Tensor weight, Tensor? bias, str activation, bool save) -> (Tensor y, Tensor z)",
    "linear_input_grad": "(Tensor dy, Tensor weight, Tensor? z, str activation) -> Tensor",
    "linear_weight_grad_": "(Tensor(a!) target, Tensor dy, Tensor x, float beta, float alpha=1.0, Tensor? scale=None,"
    " Tensor(b!)? non_finite=None) -> ()",
    "linear_bias_grad_": "(Tensor(a!) target, Tensor dy, float beta) -> ()",
    "swiglu": "(Tensor gate_up) -> Tensor",
    "swiglu_backward": "(Tensor dy, Tensor gate_up) -> Tensor",
}

LIBRARY = torch.library.Library("megapar", "DEF")
for _name, _signature in SCHEMAS.items():
    LIBRARY.define(_name + _signature)
