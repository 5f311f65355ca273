"""What the Triton kernels do to memory, seen by the interpreter: no access outside of a tensor, no race between programs, and the bytes
that the formula asks for. tests/ops/test_interpreted.py runs this file."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.gpu_cases import Case, Sizes, all_cases, op
from megapar.ops import dispatch
from megapar.ops.rope import rope_angles
from megapar.ops.step_state import StepState
from tests.row_ops import normal

pytestmark = pytest.mark.skipif(not dispatch.INTERPRETED, reason="watches Triton's interpreter: TRITON_INTERPRET=1 MEGAPAR_BACKEND=triton")
if dispatch.INTERPRETED:
    import triton
    import triton.language as tl

    from benchmarks.watched import EVEN, moved, watched

    @triton.jit
    def shifted_copy(x, y, shift, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + i, tl.load(x + i + shift))

    @triton.jit
    def flag(x, values: tl.constexpr):
        tl.store(x, tl.program_id(0) * values)


ODD = Sizes(t=7, h=70, f=129, v=301, q_heads=2, kv_heads=1, tensors=3, numel=1025)


def by_title(sizes: Sizes) -> dict[str, Case]:
    return {case.title: case for case in all_cases(sizes)}


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (lambda x: shifted_copy[(4,)](x, torch.zeros(64), 1, 16), "shifted_copy reads 1 elements outside of every tensor"),
        (lambda x: shifted_copy[(5,)](torch.zeros(80), x, 0, 16), "shifted_copy writes 16 elements outside of every tensor"),
        (lambda x: shifted_copy[(2,)](x, x, 16, 16), "program 0 reads what program 1 writes"),
        (lambda x: shifted_copy[(2,)](x, x, 0, 16), None),
        (lambda x: flag[(3,)](x, 1), "programs 0 and 1 write one address"),
        (lambda x: flag[(3,)](x, 0), None),
    ],
)
def test_the_watch_sees(run: Callable[[torch.Tensor], None], told):
    x = torch.zeros(64)
    if told is None:
        with watched() as seen:
            run(x)
        assert seen.launches == 1
        return
    with pytest.raises(AssertionError, match=told), watched():
        run(x)


@pytest.mark.parametrize("title", by_title(ODD))
def test_inside_of_its_tensors_and_no_race(title):
    case = by_title(ODD)[title]
    inputs = case.make("cpu")
    with watched() as seen:
        case.ours(inputs)
    assert seen.launches > 0


MOVED = {
    "adamw_, bf16 gradient, fp32 master": 1.01,
    "adamw_, fp32 gradient, fp32 master": 1.01,
    "adamw_, bf16 gradient, remainder": 1.01,
    "grad_norm_, bf16": 1.01,
    "grad_norm_, fp32": 1.01,
    "swiglu": 1.0,
    "swiglu_backward": 1.0,
    "dropout": 1.01,
    "cross_entropy_statistics": 1.01,
    "cross_entropy_grad": 1.01,
    "rms_norm, residual": 1.26,  # each row reads the gain, from cache
    "rms_norm_backward": 1.2,  # and leaves partial sums of the gain's gradient
    "layer_norm, residual": 1.51,
    "layer_norm_backward": 1.3,
    "rope_qkv": 1.5,  # each of the four heads reads the angles, from cache
}
"""Bytes loaded and stored, over the formula's, at the sizes EVEN."""


@pytest.mark.parametrize("title", MOVED)
def test_bytes_moved(title):
    assert 1.0 <= moved(by_title(EVEN)[title]) <= MOVED[title]


def bias_grad() -> None:
    op("linear_bias_grad_", torch.zeros(33), normal(1030, 33, dtype=torch.bfloat16), 1.0)


def rope_backward() -> None:
    cos, sin = rope_angles(torch.arange(14), 12, 1e4)
    q, k, v = (normal(2, heads, 7, 12, dtype=torch.bfloat16, seed=heads) for heads in (4, 2, 2))
    op("rope_qkv_backward", q, k, v, cos, sin)


def walked_rows() -> None:
    """Of norms, which registers do not hold."""
    x, weight, rstd = normal(19, 1027, dtype=torch.bfloat16), normal(1027, dtype=torch.float32), torch.ones(19)
    op("layer_norm", x, weight, weight, 1e-6, x)
    op("layer_norm_backward", x, x, x, weight, rstd, rstd)


def stochastic_and_unaligned_update() -> None:
    lists = [[normal(5001, dtype=torch.bfloat16, seed=i)[i:] for i in (0, 1)] for _ in range(4)]
    state = StepState.create(1)
    noise = {"seed": 3, "ids": [1, 2], "places": [7, 50, 90, 0, 5000, 5000]}
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.1, **noise}
    op("adamw_", lists[0], lists[1], [], *lists[2:], state.scalars, state.counters, [0, 0], **options)
    op("grad_norm_", torch.zeros(3, dtype=torch.float64), lists[1], True)


def nothing() -> None:
    op("rms_norm", torch.zeros(0, 70), torch.ones(70), 1e-6, None)
    op("grad_norm_", torch.zeros(3, dtype=torch.float64), [torch.zeros(0)], True)


@pytest.mark.parametrize("run", [bias_grad, rope_backward, walked_rows, stochastic_and_unaligned_update, nothing])
def test_what_no_case_launches(run):
    with watched():
        run()
