"""Whether every op has a GPU body in this environment, which needs a torch with CUDA and no GPU: python -m tests.gpu.every_body

With MEGAPAR_BACKEND=cuda that is the compiled extension, for the ops of csrc/cuda; without, Triton, for all.
"""

import importlib

import torch

from megapar.ops import dispatch, schema


def missing() -> list[str]:
    """What has no body, in words."""
    found = [] if dispatch.MISSING["cuda"] is None else [str(dispatch.MISSING["cuda"])]
    compiled = dispatch.FORCED == "cuda"
    for op in dispatch.CUDA_OPS if compiled else sorted(schema.FILES):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"megapar::{op}", "CUDA"):
            found.append(f"megapar::{op} has no kernel under the CUDA key")
        file = "cuda" if compiled else f"triton.{schema.FILES[op]}"
        try:
            getattr(importlib.import_module(f"megapar.ops.{file}"), op)
        except (ImportError, AttributeError) as error:
            found.append(f"megapar::{op} has no body: {error}")
    if compiled and not found:
        launchers = ("adamw_", "grad_norm_chunks_", "grad_norm_total_", "step_state_")
        found += [f"megapar_cuda::{op} is not registered" for op in launchers if not hasattr(torch.ops.megapar_cuda, op)]
    return found


if __name__ == "__main__":
    if torch.version.cuda is None:
        raise SystemExit("this torch is built without CUDA: run make check-cuda-build, which installs one")
    problems = missing()
    if problems:
        raise SystemExit("\n".join(problems))
    print(f"every op has a body: {dispatch.FORCED or 'triton'}, torch {torch.__version__}, GPU: {torch.cuda.is_available()}")
