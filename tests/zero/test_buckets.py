"""What a model may do with its parameters: not use them, use them often, differently on each rank and in each step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megapar import ColumnParallelLinear, ParallelMesh
from megapar.zero.optimizer import ZeroOptimizer
from tests.zero.common import reduced, wrapped

WIDTH = 20
Use = Callable[["Many", Tensor], Tensor]


class Many(nn.Module):
    """Layers, some of torch and some of megapar, to be used as a test likes."""

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        kinds = (lambda: nn.Linear(WIDTH, WIDTH), lambda: ColumnParallelLinear(WIDTH, WIDTH), lambda: nn.LayerNorm(WIDTH))
        torch.manual_seed(7)
        self.layers = nn.ModuleList(kinds[i % 3]() for i in range(count))
        self.scale = nn.Parameter(torch.tensor(1.5))  # no dimension
        self.empty = nn.Parameter(torch.empty(0, 3))

    def forward(self, x: Tensor, use: Use) -> Tensor:
        return use(self, x)


def chain(*order: int) -> Use:
    """Layers in this order, each as often as it is named."""

    def use(model: Many, x: Tensor) -> Tensor:
        for i in order:
            x = torch.tanh(model.layers[i](x)) + x
        return x * model.scale

    return use


def data(rank: int, step: int, m: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(100 * step + 10 * rank + m))


Plan = list[list[list[Use]]]
"""By step, rank and micro-batch: how the model is used."""


def expected_of(plan: list[list[Use]], step: int, frozen: tuple[str, ...]) -> list[Tensor]:
    """Sums of one process, fp64."""
    model = Many().double()
    for name, param in model.named_parameters():
        param.requires_grad_(not name.startswith(frozen) if frozen else True)
    for rank, uses in enumerate(plan):
        for m, use in enumerate(uses):
            model(data(rank, step, m).double(), use).square().sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]


def follow(plan: Plan, frozen: tuple[str, ...], options: dict[str, Any]) -> None:
    """Each step's reduced gradients against one process, whose weights stay: nothing is left over from a step in the next one."""
    mesh = ParallelMesh()
    model = Many()
    for name, param in model.named_parameters():
        param.requires_grad_(not name.startswith(frozen) if frozen else True)
    optimizer = wrapped(model, mesh, **options)
    for step, ranks in enumerate(plan):
        run(optimizer, step, ranks[mesh.dp.rank])
        optimizer.grads.finish()
        for (param, got), want in zip(reduced(optimizer).items(), expected_of(ranks, step, frozen), strict=True):
            scale = max(float(want.abs().max()), 1e-3) if want.numel() else 1.0
            difference = float((got - want).abs().max()) if want.numel() else 0.0
            assert difference <= 1e-5 * scale, (options, step, tuple(param.shape), difference, scale)
        optimizer.grads.zero()


def run(optimizer: ZeroOptimizer, step: int, uses: list[Use]) -> None:
    model, rank = optimizer.chunks[0], optimizer.mesh.dp.rank
    for m, use in enumerate(uses):
        optimizer.backward(model(data(rank, step, m), use).square().sum(), last=m == len(uses) - 1)


WAYS = [
    {"stage": stage, "bucket_bytes": size, "reduce_every": every}
    for stage, size, every in (
        *((0, 1, "step"), (1, 3000, "step"), (1, 1, "micro_batch")),
        *((2, 1, "step"), (2, 1 << 30, "micro_batch"), (3, 1, "step")),
    )
]

LATE = [{**way, "overlap": False} for way in WAYS]


def follow_all(plan: Plan, frozen: tuple[str, ...] = (), ways: list[dict[str, Any]] = WAYS) -> None:
    for options in ways:
        follow(plan, frozen, options)


def unused() -> None:
    """A layer that nobody uses: from the beginning, later, and then again."""
    everything, some = chain(0, 1, 2, 3, 4), chain(0, 2, 4)
    follow_all([[[some, some]] * 2] * 2)
    follow_all([[[everything] * 2] * 2, [[some] * 2] * 2, [[some] * 2] * 2])
    follow_all([[[use] * 2] * 2 for use in (some, everything, some, everything)], ways=LATE)


def frozen() -> None:
    follow_all([[[chain(0, 1, 2, 3, 4)] * 2] * 2] * 2, ("layers.1.", "layers.2.", "scale"))


def often() -> None:
    """Layers run two and three times in a forward, the same in each step."""
    follow_all([[[chain(0, 1, 0, 2, 1, 3, 0, 4)] * 2] * 2] * 3)


def shared_parameter(model: Many, x: Tensor) -> Tensor:
    """One weight in two operations, one of which autograd delivers and one of which writes itself."""
    return F.linear(model.layers[1](x), model.layers[1].weight) + model.layers[0](x) @ model.layers[0].weight


def shared() -> None:
    follow_all([[[shared_parameter] * 2] * 2] * 3, ways=[way for way in WAYS if way["stage"] < 3])


def recomputed(model: Many, x: Tensor) -> Tensor:
    for i in (0, 1, 2, 3, 4, 1):
        x = x + checkpoint(lambda y, i=i: torch.tanh(model.layers[i](y)), x, use_reentrant=False)
    return checkpoint(lambda y: y * model.scale, x, use_reentrant=False)


