"""Everything that may be combined, by a covering array, against one process: losses, raw gradients, their norm; and two steps' weights."""

import copy
from collections import defaultdict
from functools import cache
from typing import Any

import numpy as np
import torch

from megapar import ParallelMesh
from megapar.grads import MainGrads
from megapar.models.decoder import Decoder
from megapar.objectives.causal_lm import token_loss
from megapar.pipeline.kinds import KINDS
from megapar.pipeline.schedule import Action, Schedule
from megapar.training.step import StepResult, TrainStep
from megapar.training.verify_steps import _shards, boxes
from tests.covering import Case, covering_array, missing
from tests.parity import logical
from tests.zero.composition import LAYOUT, MICRO_BATCHES, MODELS, PRECISIONS, SCALE, VOCABULARY, Boxes, batches, joined, state, trainer

FACTORS: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2),
    "pp": (1, 2),
    "dp": (1, 2),
    "kind": KINDS,
    "chunks": (1, 2),
    "stage": (0, 1, 2, 3),
    "reduce_every": ("step", "micro_batch"),
    "reshard_every": ("step", "micro_batch"),
    "recompute": ("none", "full", "attention", "mlp"),
    "sequence_parallel": (False, True),
    "precision": tuple(PRECISIONS),
    "model": tuple(MODELS),
}
# ZeRO does something only with dp=2, so stages meet everything else there.
SOME = [("tp", "pp", "dp", "stage"), ("tp", "pp", "dp", "precision"), ("pp", "dp", "kind", "reduce_every")]
GROUPS = [*SOME, *(("dp", "stage", name) for name in FACTORS if name not in ("dp", "stage"))]


def legal(case: Case) -> bool:
    chunks = case["chunks"] == 1 or (case["pp"] > 1 and case["kind"] != "1f1b")
    kinds = case["pp"] > 1 or case["kind"] in ("gpipe", "zero_bubble")  # the others are gpipe without a pipeline
    reshards = case["stage"] == 3 or case["reshard_every"] == "step"
    return chunks and kinds and reshards and (case["tp"] > 1 or not case["sequence_parallel"])


@cache
def cases() -> list[Case]:
    return covering_array(FACTORS, legal, GROUPS)


def plainest(case: Case) -> Case:
    """The case whose every bit `case` has: same layers, sums and formats."""
    return {**case, "stage": 0, "kind": "gpipe", "reshard_every": "step", "recompute": "none"}


# In the ranks.


def gradients(train: TrainStep) -> Boxes:
    """This rank's parts of the sums over all micro-batches of all replicas, without the loss scale."""
    optimizer = train.optimizer
    parts = boxes(optimizer.chunks, lambda p: p.main_grad) if optimizer.options.stage == 0 else _shards(optimizer)
    return [(piece, (grad / float(optimizer.loss_scale)).numpy()) for piece, grad in parts]


def trained(case: Case, mesh: ParallelMesh, **options: Any) -> tuple[StepResult, Boxes, Boxes]:
    """What a step comes to, its gradients, and the state after it and two more.

    It is taken twice, at first with a learning rate of 0: from the second step on the buckets know what to expect, and start early.
    """
    train, captured = trainer(case, mesh, **options), []
    finish = train.optimizer.grads.finish

    def capture() -> None:
        finish()
        captured.append(gradients(train))

    train.optimizer.grads.finish = capture  # type: ignore[method-assign]
    told = []
    for step, lr in ((0, 0.0), (0, 1e-2), (1, 1e-2)):
        train.accumulate(batches(mesh.dp.rank, step))
        told.append(train.update(lr))
    assert told[0] == told[1] and len(captured) == 3, case
    assert all(a.name == b.name and np.array_equal(x, y) for (a, x), (b, y) in zip(*captured[:2], strict=True)), case
    return told[0], captured[0], state(train)


def train_all(cases: list[Case]) -> list[tuple[StepResult, Boxes]]:
    """Step and gradients of each case, whose state afterwards is that of the plainest case to the last bit."""
    found, meshes, plain = [], {}, {}
    for case in cases:
        sizes = (case["pp"], case["tp"])
        mesh = meshes[sizes] = meshes.get(sizes) or ParallelMesh(pp=case["pp"], tp=case["tp"])
        told, grads, after = trained(case, mesh, bucket_bytes=3000, gather_ahead=True)
        key = tuple(plainest(case).values())
        if key not in plain:
            plain[key] = joined(trained(plainest(case), mesh, overlap=False)[2])
        for piece, values in after:
            assert np.array_equal(values, plain[key][piece.name][piece.index]), (case, piece.name)
        found.append((told, grads))
    return found


# In one process.


