"""States that any layout loads, to the last bit."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megapar import ParallelMesh
from megapar import grads as gradients
from megapar.optim.precision import Precision
from megapar.params import named_specs, seed_of
from megapar.zero import state as zero_state
from megapar.zero.optimizer import ZeroOptimizer
from megapar.zero.setup import AdamW
from tests.zero.common import decoder, same, weights, wrapped


def by_hand(optimizer: ZeroOptimizer, step: int) -> None:
    """Gradients that every layout sums to the same bits: drawn by logical name, and given by the first rank of dp alone."""
    with optimizer.accumulating():
        for _, param, spec in named_specs(optimizer.chunks):
            if optimizer.mesh.dp.rank:
                continue
            parts = []
            for piece in spec.pieces:
                generator = torch.Generator().manual_seed(seed_of(step, piece.name))
                parts.append(torch.randn(piece.shape, generator=generator)[piece.index])
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
        ("none", "is not what state_dict of a ZeroOptimizer returned"),
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


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_part_of_a_box_is_written_and_the_rest_stays(precision, monkeypatch):
    """From a strided value of another dtype; masters are joined and split in several goes, and boxes cut."""
    monkeypatch.setattr(zero_state, "PART", 40)
    monkeypatch.setattr(zero_state, "AT_ONCE", 7)
    generator = torch.Generator().manual_seed(0)
    optimizer = optimizer_of((1, 1, 0), precision, None)
    found = list(optimizer.boxes())
    assert max(box.piece.numel for box in found) <= 40
    assert len({(box.kind, box.piece.name) for box in found}) < len(found)
    for box in found:
        before = box.read().clone()
        assert before.dtype == box.dtype
        assert box.bytes == before.nbytes
        at = tuple(slice(size // 3, size // 3 + -(-size // 2)) for size in box.piece.box)
        value = torch.randn(before[at].T.shape if before.dim() == 2 else before[at].shape, generator=generator, dtype=torch.float64)
        value = value.T if before.dim() == 2 else value
        box.write(value, at)
        before[at] = value.to(torch.float32).to(box.dtype)
        assert torch.equal(box.read(), before), (box.kind, box.piece)
