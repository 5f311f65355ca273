"""A CUDA graph of the optimizer phase and of a block's ops gives, replayed, the bits of the same calls made one by one."""

from collections.abc import Callable

import torch
from torch import Tensor

from megapar.ops.adamw import adamw_
from megapar.ops.grad_norm import grad_norm_
from megapar.ops.linear import linear_activation, linear_input_grad, linear_weight_grad
from megapar.ops.rms_norm import rms_norm
from megapar.ops.step_state import LossScaling, StepState, step_state_
from tests.row_ops import normal

BETAS = (0.9, 0.95)


def captured(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """After one call on the capturing stream, which uploads tables and compiles."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def optimizer_phase(device: str) -> tuple[Callable[[], None], list[Tensor], list[Tensor], Tensor]:
    """A step with dynamic loss scaling and a rate in memory; weights, gradients, rate."""
    sizes = [(1000, 33), (7,), (65536,)]
    masters = [normal(*size, dtype=torch.float32, seed=i) for i, size in enumerate(sizes)]
    weights, grads = [x.bfloat16() for x in masters], [torch.zeros_like(x) for x in masters]
    first, second = ([torch.zeros_like(x) for x in masters] for _ in range(2))
    state, total = StepState.create(3, loss_scale=4.0, device=device), torch.zeros(3, dtype=torch.float64, device=device)
    one, lr = torch.ones(1, dtype=torch.float64, device=device), torch.full((), 1e-2, dtype=torch.float64, device=device)

    def step() -> None:
        total.zero_()
        grad_norm_(total, grads)
        scaling = LossScaling(growth_interval=2)
        step_state_(state, total, one, rows=[0, 1, 2], betas=[BETAS] * 3, max_norm=1.0, scaling=scaling)
        adamw_(weights, grads, masters, first, second, state, [0, 1, 2], lr=lr, betas=BETAS, eps=1e-8, weight_decay=0.1)

    return step, [*weights, *masters, *first, *second, state.scalars, state.counters], grads, lr


def test_optimizer_phase():
    """Gradients, rate and skipping change between replays; nothing is captured by value."""
    step, state, grads, lr = optimizer_phase("cuda")
    replayed, replayed_state, replayed_grads, replayed_lr = optimizer_phase("cuda")
    graph = captured(replayed)
    for mine, theirs in zip(replayed_state, state, strict=True):
        mine.copy_(theirs)
    for i in range(5):
        for j, (a, b) in enumerate(zip(grads, replayed_grads, strict=True)):
            a.copy_(normal(*a.shape, dtype=torch.float32, seed=10 * i + j))
            if i == 2:
                a.view(-1)[-1] = torch.inf
            b.copy_(a)
        lr.mul_(0.9)
        replayed_lr.mul_(0.9)
        step()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(state, replayed_state, strict=True)), i


def test_ops_of_a_block():
    x, dy = (normal(130, 256, dtype=torch.bfloat16, seed=i) for i in range(2))
    gain, weight = normal(256, dtype=torch.bfloat16, seed=2), normal(512, 256, dtype=torch.bfloat16, seed=3)
    main_grad, out = torch.zeros(512, 256), {}

    def block() -> None:
        y = rms_norm(x, gain, 1e-6)
        assert isinstance(y, Tensor)
        out["y"], z = linear_activation(y, weight, None, "swiglu")
        out["dx"] = linear_input_grad(torch.cat([dy, dy], -1), weight)
        linear_weight_grad(z, y, main_grad, 1.0)

    graph = captured(block)
    x.copy_(normal(130, 256, dtype=torch.bfloat16, seed=9))
    main_grad.zero_()
    graph.replay()
    found = [out["y"].clone(), out["dx"].clone(), main_grad.clone()]
    main_grad.zero_()
    block()
    assert all(torch.equal(a, b) for a, b in zip(found, [out["y"], out["dx"], main_grad], strict=True))
