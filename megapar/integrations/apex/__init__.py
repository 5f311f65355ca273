"""What training code asks of NVIDIA apex, on megapar's ops: `amp_C`, `fused_weight_gradient_mlp_cuda`, `MultiTensorApply`, `FusedAdam`.

    from megapar.integrations.apex import FusedAdam, install, multi_tensor_applier

    install()          # from here on `import amp_C` and `import fused_weight_gradient_mlp_cuda` work

The `apex` on PyPI is a different project, for the web framework Pyramid: nothing here asks for it, and nothing is ever called `apex`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

from megapar.integrations.apex import adam, amp_c, fused_weight_gradient
from megapar.integrations.apex.fused_adam import FusedAdam, MultiTensorApply, multi_tensor_applier

__all__ = ["FusedAdam", "MultiTensorApply", "install", "multi_tensor_applier"]

FUNCTIONS = {
    "amp_C": (
        amp_c.multi_tensor_scale,
        amp_c.multi_tensor_axpby,
        amp_c.multi_tensor_l2norm,
        amp_c.multi_tensor_l2norm_mp,
        amp_c.multi_tensor_l2norm_scale,
        amp_c.multi_tensor_unscale_l2norm,
        adam.multi_tensor_adam,
        adam.multi_tensor_adam_capturable,
        adam.multi_tensor_adam_capturable_master,
        amp_c.update_scale_hysteresis,
    ),
    "fused_weight_gradient_mlp_cuda": (fused_weight_gradient.wgrad_gemm_accum_fp32, fused_weight_gradient.wgrad_gemm_accum_fp16),
}


def install() -> tuple[str, ...]:
    """Makes modules of apex's names importable; returns the names of those it made now.

    Where a module of that name is installed, or was made before, it stays. Only these two are made, never a package `apex`: the one on
    PyPI is a different project, and NVIDIA's has much that is not here. Take `FusedAdam` and `multi_tensor_applier` from this module.
    """
    made = []
    for name, functions in FUNCTIONS.items():
        if name in sys.modules or importlib.util.find_spec(name) is not None:
            continue
        module = types.ModuleType(name, f"{name} of NVIDIA apex, made by megapar.integrations.apex.")
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=__name__)
        for function in functions:
            setattr(module, function.__name__, function)
        sys.modules[name] = module
        made.append(name)
    return tuple(made)
