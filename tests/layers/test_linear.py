"""Column- and row-parallel linear layers against nn.Linear: weights bit for bit, values and gradients to fp64's precision."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megapar import Axis, ColumnParallelLinear, ParallelMesh, RowParallelLinear, Shards, initialize
from megapar.collectives import copy_to, gather_last
from megapar.grads import MainGrads
from megapar.layers.linear_function import column_linear, row_linear
from megapar.params import split
from tests.counting import counted
from tests.parity import boxes, logical

IN, OUT = 7, 13  # nothing divides them


def exactly(got: Tensor | None, expected: Tensor, what: str) -> None:
    """fp64: sums of a few dozen terms, so 1e-12 is thousands of roundings."""
    assert got is not None, what
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)}, not {tuple(expected.shape)}"
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=lambda told: f"{what}: {told}")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(kind: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """From torch seed 3, in fp64."""
    torch.manual_seed(3)
    return kind(*args, **kwargs).double()


def same_weights(layer: nn.Module, reference: nn.Linear) -> None:
    for name, expected in boxes(layer, logical(reference, lambda p: p)).items():
        assert torch.equal(logical(layer, lambda p: p)[name], expected), name


def same_gradients(layer: nn.Module, reference: nn.Linear, what: str) -> None:
    got = logical(layer, lambda p: p.grad)
    for name, expected in boxes(layer, logical(reference, lambda p: p.grad)).items():
        exactly(got[name], expected, f"{what}: {name}")


FEATURES: dict[str, Any] = {
    "even": 24,
    "uneven": OUT,
    "parts": (OUT, 5, 4),
    "units": (Shards(12, 3), Shards(8, 2), 5),
}
INPUTS: dict[str, Any] = {
    "1-D": lambda width: normal(width),
    "2-D": lambda width: normal(5, width),
    "3-D": lambda width: normal(2, 3, width),
    "strided": lambda width: normal(3, width, 2).permute(2, 0, 1),
    "no rows": lambda width: normal(0, width),
}


def columns(tp: int, features: str, bias: bool, gather: bool) -> None:
    axis = ParallelMesh(tp=tp).tp
    layer = made(ColumnParallelLinear, IN, FEATURES[features], tp=axis, bias=bias, gather_output=gather)
    reference = made(nn.Linear, IN, layer.out_features, bias=bias)
    same_weights(layer, reference)
    chosen, offset = [], 0
    for part, cut in zip(layer.parts, layer.cuts, strict=True):
        chosen += range(offset + cut[axis.rank][0], offset + cut[axis.rank][1])
        offset += part.size
    for name, make in INPUTS.items():
        x, whole_x = make(IN).requires_grad_(), make(IN).requires_grad_()
        expected = reference(whole_x)
        y = layer(x)
        dy = normal(*expected.shape, seed=1)
        exactly(y, expected if gather else expected[..., chosen], f"y, {name}")
        y.backward(dy if gather else strided(dy[..., chosen]))
        expected.backward(dy)
        exactly(x.grad, whole_x.grad, f"dx, {name}")
        same_gradients(layer, reference, name)


def strided(x: Tensor) -> Tensor:
    """The same values, the last dimension far apart in memory."""
    return x.unsqueeze(-1).expand(*x.shape, 2).contiguous()[..., 0]


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_column(ranks, tp):
    for features in FEATURES:
        for bias, gather in ((True, False), (False, True), (True, True)):
            ranks.run(tp, columns, tp, features, bias, gather)


def rows(tp: int, bias: bool, unit: int, parallel: bool) -> None:
    axis = ParallelMesh(tp=tp).tp
    width = 13 * unit
    layer = made(RowParallelLinear, Shards(width, unit), 5, tp=axis, bias=bias, input_is_parallel=parallel)
    reference = made(nn.Linear, width, 5, bias=bias)
    same_weights(layer, reference)
    a, b = layer.cut[axis.rank]
    assert a % unit == b % unit == 0
    for name, make in INPUTS.items():
        whole_x = make(width).requires_grad_()
        x = (make(width)[..., a:b] if parallel else make(width)).requires_grad_()
        expected, y = reference(whole_x), layer(x)
        dy = normal(*expected.shape, seed=1)
        exactly(y, expected, f"y, {name}")
        y.backward(strided(dy))
        expected.backward(dy)
        exactly(x.grad, whole_x.grad[..., a:b] if parallel else whole_x.grad, f"dx, {name}")
        same_gradients(layer, reference, name)


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_row(ranks, tp):
    for bias, unit, parallel in ((True, 1, True), (False, 2, True), (True, 2, False)):
        ranks.run(tp, rows, tp, bias, unit, parallel)


def pair(tp: int, t: int, main_grads: bool) -> None:
    """Column then row under sequence parallelism; t tokens need not be a multiple of tp, the padding rows hold rubbish."""
    axis = ParallelMesh(tp=tp).tp
    torch.manual_seed(3)
    column = ColumnParallelLinear(IN, OUT, tp=axis, sequence_parallel=True).double()
    row = RowParallelLinear(OUT, 5, tp=axis, sequence_parallel=True).double()
    torch.manual_seed(3)
    first, second = nn.Linear(IN, OUT).double(), nn.Linear(OUT, 5).double()
    main = [MainGrads(layer.parameters(), torch.float64) for layer in (column, row) if main_grads]
    c = -(-t // tp)
    mine = slice(axis.rank * c, min(t, (axis.rank + 1) * c))
    padding = c - len(range(t)[mine])
    for seed in (0, 1):
        whole_x = normal(t, IN, seed=seed).requires_grad_()
        x = torch.cat([whole_x.detach()[mine], torch.full((padding, IN), 1e6, dtype=torch.float64)]).requires_grad_()
        y = row(column(x)[:t].relu())
        expected = second(first(whole_x).relu())
        exactly(y[: c - padding], expected[mine], "y")
        dy = normal(t, 5, seed=7)
        y[: c - padding].backward(dy[mine])
        expected.backward(dy)
        exactly(x.grad[: c - padding], whole_x.grad[mine], "dx")
        assert not x.grad[c - padding :].any(), "padding must get no gradient"
    for finished in main:
        finished.finish()
    for layer, reference in ((column, first), (row, second)):
        got = logical(layer, lambda p: p.main_grad if main_grads else p.grad)
        for name, value in boxes(layer, logical(reference, lambda p: p.grad)).items():
            exactly(got[name], value, str(name))


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_sequence_parallel(ranks, tp):
    for t, main_grads in ((12, False), (7, False), (7, True), (1, False)):
        ranks.run(tp, pair, tp, t, main_grads)


def wire(sequence_parallel: bool) -> tuple[Counter[str], Counter[str]]:
    mesh = ParallelMesh(tp=2)
    common = {"tp": mesh.tp, "sequence_parallel": sequence_parallel}
    column, row = ColumnParallelLinear(4, (6, 5), **common), RowParallelLinear(11, 4, **common)
    MainGrads([*column.parameters(), *row.parameters()])
    with counted() as forward:
        y = row(column(torch.ones(6, 4, requires_grad=True)))
    with counted() as backward:
        y.sum().backward()
    return forward, backward


def test_collectives_of_a_pair(ranks):
    """Megatron's count: f and g are one all-reduce each; under sequence parallelism the input is gathered again for its weight."""
    assert ranks.run(2, wire, False) == [({"all_reduce": 1}, {"all_reduce": 1})] * 2
    gather_and_scatter = {"all_gather": 1, "reduce_scatter": 1}
    assert ranks.run(2, wire, True) == [(gather_and_scatter, {"all_gather": 2, "reduce_scatter": 1})] * 2


