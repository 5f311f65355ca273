"""Models built on meta and drawn by the optimizer, shard by shard: the same bits as drawn first and sharded then, in less memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megapar import Axis, ColumnParallelLinear, ParallelMesh, initialize
from megapar.batch import TokenBatch
from megapar.models.config import DecoderConfig
from megapar.models.decoder import Decoder
from megapar.models.pipelined import PipelinedDecoder
from megapar.optim.precision import LossScaler, Precision
from megapar.params import SpecParameter
from megapar.pipeline.kinds import make_schedule
from megapar.training.memory import MemoryPeak
from megapar.training.step import TrainStep
from megapar.zero.layout import Entry, make_layout
from megapar.zero.optimizer import ZeroOptimizer
from megapar.zero.setup import AdamW
from megapar.zero.weights import Weights, storage_bytes
from tests.ranks import RankPool
from tests.zero.common import CONFIGS, LLAMA, TIED, TOKENS, VOCABULARY, Plain, backward, decoder, loss_sum, micro_batch, plain_loss, wrapped

PRECISIONS: dict[str, tuple[Precision, torch.dtype]] = {
    # formats, and the dtype that the model is built in
    "fp32": (Precision.of("fp32"), torch.float32),
    "bf16": (Precision(), torch.float32),
    "bf16 model": (Precision(), torch.bfloat16),
    "remainder": (Precision(master="remainder"), torch.float32),
    "no master": (Precision(master=None, moments=torch.bfloat16), torch.float32),
    "fp16": (Precision(torch.float16, scaler=LossScaler(1024.0)), torch.float32),
}
Boxes = dict[tuple[str, str, tuple[int, ...]], Tensor]


def held(optimizer: ZeroOptimizer) -> Boxes:
    """All that this rank updates; its weights also as they are, rounded and gathered."""
    found = {(box.kind, box.piece.name, box.piece.start): box.read().clone() for box in optimizer.boxes()}
    with optimizer.unshard():
        for entry, param in zip(optimizer.layout.entries, optimizer.grads.params, strict=True):
            found["whole", entry.name, ()] = param.detach().clone()
    return found


def assert_same(found: Boxes, expected: Boxes) -> None:
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert not any(value.isnan().any() for value in found.values())


def trained(optimizer: ZeroOptimizer, loss: Any = loss_sum) -> tuple[Boxes, Boxes]:
    """At the start, and after three steps."""
    start = held(optimizer)
    for step in range(3):
        backward(optimizer, step, loss=loss)
        optimizer.step(2 * TOKENS)
    return start, held(optimizer)


def both_ways(tp: int, config: str, name: str, options: dict[str, Any]) -> None:
    mesh = ParallelMesh(tp=tp)
    precision, dtype = PRECISIONS[name]
    for stage in range(4):
        expected, found = (
            trained(wrapped(decoder(mesh, CONFIGS[config], dtype=dtype, device=device, **options), mesh, stage=stage, precision=precision))
            for device in (None, "meta")
        )
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("name", PRECISIONS)
def test_bitwise(ranks, name):
    for dp in (1, 2):
        ranks.run(dp, both_ways, 1, "llama", name, {})


@pytest.mark.parametrize("config", CONFIGS)
def test_bitwise_beside_tensor_parallelism(ranks, config):
    ranks.run(2, both_ways, 2, config, "bf16", {"sequence_parallel": config == "gpt"})
    ranks.run(4, both_ways, 2, config, "fp32", {})


def pipelined(mesh: ParallelMesh, stage: int, name: str, drawn_before: bool) -> Iterator[Boxes]:
    def optimize(stages: Sequence[nn.Module]) -> ZeroOptimizer:
        assert all(param.is_meta for one in stages for param in one.parameters())
        for one in stages if drawn_before else ():
            initialize(one, 3, mesh.device)
        return ZeroOptimizer(stages, mesh, stage=stage, update=AdamW(lr=1e-2), precision=PRECISIONS[name][0])

    schedule = make_schedule("1f1b", 2, 1, 2)
    train = TrainStep(PipelinedDecoder(TIED, VOCABULARY, mesh, schedule=schedule, seed=3, optimize=optimize), mesh)
    yield held(train.optimizer)
    for step in range(3):
        batches = [micro_batch(mesh.dp.rank, step, m) for m in range(2)]
        train.accumulate([TokenBatch.of(tokens[:, :-1], tokens[:, 1:]) for tokens in batches])
        train.update(1e-2)
    yield held(train.optimizer)


def a_tied_pipeline(name: str) -> None:
    mesh = ParallelMesh(pp=2)
    for stage in (0, 1, 3):
        for found, expected in zip(*(pipelined(mesh, stage, name, before) for before in (False, True)), strict=True):
            assert_same(found, expected)


def test_a_pipeline_with_tied_ends(ranks):
    ranks.run(2, a_tied_pipeline, "fp32")
    ranks.run(4, a_tied_pipeline, "remainder")


def identities() -> None:
    """Ties, specs, a frozen parameter, the user's groups; names are those that `initialize` saw, also inside another module."""
    mesh = ParallelMesh()

    def built(device: str) -> tuple[nn.Module, Decoder]:
        model = decoder(mesh, TIED, device=device)
        model.norm.weight.requires_grad_(False)
        return nn.Sequential(model), model

    expected = {name: param.detach().clone() for name, param in built("cpu")[1].named_parameters()}
    outer, model = built("meta")
    before = dict(model.named_parameters())
    specs = {name: param.spec for name, param in before.items()}
    groups = [{"params": [p for p in before.values() if p.requires_grad], "weight_decay": 0.5}]
    optimizer = wrapped(outer, mesh, stage=3, groups=groups)
    assert model.head.weight is model.embedding.weight
    with optimizer.unshard():
        for name, param in model.named_parameters():
            assert param is before[name] and type(param) is SpecParameter and param.spec is specs[name]
            assert torch.equal(param, expected[name]), name
    assert not model.norm.weight.requires_grad
    optimizer.backward(outer(micro_batch(mesh.dp.rank, 0, 0)).sum())
    optimizer.step(TOKENS)


