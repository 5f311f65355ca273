"""The update as its user sees it: groups, schedulers, results, clipping, the payload."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from megapar import ParallelMesh
from megapar.transport import start_all_gather
from megapar.zero.optimizer import ZeroOptimizer
from megapar.zero.setup import AdamW
from tests.parity import logical
from tests.zero.common import GPT, TOKENS, Plain, backward, decoder, loss_sum, micro_batch, plain_loss, reduced, weights, wrapped


def against_torch(kind: str, stage: int) -> None:
    """Two groups, each of its own, driven by a scheduler of torch's, beside torch's own AdamW on one process."""
    mesh = ParallelMesh()
    torch.manual_seed(5)
    model = Plain(blocks=2)
    alone = copy.deepcopy(model)

    def groups_of(net: nn.Module) -> list[dict[str, Any]]:
        some = [p for name, p in net.named_parameters() if "blocks" in name]
        rest = [p for name, p in net.named_parameters() if "blocks" not in name]
        return [
            {"params": some, "lr": 2e-2, "betas": (0.5, 0.9), "weight_decay": 0.3},
            {"params": rest, "lr": 5e-3, "betas": (0.9, 0.99), "weight_decay": 0.0, "eps": 1e-2},
        ]

    def scheduler_of(made: torch.optim.Optimizer) -> Any:
        schedulers = torch.optim.lr_scheduler
        if kind == "lambda":
            return schedulers.LambdaLR(made, [lambda step: 1 / (1 + step), lambda step: 0.5**step])
        if kind == "cycle":
            return schedulers.OneCycleLR(made, max_lr=[2e-2, 1e-2], total_steps=8)
        return schedulers.CosineAnnealingLR(made, 6, eta_min=1e-3)

    optimizer = ZeroOptimizer(
        model, mesh, stage=stage, update=AdamW(eps=1e-3), precision="fp32", max_norm=None, groups=groups_of(model), bucket_bytes=999
    )
    reference = torch.optim.AdamW(groups_of(alone), eps=1e-3)
    schedules = scheduler_of(optimizer), scheduler_of(reference)
    count = 2 * TOKENS * mesh.dp.size
    for step in range(6):
        reference.zero_grad()
        (sum(plain_loss(alone, micro_batch(rank, step, m)) for rank in range(mesh.dp.size) for m in range(2)) / count).backward()
        reference.step()
        backward(optimizer, step, loss=plain_loss)
        optimizer.step(2 * TOKENS)
        for schedule in schedules:
            schedule.step()
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in reference.param_groups]
        assert [g["betas"] for g in optimizer.param_groups] == [g["betas"] for g in reference.param_groups]
    for key, value in weights(optimizer).items():
        torch.testing.assert_close(value, alone.get_parameter(key[0]), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["lambda", "cycle", "cosine"])
def test_groups_and_schedulers(ranks, kind):
    for stage in (0, 1, 3):
        ranks.run(2, against_torch, kind, stage)


def decays() -> None:
    """Matrices decay, vectors do not; without gradients nothing else moves."""
    mesh = ParallelMesh()
    model = decoder(mesh)
    before = logical(model, lambda p: p)
    optimizer = wrapped(model, mesh, update=AdamW(lr=0.1, weight_decay=0.5))
    with optimizer.accumulating():
        pass
    optimizer.step(1)
    for key, value in weights(optimizer).items():
        expected = before[key] * 0.95 if "norm" not in key[0] else before[key]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


def test_decay(ranks):
    ranks.run(2, decays)


def results(tp: int, sequence_parallel: bool) -> None:
    mesh = ParallelMesh(tp=tp)
    alone = decoder(ParallelMesh.alone(), GPT)
    for rank in range(mesh.dp.size):
        loss_sum(alone, micro_batch(rank, 0, 0)).backward()
    count = sum(5 + rank for rank in range(mesh.dp.size))
    norm = math.sqrt(sum(float((p.grad.double() / count).square().sum()) for p in alone.parameters()))
    optimizer = wrapped(decoder(mesh, GPT, sequence_parallel=sequence_parallel), mesh, max_norm=1e-3)
    backward(optimizer, 0, 1)
    told = optimizer.step(5 + mesh.dp.rank, shared=[1.0, torch.tensor(2.0 + mesh.world.rank)])
    assert abs(float(told.grad_norm) - norm) <= 1e-6 * norm, "of the mean, before clipping"
    assert float(told.count) == count
    assert told.shared.tolist() == [mesh.world.size, sum(2.0 + rank for rank in range(mesh.world.size))]
    assert float(told.loss_scale) == 1.0 and float(told.skipped) == 0.0
    assert all(value.dim() == 0 for value in (told.grad_norm, told.loss_scale, told.skipped, told.count))
    kept = float(told.grad_norm)
    backward(optimizer, 1, 1)
    later = optimizer.step(torch.tensor(5))
    assert float(told.grad_norm) == kept != float(later.grad_norm), "the next step does not write over it"
    assert later.shared.tolist() == []


def test_results(ranks):
    """Ranks of tp count their samples once, and what several of them hold once in the norm."""
    for world, tp, sequence_parallel in ((1, 1, False), (2, 1, False), (3, 1, False), (2, 2, False), (4, 2, True)):
        ranks.run(world, results, tp, sequence_parallel)


def clips() -> None:
    """Adam hides a scale; without momentum and with a large eps the update is the clipped mean gradient."""
    mesh = ParallelMesh()
    alone = decoder(ParallelMesh.alone())
    for rank in range(mesh.dp.size):
        loss_sum(alone, micro_batch(rank, 0, 0)).backward()
    count = TOKENS * mesh.dp.size
    grads = {key: value / count for key, value in logical(alone, lambda p: p.grad).items()}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
    for max_norm in (None, 0.1, 1e6):
        model = decoder(mesh)
        update = AdamW(lr=1e4, betas=(0.0, 0.0), eps=1e4, weight_decay=0.0)
        optimizer = wrapped(model, mesh, stage=2, max_norm=max_norm, update=update)
        before = weights(optimizer)
        backward(optimizer, 0, 1)
        optimizer.step(TOKENS)
        scale = 1.0 if max_norm is None else min(1.0, max_norm / norm)
        largest = max(float(g.abs().max()) for g in grads.values()) * scale
        for key, value in weights(optimizer).items():
            moved = before[key] - value
            assert float((moved - scale * grads[key]).abs().max()) <= 1e-3 * largest + 1e-6, (max_norm, key)


def test_clipping_and_mean(ranks):
    ranks.run(2, clips)


def bf16_payload(stage: int) -> None:
    """Gradients travel rounded to bf16, and are summed in fp32: no rounding but that."""
    mesh = ParallelMesh()
    local = wrapped(decoder(ParallelMesh.alone()), ParallelMesh.alone(), stage=0)
    local.backward(loss_sum(local.chunks[0], micro_batch(mesh.dp.rank, 0, 0)))
    optimizer = wrapped(decoder(mesh), mesh, stage=stage, payload=torch.bfloat16)
    backward(optimizer, 0, 1)
    optimizer.grads.finish()
    for got, mine in zip(reduced(optimizer).values(), local.grads.params, strict=True):
        terms = start_all_gather(mine.main_grad[None], mesh.dp).wait().bfloat16().float()
        expected = terms[0]
        for term in terms[1:]:
            expected = expected + term
        assert torch.equal(got, expected)
        assert not torch.equal(got, got.bfloat16().float()) or got.numel() < 32


def test_payload(ranks):
    for world in (2, 3):
        for stage in (0, 2):
            ranks.run(world, bf16_payload, stage)


def test_frozen_parameters_are_converted_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    optimizer = ZeroOptimizer(model, ParallelMesh.alone(), precision="bf16")
    optimizer.backward(model(torch.ones(2, 4, dtype=torch.bfloat16)).float().sum())
    assert float(optimizer.step(2).grad_norm) > 0