def frozen_wire() -> None:
    mesh = ParallelMesh(tp=2)
    column, row = ColumnParallelLinear(4, 6, tp=mesh.tp, sequence_parallel=True), RowParallelLinear(6, 4, tp=mesh.tp)
    column.requires_grad_(False)
    row.requires_grad_(False)
    x = torch.ones(6, 4, requires_grad=True)
    y = row(column(x))
    with counted() as calls:
        y.sum().backward()
    assert calls == {"reduce_scatter": 1}, "a frozen weight needs no input"
    assert column.weight.grad is None and x.grad is not None
    column.weight.requires_grad_(True)
    y = row(column(x.detach()))
    with counted() as calls:
        y.sum().backward()
    assert calls == {"all_gather": 1}, "an input that needs no gradient sends none"
    assert column.weight.grad is not None and column.bias.grad is None


def test_frozen(ranks):
    ranks.run(2, frozen_wire)


def silence() -> None:
    alone = ParallelMesh(tp=1).tp  # whose dp ranks find each other
    with counted() as calls:
        for axis in (None, alone):
            common = {"tp": axis, "sequence_parallel": True}
            column, row = (
                ColumnParallelLinear(4, (6, 5), gather_output=True, **common),
                RowParallelLinear(11, 4, input_is_parallel=False, **common),
            )
            row(column(torch.ones(3, 4))).sum().backward()
            MainGrads([*column.parameters(), *row.parameters()])
            row(column(torch.ones(3, 4))).sum().backward()
    assert not calls, calls


