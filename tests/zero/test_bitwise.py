"""Stages, bucket sizes, overlap, when weights are gathered and freed: none changes a bit of the weights. And they are the right ones."""

import copy
import itertools
from typing import Any
from unittest import mock

import pytest
import torch

from megapar import FusedAdamW, ParallelMesh, shared_memory
from megapar.optim.precision import Precision
from megapar.zero.setup import AdamW
from tests.parity import boxes, gradients, logical
from tests.zero.common import CONFIGS, LLAMA, TOKENS, backward, decoder, loss_sum, masters, micro_batch, reduced, same, weights, wrapped

BUCKETS = {"tiny": 1, "default": 32 << 20, "whole": 1 << 40}
Case = dict[str, Any]


def train(mesh: ParallelMesh, case: Case, steps: int = 10) -> tuple[Any, list[float], list[torch.Tensor]]:
    """Weights, norms of every step and the masters of this rank."""
    case = dict(case)
    config, sequence_parallel = CONFIGS[case.pop("config", "llama")], case.pop("sequence_parallel", False)
    optimizer = wrapped(decoder(mesh, config, sequence_parallel=sequence_parallel), mesh, **case)
    norms = []
    for step in range(steps):
        backward(optimizer, step)
        norms.append(float(optimizer.step(2 * TOKENS).grad_norm))
    optimizer.grads.detach()
    return weights(optimizer), norms, masters(optimizer)


def all_alike(tp: int, common: Case, cases: list[Case], steps: int = 10) -> None:
    mesh = ParallelMesh(tp=tp)
    expected, norms, _ = train(mesh, {"stage": 0, "overlap": False, **common}, steps)
    assert norms[0] > 1.0, "clipping takes part"
    assert len(set(norms)) == steps
    for case in cases:
        got, told, _ = train(mesh, {**common, **case}, steps)
        assert told == norms, case
        assert same(got, expected), case


GRID = [
    {"stage": stage, "bucket_bytes": size, "overlap": overlap}
    for stage, size, overlap in itertools.product(range(4), BUCKETS.values(), (True, False))
]
MORE = [
    *({"stage": stage, "gather_ahead": True, "overlap": overlap} for stage in (1, 2) for overlap in (True, False)),
    *({"stage": 3, "reshard_every": "step", "bucket_bytes": size} for size in BUCKETS.values()),
]
FEW = [{"stage": stage, "bucket_bytes": size} for stage, size in ((1, 1), (2, 3000), (3, 1), (3, 1 << 40))]


@pytest.mark.parametrize("every", ["step", "micro_batch"])
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_fp32(ranks, dp, every):
    cases = GRID + MORE if (dp, every) == (2, "step") else GRID[1::3] + MORE[::3]
    ranks.run(dp, all_alike, 1, {"reduce_every": every}, cases, timeout=200)


