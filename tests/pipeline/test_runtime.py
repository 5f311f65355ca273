"""The runtime on gloo ranks: losses and raw gradients of plain modules against one process, for every schedule."""

import pytest
import torch
from torch import nn

from megapar import ParallelMesh
from megapar.pipeline.kinds import make_schedule
from megapar.pipeline.runtime import PipelineRunner

WIDTH = 6


def layers(count: int) -> list[nn.Module]:
    torch.manual_seed(7)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(count)]


def data(microbatches: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2 + m % 3, WIDTH, generator=generator) for _ in range(2)) for m in range(microbatches)]  # type: ignore[misc]


def loss_fn(output: torch.Tensor, micro_batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, int]:
    return (output - micro_batch[1]).square().sum(), output.numel()


def train_plain(kind: str, pp: int, chunks: int, microbatches: int) -> None:
    mesh = ParallelMesh(pp=pp)
    whole, alone = layers(pp * chunks), layers(pp * chunks)
    mine = whole[mesh.pp.rank :: pp]
    runner = PipelineRunner(mine, mesh, make_schedule(kind, pp, chunks, microbatches), inputs=lambda micro_batch: micro_batch[0])
    for seed in range(2):  # the second step adds to the first
        totals = runner.step(data(microbatches, seed), loss_fn)
        loss = torch.zeros(())
        for x, y in data(microbatches, seed):
            part, _ = loss_fn(nn.Sequential(*alone)(x), (x, y))
            part.backward()
            loss += part.detach()
        if runner.is_last:
            assert abs(float(totals.loss - loss)) <= 1e-5 * float(loss)
            assert totals.count == sum(x.numel() for x, _ in data(microbatches, seed))
        else:
            assert float(totals.loss) == 0 and totals.count == 0
    for ours, theirs in zip(mine, alone[mesh.pp.rank :: pp], strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("kind,chunks", [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("gpipe", 2), ("interleaved_1f1b", 3)])
def test_plain_modules(ranks, kind, chunks, pp):
    for m in (1, 2, 3, 5, 8):
        ranks.run(pp, train_plain, kind, pp, chunks, m)


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("boom")


def one_stage_raises(pp: int, rank: int) -> None:
    mesh = ParallelMesh(pp=pp)
    chunk = Broken() if mesh.pp.rank == rank else layers(1)[0]
    PipelineRunner([chunk], mesh, make_schedule("1f1b", pp, 1, 4), inputs=lambda micro_batch: micro_batch[0]).step(data(4), loss_fn)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_stage_raises(ranks, rank):
    """Every rank ends at once with the error of the one that failed."""
    errors = ranks.errors(4, one_stage_raises, 4, rank, timeout=10)
    assert errors[rank] == "'boom'"
    assert {error for i, error in enumerate(errors) if i != rank} == {f"rank {rank} failed in {rank}F0: KeyError: 'boom'"}
