"""The optimizer as its user sees it: groups, schedulers, states that any layout loads, results, and sentences about bad input."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megapar import ParallelMesh
from megapar import grads as gradients
from megapar.optim.precision import Precision
from megapar.params import named_specs, seed_of
from megapar.transport import start_all_gather
from megapar.zero.optimizer import ZeroOptimizer
from megapar.zero.setup import AdamW
from tests.parity import logical
from tests.zero.common import TOKENS, Plain, backward, decoder, loss_sum, micro_batch, plain_loss, reduced, same, weights, wrapped

# Bad input: what every rank is told.

COUNTS: dict[str, tuple[Any, str]] = {
    "missing": (None, "step was given the count None and needs a number"),
    "negative": (-1, "step was given the count -1 and gradients are divided by it: it must be 0 or more"),
    "nan": (math.nan, "step was given the count nan"),
    "infinite": (math.inf, "step was given the count inf"),
    "bool": (True, "step was given the count True and needs a number"),
    "text": ("14", "step was given the count '14' and needs a number"),
    "two": (torch.ones(2), "needs a number"),
    "zero": (0, "the step counted 0 on all ranks and cannot divide by it: give samples with targets"),
    "zero tensor": (torch.tensor(0), "the step counted 0 on all ranks"),
    "nan tensor": (torch.tensor(math.nan), "the step counted nan on all ranks"),
}


def with_count(name: str, stage: int) -> None:
    mesh = ParallelMesh()
    optimizer = wrapped(decoder(mesh), mesh, stage=stage)
    backward(optimizer, 0)
    optimizer.step(*([] if name == "missing" else [COUNTS[name][0]]))


@pytest.mark.parametrize("name", COUNTS)
def test_counts(ranks, name):
    for told in ranks.errors(2, with_count, name, 2):
        assert COUNTS[name][1] in told


def one_rank_counts_none() -> float:
    """Rank 1 had no target in its samples: its gradient is 0, its count too."""
    mesh = ParallelMesh()
    optimizer = wrapped(decoder(mesh), mesh)
    optimizer.backward(loss_sum(optimizer.chunks[0], micro_batch(0, 0, 0)) * (mesh.dp.rank == 0))
    return float(optimizer.step(TOKENS if mesh.dp.rank == 0 else 0).grad_norm)


def test_one_rank_without_targets(ranks):
    two, one = ranks.run(2, one_rank_counts_none), ranks.run(1, one_rank_counts_none)
    assert two[0] == two[1] and math.isclose(two[0], one[0], rel_tol=1e-14)


MISUSES: dict[str, str] = {
    "added": "extra.weight requires a gradient and the optimizer does not know it: wrap the model after its last change",
    "frozen": "norm.weight was frozen or removed after the model was wrapped: wrap it after its last change",
    "removed": "norm.weight was frozen or removed after the model was wrapped",
    "replaced": "norm.weight requires a gradient and the optimizer does not know it",
    "grad": "norm.weight has a .grad, which the step would ignore: gradients arrive by optimizer.backward, clear it",
    "step first": "step was called and no backward before it: call optimizer.backward(loss_sum), then step",
    "step twice": "step was called and no backward before it",
    "zero_grad": "step was called and no backward before it",
    "no last": "the step's last backward had last=False and its gradients are not summed yet: give the last one last=True",
    "vector": "torch.float32 of shape (14,), requires_grad=True, and needs an fp32 scalar",
    "constant": "torch.float32 of shape (), requires_grad=False, and needs an fp32 scalar",
    "outside": "was given a gradient by a backward of yours: call optimizer.backward(loss_sum) instead",
}


def misuse(name: str, stage: int) -> None:
    mesh = ParallelMesh()
    model = decoder(mesh)
    optimizer = wrapped(model, mesh, stage=stage)
    if name == "step first":
        optimizer.step(1)
    if name == "added":
        model.extra = nn.Linear(2, 2)
    elif name == "frozen":
        model.norm.weight.requires_grad_(False)
    elif name == "vector":
        optimizer.backward(model(micro_batch(0, 0, 0)[:, :-1])[:, 0])
    elif name == "constant":
        optimizer.backward(torch.tensor(1.0))
    elif name == "outside":
        loss_sum(model, micro_batch(0, 0, 0)).backward()
    optimizer.backward(loss_sum(model, micro_batch(0, 0, 0)), last=name != "no last")
    if name == "removed":
        model.norm = nn.Identity()
    elif name == "replaced":
        model.norm.weight = nn.Parameter(torch.ones(16))
    elif name == "grad":
        model.norm.weight.grad = torch.ones(16)
    elif name == "zero_grad":
        optimizer.zero_grad()
    optimizer.step(TOKENS)
    if name == "step twice":
        optimizer.step(TOKENS)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", MISUSES)
def test_misuse(ranks, name, stage):
    for told in ranks.errors(2, misuse, name, stage):
        assert MISUSES[name] in told


def test_misuse_alone(ranks):
    """Without another rank no word of it is different."""
    for name, words in MISUSES.items():
        assert words in ranks.errors(1, misuse, name, 1)[0], name


def differing(name: str) -> None:
    mesh = ParallelMesh()
    other = mesh.dp.rank == 1
    model: nn.Module = Plain(blocks=3 if other and name == "model" else 2)
    options: dict[str, Any] = {}
    if name == "option" and other:
        options = {"max_norm": 2.0}
    elif name == "precision" and other:
        options = {"precision": "bf16"}
    elif name == "nan" and other:
        with torch.no_grad():
            model.head.weight[1, 2] = math.nan
    elif name == "bad option" and other:
        options = {"stage": 4}
    elif name == "frozen" and other:
        model.norm.weight.requires_grad_(False)
    wrapped(model, mesh, **options)


DIFFERS = "the parameters (a hash) and options must be the same on all ranks of dp"


@pytest.mark.parametrize(
    "name,words",
    [
        ("model", DIFFERS),
        ("option", DIFFERS),
        ("precision", DIFFERS),
        ("frozen", DIFFERS),
        ("nan", "head.weight has values that are not finite: check what it was loaded from"),
        ("bad option", "stage=4 must be 0 (replicated)"),
    ],
)
def test_a_rank_that_differs(ranks, name, words):
    for told in ranks.errors(2, differing, name):
        assert words in told


def another_update(name: str) -> None:
    """The step would end in other weights on other ranks: what `update` and groups say is compared too."""
    mesh = ParallelMesh()
    other = mesh.dp.rank == 1
    model = Plain(blocks=1)
    if name == "update":
        wrapped(model, mesh, update=AdamW(lr=2e-2 if other else 1e-2))
    else:
        groups = [{"params": list(model.parameters()), "lr": 2e-2 if other else 1e-2}]
        wrapped(model, mesh, groups=groups)


@pytest.mark.parametrize("name", ["update", "groups"])
def test_a_rank_whose_update_differs(ranks, name):
    for told in ranks.errors(2, another_update, name):
        assert DIFFERS in told


def test_options():
    mesh, model = ParallelMesh.alone(), Plain(blocks=1)
    for options, words in (
        ({"stage": 4}, r"stage=4 must be 0 \(replicated\), 1"),
        ({"max_norm": 0.0}, r"max_norm=0\.0 must be above 0"),
        ({"max_norm": math.nan}, "max_norm=nan must be above 0"),
        ({"reduce_every": "epoch"}, 'reduce_every="epoch" must be "step" or "micro_batch"'),
        ({"reshard_every": "never"}, 'reshard_every="never" must be'),
        ({"reduction": "tree"}, 'reduction="tree" must be "ordered", "native" or None'),
        ({"payload": torch.float16}, r"payload=torch.float16 must be torch.float32 or torch.bfloat16"),
        ({"bucket_bytes": 0}, "bucket_bytes=0 must be 1 or more"),
        ({"precision": "fp8"}, 'precision="fp8" is not known'),
        ({"groups": [{"params": list(model.parameters())[1:]}]}, "groups leave out embedding.weight"),
        ({"groups": [{"params": [*model.parameters(), nn.Parameter(torch.ones(2))]}]}, "have a parameter that is not the model's"),
        ({"groups": [{"params": list(model.parameters())}, {"params": [model.head.bias]}]}, "groups name a parameter twice"),
        ({"groups": [{"params": list(model.parameters()), "lr": -1.0}]}, r"lr=-1\.0 must not be negative"),
    ):
        with pytest.raises(ValueError, match=words):
            ZeroOptimizer(model, mesh, **options)
    for name, bad in (("lr", -1.0), ("betas", (1.0, 0.9)), ("eps", -1.0), ("weight_decay", -1.0)):
        with pytest.raises(ValueError, match=name[:4]):
            AdamW(**{name: bad})
    with pytest.raises(ValueError, match="the model has no parameter that requires a gradient"):
        ZeroOptimizer(nn.ReLU(), mesh)
    with pytest.raises(ValueError, match="weight is on meta and has no values"):
        ZeroOptimizer(nn.Linear(2, 2, device="meta"), mesh)
    ZeroOptimizer(model, mesh, precision="fp32")
    with pytest.raises(ValueError, match="already has a main_grad"):
        ZeroOptimizer(model, mesh, precision="fp32")


def test_cannot_be_copied_or_given_more():
    optimizer = wrapped(Plain(blocks=1), ParallelMesh.alone())
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="ZeroOptimizer cannot be copied or pickled"):
            copied(optimizer)
    with pytest.raises(ValueError, match="groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


# The update.


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


def results() -> None:
    mesh = ParallelMesh()
    alone = decoder(ParallelMesh.alone())
    for rank in range(mesh.dp.size):
        loss_sum(alone, micro_batch(rank, 0, 0)).backward()
    count = sum(5 + rank for rank in range(mesh.dp.size))
    norm = math.sqrt(sum(float((p.grad.double() / count).square().sum()) for p in alone.parameters()))
    optimizer = wrapped(decoder(mesh), mesh, max_norm=1e-3)
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
    for world in (1, 2, 3):
        ranks.run(world, results)


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


# Any layout.


def by_hand(optimizer: ZeroOptimizer, step: int) -> None:
    """Gradients that every layout sums to the same bits: drawn by logical name, and given by the first rank of dp alone."""
    with optimizer.accumulating():
        for name, param, spec in named_specs(optimizer.chunks):
            if optimizer.mesh.dp.rank:
                continue
            parts = []
            for piece in spec.pieces:
                generator = torch.Generator().manual_seed(seed_of(step, piece.name))
                parts.append(torch.randn(piece.shape, generator=generator)[piece.index])
            assert name
            gradients.add(param, torch.cat(parts))


def trained(optimizer: ZeroOptimizer, steps: range) -> ZeroOptimizer:
    for step in steps:
        by_hand(optimizer, step)
        optimizer.step(8 if optimizer.mesh.dp.rank == 0 else 0)
    return optimizer


PRECISIONS = {
    "fp32": Precision.of("fp32"),
    "bf16": Precision(),
    "remainder": Precision(master="remainder"),
    "bf16 moments": Precision(moments=torch.bfloat16),
    "alone": Precision(master=None),
}
Layout = tuple[int, int, int]
"""Ranks, tp, stage."""


def optimizer_of(layout: Layout, precision: str, seed: int | None) -> ZeroOptimizer:
    mesh = ParallelMesh(tp=layout[1])
    update = AdamW(lr=1e-2, betas=(0.8, 0.95), seed=seed)
    return wrapped(decoder(mesh), mesh, stage=layout[2], precision=PRECISIONS[precision], max_norm=None, update=update, bucket_bytes=3000)


def first_half(layout: Layout, precision: str, seed: int | None) -> tuple[dict[str, Any], Any]:
    """The state after 3 of 6 steps, and this rank's weights after 6 of them."""
    optimizer = trained(optimizer_of(layout, precision, seed), range(3))
    optimizer.param_groups[0]["lr"] = 7e-3
    state = optimizer.state_dict()
    return state, weights(trained(optimizer, range(3, 6)))