def test_identities(ranks):
    ranks.run(2, identities)


# To be loaded


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def load_later() -> None:
    """A model of plain modules without values takes those of a checkpoint, in any stage; until then it does nothing."""
    mesh = ParallelMesh()
    torch.manual_seed(1)
    saved: list[Any] = [None] * mesh.dp.size
    source = wrapped(Plain(), mesh, stage=2, precision="bf16")
    backward(source, 0, loss=plain_loss)
    source.step(2 * TOKENS)
    torch.distributed.all_gather_object(saved, source.state_dict())
    first = held(source)
    after = trained(source, plain_loss)[1]
    for stage in range(4):
        optimizer = wrapped(on_meta(Plain), mesh, stage=stage, precision="bf16", load_later=True)
        for what, act in {
            "a backward": lambda optimizer=optimizer: optimizer.backward(torch.ones((), requires_grad=True)),
            "a step": lambda optimizer=optimizer: optimizer.step(1),
            "unshard": lambda optimizer=optimizer: optimizer.unshard().__enter__(),
            "state_dict": lambda optimizer=optimizer: optimizer.state_dict(),
        }.items():
            with pytest.raises(ValueError, match=f"{what} needs weights and load_later=True left them to be loaded"):
                act()
        assert all(box.read().isnan().all() for box in optimizer.boxes() if box.kind == "weight"), "nothing that could be taken for weights"
        optimizer.load_state_dict(saved)
        for found, expected in zip(trained(optimizer, plain_loss), (first, after), strict=True):
            kinds = {"whole"} if stage == 0 else {kind for kind, *_ in expected}  # stage 0 cuts no boxes
            assert_same(*({key: value for key, value in boxes.items() if key[0] in kinds} for boxes in (found, expected)))


def test_load_later(ranks):
    ranks.run(2, load_later)


def test_load_later_draws_nothing():
    def init(full: Tensor, generator: torch.Generator | None) -> None:
        raise AssertionError("drawn")

    layer = ColumnParallelLinear(4, 4, init=init, device="meta")
    initialize(layer, 0, "meta")
    optimizer = wrapped(layer, ParallelMesh.alone(), load_later=True)
    assert all(box.read().isnan().all() for box in optimizer.boxes() if box.kind == "weight")


# Refused


def test_what_stays_without_values_is_refused():
    mesh = ParallelMesh.alone()
    frozen, buffered = on_meta(Plain), Plain()
    frozen.norm.weight.requires_grad_(False)
    buffered.register_buffer("scale", torch.ones(2, device="meta"))
    never = ColumnParallelLinear(2, 2, device="meta")
    for model, load, words in (
        (on_meta(Plain), False, r"embedding.weight is on meta and has no values: call initialize\(.*\) first, or give load_later=True"),
        (never, False, r"weight is on meta and has no values: call initialize\(model, seed, device=\"meta\"\) first"),
        (frozen, True, r"norm.weight is on meta and has no values: .* or build it on a real device, as it is frozen"),
        (buffered, True, "buffer scale is on meta and has no values: register it on a real device"),
    ):
        with pytest.raises(ValueError, match=words):
            wrapped(model, mesh, load_later=load)


