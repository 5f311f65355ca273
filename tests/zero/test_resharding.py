"""Checkpoints from layout to layout: tp, pp, dp, ZeRO stage and masters change, no bit does, and the first layout goes on from them."""

from pathlib import Path

import numpy as np
import pytest

from megapar import ParallelMesh
from megapar.training.checkpoint import load_checkpoint, save_checkpoint
from megapar.training.step import TrainStep
from tests.covering import Case
from tests.zero.composition import LAYOUT, Boxes, batches, joined, state, trainer

# The first one trains; each loads what the one before saved, and saves it again; the first one loads the last one's, and trains on.
CHAINS: dict[str, list[Case]] = {
    "fp32": [
        {"pp": 2, "chunks": 2, "kind": "interleaved_1f1b", "dp": 2, "stage": 2, "model": "tied"},
        {"tp": 2, "dp": 2, "stage": 1, "sequence_parallel": True},
        {"dp": 2, "stage": 3, "reshard_every": "micro_batch", "recompute": "full"},
        {"pp": 2, "kind": "zero_bubble"},
    ],
    "bf16": [
        {"dp": 2, "stage": 3, "precision": "bf16 remainder"},
        {"precision": "bf16"},
        {"tp": 2, "pp": 2, "dp": 2, "stage": 2, "precision": "bf16 remainder"},
        {"tp": 2, "pp": 2, "kind": "1f1b", "precision": "bf16"},
    ],
    "fp16": [
        {"tp": 2, "pp": 2, "dp": 2, "kind": "zero_bubble", "stage": 1, "precision": "fp16", "model": "gpt"},
        {"dp": 2, "stage": 3, "reduce_every": "micro_batch"},
        {"tp": 2, "pp": 2, "dp": 2, "stage": 3, "sequence_parallel": True},
    ],
}


def advance(train: TrainStep, steps: range) -> None:
    for step in steps:
        train.accumulate(batches(train.mesh.dp.rank, step))
        train.update(1e-2)


def save(train: TrainStep, folder: Path) -> None:
    save_checkpoint(folder, train.optimizer.boxes(), {"progress": train.optimizer.progress()}, train.mesh)


def loaded(case: Case, folder: Path) -> TrainStep:
    """The training at `case`, from what was saved in `folder`."""
    train = trainer(case, ParallelMesh(tp=case["tp"], pp=case["pp"]))
    saved = load_checkpoint(folder, train.optimizer.boxes(), train.mesh)
    train.optimizer.set_progress(saved["progress"])
    train.optimizer.loaded()
    assert train.optimizer.progress() == saved["progress"]
    return train


def begins(case: Case, folder: Path) -> tuple[Boxes, Boxes]:
    """The state when it is saved, and two steps later."""
    train = trainer(case, ParallelMesh(tp=case["tp"], pp=case["pp"]))
    advance(train, range(2))
    save(train, folder)
    saved = state(train)
    advance(train, range(2, 4))
    return saved, state(train)


def hands_on(case: Case, source: Path, target: Path) -> Boxes:
    train = loaded(case, source)
    save(train, target)
    return state(train)


def goes_on(case: Case, source: Path) -> Boxes:
    train = loaded(case, source)
    advance(train, range(2, 4))
    return state(train)


def same(found: list[Boxes], expected: list[Boxes]) -> bool:
    """Whether the ranks together have the same logical tensors, whole."""
    a, b = (joined(box for boxes in told for box in boxes) for told in (found, expected))
    return a.keys() == b.keys() and all(np.array_equal(values, b[name]) for name, values in a.items())  # a NaN is equal to none


def world(case: Case) -> int:
    return case["tp"] * case["pp"] * case["dp"]


@pytest.mark.parametrize("name", CHAINS)
def test_chain(ranks, tmp_path, name):
    fixed = {what: CHAINS[name][0].get(what, LAYOUT[what]) for what in ("model", "precision")}
    first, *others = ({**LAYOUT, **fixed, **case} for case in CHAINS[name])
    saved, later = zip(*ranks.run(world(first), begins, first, tmp_path / "0"), strict=True)
    for number, case in enumerate(others):
        told = ranks.run(world(case), hands_on, case, tmp_path / f"{number}", tmp_path / f"{number + 1}")
        assert same(told, saved), case
    assert same(ranks.run(world(first), goes_on, first, tmp_path / f"{len(others)}"), later)


def test_another_schedule_and_stage_goes_on_with_the_same_bits(ranks, tmp_path):
    case = {**LAYOUT, "pp": 2, "dp": 2, "precision": "bf16"}
    _, later = zip(*ranks.run(4, begins, case, tmp_path / "0"), strict=True)
    other = {**case, "stage": 3, "kind": "zero_bubble", "reshard_every": "micro_batch", "recompute": "mlp"}
    assert same(ranks.run(4, goes_on, other, tmp_path / "0"), later)
