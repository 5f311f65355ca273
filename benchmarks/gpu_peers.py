"""Peers of the GPU kernels from other packages, where they are installed: apex, Transformer Engine, Liger; and torch.compile.

A peer is found by the module that it really needs: PyPI's `apex` is another project.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_cases import EPS, Case, Inputs, Way

Peers = dict[str, dict[str, Way]]
"""By title of the case, then by name."""


def apex() -> Peers:
    amp_c, wgrad = importlib.import_module("amp_C"), importlib.import_module("fused_weight_gradient_mlp_cuda")

    def noop(i: Inputs) -> Any:
        return i.setdefault("noop", torch.zeros(1, dtype=torch.int32, device="cuda"))

    def norm(i: Inputs) -> Any:
        return amp_c.multi_tensor_l2norm(65536, noop(i), [i["lists"][1]], False)[0]

    def adam(i: Inputs) -> None:
        _, grads, masters, first, second = i["lists"]
        amp_c.multi_tensor_adam(65536, noop(i), [grads, masters, first, second], 1e-4, 0.9, 0.95, 1e-8, 1, 1, 1, 0.1)

    def into_main_grad(i: Inputs) -> Any:
        wgrad.wgrad_gemm_accum_fp32(i["x"], i["dy"], i["main_grad"].zero_())
        return i["main_grad"]

    return {
        "grad_norm_, bf16": {"apex": norm},
        "grad_norm_, fp32": {"apex": norm},
        "adamw_, fp32 gradient, fp32 master": {"apex, master alone": adam},
        "linear_weight_grad_, fp32": {"apex": into_main_grad},
    }


def transformer_engine() -> Peers:
    te = importlib.import_module("transformer_engine.pytorch")

    def rms_norm(i: Inputs) -> Any:
        module = i.setdefault("te", te.RMSNorm(i["w"].numel(), eps=EPS, params_dtype=i["w"].dtype, device="cuda"))
        s = i["x"] + i["residual"]
        with torch.no_grad():
            module.weight.copy_(i["w"])
            return module(s), s

    return {"rms_norm, residual": {"TE": rms_norm}}


def liger() -> Peers:
    rms = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    silu_mul = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction

    def rms_norm(i: Inputs) -> Any:
        s = i["x"] + i["residual"]
        return rms.apply(s, i["w"], EPS), s

    return {
        "rms_norm, residual": {"Liger": rms_norm},
        "swiglu": {"Liger": lambda i: silu_mul.apply(*(half.contiguous() for half in i["x"].chunk(2, -1)))},
    }


PACKAGES: dict[str, tuple[str, Callable[[], Peers]]] = {
    "apex": ("amp_C", apex),
    "Transformer Engine": ("transformer_engine", transformer_engine),
    "Liger": ("liger_kernel", liger),
}


def installed() -> tuple[Peers, dict[str, str]]:
    """What can be imported here, and why the rest cannot."""
    found: Peers = {}
    missing = {}
    for package, (module, ways) in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            missing[package] = f"there is no module {module}"
            continue
        try:
            peers = ways()
        except (ImportError, AttributeError) as error:
            missing[package] = str(error)
            continue
        for title, by_name in peers.items():
            found.setdefault(title, {}).update(by_name)
    return found, missing


def compiled(case: Case) -> dict[str, Way]:
    """torch's way of the case through torch.compile."""
    way = case.peers.get("torch")
    return {} if way is None else {"torch.compile": torch.compile(way, dynamic=False)}