PRECISIONS = {
    "fp32 master": Precision(),
    "remainder": Precision(master="remainder"),
    "bf16 gradients": Precision(main_grad=torch.bfloat16),
    "bf16 moments": Precision(moments=torch.bfloat16),
    "no master": Precision(master=None),
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_bf16(ranks, name):
    for every in ("step", "micro_batch") if "master" in name else ("step",):
        common = {"precision": PRECISIONS[name], "reduce_every": every}
        ranks.run(2, all_alike, 1, {**common, "payload": torch.bfloat16 if name == "remainder" else torch.float32}, FEW)


def all_alike_by(way: str, cases: list[Case]) -> None:
    """Over dp by messages, or through memory in many pieces, as large models go."""
    name, stand_in = ("_host", lambda: 0) if way == "messages" else ("LARGEST_SLOT", 1024)
    with mock.patch.object(shared_memory, name, stand_in):
        all_alike(1, {}, cases, steps=4)


@pytest.mark.parametrize("way", ["messages", "pieces"])
@pytest.mark.parametrize("dp", [2, 3])
def test_every_way_over_the_wire(ranks, way, dp):
    ranks.run(dp, all_alike_by, way, FEW + MORE[::2])


@pytest.mark.parametrize("name", ["tied", "gpt"])
def test_styles(ranks, name):
    ranks.run(2, all_alike, 1, {"config": name}, FEW + MORE)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_beside_tensor_parallelism(ranks, sequence_parallel):
    for name in ("llama", "gpt"):
        ranks.run(4, all_alike, 2, {"config": name, "sequence_parallel": sequence_parallel}, FEW[::2] + FEW[1:2], 6, timeout=120)


def a_step_of_either_master() -> None:
    """A remainder and its bf16 weight are the fp32 master."""
    mesh, told = ParallelMesh(), []
    for master in ("fp32", "remainder"):
        optimizer = wrapped(decoder(mesh), mesh, stage=2, precision=Precision(master=master))
        backward(optimizer, 0)
        optimizer.step(2 * TOKENS)
        told.append([box.read() for box in optimizer.boxes() if box.kind == "weight"])
    assert all(torch.equal(a, b) for a, b in zip(*told, strict=True))
    assert any(not torch.equal(a, a.bfloat16().float()) for a in told[0])


def test_a_remainder_is_the_rest_of_the_fp32_master(ranks):
    ranks.run(2, a_step_of_either_master)


# Against one process.


def sums(dp: int, step: int, model: torch.nn.Module) -> torch.Tensor:
    """What the ranks' losses of a step add up to."""
    return sum(loss_sum(model, micro_batch(rank, step, m)) for rank in range(dp) for m in range(2))


def raw_gradients(tp: int, config: str, cases: list[Case]) -> None:
    """Within the bounds that megapar promises: 4 times the error of one process, or 1e-6 of the largest gradient."""
    mesh = ParallelMesh(tp=tp)
    alone = decoder(ParallelMesh.alone(), CONFIGS[config])
    _, exact = gradients(copy.deepcopy(alone).double(), lambda model: sums(mesh.dp.size, 0, model))
    _, single = gradients(alone, lambda model: sums(mesh.dp.size, 0, model))
    floor = 1e-6 * max(float(g.abs().max()) for g in exact.values())
    for case in cases:
        case = dict(case)
        model = decoder(mesh, CONFIGS[config], sequence_parallel=case.pop("sequence_parallel", False))
        optimizer = wrapped(model, mesh, **case)
        backward(optimizer, 0)
        optimizer.grads.finish()
        whole = reduced(optimizer)
        if optimizer.options.stage == 0:
            assert all(torch.equal(param.main_grad, grad) for param, grad in whole.items()), "every rank has all of it"
        local = logical(model, lambda p, whole=whole: whole[p])
        for key, expected in boxes(model, exact).items():
            bound = max(4 * max(float((single[k] - exact[k]).abs().max()) for k in exact if k[0] == key[0]), floor)
            error = float((local[key] - expected).abs().max())
            assert error <= bound, f"{case} {key[0]}: error {error:.2e} above {bound:.2e}"
        optimizer.grads.detach()


ACCUMULATED = [{"stage": stage, "reduce_every": every} for stage in range(4) for every in ("step", "micro_batch")]


@pytest.mark.parametrize("config", CONFIGS)
def test_raw_gradients(ranks, config):
    ranks.run(2, raw_gradients, 1, config, ACCUMULATED)
    ranks.run(4, raw_gradients, 1, config, ACCUMULATED[1::2])
    cases = [{"stage": stage, "sequence_parallel": sp} for stage in (0, 2, 3) for sp in (False, True)]
    ranks.run(4, raw_gradients, 2, config, cases)


def descends(case: Case) -> None:
    """Ten steps of gradient descent by hand: a wrong scale, which Adam would hide, shows."""
    mesh, rate = ParallelMesh(), 0.1
    alone = decoder(ParallelMesh.alone(), LLAMA)
    optimizer = wrapped(decoder(mesh), mesh, **case)
    count = 2 * TOKENS * mesh.dp.size
    for step in range(10):
        alone.zero_grad()
        (sums(mesh.dp.size, step, alone) / count).backward()
        backward(optimizer, step)
        optimizer.grads.finish()
        with torch.no_grad():
            for param in alone.parameters():
                param -= rate * param.grad
            for index, whole in enumerate(reduced(optimizer).values()):
                shard, stage = optimizer.weights.shards[index], optimizer.options.stage
                start, stop = (0, whole.numel()) if stage == 0 else optimizer.layout.interval(index, mesh.dp.rank)
                shard[: stop - start] -= rate / count * whole.reshape(-1)[start:stop]
        optimizer.loaded()
        optimizer.grads.zero()
    expected, moved = logical(alone, lambda p: p), logical(decoder(ParallelMesh.alone(), LLAMA), lambda p: p)
    assert max(float((expected[key] - moved[key]).abs().max()) for key in expected) > 1e-2
    for key, value in weights(optimizer).items():
        assert float((value - expected[key]).abs().max()) <= 5e-6, (case, key)


def test_ten_steps_of_gradient_descent(ranks):
    for stage in range(4):
        ranks.run(2, descends, {"stage": stage, "max_norm": None})


def same_update(case: Case, master: Any, max_norm: float | None) -> None:
    """The reduced gradients given to FusedAdamW on one process: the same bits of weights."""
    mesh = ParallelMesh()
    precision = Precision() if master == "fp32" else Precision(master="remainder") if master else Precision.of("fp32")
    update = AdamW(lr=3e-3, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.1)
    model = decoder(mesh)
    alone = decoder(ParallelMesh.alone(), dtype=precision.param)
    optimizer = wrapped(model, mesh, precision=precision, update=update, max_norm=max_norm, **case)
    twin = dict(zip(model.parameters(), alone.parameters(), strict=True))
    with torch.no_grad():
        for box in optimizer.boxes():
            if box.kind == "weight":  # FusedAdamW makes its masters of the 16-bit weights
                box.write(box.read().to(precision.param).float())
    optimizer.loaded()
    groups = [{**group, "params": [twin[p] for p in group["params"]]} for group in optimizer.param_groups]
    fused = FusedAdamW(groups, master_weights=master, max_norm=max_norm)
    finish = optimizer.grads.finish
    captured = {}

    def capture() -> None:
        finish()
        captured.update(reduced(optimizer))

    optimizer.grads.finish = capture
    for step in range(10):
        backward(optimizer, step)
        told = optimizer.step(1 if mesh.dp.rank == 0 else 0)
        for param, grad in captured.items():
            twin[param].main_grad = grad
        fused.step()
        if max_norm is not None:
            assert abs(float(told.grad_norm) - float(fused.grad_norm)) <= 1e-14 * float(told.grad_norm)
        with optimizer.unshard():
            for name, param in model.named_parameters():
                assert torch.equal(param, twin[param]), (case, master, step, name)


@pytest.mark.parametrize("master", [None, "fp32", "remainder"])
def test_the_update_is_fused_adamw(ranks, master):
    for stage, max_norm in ((0, 1.0), (1, None), (3, 1.0)):
        ranks.run(2, same_update, {"stage": stage}, master, max_norm)
