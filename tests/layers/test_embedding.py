"""Vocabulary-parallel embedding against nn.Embedding; wrong ids are refused in one voice."""

import copy

import pytest
import torch
from torch import Tensor, nn

from megapar import ColumnParallelLinear, ParallelMesh, VocabParallelEmbedding
from megapar.collectives import copy_to, gather_last
from megapar.grads import MainGrads
from megapar.layers.embedding import _VocabEmbedding
from megapar.params import split
from tests.counting import counted
from tests.parity import boxes, logical

VOCAB = 11
IDS = {
    "1-D": torch.tensor([3, 0, 10, 3, 3, 7, 1]),
    "2-D": torch.tensor([[3, 0, 10], [10, 10, 5]]),
    "int32": torch.tensor([[3, 0, 10], [10, 10, 5]], dtype=torch.int32),
    "strided": torch.tensor([[3, 0, 10], [10, 10, 5]]).t(),
    "one id": torch.tensor(10),
    "empty": torch.empty(0, dtype=torch.int64),
}


def made(tp: int, **kwargs) -> tuple[VocabParallelEmbedding, nn.Embedding, ParallelMesh]:
    mesh = ParallelMesh(tp=tp)
    torch.manual_seed(3)
    layer = VocabParallelEmbedding(VOCAB, 4, tp=mesh.tp, **kwargs)
    torch.manual_seed(3)
    reference = nn.Embedding(VOCAB, 4)
    whole = boxes(layer, logical(reference, lambda p: p))
    assert all(torch.equal(value, whole[name]) for name, value in logical(layer, lambda p: p).items())
    return layer.double(), reference.double(), mesh


def same(tp: int, sequence_parallel: bool, main_grads: bool) -> None:
    """Values are looked up, so bit for bit; gradients add the same fp64 integers, in any order."""
    layer, reference, mesh = made(tp, sequence_parallel=sequence_parallel)
    main = MainGrads(layer.parameters(), torch.float64) if main_grads else None
    for name, ids in IDS.items():
        if sequence_parallel and ids.dim() == 0:
            continue
        y, expected = layer(ids), reference(ids)
        dy = torch.randint(-9, 9, expected.shape, generator=torch.Generator().manual_seed(0)).double()
        if sequence_parallel and tp > 1:
            c = -(-ids.shape[0] // tp)
            pad = torch.zeros(c * tp - ids.shape[0], *expected.shape[1:], dtype=torch.float64)
            mine = slice(mesh.tp.rank * c, (mesh.tp.rank + 1) * c)
            assert torch.equal(y, torch.cat([expected, pad])[mine]), name
            y.backward(torch.cat([dy, pad + 5])[mine])  # what padding rows receive must not count
        else:
            assert torch.equal(y, expected), name
            y.backward(dy)
        expected.backward(dy)
    if main is not None:
        main.finish()
    got = logical(layer, lambda p: p.main_grad if main_grads else p.grad)
    for name, value in boxes(layer, logical(reference, lambda p: p.grad)).items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_against_torch(ranks, tp):
    for sequence_parallel, main_grads in ((False, False), (True, False), (True, True)):
        ranks.run(tp, same, tp, sequence_parallel, main_grads)


def gradchecks() -> None:
    axis = ParallelMesh(tp=2).tp
    cut = split(5, 2)
    ids = torch.tensor([4, 1, 1])
    weight = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)

    def replicated(weight: Tensor) -> Tensor:
        return _VocabEmbedding.apply(ids, copy_to(weight, axis)[slice(*cut[axis.rank])], cut[axis.rank][0], axis, False).sin()

    def sharded(weight: Tensor) -> Tensor:
        y = _VocabEmbedding.apply(ids, copy_to(weight, axis)[slice(*cut[axis.rank])], cut[axis.rank][0], axis, True)
        return gather_last(y.t(), axis, [(0, 2), (2, 4)]).t()[:3].sin()

    for function in (replicated, sharded):
        assert torch.autograd.gradcheck(function, weight), function.__name__


def test_gradcheck(ranks):
    ranks.run(2, gradchecks)


