"""Vocabulary-parallel cross-entropy is F.cross_entropy, for every tp."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megapar import ParallelMesh, vocab_parallel_cross_entropy
from megapar.collectives import copy_to
from megapar.params import split
from tests.counting import counted

VOCAB, T = 13, 6
TARGET = torch.tensor([0, 12, 5, -100, 7, 6])


def mine(tp: int) -> tuple[ParallelMesh, slice]:
    mesh = ParallelMesh(tp=tp) if tp > 1 else ParallelMesh.alone()
    return mesh, slice(*split(VOCAB, tp)[mesh.tp.rank])


def reference(z: Tensor, target: Tensor, label_smoothing: float, ignore_index: int, z_loss: float) -> Tensor:
    loss = F.cross_entropy(z.flatten(0, -2), target.flatten(), reduction="none", label_smoothing=label_smoothing, ignore_index=ignore_index)
    kept = target.flatten() != ignore_index
    return (loss + z_loss * z.flatten(0, -2).logsumexp(-1).square() * kept).view(target.shape)


def compare(tp: int, dtype: torch.dtype, z: Tensor, target: Tensor, smoothing: float, ignore: int, z_loss: float, sized: bool) -> None:
    """Loss and gradient against fp64 of the same logits. In fp32 exp, sum and log each round a few times at the logits' magnitude; a
    gradient in 16 bits is rounded once more."""
    mesh, part = mine(tp)
    z = z.to(dtype)
    exact_z = z.double().clone().requires_grad_()
    local = z[..., part].clone().requires_grad_()
    kept, version = local.detach().clone(), local._version
    options = {"label_smoothing": smoothing, "ignore_index": ignore, "z_loss": z_loss, "vocab_size": VOCAB if sized else None}
    loss = vocab_parallel_cross_entropy(local, target, tp=mesh.tp, **options)
    exact = reference(exact_z, target, smoothing, ignore, z_loss)
    assert loss.shape == target.shape and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    unit = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    size = float(exact.detach().nan_to_num(posinf=0).abs().max()) + float(z.double().nan_to_num(neginf=0).abs().max()) + 1
    close(loss.detach(), exact.detach(), 16 * unit * size)
    dloss = torch.randn(target.shape, generator=torch.Generator().manual_seed(5))
    loss.backward(dloss.to(loss.dtype))
    exact.backward(dloss.double())
    assert local.grad.dtype == dtype
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(dtype, 0.0)
    slope = float(exact_z.grad.abs().max())
    close(local.grad, exact_z.grad[..., part], slope * (rounding + 16 * unit * size) + 16 * unit)
    assert torch.equal(local.detach(), kept) and local._version == version, "the logits were modified"


def close(got: Tensor, exact: Tensor, bound: float) -> None:
    finite = exact.isfinite()
    assert torch.equal(got.double()[~finite], exact[~finite])
    error = float((got.double() - exact)[finite].abs().max()) if finite.any() else 0.0
    assert error <= bound, f"error {error:.2e} above {bound:.2e}"


def cases(tp: int) -> None:
    z = 3 * torch.randn(T, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for smoothing in (0.0, 0.1):
            for z_loss, sized in ((0.0, True), (0.01, False)):
                compare(tp, dtype, z, TARGET, smoothing, -100, z_loss, sized)
    compare(tp, torch.float32, z, torch.full((T,), -100), 0.1, -100, 0.01, True)
    compare(tp, torch.float32, z, TARGET.clamp(min=0), 0.1, 5, 0.01, True)  # an ignored id within the vocabulary
    compare(tp, torch.float32, z.view(2, 3, VOCAB), TARGET.view(2, 3), 0.1, -100, 0.0, True)
    compare(tp, torch.float32, z.view(2, 3, VOCAB).transpose(0, 1), TARGET.view(2, 3).t(), 0.0, -100, 0.0, True)


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_against_torch(ranks, tp):
    ranks.run(tp, cases, tp)


def extremes(tp: int) -> None:
    z = torch.randn(T, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.tensor([0, 12, 5, 3, 7, 6])
    for value in (1e4, -1e4):
        for rows in (slice(0, 1), slice(None)):
            for columns in (slice(0, 1), slice(4, 9), slice(None)):
                large = z.clone()
                large[rows, columns] = value
                compare(tp, torch.float32, large, target, 0.0, -100, 0.0, True)
                compare(tp, torch.float32, large, target, 0.1, -100, 0.0, True)
    masked = z.clone()
    masked[:, :7] = -torch.inf  # everything that the first ranks hold
    compare(tp, torch.float32, masked, target.clamp(min=7), 0.0, -100, 0.0, True)
    compare(tp, torch.float32, masked, target, 0.0, -100, 0.0, True)  # an impossible target: its loss is inf


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_extreme_logits(ranks, tp):
    ranks.run(tp, extremes, tp)


def wire(sized: bool) -> None:
    mesh, part = mine(2)
    alone = ParallelMesh(tp=1).tp
    z = torch.zeros(T, VOCAB)[:, part].requires_grad_()
    with counted() as forward:
        loss = vocab_parallel_cross_entropy(z, TARGET, tp=mesh.tp, vocab_size=VOCAB if sized else None, label_smoothing=0.1, z_loss=0.1)
    assert forward == {"all_gather": 1 if sized else 2}
    with counted() as backward:
        loss.sum().backward()
        vocab_parallel_cross_entropy(torch.zeros(T, VOCAB), TARGET, tp=alone)
    assert not backward


def test_collectives(ranks):
    ranks.run(2, wire, True)
    ranks.run(2, wire, False)


def gradchecks(tp: int) -> None:
    mesh, part = mine(tp)
    z = torch.randn(T, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    for smoothing, z_loss in ((0.0, 0.0), (0.3, 0.1)):

        def loss(z: Tensor, smoothing: float = smoothing, z_loss: float = z_loss) -> Tensor:
            local = copy_to(z, mesh.tp)[:, part]
            return vocab_parallel_cross_entropy(local, TARGET, tp=mesh.tp, label_smoothing=smoothing, z_loss=z_loss, vocab_size=VOCAB)

        assert torch.autograd.gradcheck(loss, z)


def test_gradcheck(ranks):
    gradchecks(1)
    ranks.run(2, gradchecks, 2)


def refused(options: dict, target: Tensor) -> None:
    mesh, part = mine(2)
    vocab_parallel_cross_entropy(torch.zeros(T, VOCAB)[:, part], target, tp=mesh.tp, **options)


@pytest.mark.parametrize(
    "options,target,told",
    [
        ({}, TARGET[:5], r"target has shape (5,) and logits (6, 7)"),
        ({}, torch.tensor([0, 1, 2, 3, 4, 13]), "targets contain 13 and must lie in [0, 13)"),
        ({}, torch.tensor([0, 1, 2, 3, 4, -1]), "targets contain -1 and must lie in [0, 13)"),
        ({"vocab_size": VOCAB, "ignore_index": -1}, TARGET, "targets contain -100"),
        ({}, TARGET.clamp(min=0).float(), "targets have dtype torch.float32"),
        ({"label_smoothing": -0.1}, TARGET, "label_smoothing=-0.1 must lie in [0, 1]"),
        ({"label_smoothing": 1.1}, TARGET, "label_smoothing=1.1 must lie in [0, 1]"),
        ({"z_loss": -1.0}, TARGET, "z_loss=-1.0 must be 0 or more"),
        ({"vocab_size": 20}, TARGET, "logits are 7 wide, rank 0 of vocab_size=20 has 10"),
    ],
)
def test_refusals(ranks, options, target, told):
    messages = ranks.errors(2, refused, options, target, timeout=10)
    assert told in messages[0]


def test_no_rows():
    z = torch.zeros(0, VOCAB, requires_grad=True)
    loss = vocab_parallel_cross_entropy(z, torch.empty(0, dtype=torch.int64), tp=None)
    loss.sum().backward()
    assert loss.shape == (0,) and z.grad.shape == (0, VOCAB)