@cache
def alone(model: str, dtype: torch.dtype, dp: int) -> tuple[Any, ...]:
    """Loss and gradients of the same weights in fp64 and in `dtype`, with fp32 sums as everywhere; and the number of targets."""
    scale = SCALE if dtype == torch.float16 else 1.0
    single = Decoder(MODELS[model], VOCABULARY, ParallelMesh.alone(), seed=3, dtype=dtype)
    told, found = [], []
    for decoder, of_loss, of_sums in ((copy.deepcopy(single).double(), 1.0, torch.float64), (single, scale, torch.float32)):
        main_grads = MainGrads(decoder.parameters(), of_sums)
        total = count = 0
        for batch in (batch for replica in range(dp) for batch in batches(replica, 0)):
            loss, targets = token_loss(decoder, decoder.hidden(batch), batch, of_loss)
            loss.backward(torch.full_like(loss, of_loss))
            total, count = total + float(loss.detach()), count + targets
        main_grads.finish()
        told.append(total / count)
        found.append({name: (grad / of_loss).numpy() for (name, _), grad in logical(decoder, lambda p: p.main_grad).items()})
    return told, found, count


def compare(case: Case, told: list[tuple[StepResult, Boxes]]) -> None:
    """Each rank's step and all ranks' gradients against one process."""
    dtype = PRECISIONS[case["precision"]].param
    (exact_loss, single_loss), (exact, single), count = alone(case["model"], dtype, case["dp"])
    whole, step = joined(box for _, boxes in told for box in boxes), told[0][0]
    assert whole.keys() == exact.keys() and all(result == step for result, _ in told), case
    assert step.tokens == count and not step.skipped, case
    times, eps = (4, 1e-6) if dtype == torch.float32 else (2, torch.finfo(dtype).eps)
    assert abs(step.loss - exact_loss) <= max(times * abs(single_loss - exact_loss), eps * exact_loss), case

    def size(values: np.ndarray) -> float:
        return float(np.abs(values).max() if dtype == torch.float32 else np.linalg.norm(values))

    largest = max(np.abs(grad).max() for grad in exact.values())
    squares, elements = sum((grad**2).sum() for grad in exact.values()), sum(grad.size for grad in exact.values())
    for name, grad in exact.items():
        floor = 1e-6 * largest if dtype == torch.float32 else eps * (squares / elements * grad.size) ** 0.5
        error, bound = size(whole[name] - grad), max(times * size(single[name] - grad), floor)
        assert error <= bound, f"{case}: {name}: error {error:.2e} above {bound:.2e}"  # and no NaN is
    norm = sum((grad.astype(np.float64) ** 2).sum() for grad in whole.values()) ** 0.5 / count
    assert abs(step.grad_norm - norm) <= 1e-6 * norm, case
    assert dtype != torch.float32 or abs(step.grad_norm - squares**0.5 / count) <= 1e-6 * norm, case


def test_every_combination_is_there():
    """Of any two factors all that is legal, and of the groups together; so also of tp, pp and stage."""
    assert not missing(cases(), FACTORS, legal, GROUPS)
    assert len(cases()) <= 45


def test_covering_array(ranks):
    worlds = defaultdict(list)
    for case in cases():
        worlds[case["tp"] * case["pp"] * case["dp"]].append(case)
    for world, of_world in sorted(worlds.items()):
        told = ranks.run(world, train_all, of_world, timeout=120)
        for index, case in enumerate(of_world):
            compare(case, [rank[index] for rank in told])


# How often, and when, gradients are reduced.


def reductions(kind: str, chunks: int) -> None:
    """With reduce_every="micro_batch" each bucket once a micro-batch; from the second step on all start while backward goes on."""
    mesh = ParallelMesh(pp=2)
    case = {**LAYOUT, "pp": 2, "dp": 2, "kind": kind, "chunks": chunks, "stage": 2, "reduce_every": "micro_batch"}
    train, started = trainer(case, mesh, bucket_bytes=1), []
    grads = train.optimizer.grads
    start, end_window = grads._start, grads.end_window

    def end(chunk: int | None = None) -> None:
        before = len(started)
        end_window(chunk)
        started[before:] = ["late"] * (len(started) - before)

    grads._start = lambda bucket: (started.append("early"), start(bucket))
    grads.end_window = end
    for step in range(2):
        started.clear()
        train.accumulate(batches(mesh.dp.rank, step))
        train.update(1e-2)
        assert len(started) == MICRO_BATCHES * len(grads.layout.buckets), "each as often as there are windows"
        assert started.count("early") == step * len(started)


def put_off() -> None:
    """Two micro-batches' weight gradients wait at once, the last one's alone: a window is what one micro-batch writes all the same."""
    mesh, case = ParallelMesh(), {**LAYOUT, "dp": 2, "stage": 2, "reduce_every": "micro_batch", "model": "gpt"}
    actions = [Action(kind, 0, m) for kind, m in zip("FFFIIWWIW", (0, 1, 2, 0, 1, 0, 1, 2, 2), strict=True)]
    expected = joined(trained(plainest(case), mesh, overlap=False)[2])
    for piece, values in trained(case, mesh, schedule=Schedule((tuple(actions),), (0,)), bucket_bytes=1)[2]:
        assert np.array_equal(values, expected[piece.name][piece.index]), piece.name


def test_windows_of_a_pipeline(ranks):
    for kind, chunks in (("1f1b", 1), ("interleaved_1f1b", 2), ("zero_bubble", 1), ("zero_bubble", 2)):
        ranks.run(4, reductions, kind, chunks)
    ranks.run(2, put_off)
