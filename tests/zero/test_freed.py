"""Stage 3 between uses: weights are gone, read inside `unshard`, and touching a freed one says so."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapar import ParallelMesh
from megapar.models.generate import generate
from megapar.zero.optimizer import ZeroOptimizer
from tests.parity import logical
from tests.zero.common import LLAMA, TOKENS, Plain, backward, decoder, loss_sum, micro_batch, plain_loss, wrapped
from tests.zero.test_gather import Net, block, data, in_order


def bytes_of(params: Any) -> int:
    """What their storages hold, whatever class they are of."""
    with torch._C.DisableTorchFunctionSubclass():
        return sum(p.untyped_storage().nbytes() for p in params)


# Memory.


class Seen(nn.Module):
    """Notes what is whole while it runs, forward and backward."""

    def __init__(self, inner: nn.Module, note: Callable[[], None]) -> None:
        super().__init__()
        self.inner, self.note = inner, note

    def forward(self, x: Tensor) -> Tensor:
        self.note()
        y = self.inner(x)
        if y.requires_grad:
            y.register_hook(lambda grad: self.note())
        return y


def frees(overlap: bool) -> None:
    """After use a block's storages are empty; of blocks one is whole at a time, and with overlap the next one too."""
    mesh = ParallelMesh()
    noted: list[int] = []
    model = Net(block, in_order, count=5)
    for number, module in enumerate(model.blocks):
        model.blocks[number] = Seen(module, lambda: noted.append(sum(bytes_of(b.parameters()) > 0 for b in model.blocks)))
    optimizer = wrapped(model, mesh, stage=3, overlap=overlap)
    params = list(model.parameters())
    assert bytes_of(params) == 0
    for m in range(2):
        loss = model(data(mesh.dp.rank, 0, m)).square().sum()
        assert bytes_of(model.blocks.parameters()) == 0, "after forward"
        optimizer.backward(loss, last=m == 1)
        assert bytes_of(params) == 0, "after backward"
    assert max(noted) <= 2, noted
    assert len(noted) == 20
    optimizer.step(10)
    assert bytes_of(params) == 0
    with torch.no_grad():
        model(data(0, 0, 0))
    assert bytes_of(model.blocks.parameters()) == 0
    optimizer.release()
    assert bytes_of(params) == 0
    with optimizer.unshard():
        assert all(bytes_of([p]) >= p.numel() * 4 for p in params)
    assert bytes_of(params) == 0


@pytest.mark.parametrize("overlap", [True, False])
def test_weights_are_freed(ranks, overlap):
    ranks.run(2, frees, overlap)


def stays_for_a_step() -> None:
    """reshard_every="step": gathered once, whole until the step's last backward."""
    mesh = ParallelMesh()
    model = Net(block, in_order)
    optimizer = wrapped(model, mesh, stage=3, reshard_every="step")
    gathered = []
    real = optimizer.weights.start_gather
    optimizer.weights.start_gather = lambda bucket: gathered.append(bucket.number) or real(bucket)
    for m in range(3):
        optimizer.backward(model(data(0, 0, m)).square().sum(), last=m == 2)
        assert (bytes_of(model.parameters()) == 0) is (m == 2)
    assert sorted(gathered) == list(range(len(optimizer.layout.buckets)))


def test_reshard_once_a_step(ranks):
    ranks.run(2, stays_for_a_step)


# Reading.