def second_half(layout: Layout, precision: str, seed: int | None, states: list[dict[str, Any]]) -> tuple[dict[str, Any], Any]:
    """From the state of another layout, and not from the model's initial values; the state as it is found again, and weights after 6."""
    optimizer = optimizer_of(layout, precision, seed)
    trained(optimizer, range(90, 92))
    optimizer.load_state_dict(states)
    state = optimizer.state_dict()
    assert optimizer.param_groups[0]["lr"] == 7e-3
    return state, weights(trained(optimizer, range(3, 6)))


def whole(states: list[dict[str, Any]]) -> dict[tuple[str, str], Tensor]:
    """Logical tensors of all kinds put together from every rank's boxes, each element saved once."""
    found: dict[tuple[str, str], Tensor] = {}
    seen: dict[tuple[str, str], Tensor] = {}
    for state in states:
        for box in state["boxes"]:
            key = box["kind"], box["name"]
            full = found.setdefault(key, torch.full(box["shape"], math.nan))
            times = seen.setdefault(key, torch.zeros(box["shape"]))
            index = tuple(slice(a, a + n) for a, n in zip(box["start"], box["values"].shape, strict=True))
            full[index] = box["values"].float()
            times[index] += 1
    assert all(bool((times == 1).all()) for times in seen.values())
    return found


