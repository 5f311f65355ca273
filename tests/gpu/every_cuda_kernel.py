"""Runs every kernel of csrc/cuda once, for compute-sanitizer: MEGAPAR_BACKEND=cuda python -m tests.gpu.every_cuda_kernel"""

import itertools

import torch

from megapar.ops.adamw import Noise, adamw_
from megapar.ops.grad_norm import grad_norm_
from megapar.ops.step_state import StepState, step_state_

SIZES = (1, 1000, 4097, 70001)
F32, BF16, FP16, INT16 = torch.float32, torch.bfloat16, torch.float16, torch.int16
KINDS = [(F32, None), (BF16, None), (FP16, None), (BF16, F32), (FP16, F32), (BF16, INT16)]


def main() -> None:
    torch.set_default_device("cuda")
    total, one = torch.zeros(3, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    state = StepState.create(1, device="cuda")
    rows = [0] * len(SIZES)
    for (weight, master), grad, moment in itertools.product(KINDS, (F32, BF16, FP16), (F32, BF16)):
        lists = [[torch.zeros(n, dtype=dtype) for n in SIZES] for dtype in (weight, grad, moment, moment)]
        masters = [] if master is None else [torch.zeros(n, dtype=master) for n in SIZES]
        grad_norm_(total, lists[1], count_zeros=True)
        step_state_(state, total, one, rows=[0], betas=[(0.9, 0.99)])
        for noise in (None, Noise(1, range(len(SIZES)))):
            if noise is None or not (weight == FP16 and master is None):
                options = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "noise": noise}
                adamw_(lists[0], lists[1], masters, lists[2], lists[3], state, rows, **options)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
