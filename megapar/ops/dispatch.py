"""Which body of an op runs: the compiled kernel of the tensor's device, or the plain PyTorch reference.

Kernels are the default. The reference runs where MEGAPAR_BACKEND=reference asks for it, and always in float64, which no kernel knows.
Where there is no body an op raises and says how to get one: a slower one is never taken silently.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch
from torch import Tensor

from megapar.ops import schema

BACKENDS = ("reference",)
BUILD = "pip install --no-build-isolation -e ."


def _load() -> str | None:
    """Registers the compiled kernels with torch; why there are none, if so."""
    if importlib.util.find_spec("megapar._C") is None:
        return f"the CPU kernels are not built: install g++ 12 or newer and run {BUILD}, or set MEGAPAR_BACKEND=reference"
    try:
        importlib.import_module("megapar._C")
    except ImportError as error:
        return f"the CPU kernels were built for another torch ({error}): run {BUILD} again, or set MEGAPAR_BACKEND=reference"
    return None


def _forced() -> str | None:
    asked = os.environ.get("MEGAPAR_BACKEND") or None
    if asked is not None and asked not in BACKENDS:
        raise ValueError(f"MEGAPAR_BACKEND={asked} must be one of {', '.join(BACKENDS)}: correct it or unset it")
    return asked


assert schema.LIBRARY is not None
MISSING = _load()
FORCED = _forced()


def use_reference(x: Tensor) -> bool:
    """Whether an op on `x` is the reference's. Raises RuntimeError where neither it nor a kernel may run."""
    return x.dtype == torch.float64 or use_reference_on(x.device.type)


def use_reference_on(device: str) -> bool:
    """The same for an op whose float64 arguments are numbers of its own, and not what it is computed in."""
    if FORCED == "reference":
        return True
    if device not in ("cpu", "meta"):
        raise RuntimeError(f"megapar's ops have no kernels for {device} yet: set MEGAPAR_BACKEND=reference to compute with plain PyTorch")
    if MISSING is not None:
        raise RuntimeError(MISSING)
    return False