def reads() -> None:
    mesh = ParallelMesh()
    model = decoder(mesh)
    before = logical(model, lambda p: p)
    prompt = torch.tensor([[1, 5, 9], [2, 2, 30]])
    text = generate(model, prompt, 6, temperature=0.0)
    optimizer = wrapped(model, mesh, stage=3)
    for _ in range(2):
        with optimizer.unshard():
            assert all(torch.equal(value, before[key]) for key, value in logical(model, lambda p: p).items())
            state = {key: value.clone() for key, value in model.state_dict().items()}
            copied = copy.deepcopy([p.detach() for p in model.parameters()])
            assert type(next(model.parameters())).__name__ == "SpecParameter"
        assert torch.equal(generate(model, prompt, 6, temperature=0.0), text)
    assert sum(value.numel() for value in copied) <= sum(value.numel() for value in state.values())
    with torch.inference_mode():
        loss_sum(model, micro_batch(0, 0, 0))
    backward(optimizer, 0)
    optimizer.step(2 * TOKENS)
    with optimizer.unshard():
        changed = logical(model, lambda p: p)
    assert not any(torch.equal(changed[key], before[key]) for key in before)
    assert not torch.equal(generate(model, prompt, 6, temperature=2.0), text)


def test_reading(ranks):
    ranks.run(2, reads)


TOUCHES: dict[str, Callable[[nn.Parameter, nn.Module], Any]] = {
    "sum": lambda p, _: p.sum(),
    "detach": lambda p, _: p.detach(),
    "data": lambda p, _: p.data,
    "data = ": lambda p, _: setattr(p, "data", torch.zeros(3)),
    "in place": lambda p, _: p.detach().zero_(),
    "add_": lambda p, _: torch.no_grad()(lambda: p.add_(1))(),
    "init": lambda p, _: nn.init.zeros_(p),
    "copy_ into": lambda p, _: torch.empty(p.shape).copy_(p),
    "item": lambda p, _: p[0, 0].item(),
    "equal": lambda p, _: torch.equal(p, torch.zeros(p.shape)),
    "matmul": lambda p, _: torch.zeros(1, p.shape[1]) @ p.t(),
    "linear": lambda p, _: F.linear(torch.zeros(1, p.shape[1]), p),
    "foreach": lambda p, _: torch._foreach_add([p], 1.0),
    "numpy": lambda p, _: p.numpy(),
    "tolist": lambda p, _: p.tolist(),
    "iterate": lambda p, _: list(p),
    "storage": lambda p, _: p.untyped_storage().nbytes(),
    "data_ptr": lambda p, _: p.data_ptr(),
    "repr": lambda p, _: repr(p),
    "format": lambda p, _: f"{p}",
    "deepcopy": lambda p, _: copy.deepcopy(p),
    "save": lambda p, _: torch.save(p, io.BytesIO()),
    "cat": lambda p, _: torch.cat([torch.zeros(1, p.shape[1]), p]),
    "index": lambda p, _: torch.zeros(p.shape[0])[p > 0],
    "set": lambda p, _: p.__setitem__(0, 1.0),
    "vector": lambda p, _: nn.utils.parameters_to_vector([p]),
    "apply": lambda p, _: Double.apply(p),
    "state_dict": lambda _, m: m.state_dict(),
    "load_state_dict": lambda _, m: m.load_state_dict({name: torch.zeros(p.shape) for name, p in m.named_parameters()}),
    "half": lambda _, m: m.half(),
}


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return 2 * dy


def touches() -> dict[str, str]:
    model = decoder(ParallelMesh(), LLAMA)
    wrapped(model, ParallelMesh(), stage=3)
    param, told = model.blocks["1"].mlp.down.weight, {}
    for name, touch in TOUCHES.items():
        try:
            touch(param, model)
            told[name] = "nothing"
        except Exception as error:
            told[name] = str(error)
    # What needs no values is answered.
    assert param.shape == (16, 24) and param.dtype == torch.float32 and param.numel() == 384 and param.dim() == param.ndim == 2
    assert param.requires_grad and param.is_leaf and param.grad is None and isinstance(param, nn.Parameter) and param.device.type == "cpu"
    assert len({param, *model.parameters()}) == len(list(model.parameters()))
    assert "DecoderBlock" in repr(model)
    assert sum(p.numel() for p in model.parameters()) > 1000
    return told


def test_touching_a_freed_weight(ranks):
    """A sentence that names it, never a crash or a number."""
    for told in ranks.run(2, touches):
        for name, words in told.items():
            assert "is sharded and its whole values are not here: read it inside `with optimizer.unshard():`" in words, (name, words)
            if "model" not in name and "dict" not in name and name != "half":
                assert "blocks.1.mlp.down.weight" in words, (name, words)