LAYOUTS: list[Layout] = [(1, 1, 0), (2, 1, 0), (2, 1, 1), (2, 1, 3), (4, 1, 2), (4, 1, 3), (2, 2, 1), (4, 2, 3), (4, 2, 0)]


def joined(told: list[tuple[Any, Any]]) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    """Weights of all ranks, by name and place."""
    values: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    for _, boxes in told:
        for key, value in boxes.items():
            assert key not in values or torch.equal(values[key], value), "copies agree"
            values[key] = value
    return values


def assembled(told: list[tuple[Any, Any]]) -> dict[str, Tensor]:
    parts: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}
    for (name, start), value in sorted(joined(told).items(), key=lambda item: item[0]):
        parts.setdefault(name, []).append((start, value))
    made = {}
    for name, boxes in parts.items():
        cut = next((d for d in range(boxes[0][1].dim()) if boxes[-1][0][d]), 0)
        made[name] = torch.cat([value for _, value in boxes], cut)
    return made


@pytest.mark.parametrize("precision", PRECISIONS)
def test_any_layout_goes_on(ranks, precision):
    """From the states of all ranks, to the last bit, in other dp, tp and stage: weights, moments, masters, steps and noise."""
    seed = 5 if precision in ("alone", "bf16 moments") else None
    origin: Layout = (2, 1, 1)
    told = ranks.run(2, first_half, origin, precision, seed)
    states, expected = [state for state, _ in told], assembled(told)
    saved = whole(states)
    for layout in LAYOUTS:
        again = ranks.run(layout[0], second_half, layout, precision, seed, states)
        found = whole([state for state, _ in again])
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[key], saved[key]) for key in saved), layout
        got = assembled(again)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected), layout
        assert all(state["progress"] == states[0]["progress"] for state, _ in again)