def recomputed_reentrant(model: Many, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    for pair in ((0, 1), (2, 3), (4, 1)):

        def segment(y: Tensor, pair: tuple[int, int] = pair) -> Tensor:
            for i in pair:
                y = y + torch.tanh(model.layers[i](y))
            return y

        x = checkpoint(segment, x, use_reentrant=True)
    return x


def recomputation() -> None:
    """It is what one process without recomputation computes, and a hook that fires twice would count a write too many."""
    for use in (recomputed, recomputed_reentrant):
        follow_all([[[use] * 2] * 2] * 3)


def differing_micro_batches() -> None:
    """Use counts that vary between micro-batches of a step, and then do not."""
    a, b = chain(0, 1, 2), chain(0, 3, 4, 3)
    follow_all([[[a, b]] * 2, [[a, b]] * 2, [[b, a]] * 2, [[a, a]] * 2, [[b, b]] * 2], ways=LATE)


def numbers_of_micro_batches() -> None:
    """From step to step 1, 3, 2, 1 of them, and 0 of one rank's fewer than the other's."""
    use = chain(0, 1, 2, 3, 4, 0)
    follow_all([[[use] * count] * 2 for count in (1, 3, 2, 1)])


def ranks_with_different_numbers() -> None:
    """With one reduction a step a rank may have more micro-batches than another."""
    use = chain(0, 1, 2, 3, 4)
    ways = [way for way in WAYS if way["reduce_every"] == "step" and way["stage"] < 3]
    follow_all([[[use] * a, [use] * b] for a, b in ((1, 3), (2, 1), (3, 3))], ways=ways)


@pytest.mark.parametrize(
    "story", [unused, frozen, often, shared, recomputation, differing_micro_batches, numbers_of_micro_batches, ranks_with_different_numbers]
)
def test_stories(ranks, story):
    ranks.run(2, story)


def alone() -> None:
    """The same without anybody to share with."""
    everything, some = chain(0, 1, 2, 3, 4, 0), chain(0, 2, 4)
    follow_all([[[some, everything]], [[everything, everything]], [[some]], [[everything] * 3], [[recomputed] * 2]], ("layers.2",))


def test_alone(ranks):
    ranks.run(1, alone)


def differing_ranks() -> None:
    """Neither hangs nor mixes up: buckets start in one order on all ranks. In stage 3 ranks gather the same blocks, used or not."""
    a, b = chain(0, 1, 2), chain(4, 3, 0)
    ways = [way for way in WAYS if way["stage"] < 3]
    follow_all([[[a, a], [b, b]]] * 3, ways=ways)
    follow_all([[[a, b], [b, a]], [[b, b], [a, a]]], ways=[{**way, "overlap": False} for way in ways])
    follow_all([[[a], [chain()]], [[chain()], [b]]], ways=[{**way, "overlap": False} for way in ways])


def test_ranks_that_use_different_parameters(ranks):
    ranks.run(2, differing_ranks)
    ranks.run(3, three_ranks)


def three_ranks() -> None:
    a, b, c = chain(0, 1), chain(2, 3), chain(4)
    follow_all([[[a, a], [b, b], [c, c]]] * 3, ways=[way for way in WAYS if way["stage"] < 3])


def more_often(overlap: bool) -> None:
    """A parameter that was used once a step is used twice, long after its reduction has started."""
    for stage in (1, 2):
        plan = [[[chain(0, 1, 2, 3, 4)]] * 2] * 2 + [[[chain(4, 0, 1, 2, 3, 4)]] * 2]
        follow(plan, (), {"stage": stage, "bucket_bytes": 1, "overlap": overlap})


def test_used_more_often_than_in_the_step_before(ranks):
    ranks.run(2, more_often, False)
    for told in ranks.errors(2, more_often, True):
        assert "layers.4." in told and "used more often than in the step before" in told and "overlap=False" in told


def less_often() -> None:
    """Fewer uses are no error: what is expected and does not come starts when the window ends."""
    follow_all([[[chain(4, 0, 1, 2, 3, 4)] * 2] * 2] * 2 + [[[chain(0, 1, 2, 3, 4)] * 2] * 2])


def test_used_less_often(ranks):
    ranks.run(2, less_often)


def in_one_backward() -> None:
    """Micro-batches accumulated with last=False give what one backward of their sum gives."""
    mesh, use = ParallelMesh(), chain(0, 1, 2, 3, 4)
    for way in WAYS:
        told = []
        for together in (False, True):
            optimizer = wrapped(Many(), mesh, **way)
            model = optimizer.chunks[0]
            for step in range(2):
                losses = (model(data(mesh.dp.rank, step, m), use).square().sum() for m in range(3))
                if together:
                    optimizer.backward(sum(losses))
                else:
                    for m, loss in enumerate(losses):
                        optimizer.backward(loss, last=m == 2)
                optimizer.grads.finish()
                told.append(list(reduced(optimizer).values()))
                optimizer.grads.zero()
        for a, b in zip(told[:2], told[2:], strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_accumulation(ranks):
    ranks.run(2, in_one_backward)


def now_and_then() -> None:
    """A block that some steps leave out (LayerDrop) is no surprise when it comes back, whether or not the first step had it."""
    mesh, whole, short = ParallelMesh(), chain(0, 1, 2, 3, 4), chain(0, 1, 3, 4)
    for first in (True, False):
        optimizer = wrapped(Many(), mesh, stage=1, bucket_bytes=1)
        for step, use in enumerate([whole if (step % 2 == 0) == first else short for step in range(5)]):
            optimizer.backward(optimizer.chunks[0](data(mesh.dp.rank, step, 0), use).square().sum())
            optimizer.step(3)


def test_a_block_left_out_now_and_then(ranks):
    ranks.run(2, now_and_then)
