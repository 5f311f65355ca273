"""The runtime on gloo ranks: losses and raw gradients of plain modules against one process, for every schedule."""

import time

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


def several_chunks(kind: str, chunks: int) -> None:
    """Forwards of rank 0 are slow, backwards of rank 1: both directions have messages under way."""
    mesh = ParallelMesh(pp=2)
    whole, alone = layers(2 * chunks), layers(2 * chunks)
    mine = whole[mesh.pp.rank :: 2]
    if mesh.pp.rank == 0:
        for chunk in mine:
            chunk.register_forward_hook(lambda *_: time.sleep(0.002))
    else:
        for chunk in mine:
            chunk.register_full_backward_hook(lambda *_: time.sleep(0.002))
    m = 5
    batches = [tuple(part[:1] for part in batch) for batch in data(m)]
    runner = PipelineRunner(mine, mesh, make_schedule(kind, 2, chunks, m), inputs=lambda micro_batch: micro_batch[0])
    for _ in range(3):  # from the second one on, shapes are known and receives posted ahead
        totals = runner.step(batches, loss_fn)
        losses = [loss_fn(nn.Sequential(*alone)(x), (x, y))[0] for x, y in batches]
        sum(losses).backward()
    if runner.is_last:
        torch.testing.assert_close(totals.loss, sum(losses).detach(), rtol=1e-6, atol=0)
    for ours, theirs in zip(mine, alone[mesh.pp.rank :: 2], strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("kind", ["gpipe", "interleaved_1f1b"])
def test_two_ranks_several_chunks(ranks, kind, chunks):
    """The next rank is also the previous one, and activations and gradients have one shape: swapped, nothing but numbers would tell."""
    ranks.run(2, several_chunks, kind, chunks)


class Parts(nn.Module):
    """Hands on (hidden, how many times, a factor that needs no gradient); the first one takes tokens."""

    def __init__(self, place: int, last: bool) -> None:
        super().__init__()
        torch.manual_seed(place)
        self.first, self.last = place == 0, last
        self.linear = nn.Embedding(11, WIDTH) if self.first else nn.Linear(WIDTH, WIDTH)

    def forward(self, value):
        if self.first:
            return self.linear(value).tanh(), torch.tensor([1, 2]), torch.full((1,), 0.5)
        x, times, factor = value
        assert times.dtype == torch.int64 and times.tolist() == [1, 2] and not times.requires_grad
        x = self.linear(x).tanh() * factor.detach() * times.sum()
        # A transposed view is sent as it looks, and nothing comes back for a part that the next stage does not use.
        return x if self.last else (x.t().contiguous().t(), times, factor)


def tuples(pp: int, chunks: int, m: int, frozen: int | None) -> None:
    mesh, stages = ParallelMesh(pp=pp), pp * chunks
    whole, alone = ([Parts(place, place == stages - 1) for place in range(stages)] for _ in range(2))
    for model in (whole, alone):
        if frozen is not None:
            model[frozen].requires_grad_(False)
    mine = whole[mesh.pp.rank :: pp]
    batches = [torch.arange(m_ % 2 + 2) + m_ for m_ in range(m)]
    runner = PipelineRunner(mine, mesh, make_schedule("gpipe", pp, chunks, m), inputs=lambda tokens: tokens)

    def loss(output: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return output.square().sum(), torch.tensor(output.numel())

    totals = runner.step(batches, loss, loss_scale=8.0)
    expected, outputs = 0.0, []
    for tokens in batches:
        value = tokens
        for module in alone:
            value = module(value)
        outputs.append(value.detach())
        (8.0 * value.square().sum()).backward()
        expected += float(value.detach().square().sum())
    for ours, theirs in zip(mine, alone[mesh.pp.rank :: pp], strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None) == (not a.requires_grad)
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
    before = [p.grad.clone() for chunk in mine for p in chunk.parameters() if p.grad is not None]
    for count in (1, m, m + 3):
        evaluated = runner.evaluate((batches * 4)[:count], loss)
        if runner.is_last and count == m:
            assert torch.equal(evaluated.loss, totals.loss) and int(evaluated.count) == int(totals.count)
            assert abs(float(totals.loss) - expected) <= 1e-5 * expected
    found = runner.forward(batches[1])
    assert (found is None) == (not runner.is_last)
    if found is not None:
        torch.testing.assert_close(found, outputs[1], rtol=1e-6, atol=1e-6)
        assert not found.requires_grad
    after = [p.grad for chunk in mine for p in chunk.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "evaluation leaves gradients alone"


@pytest.mark.parametrize("frozen", [None, 0, 1, 3])
@pytest.mark.parametrize("pp,chunks", [(2, 2), (4, 1), (1, 4)])
def test_tuples_tokens_and_frozen_chunks(ranks, pp, chunks, frozen):
    ranks.run(pp, tuples, pp, chunks, 2, frozen)


def empty_and_scalar() -> None:
    """Tensors without elements and without dimensions cross too."""
    mesh = ParallelMesh(pp=2)
    chunk = nn.Linear(WIDTH, WIDTH)
    chunk.forward = lambda x: (x * chunk.weight[0], x.sum()) if mesh.pp.rank == 0 else x[0].sum() + x[1] * chunk.bias[0]
    runner = PipelineRunner([chunk], mesh, make_schedule("1f1b", 2, 1, 3), inputs=lambda x: x)
    totals = runner.step([torch.ones(n, WIDTH) for n in (2, 0, 1)], lambda y, x: (y, x.shape[0]))
    assert totals.count == (3 if runner.is_last else 0)
    grad = chunk.weight.grad[0] if mesh.pp.rank == 0 else chunk.bias.grad[:1]
    assert torch.equal(grad, torch.full_like(grad, 3.0 if mesh.pp.rank == 0 else 3.0 * WIDTH))


def test_empty_and_scalar_tensors(ranks):
    ranks.run(2, empty_and_scalar)


def measured(kind: str, pp: int, chunks: int, m: int) -> None:
    mesh = ParallelMesh(pp=pp)
    schedule = make_schedule(kind, pp, chunks, m)
    mine = layers(pp * chunks)[mesh.pp.rank :: pp]
    for chunk in mine:
        chunk.register_forward_hook(lambda *_: time.sleep(0.005))
    runner = PipelineRunner(mine, mesh, schedule, inputs=lambda micro_batch: micro_batch[0])
    runner.step(data(m), loss_fn)
    runner.evaluate(data(m), loss_fn)  # leaves the step's times alone
    timeline = runner.timeline()
    for spans, actions in zip(timeline.ranks, schedule.ranks, strict=True):
        assert [span.action for span in spans] == list(actions)
        moments = [moment for span in spans for moment in (span.start, span.end)]
        assert moments == sorted(moments) and moments[0] >= 0
        assert all(span.end > span.start for span in spans)
        assert all(span.end - span.start >= 0.005 for span in spans if span.action.kind == "F")


@pytest.mark.parametrize("kind,chunks", [("gpipe", 1), ("interleaved_1f1b", 2)])
def test_timeline(ranks, kind, chunks):
    """Every computing action, in order, one after another."""
    ranks.run(2, measured, kind, 2, chunks, 3)