def other_masters(states: list[dict[str, Any]], precision: str) -> dict[str, Any]:
    optimizer = optimizer_of((2, 1, 2), precision, None)
    optimizer.load_state_dict(states)
    return optimizer.state_dict()


def test_masters_of_another_kind(ranks):
    """fp32 to a remainder and back, and to fp32 weights and back: no bit is lost."""
    told = ranks.run(2, first_half, (2, 1, 1), "bf16", None)
    states = [state for state, _ in told]
    for precision in ("remainder", "fp32"):
        between = ranks.run(2, other_masters, states, precision)
        back = ranks.run(2, other_masters, between, "bf16")
        found, saved = whole(back), whole(states)
        assert all(torch.equal(found[key], saved[key]) for key in saved), precision


def bad_states(name: str) -> None:
    mesh = ParallelMesh()
    optimizer = trained(wrapped(decoder(mesh), mesh, max_norm=None), range(2))
    states: list[Any] = [None] * 2
    torch.distributed.all_gather_object(states, optimizer.state_dict())
    before = weights(optimizer)
    if name == "one rank's":
        states = states[:1]
    elif name == "none":
        states = []
    elif name == "groups":
        states[0]["groups"] = states[0]["groups"][:1]
    elif name == "shape":
        for state in states:
            for box in state["boxes"]:
                box["shape"][0] += 1
    try:
        optimizer.load_state_dict(states)
    finally:
        assert same(weights(optimizer), before)
        trained(optimizer, range(2, 3))  # nothing is broken


@pytest.mark.parametrize(
    "name,words",
    [
        ("one rank's", "give the states of all ranks"),
        ("none", "other param_groups"),
        ("groups", "other param_groups"),
        ("shape", "has shape"),
    ],
)
def test_states_that_do_not_fit(ranks, name, words):
    for told in ranks.errors(2, bad_states, name):
        assert words in told


def test_seed_rounds(ranks):
    """The same weights from any layout, and others without the seed, or with another."""
    told = {layout: assembled(ranks.run(layout[0], first_half, layout, "alone", 5)) for layout in LAYOUTS}
    expected = told[LAYOUTS[0]]
    for layout, got in told.items():
        assert all(torch.equal(got[name], expected[name]) for name in expected), layout
    for seed in (None, 6):
        other = assembled(ranks.run(1, first_half, (1, 1, 0), "alone", seed))
        assert not all(torch.equal(other[name], expected[name]) for name in expected)


