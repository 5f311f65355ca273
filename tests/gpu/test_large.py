"""Tensors of more than 2^31 elements: what a 32-bit offset would write lies elsewhere."""

import pytest
import torch

from megapar.ops.adamw import adamw_
from megapar.ops.grad_norm import grad_norm_
from megapar.ops.step_state import StepState
from megapar.ops.swiglu import swiglu

N = (1 << 31) + (1 << 20) + 8


def needs(gigabytes: float) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes:.0f} GB of free GPU memory")


def test_optimizer():
    needs(32)
    weight, grad, first, second = (torch.zeros(N, dtype=torch.bfloat16) for _ in range(4))
    grad[-1] = 2.0
    grad[0] = 1.0
    total, state = torch.zeros(3, dtype=torch.float64), StepState.create(1)
    grad_norm_(total, [grad], count_zeros=True)
    assert total.tolist() == [5.0, 0.0, N - 2]
    state.counters.fill_(1.0)
    adamw_([weight], [grad], [], [first], [second], state, [0], lr=1.0, betas=(0.5, 0.5), eps=0.0, weight_decay=0.0)
    assert weight[[0, -1]].tolist() == [weight[0].item()] * 2 != [0.0, 0.0] and first[[0, -1]].tolist() == [0.5, 1.0]


def test_rows():
    needs(16)
    gate_up = torch.zeros((1 << 17) + 1, 1 << 14, dtype=torch.bfloat16)
    gate_up[-1] = 1.0
    y = swiglu(gate_up)
    assert y[:-1].count_nonzero() == 0 and y[-1, 0].item() == pytest.approx(0.7311, abs=4e-3)