def test_silent_alone(ranks):
    ranks.run(2, silence)


def gradchecks(sequence_parallel: bool) -> None:
    """Replicated functions of replicated inputs: weights pass copy_to and are cut inside, results are gathered."""
    axis = ParallelMesh(tp=2).tp
    c, rank = 2, axis.rank
    cut_out, cut_in = split(3, 2), split(5, 2)
    mine = slice(rank * c, (rank + 1) * c) if sequence_parallel else slice(None)

    def column(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        out = slice(*cut_out[rank])
        x = copy_to(x, axis)[mine] if sequence_parallel else x
        y = column_linear(x, copy_to(w, axis)[out], copy_to(b, axis)[out], axis, sequence_parallel)
        return gather_last(y, axis, cut_out)

    def row(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        part = slice(*cut_in[rank])
        b = copy_to(b, axis) if sequence_parallel else b
        y = row_linear(copy_to(x, axis)[:, part], copy_to(w, axis)[:, part], b, axis, sequence_parallel)
        return gather_last(y.t(), axis, [(0, c), (c, 2 * c)]).t()[: x.shape[0]] if sequence_parallel else y

    for function, t, outputs in ((column, 4, 3), (row, 3, 2)):
        inputs = [normal(*shape).requires_grad_() for shape in ((t, 5), (outputs, 5), (outputs,))]
        assert torch.autograd.gradcheck(function, inputs), function.__name__


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_gradcheck(ranks, sequence_parallel):
    ranks.run(2, gradchecks, sequence_parallel)


def three_micro_batches(tp: int, sequence_parallel: bool) -> None:
    mesh = ParallelMesh(tp=tp) if tp > 1 else ParallelMesh.alone()
    layers = nn.Sequential(
        ColumnParallelLinear(IN, OUT, tp=mesh.tp, sequence_parallel=sequence_parallel),
        RowParallelLinear(OUT, 5, tp=mesh.tp, sequence_parallel=sequence_parallel),
    ).double()
    main = MainGrads(layers.parameters(), torch.float64)
    x = normal(12, IN)[6 * mesh.tp.rank :][:6] if sequence_parallel else normal(12, IN)
    layers(x).sum().backward()
    main.finish()
    expected = [p.main_grad.clone() for p in main.params]
    main.zero()
    for micro_batch in x.chunk(3):
        layers(micro_batch).sum().backward()
    main.finish()
    for param, value in zip(main.params, expected, strict=True):
        exactly(param.main_grad, value, "main_grad")


def test_micro_batches_add_up(ranks):
    three_micro_batches(1, False)
    for sequence_parallel in (False, True):
        ranks.run(2, three_micro_batches, 2, sequence_parallel)


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def mixed_precision(tp: int, autocast: bool, main_grads: bool) -> None:
    """Within twice nn.Linear's own error, by Frobenius norm; bf16 weights with main_grad within a tenth of it."""
    mesh = ParallelMesh(tp=tp) if tp > 1 else ParallelMesh.alone()
    dtype = torch.float32 if autocast else torch.bfloat16
    layer = made(ColumnParallelLinear, 64, 48, tp=mesh.tp).to(dtype)
    reference = made(nn.Linear, 64, 48).to(dtype)
    exact = made(nn.Linear, 64, 48).to(dtype).double()
    main = MainGrads(layer.parameters()) if main_grads else None
    a, b = layer.cuts[0][mesh.tp.rank]
    for seed in range(4):
        x = normal(32, 64, seed=seed).bfloat16().to(dtype)
        dy = normal(32, 48, seed=9 + seed).bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, expected = layer(x), reference(x)
        assert y.dtype == expected.dtype == torch.bfloat16
        y.backward(dy[:, a:b])
        expected.backward(dy)
        exact(x.double()).backward(dy.double())
    if main is not None:
        main.finish()
    got = layer.weight.grad if main is None else layer.weight.main_grad
    assert got.dtype == (dtype if main is None else torch.float32)
    limit = 2.0 if main is None or autocast else 0.1
    whole = exact.weight.grad[a:b]
    assert relative(got, whole) <= limit * relative(reference.weight.grad[a:b], whole)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("main_grads", [False, True])
def test_mixed_precision(ranks, autocast, main_grads):
    mixed_precision(1, autocast, main_grads)
    ranks.run(2, mixed_precision, 2, autocast, main_grads)


def shared(tp: int) -> None:
    """Intervals that ranks share: their gradient arrives summed on each sharer, one of which owns it."""
    axis = ParallelMesh(tp=tp).tp
    parts = Shards(6, 3, intervals=((0, 3), (0, 3), (3, 6))), Shards(2, 1, intervals=((0, 1), (0, 1), (1, 2)))
    layer = made(ColumnParallelLinear, IN, parts, tp=axis)
    reference = made(nn.Linear, IN, 8)
    same_weights(layer, reference)
    assert [layer.weight.spec.owner, layer.weight.spec.grad_sum is not None] == [[True, True], [False, True], [True, False]][axis.rank]
    x, whole_x = normal(4, IN), normal(4, IN)
    dy = normal(4, 8)
    chosen = [0, 1, 2, 6] if axis.rank < 2 else [3, 4, 5, 7]
    # Ranks 0 and 1 use half of their features' gradient each.
    layer(x).backward(dy[:, chosen] * (1 if axis.rank == 2 else 0.25 + 0.5 * axis.rank))
    reference(whole_x).backward(dy)
    same_gradients(layer, reference, "shared")


def test_shared_features(ranks):
    ranks.run(3, shared, 3)


def test_initialize_names():
    """Named parts draw under their own names: the layer and three layers apart start alike."""
    fused = ColumnParallelLinear(IN, (Shards(4, name="q"), Shards(2, name="k")), tp=Axis.layout("tp", 1, 2))
    apart = nn.ModuleDict({"q": ColumnParallelLinear(IN, 4), "k": ColumnParallelLinear(IN, 2)})
    model = nn.ModuleDict({"fused": fused})
    initialize(model, 7)
    initialize(apart, 7)
    assert torch.equal(fused.weight, torch.cat([apart["q"].weight[2:], apart["k"].weight[1:]]))
    assert torch.equal(fused.bias, torch.cat([apart["q"].bias[2:], apart["k"].bias[1:]]))


@pytest.mark.parametrize(
    "make,told",
    [
        (lambda tp: ColumnParallelLinear(4, 1, tp=tp), "out_features=1 has 1 units of 1 and cannot be split over 2 ranks"),
        (lambda tp: ColumnParallelLinear(4, Shards(6, 4), tp=tp), "out_features=6 must be a positive multiple of its unit 4"),
        (lambda tp: ColumnParallelLinear(0, 4, tp=tp), "in_features=0 must be 1 or more"),
        (lambda tp: RowParallelLinear(4, 0, tp=tp), "out_features=0 must be 1 or more"),
        (lambda tp: RowParallelLinear(1, 4, tp=tp), "in_features=1 has 1 units"),
        (lambda tp: ColumnParallelLinear(4, Shards(4, intervals=((0, 2),)), tp=tp), "must be 2, one a rank"),
        (lambda tp: ColumnParallelLinear(4, Shards(4, intervals=((0, 2), (1, 4))), tp=tp), "tile \\[0, 4\\)"),
        (lambda tp: RowParallelLinear(Shards(4, intervals=((0, 4), (0, 4))), 4, tp=tp), "shared inputs would be summed twice"),
        (lambda tp: ColumnParallelLinear(4, Shards(4, intervals=((0, 2), (2, 5))), tp=tp), "tile \\[0, 4\\)"),
        (lambda tp: ColumnParallelLinear(4, Shards(4, intervals=((0, 4), (0, 4))), tp=tp, gather_output=True), "gather_output=True cannot"),
        (
            lambda tp: ColumnParallelLinear(4, (Shards(4, intervals=((0, 4), (0, 4))), 4), tp=tp),
            "the parts of one layer must be shared by the same ranks",
        ),
        (lambda tp: ColumnParallelLinear(4, 6, tp=tp)(torch.ones(2, 5)), r"shape \(2, 5\) and the layer expects a last dimension of 4"),
        (lambda tp: ColumnParallelLinear(4, 6, tp=tp)(torch.tensor(1.0)), r"shape \(\)"),
        (lambda tp: RowParallelLinear(4, 6, tp=tp)(torch.ones(2, 4)), "expects a last dimension of 2"),
        (lambda tp: RowParallelLinear(4, 6, tp=tp, input_is_parallel=False)(torch.ones(2, 2)), "expects a last dimension of 4"),
        (lambda tp: RowParallelLinear(4, 6, tp=tp, sequence_parallel=True)(torch.ones(2)), r"an input of shape \(2,\) has none"),
        (lambda tp: ColumnParallelLinear(4, 6, tp=tp)(torch.ones(4).double()), "the input is torch.float64 and the weight torch.float32"),
    ],
)
def test_refusals(make, told):
    with pytest.raises(ValueError, match=told):
        make(Axis.layout("tp", 0, 2))