def not_finite() -> None:
    """On one rank only: the other one must not wait."""
    mesh = ParallelMesh()

    def init(full: Tensor, generator: torch.Generator | None) -> None:
        full.fill_(1.0)[-1] = torch.inf

    layer = ColumnParallelLinear(16, 16, bias=False, init=init, device="meta")
    initialize(layer, 0, "meta")
    wrapped(layer, mesh, stage=3)


def test_drawn_values_that_are_not_finite(ranks):
    for told in ranks.errors(2, not_finite):
        assert "weight has values that are not finite" in told


def differing(name: str) -> None:
    mesh = ParallelMesh()
    device = "cpu" if name == "device" and mesh.dp.rank else "meta"
    model = Decoder(LLAMA, VOCABULARY, mesh, seed=mesh.dp.rank if name == "seed" else 3, device=device)
    wrapped(model, mesh, load_later=name == "load_later" and mesh.dp.rank == 1)


@pytest.mark.parametrize("name", ["seed", "device", "load_later"])
def test_replicas_that_would_be_drawn_differently(ranks, name):
    for told in ranks.errors(2, differing, name):
        words = "options must be the same on all ranks of dp" if name == "load_later" else "has different values on the replicas"
        assert words in told


# Memory

LARGE = DecoderConfig(hidden_size=1024, layers=4, heads=16, ffn_size=2816)
LARGE_VOCABULARY, SLACK = 16384, 16 << 20
"""324 MiB of fp32 parameters; the largest logical tensor is the embedding, 64 MiB. SLACK: freed blocks below malloc's mmap threshold, which
grows to 32 MiB, stay in its heap between shards that live on; and the pages of code and tables that are first used here."""


def test_place():
    """A sharded parameter never has more memory than its shard: what is allocated counts on a GPU, though nobody has written to it."""
    param = nn.Parameter(torch.empty(5, 7, device="meta"))
    layout = make_layout([Entry("weight", 35)], 2, 1)
    weights = Weights([param], layout, Axis.layout("dp", 1, 2), replicated=False, sharded=True)
    weights.place(0, torch.arange(32.0, 35.0))
    assert weights.shards[0].tolist() == [32, 33, 34, *[0] * 29]
    assert param.shape == (5, 7) and param.device.type == "cpu" and param.untyped_storage().nbytes() == 0
    assert storage_bytes(weights.tensors()) == 32 * 4


def peak(device: str) -> dict[str, int]:
    """Bytes: held once it is built, by kind; the most that were resident while it was built, and in a step after that, beyond before."""
    mesh = ParallelMesh()
    small = wrapped(decoder(mesh, device=device), mesh, stage=3)  # what is made once in a process is made
    backward(small, 0)
    small.step(2 * TOKENS)
    building = MemoryPeak(mesh.device)
    model = Decoder(LARGE, LARGE_VOCABULARY, mesh, device=device)
    optimizer = wrapped(model, mesh, stage=3, reduce_every="micro_batch")
    told = optimizer.bytes_held() | {"building": building.bytes()}
    training = MemoryPeak(mesh.device)
    optimizer.backward(model(micro_batch(mesh.dp.rank, 0, 0)[:, :-1]).float().logsumexp(-1).sum())
    optimizer.step(TOKENS)
    return told | {"training": training.bytes(), "count": sum(p.numel() for p in model.parameters())}


def test_peak():
    """What this rank keeps, and one logical tensor: 307 MiB, where drawing the whole model first takes 546.

    Without gradients, whose memory no one has written to yet. Four ranks: with fewer, moments that are made after the last large tensor
    was drawn would hide more.
    """
    largest = 4 * LARGE_VOCABULARY * LARGE.hidden_size
    with RankPool() as pool:  # processes whose malloc has nothing left over from other tests
        for told in pool.run(4, peak, "meta", timeout=120):
            kept = told["parameters"] + told["optimizer_state"]
            assert kept < 1.01 * (4 + 8) * told["count"] / 4
            assert told["building"] <= kept + largest + SLACK, told
