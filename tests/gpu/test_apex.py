"""apex's functions and FusedAdam on a GPU: a CUDA graph of them gives, replayed, the bits of the same calls made one by one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megapar.integrations.apex import FusedAdam, amp_c, multi_tensor_applier
from tests.gpu.test_graphs import captured
from tests.row_ops import DEVICE, normal

KINDS = [((1000, 33), torch.bfloat16), ((7,), torch.float32), ((65536,), torch.float16), ((4, 3, 2, 2), torch.bfloat16)]


def training_step() -> tuple[Callable[[], None], list[Tensor], Callable[[], list[Tensor]]]:
    """Norms, scaling, the loss scale and an update, all in place; the gradients, and all that it writes."""
    params = [nn.Parameter(normal(*size, dtype=dtype, seed=i)) for i, (size, dtype) in enumerate(KINDS)]
    for p in params:
        p.grad = torch.zeros_like(p)
    grads = [p.grad for p in params]
    optimizer = FusedAdam(params, lr=1e-2, weight_decay=0.1, capturable=True, master_weights=True)
    noop, growth, left = (torch.zeros(1, dtype=torch.int32, device=DEVICE) for _ in range(3))
    scale, norms = torch.full((1,), 4.0, device=DEVICE), torch.zeros(1 + len(params), device=DEVICE)

    def step() -> None:
        noop.zero_()
        norm, each = multi_tensor_applier(amp_c.multi_tensor_unscale_l2norm, noop, [grads], scale.reciprocal(), True)
        norms.copy_(torch.cat([norm, each]))
        multi_tensor_applier(amp_c.multi_tensor_scale, noop, [grads, grads], 0.5)
        amp_c.update_scale_hysteresis(scale, growth, left, noop.float(), 2.0, 0.5, 2, 1)
        optimizer.step()

    def written() -> list[Tensor]:
        states = [x for p in params for x in optimizer.state[p].values()]
        return [*params, *grads, *states, norms, scale, growth, left, optimizer.param_groups[0]["step"]]

    return step, grads, written


def test_a_training_step():
    step, grads, written = training_step()
    replayed, replayed_grads, replayed_written = training_step()
    graph = captured(replayed)
    step()  # as `captured` made one
    for i in range(4):
        for j, (a, b) in enumerate(zip(grads, replayed_grads, strict=True)):
            a.copy_(normal(*a.shape, dtype=a.dtype, seed=10 * i + j))
            b.copy_(a)
        step()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(written(), replayed_written(), strict=True)), i
    assert written()[-1].tolist() == [5]
