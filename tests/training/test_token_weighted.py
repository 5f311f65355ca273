"""A step's loss and gradients are those of its tokens, however its samples are dealt to micro-batches, replicas and pipelines."""

from typing import Any

import numpy as np
import pytest
import torch

from megapar import ParallelMesh
from megapar.batch import TokenBatch
from megapar.objectives.sample import IGNORED
from megapar.pipeline.kinds import make_schedule
from megapar.training.step import TrainStep
from megapar.training.verify_steps import _shards
from tests.zero.composition import LAYOUT, VOCABULARY, joined, trainer

SAMPLES, LENGTH = 8, 12
LAYOUTS: dict[str, tuple[dict[str, int], int]] = {
    "one micro-batch": ({}, 8),
    "one by one": ({}, 1),
    "two replicas": ({"dp": 2, "stage": 2}, 2),
    "two replicas, one by one": ({"dp": 2, "stage": 3}, 1),
    "a pipeline": ({"pp": 2}, 2),
    "a pipeline of two replicas": ({"pp": 2, "dp": 2, "stage": 1}, 2),
}


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets [8, 12]: sample i has 1 + i targets, one in the middle has none."""
    tokens = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    for number in range(SAMPLES):
        targets[number, : LENGTH if number == 3 else LENGTH - 1 - number] = IGNORED
    return tokens[:, :-1], targets


def accumulated(layout: dict[str, int], size: int) -> TrainStep:
    mesh = ParallelMesh(pp=layout.get("pp", 1))
    tokens, targets = samples()
    starts = range(mesh.dp.rank * size, SAMPLES, mesh.dp.size * size)
    schedule = make_schedule("gpipe" if mesh.pp.size == 1 else "1f1b", mesh.pp.size, 1, len(starts))
    train = trainer({**LAYOUT, **layout}, mesh, schedule)
    train.accumulate([TokenBatch.of(tokens[at : at + size], targets[at : at + size]) for at in starts])
    return train


def step(layout: dict[str, int], size: int) -> Any:
    """[loss, targets, gradient norm], and this rank's parts of the gradient: of another trainer's, as an update does not keep them."""
    result = accumulated(layout, size).update(1e-3)
    train = accumulated(layout, size)
    train.optimizer.grads.finish()
    return [result.loss, result.tokens, result.grad_norm], [(piece, part.numpy().copy()) for piece, part in _shards(train.optimizer)]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one micro-batch"])
def test_loss_and_gradients_are_of_the_tokens(ranks, name):
    (told, parts), *_ = ranks.run(1, step, *LAYOUTS["one micro-batch"])
    whole = joined(parts)
    layout, size = LAYOUTS[name]
    found = ranks.run(layout.get("pp", 1) * layout.get("dp", 1), step, layout, size)
    for (loss, count, norm), _ in found:
        assert count == told[1] == sum(1 + n for n in range(SAMPLES) if n != 3)
        assert loss == pytest.approx(told[0], rel=1e-6) and norm == pytest.approx(told[2], rel=1e-6)
    together = joined(part for _, parts in found for part in parts)
    largest = max(float(np.abs(values).max()) for values in whole.values())
    for tensor, values in whole.items():
        assert np.abs(together[tensor] - values).max() <= 1e-6 * largest, tensor
