"""Stage 3 in whatever way a module is run: the gradients of one process."""

import dataclasses
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megapar import ParallelMesh, shared_memory
from tests.zero.common import PlainBlock, reduced, wrapped

WIDTH = 12


class Net(nn.Module):
    """An embedding of data, blocks, a projection; `run` says how the blocks are used."""

    def __init__(self, block: Callable[[], nn.Module], run: Callable[..., Tensor], count: int = 4) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.first, self.last, self.run = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), run
        self.blocks = nn.ModuleList(block() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self.blocks, self.first(x)))


def block() -> PlainBlock:
    return PlainBlock(WIDTH)


def in_order(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for module in blocks:
        x = module(x)
    return x


def twice(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return in_order(blocks, in_order(blocks, x))


def each_twice(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for module in blocks:
        x = module(module(x))
    return x


def out_of_order(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for i in (2, 0, 3, 1, 2):
        x = blocks[i](x)
    return x


def backwards(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for module in reversed(blocks):
        x = module(x)
    return x


def branches(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """Blocks side by side, whose backwards have no order of their own."""
    return sum(module(x) for module in blocks) + blocks[0](blocks[3](x))


def in_place(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """What comes out of a block is written over."""
    for module in blocks:
        x = module(x).mul_(1.5)
        x += 1
    return x


def recomputed(reentrant: bool, segment: int) -> Callable[..., Tensor]:
    def run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for start in range(0, len(blocks), segment):
            x = checkpoint(lambda y, start=start: in_order(blocks[start : start + segment], y), x, use_reentrant=reentrant)
        return x

    return run


def auxiliary(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """Losses of each block beside the last one."""
    losses = []
    for module in blocks:
        x = module(x)
        losses.append(x.square().mean())
    return x * torch.stack(losses).sum()


class Inner(nn.Module):
    """Recomputes its own inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gain = block(), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * checkpoint(self.inner, x, use_reentrant=False)


class Tuples(nn.Module):
    """The first makes a bias, the others hand it on (T5's do)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.make = block(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        bias = self.make(x) if bias is None else bias
        return self.inner(x + bias), bias


class Writes(nn.Module):
    """Into what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = block()

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.inner(x.clone()))


class Mute(nn.Module):
    """Returns nothing to follow backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = block()

    def forward(self, x: list[Tensor]) -> None:
        x.append(self.inner(x[-1]))


class Dicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = block(), nn.Linear(WIDTH, WIDTH)

    def forward(self, state: dict[str, Any]) -> dict[str, Any]:
        return {"x": self.inner(state["x"]), "more": [self.other(state["x"]), None], "kept": state["x"], "number": 3}


@dataclasses.dataclass
class Output:
    x: Tensor
    number: int = 3


class Dataclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = block()

    def forward(self, x: Tensor) -> Output:
        return Output(self.inner(x))


def tuples(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    bias = None
    for module in blocks:
        x, bias = module(x, bias)
    return x + bias


def dicts(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    state: dict[str, Any] = {"x": x}
    total = x
    for module in blocks:
        state = module(state)
        total = total + state["more"][0] + state["kept"]
    return total + state["x"]


def of_dataclasses(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for module in blocks:
        x = module(x).x
    return x


class Nested(nn.Module):
    """Lists in a list, which themselves are never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.stages = nn.ModuleList(nn.ModuleList(block() for _ in range(2)) for _ in range(2))
        self.heads = nn.ModuleDict({"a": nn.Linear(WIDTH, 3), "b": nn.Linear(WIDTH, 3)})

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = in_order(stage, x)
        return self.heads["a"](x) + self.heads["b"](x)


class Shared(nn.Module):
    """One matrix in two blocks, one module that is two blocks, one vector of the model in all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.blocks[2].up.weight = self.blocks[0].up.weight
        self.blocks.append(self.blocks[1])
        self.bias = nn.Parameter(torch.ones(WIDTH))
        self.blocks[0].norm.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        return in_order(self.blocks, x + self.bias)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{run.__name__: lambda run=run: Net(block, run) for run in (in_order, twice, each_twice, out_of_order, backwards, branches, in_place)},
    "auxiliary": lambda: Net(block, auxiliary),
    **{f"recomputed {r} {n}": lambda r=r, n=n: Net(block, recomputed(r, n)) for r in (False, True) for n in (1, 2, 4)},
    "recomputed inside": lambda: Net(Inner, in_order),
    "tuples": lambda: Net(Tuples, tuples),
    "writes": lambda: Net(Writes, in_order),
    "dicts": lambda: Net(Dicts, dicts),
    "dataclasses": lambda: Net(Dataclasses, of_dataclasses),
    "nested lists": Nested,
    "shared": Shared,
}


def data(rank: int, step: int, m: int) -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(100 * step + 10 * rank + m))


def as_one_process(name: str, options: dict[str, Any]) -> None:
    mesh = ParallelMesh()
    alone = MODELS[name]()
    optimizer = wrapped(MODELS[name](), mesh, stage=3, **options)
    model = optimizer.chunks[0]
    for step in range(3):
        alone.zero_grad()
        for rank in range(mesh.dp.size):
            for m in range(2):
                alone(data(rank, step, m)).square().sum().backward()
        for m in range(2):
            with torch.no_grad():  # an evaluation in between
                value = model(data(mesh.dp.rank, step, m))
            torch.testing.assert_close(value, alone(data(mesh.dp.rank, step, m)), rtol=1e-5, atol=1e-5)
            optimizer.backward(model(data(mesh.dp.rank, step, m)).square().sum(), last=m == 1)
        optimizer.grads.finish()
        grads = list(reduced(optimizer).values())
        for (key, param), grad in zip(alone.named_parameters(), grads, strict=True):
            want = torch.zeros_like(param) if param.grad is None else param.grad
            assert float((want - grad).abs().max()) <= 1e-5 * float(want.abs().max()) + 1e-6, (options, step, key)
        optimizer.grads.zero()


@pytest.mark.parametrize("name", MODELS)
def test_whatever_way_it_is_run(ranks, name):
    for options in (
        {"bucket_bytes": 1},
        {"overlap": False, "reduce_every": "micro_batch"},
        {"reshard_every": "step"},
    ):
        ranks.run(2, as_one_process, name, options)


def mute() -> None:
    model = Net(Mute, lambda blocks, x: [blocks[0](found := [x]), found[-1]][-1])
    wrapped(model, ParallelMesh(), stage=3)
    model(data(0, 0, 0))


def test_a_block_that_returns_no_tensor(ranks):
    for told in ranks.errors(2, mute):
        assert told.startswith("block 0.blocks.0 returned a NoneType in which no tensor is found: return tensors, or tuples")


def unused_gathers() -> None:
    """What has come of them is written as soon as others need their room: the weights are there, and nobody may touch them yet."""
    with mock.patch.object(shared_memory, "LARGEST_SLOT", 256):
        mesh = ParallelMesh()
    model = Net(block, in_order)
    optimizer = wrapped(model, mesh, stage=3)
    optimizer.backward(model(data(0, 0, 0)).square().sum())
    for unit in optimizer.gathers.units[0]:
        optimizer.gathers.start(unit)
    optimizer.step(1)


def test_a_gather_that_nobody_waits_for(ranks):
    ranks.run(2, unused_gathers)


def unused_last_block() -> None:
    """Rank 0 does not run it, and has posted a part of its weights only when rank 1 waits for all of them."""
    with mock.patch.object(shared_memory, "LARGEST_SLOT", 256):
        mesh = ParallelMesh(timeout=timedelta(seconds=5))
    model = Net(block, lambda blocks, x: in_order(blocks[:-1] if mesh.dp.rank == 0 else blocks, x))
    optimizer = wrapped(model, mesh, stage=1, gather_ahead=True, bucket_bytes=1)
    for step in range(3):
        optimizer.backward(model(data(0, step, 0)).square().sum())
        optimizer.step(1)


def test_a_last_block_that_one_rank_skips(ranks):
    ranks.run(2, unused_last_block)


def different_blocks() -> None:
    """Ranks that run different blocks would take each other's shards for their own: nobody may get a wrong number."""
    mesh = ParallelMesh(tp=2, timeout=timedelta(seconds=2))
    model = Net(block, lambda blocks, x: blocks[1 + mesh.dp.rank](blocks[0](x)))
    wrapped(model, mesh, stage=3, overlap=False)
    model(data(0, 0, 0))


def test_ranks_that_run_different_blocks(ranks):
    for told in ranks.errors(4, different_blocks):
        through_memory = "is in ALL_GATHER number " in told and "give all ranks the same calls" in told
        assert through_memory or "failed and left" in told or "Timed out" in told or "Connection closed" in told
