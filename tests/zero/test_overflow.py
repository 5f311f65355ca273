"""fp16 gradients that overflow on one rank of tp x pp x dp alone: all ranks skip that step and no other, and move the loss scale alike."""

import numpy as np
import torch

from megapar import ParallelMesh
from megapar.ops.step_state import LossScaling
from megapar.optim.precision import LossScaler, Precision
from megapar.params import spec_of
from megapar.zero.buckets import GradBuckets
from tests.zero.composition import LAYOUT, SCALE, batches, state, trainer

CASE = {**LAYOUT, "tp": 2, "pp": 2, "dp": 2, "kind": "1f1b", "precision": "fp16", "model": "gpt"}
MOVING = Precision(torch.float16, scaler=LossScaler(SCALE, LossScaling(growth_interval=2, hysteresis=1)))
OVERFLOWS = 2
"""The step in which they do, of four."""
CULPRITS = [  # of tp, pp and dp: which rank it is
    (0, 0, 1, {"stage": 0}),
    (0, 1, 0, {"stage": 1, "reduce_every": "micro_batch"}),
    (1, 0, 0, {"stage": 2}),
    (1, 1, 1, {"stage": 3, "reshard_every": "micro_batch"}),
    (0, 0, 0, {"stage": 3, "reduce_every": "micro_batch"}),
]


def overflow(grads: GradBuckets) -> None:
    """Makes one element of a matrix's part that only this rank has infinite, at its next write."""
    written = grads.written
    victim = next(param for param in grads.params if spec_of(param).is_sharded)

    def infinite(param: torch.Tensor) -> None:
        if param is victim:
            param.main_grad[0, 0] = float("inf")
            grads.written = written
        written(param)

    grads.written = infinite


def skips() -> list[list[tuple[bool, float]]]:
    """What each step said, for each culprit."""
    mesh, found = ParallelMesh(tp=2, pp=2), []
    for *culprit, how in CULPRITS:
        train, told, states = trainer({**CASE, **how}, mesh, precision=MOVING), [], []
        for step in range(4):
            if step == OVERFLOWS and [mesh.tp.rank, mesh.pp.rank, mesh.dp.rank] == culprit:
                overflow(train.optimizer.grads)
            train.accumulate(batches(mesh.dp.rank, step))
            result = train.update(1e-2)
            told.append((result.skipped, result.loss_scale))
            states.append(state(train))
        for step in range(1, 4):
            changed = [not np.array_equal(a, b) for (_, a), (_, b) in zip(states[step - 1], states[step], strict=True)]
            assert not any(changed) if step == OVERFLOWS else any(changed), (culprit, step)
        assert train.optimizer.progress()["applied_steps"] == 3 and train.optimizer.skipped_steps == 1
        found.append(told)
    return found


def test_one_rank_overflows(ranks):
    expected = [(False, SCALE), (False, 2 * SCALE), (True, SCALE), (False, SCALE)]
    for told in ranks.run(8, skips, timeout=120):
        assert told == [expected] * len(CULPRITS)
