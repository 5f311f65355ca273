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
    "rms_norm": "(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor y, Tensor s, Tensor rstd)",
    "rms_norm_backward": "(Tensor dy, Tensor? ds, Tensor s, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dw)",
    "layer_norm": "(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? residual) -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)",
    "layer_norm_backward": "(Tensor dy, Tensor? ds, Tensor s, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor dx, Tensor dw, Tensor db)",
    "rope_qkv": "(Tensor qkv, Tensor cos, Tensor sin, int b, int q_heads, int kv_heads) -> (Tensor q, Tensor k, Tensor v)",
    "rope_qkv_backward": "(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor",
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor? spans) -> (Tensor y, Tensor lse)",
    "attention_backward": "(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, Tensor? spans)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    "cross_entropy_statistics": "(Tensor logits, Tensor index, bool with_sum) -> Tensor",
    "cross_entropy_grad": "(Tensor dloss, Tensor logits, Tensor index, Tensor lse, Tensor ignored, int vocab_size, float label_smoothing,"
    " float z_loss) -> Tensor",
    "cross_entropy_grad_": "(Tensor dloss, Tensor(a!) logits, Tensor index, Tensor lse, Tensor ignored, int vocab_size,"
    " float label_smoothing, float z_loss) -> ()",
    "dropout": "(Tensor x, Tensor rows, int key, float p, int column) -> Tensor",
    "grad_norm_": "(Tensor(a!) total, Tensor[] grads, bool count_zeros=False) -> ()",
    "step_state_": (
        "(Tensor(a!) scalars, Tensor(b!) counters, Tensor total, Tensor count, int[] rows, float[] beta1, float[] beta2, float? max_norm,"
        " float growth_factor, float backoff_factor, int growth_interval, int hysteresis, float min_scale) -> ()"
    ),
    "adamw_": (
        "(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] masters, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor scalars,"
        " Tensor counters, int[] rows, *, float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled=True,"
        " int? seed=None, int[] ids=[], int[] places=[], Tensor? lr_scale=None) -> ()"
    ),
}

FILES = {
    "linear": "linear",
    "linear_input_grad": "linear",
    "linear_weight_grad_": "linear",
    "linear_bias_grad_": "linear",
    "swiglu": "swiglu",
    "swiglu_backward": "swiglu",
    "rms_norm": "rms_norm",
    "rms_norm_backward": "rms_norm",
    "layer_norm": "layer_norm",
    "layer_norm_backward": "layer_norm",
    "rope_qkv": "rope",
    "rope_qkv_backward": "rope",
    "cross_entropy_statistics": "cross_entropy",
    "cross_entropy_grad": "cross_entropy",
    "cross_entropy_grad_": "cross_entropy",
    "dropout": "dropout",
    "grad_norm_": "grad_norm",
    "step_state_": "step_state",
    "adamw_": "adamw",
}
"""The file, here and in `triton/`, of every op that has a body on both devices."""
CPU_ONLY = ("attention", "attention_backward")
"""Those in `attention.py`, which no GPU runs."""

LIBRARY = torch.library.Library("megapar", "DEF")
for _name, _signature in SCHEMAS.items():
    LIBRARY.define(_name + _signature)