def tied(sequence_parallel: bool) -> None:
    """One weight, two uses, one main_grad: the sum of both, as in one process."""
    mesh = ParallelMesh(tp=2)
    ids = torch.tensor([3, 0, 10, 3, 3, 7])

    def build(mesh: ParallelMesh, sequence_parallel: bool) -> nn.ModuleDict:
        torch.manual_seed(0)
        common = {"tp": mesh.tp, "sequence_parallel": sequence_parallel}
        embedding, head = VocabParallelEmbedding(VOCAB, 4, **common), ColumnParallelLinear(4, VOCAB, bias=False, **common)
        head.weight = embedding.weight
        return nn.ModuleDict({"embedding": embedding, "head": head}).double()

    alone, parallel = build(ParallelMesh.alone(), False), build(mesh, sequence_parallel)
    main = MainGrads(parallel.parameters(), torch.float64)
    for _ in range(2):
        parallel["head"](parallel["embedding"](ids).sin()).square().sum().backward()
        alone["head"](alone["embedding"](ids).sin()).square().sum().backward()
    main.finish()
    got = logical(parallel, lambda p: p.main_grad)
    for name, value in boxes(parallel, logical(alone, lambda p: p.grad)).items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)


def test_tied(ranks):
    for sequence_parallel in (False, True):
        ranks.run(2, tied, sequence_parallel)


def look_up(ids_of_rank: list[Tensor]) -> None:
    layer, _, mesh = made(2)
    layer(IDS["1-D"])
    layer(ids_of_rank[mesh.tp.rank])


GOOD = torch.tensor([1, 2])
WRONG = {
    "token ids contain -1 and must lie in [0, 11)": [torch.tensor([1, -1])] * 2,
    "token ids contain 11 and must lie in [0, 11)": [torch.tensor([1, 11])] * 2,
    "token ids have dtype torch.float32 and must be int64 or int32": [GOOD.float()] * 2,
    "token ids have dtype torch.bfloat16 and must be int64 or int32": [GOOD.bfloat16()] * 2,
    "token ids must be the same on all ranks of tp and differs": [GOOD, torch.tensor([2, 1])],
    "'shape': [2]": [GOOD, GOOD[None]],
    "'dtype': 'torch.int32'": [GOOD, GOOD.int()],
    "must be the same on all ranks of tp": [GOOD, torch.tensor([1, 11])],
    "differs (rank 0:": [GOOD.bfloat16(), GOOD],
}


def test_wrong_ids(ranks):
    """Also when they are wrong on one rank only: the other must not be left waiting."""
    for told, ids in WRONG.items():
        messages = ranks.errors(2, look_up, ids, timeout=10)
        assert told in messages[0], messages
        assert messages[0] == messages[1]


def test_wrong_ids_alone():
    for told, ids in list(WRONG.items())[:3]:
        with pytest.raises(ValueError) as error:
            VocabParallelEmbedding(VOCAB, 4)(ids[0])
        assert told in str(error.value)
    for sizes, told in (((VOCAB, 0), "embedding_dim=0"), ((0, 4), "num_embeddings=0")):
        with pytest.raises(ValueError, match=told):
            VocabParallelEmbedding(*sizes)


def wire() -> None:
    layer = made(2)[0]
    with counted() as calls:
        y = layer(GOOD)
    assert calls == {"all_gather": 1, "all_reduce": 1}, "one for the ids' digest, one for the rows"
    with counted() as calls:
        y.sum().backward()
    assert not calls
    single = VocabParallelEmbedding(VOCAB, 4, tp=ParallelMesh(tp=1).tp, sequence_parallel=True)
    with counted() as calls:
        single(GOOD).sum().backward()
        copy.deepcopy(layer)
    assert not calls


def test_collectives(ranks):
    ranks.run(2, wire)


def test_deterministic_rows_elsewhere():
    """A row that this rank does not hold is zeros, even where its own table holds nan."""
    weight = torch.full((2, 3), torch.nan)
    y = nn.functional.embedding(torch.tensor([0]), weight)
    assert y.isnan().all()
    mesh = ParallelMesh.alone()
    out = _VocabEmbedding.apply(torch.tensor([4]), weight, 0, mesh.tp, False)
    assert not out.any()
