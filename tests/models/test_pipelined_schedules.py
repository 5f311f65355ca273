"""A run whose number of micro-batches changes: the same bits as one that knows of no numbers, under every ZeRO stage; what is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megapar import ParallelMesh
from megapar.batch import TokenBatch
from megapar.models.config import DecoderConfig
from megapar.models.pipelined import PipelinedDecoder
from megapar.objectives.sample import IGNORED
from megapar.pipeline import runtime
from megapar.pipeline.kinds import make_schedule
from megapar.pipeline.schedule import Schedule
from megapar.training.step import TrainStep
from megapar.zero.buckets import GradBuckets
from megapar.zero.optimizer import ZeroOptimizer
from megapar.zero.setup import AdamW
from tests.parity import logical

VOCAB = 37
TIED = DecoderConfig(hidden_size=16, layers=4, heads=4, kv_heads=2, ffn_size=24, init_std=0.1, tied_embeddings=True)
STEPS = ((2,), (5,), (5,), (1,), (3, 2), (2,), (4,))
"""The micro-batches of each accumulation of each step: more, fewer, and two numbers in one step."""
WAYS: list[dict[str, Any]] = [
    *({"stage": stage} for stage in range(4)),
    {"stage": 3, "reshard_every": "step"},
    {"stage": 2, "gather_ahead": True},
]
EACH: list[dict[str, Any]] = [
    {"stage": 2, "reduce_every": "micro_batch"},
    {"stage": 3, "reduce_every": "micro_batch"},
    {"stage": 3, "reduce_every": "micro_batch", "reshard_every": "step"},
]


def batches(replica: int, step: int, count: int) -> list[TokenBatch]:
    """A replica's micro-batches of a step: lengths differ, and some targets do not count."""
    generator, made = torch.Generator().manual_seed(1000 * step + replica), []
    for m in range(count):
        tokens = torch.randint(0, VOCAB, (2, 5 + (m + 2 * replica) % 4), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[0, : 1 + (m + replica) % 3] = IGNORED
        made.append(TokenBatch.of(tokens[:, :-1], targets))
    return made


def trainer(mesh: ParallelMesh, schedule: Schedule, **options: Any) -> TrainStep:
    """Buckets so small that several are reduced while backward goes on."""
    options = {"update": AdamW(lr=1e-2), "precision": "fp32", "bucket_bytes": 4000, **options}
    made = {"schedule": schedule, "seed": 3, "optimize": lambda stages: ZeroOptimizer(stages, mesh, **options)}
    return TrainStep(PipelinedDecoder(TIED, VOCAB, mesh, **made), mesh)


def read(train: TrainStep, norms: list[float]) -> dict[str, np.ndarray]:
    """This rank's whole weights, its part of the moments, and the gradient norm of every step."""
    with train.optimizer.unshard():
        found = {f"{name} {start}": w.numpy() for (name, start), w in logical(train.model.stages, lambda p: p).items()}
    return found | {"norms": np.array(norms)}


def changing(mesh: ParallelMesh, kinds: list[str | None], chunks: int, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """STEPS by schedules of one model after another, of the kinds in turn."""
    numbers = [count for step in STEPS for count in step]
    schedules = iter([make_schedule(kinds[i % len(kinds)], mesh.pp.size, chunks, count) for i, count in enumerate(numbers)])
    train, norms = trainer(mesh, make_schedule(kinds[0], mesh.pp.size, chunks, 7), **options), []
    for step, counts in enumerate(STEPS):
        data = batches(mesh.dp.rank, step, sum(counts))
        for index, count in enumerate(counts):
            train.model.set_schedule(next(schedules))
            train.accumulate([data.pop(0) for _ in range(count)], last=index == len(counts) - 1)
        norms.append(train.update(0.01).grad_norm)
    return read(train, norms)


def one_by_one(mesh: ParallelMesh, chunks: int, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The same micro-batches, each an accumulation of its own: the schedule never changes, and nothing is expected of a step before."""
    train, norms = trainer(mesh, make_schedule("gpipe", mesh.pp.size, chunks, 1), overlap=False, **options), []
    for step, counts in enumerate(STEPS):
        data = batches(mesh.dp.rank, step, sum(counts))
        for index, batch in enumerate(data):
            train.accumulate([batch], last=index == len(data) - 1)
        norms.append(train.update(0.01).grad_norm)
    return read(train, norms)


def same_bits(pp: int, chunks: int, kinds: list[str | None], ways: list[dict[str, Any]]) -> None:
    mesh = ParallelMesh(pp=pp)
    expected = one_by_one(mesh, chunks, {**ways[0], "stage": 2})
    for way in ways:
        found = changing(mesh, kinds, chunks, way)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert np.array_equal(value, expected[name]), (way, name)


@pytest.mark.parametrize("ways", [WAYS, EACH], ids=["reduced once", "reduced each"])
@pytest.mark.parametrize(
    ("pp", "chunks", "kinds"),
    [
        (1, 1, ["1f1b"]),
        (2, 1, ["1f1b", "zero_bubble"]),
        (2, 2, ["interleaved_1f1b", "gpipe", "zero_bubble"]),
    ],
)
def test_a_changing_number_changes_no_bit(ranks, pp, chunks, kinds, ways):
    """Two replicas: the number of writes that a bucket waits for follows the number of micro-batches, of this step and not the last."""
    ranks.run(2 * pp, same_bits, pp, chunks, kinds, ways, timeout=120)


@contextmanager
def starts() -> Iterator[list[bool]]:
    """Of every bucket whose reduction starts: whether its last write started it, rather than the end of the window."""
    found: list[bool] = []
    ending: list[bool] = []
    start, end = GradBuckets._start, GradBuckets.end_window

    def noted(grads: GradBuckets, bucket: Any) -> None:
        found.append(not ending)
        start(grads, bucket)

    def ended(grads: GradBuckets, chunk: int | None = None) -> None:
        ending.append(True)
        end(grads, chunk)
        ending.pop()

    with mock.patch.object(GradBuckets, "_start", noted), mock.patch.object(GradBuckets, "end_window", ended):
        yield found


def overlapped() -> None:
    mesh = ParallelMesh(pp=2)
    train = trainer(mesh, make_schedule(None, 2, 2, 3), stage=1)
    buckets = len(train.optimizer.layout.buckets)
    assert buckets > 2
    with starts() as found:
        for step, count in enumerate((3, 5, 2)):
            train.model.set_schedule(make_schedule(None, 2, 2, count))
            train.accumulate(batches(mesh.dp.rank, step, count))
            train.update(0.01)
    assert found == [False] * buckets + [True] * 2 * buckets


def test_reductions_overlap_as_before(ranks):
    """What is learned is how often a parameter is used in a micro-batch, which a step with another number of them does not unlearn."""
    ranks.run(4, overlapped)


def proofs() -> None:
    mesh = ParallelMesh(pp=2)
    train = trainer(mesh, make_schedule(None, 2, 1, 2), stage=1)
    with mock.patch.object(runtime, "prepared", wraps=runtime.prepared) as prepared:
        for count in (4, 2, 4, 2, 4):
            train.model.set_schedule(make_schedule(None, 2, 1, count))
            assert train.model.runner.schedule.microbatches == count
    assert prepared.call_count == 1, "the schedule of 2 was proven by the constructor, that of 4 once"


def test_a_schedule_is_proven_once(ranks):
    ranks.run(2, proofs)


def without_optimizer() -> tuple[float, float]:
    """The losses of 2 and of 4 micro-batches, evaluated and trained on."""
    mesh = ParallelMesh.alone()
    model, data = PipelinedDecoder(TIED, VOCAB, mesh, schedule=make_schedule(None, 1, 1, 2), seed=3), batches(0, 0, 4)

    def loss(output: torch.Tensor, batch: TokenBatch) -> tuple[torch.Tensor, int]:
        return output.float().sum(), 1

    first = model.runner.step(data[:2], loss)
    model.set_schedule(make_schedule(None, 1, 1, 4))
    second = model.runner.step(data, loss)
    assert (first.count, second.count) == (2, 4)
    return float(second.loss), float(model.runner.evaluate(data, loss).loss)


def test_without_an_optimizer():
    trained, evaluated = without_optimizer()
    assert trained == evaluated