def outside_of_forward() -> None:
    """A block of another's is run on its own: its weights are freed."""
    model = decoder(ParallelMesh(), LLAMA)
    wrapped(model, ParallelMesh(), stage=3)
    model.blocks["0"].mlp(torch.zeros(3, 16))


def test_a_part_of_a_block(ranks):
    for told in ranks.errors(2, outside_of_forward):
        assert "blocks.0.mlp." in told and "with optimizer.unshard()" in told


def writes(where: str) -> None:
    mesh = ParallelMesh()
    model = Net(block, in_order)
    optimizer = wrapped(model, mesh, stage=3)
    weight = model.blocks[1].up.weight
    with optimizer.unshard(), torch.no_grad():
        if where == "weight":
            weight.mul_(2)
        elif where == "load_state_dict":
            model.load_state_dict(model.state_dict())
        else:
            model.first.bias[0] = 3.0


@pytest.mark.parametrize("where,name", [("weight", "blocks.1.up.weight"), ("load_state_dict", "first.weight"), ("rest", "first.bias")])
def test_writing_inside_unshard(ranks, where, name):
    for told in ranks.errors(2, writes, where):
        assert told == f"{name} was written inside unshard(), and its shards were not: load_state_dict changes weights"


def fails_inside() -> None:
    """The exception comes out, every rank ends with it, and the optimizer says that it is of no use any more."""
    mesh = ParallelMesh()
    optimizer = wrapped(Net(block, in_order), mesh, stage=3)
    with pytest.raises(KeyError, match="mine"), optimizer.unshard():
        raise KeyError("mine")
    with pytest.raises(RuntimeError, match="an earlier step of this optimizer failed"):
        optimizer.backward(optimizer.chunks[0](data(0, 0, 0)).sum())


def test_an_exception_inside_unshard(ranks):
    ranks.run(2, fails_inside)


# Graphs that are older than the weights.


def stale(stage: int, when: str, net: str) -> None:
    mesh = ParallelMesh()
    model: nn.Module = Plain() if net == "plain" else decoder(mesh)
    loss_of = plain_loss if net == "plain" else loss_sum
    optimizer: ZeroOptimizer = wrapped(model, mesh, stage=stage)
    old = loss_of(model, micro_batch(mesh.dp.rank, 0, 0))
    if when == "step":
        backward(optimizer, 0, loss=loss_of)
        optimizer.step(2 * TOKENS)
    else:
        state = [None] * mesh.dp.size
        torch.distributed.all_gather_object(state, optimizer.state_dict())
        optimizer.load_state_dict(state)
    optimizer.backward(old)


@pytest.mark.parametrize("when", ["step", "load"])
@pytest.mark.parametrize("net", ["plain", "megapar"])
def test_backward_after_weights_changed(ranks, when, net):
    for stage in (0, 1, 2, 3):
        for told in ranks.errors(2, stale, stage, when, net):
            assert "modified by an inplace operation" in told or "RuntimeError" in told, (stage, told)


def built_inside_unshard() -> None:
    mesh = ParallelMesh()
    model = Plain()
    optimizer = wrapped(model, mesh, stage=3)
    with optimizer.unshard():
        loss = model.head.weight.square().sum()
    optimizer.backward(loss)


def test_a_graph_built_inside_unshard(ranks):
    for told in ranks.errors(2, built_inside_unshard):
        assert "modified by an inplace operation" in told


def norm_of_a_freed_block() -> None:
    """torch hands its weight on by name."""
    model = Net(block, in_order)
    wrapped(model, ParallelMesh(), stage=3)
    model.blocks[1].norm(data(0, 0, 0))


def test_names_a_keyword_argument(ranks):
    for told in ranks.errors(2, norm_of_a_freed_block):
        assert told.startswith("blocks.1.norm.weight is sharded")
