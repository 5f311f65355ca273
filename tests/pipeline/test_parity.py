"""The decoder in a pipeline against one process, for a covering array of everything that may be combined: losses and raw gradients."""

import copy
from collections import defaultdict
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from megapar import ParallelMesh
from megapar.grads import MainGrads
from megapar.models.config import DecoderConfig
from megapar.models.decoder import Decoder, DecoderStage
from megapar.pipeline.kinds import KINDS, make_schedule
from megapar.pipeline.runtime import PipelineRunner
from megapar.pipeline.schedule import COMPUTE, Schedule
from tests.covering import Case, covering_array, missing
from tests.parity import gradients, logical
from tests.pipeline.decoders import VOCABULARY, Chunk, loss_of, micro_batches, stages_of
from tests.pipeline.test_schedule import torchs

FACTORS: dict[str, tuple[Any, ...]] = {
    "kind": KINDS,
    "pp": (2, 3, 4),
    "chunks": (1, 2, 3),
    "m": (1, 2, 3, 5, 8),
    "tp": (1, 2),
    "sequence_parallel": (False, True),
    "tied": (False, True),
    "uneven": (False, True),
    "varying": (False, True),
    "gpt": (False, True),
    "kv_heads": (2, 1),  # one is shared by the ranks of tp=2
}
GROUPS = [("kind", "pp", "chunks")]


def legal(case: Case) -> bool:
    return (case["kind"] != "1f1b" or case["chunks"] == 1) and (case["tp"] > 1 or not case["sequence_parallel"])


CASES = covering_array(FACTORS, legal, GROUPS)


def sizes_of(case: Case) -> list[int]:
    """Blocks of each stage: one, and if the split is uneven one more in a stage that depends on the case."""
    sizes = [1] * (case["pp"] * case["chunks"])
    if case["uneven"]:
        sizes[(case["m"] + case["pp"]) % len(sizes)] += 1
    return sizes


def config_of(layers: int, tied: bool, gpt: bool, kv_heads: int) -> DecoderConfig:
    gpts = {"norm": "layer", "positions": "learned", "activation": "gelu", "bias": True, "max_positions": 16}
    style: dict[str, Any] = gpts if gpt else {}
    sizes = {"hidden_size": 32, "layers": layers, "heads": 4, "kv_heads": kv_heads, "ffn_size": 48}
    return DecoderConfig(**sizes, **style, tied_embeddings=tied, init_std=0.2)


def config_for(case: Case) -> DecoderConfig:
    return config_of(sum(sizes_of(case)), case["tied"], case["gpt"], case["kv_heads"])


def train(cases: list[Case]) -> list[tuple[float | None, dict[tuple[str, tuple[int, ...]], np.ndarray]]]:
    """For each case the loss, on the last stage, and this rank's boxes of the gradients, which are GPipe's to the last bit."""
    found, meshes = [], {}
    for case in cases:
        sizes = (case["pp"], case["tp"])
        mesh = meshes[sizes] = meshes.get(sizes) or ParallelMesh(pp=case["pp"], tp=case["tp"])
        stages = stages_of(config_for(case), mesh, case["chunks"], sizes_of(case), case["sequence_parallel"])
        main_grads = MainGrads(p for stage in stages for p in stage.parameters())
        data, told = micro_batches(case["m"], case["varying"]), {}
        for kind in dict.fromkeys((case["kind"], "gpipe")):
            main_grads.zero()
            schedule = make_schedule(kind, case["pp"], case["chunks"], case["m"])
            runner = PipelineRunner([Chunk(stage) for stage in stages], mesh, schedule)
            totals = runner.step(data, loss_of(stages[-1]))
            main_grads.finish()
            told[kind] = totals.loss, {key: g for stage in stages for key, g in logical(stage, lambda p: p.main_grad).items()}
        (loss, ours), (gpipe_loss, gpipes) = told[case["kind"]], told["gpipe"]
        assert torch.equal(loss, gpipe_loss), case
        for key, grad in ours.items():
            assert torch.equal(grad, gpipes[key]), (case, key)
        assert totals.count == (sum(targets.numel() for _, targets in data) if runner.is_last else 0)
        main_grads.detach()
        found.append((float(loss) if runner.is_last else None, {key: grad.numpy() for key, grad in ours.items()}))
    return found


@cache
def alone(config: DecoderConfig, m: int, varying: bool) -> tuple[Any, ...]:
    """Loss and gradients of one process, in fp64 and in fp32."""

    def loss(model: DecoderStage) -> torch.Tensor:
        return sum(loss_of(model)(model.hidden(batch), (batch, targets))[0] for batch, targets in micro_batches(m, varying))

    model = Decoder(config, VOCABULARY, ParallelMesh.alone())
    exact_loss, exact = gradients(copy.deepcopy(model).double(), loss)
    single_loss, single = gradients(model, loss)
    by_name = {name: (grad.numpy(), single[name, start].numpy()) for (name, start), grad in exact.items()}
    return float(exact_loss), float(single_loss), by_name


def compare(case: Case, told: list[tuple[float | None, dict[tuple[str, tuple[int, ...]], np.ndarray]]]) -> None:
    """Each rank's loss and boxes against one process; together the boxes are the whole model."""
    exact_loss, single_loss, whole = alone(config_for(case), case["m"], case["varying"])
    floor = 1e-6 * max(np.abs(exact).max() for exact, _ in whole.values())
    seen = {name: np.zeros(exact.shape, bool) for name, (exact, _) in whole.items()}
    for loss, boxes in told:
        if loss is not None:
            assert abs(loss - exact_loss) <= max(4 * abs(single_loss - exact_loss), 1e-6 * abs(exact_loss)), case
        for (name, start), grad in boxes.items():
            place = tuple(slice(a, a + n) for a, n in zip(start, grad.shape, strict=True))
            exact, single = whole[name]
            bound = max(4 * np.abs(single - exact).max(), floor)
            error = np.abs(grad - exact[place]).max()
            assert error <= bound, f"{case}: {name}: error {error:.2e} above {bound:.2e}"
            seen[name][place] = True
    assert all(s.all() for s in seen.values()) and sum(loss is not None for loss, _ in told) == case["tp"]


def accumulated(kind: str, chunks: int, tied: bool) -> None:
    """Two steps of 3 micro-batches are, to the last bit, the GPipe step of all 6."""
    mesh = ParallelMesh(pp=2)
    stages = stages_of(config_of(2 * chunks, tied, False, 2), mesh, chunks)
    main_grads = MainGrads(p for stage in stages for p in stage.parameters())
    modules, data, told = [Chunk(stage) for stage in stages], micro_batches(6, varying=True), []
    for name, steps in ((kind, (data[:3], data[3:])), ("gpipe", (data,))):
        main_grads.zero()
        runner = PipelineRunner(modules, mesh, make_schedule(name, 2, chunks, len(steps[0])))
        for step in steps:
            runner.step(step, loss_of(stages[-1]))
        main_grads.finish()
        told.append([p.main_grad.clone() for p in main_grads.params])
    assert all(torch.equal(a, b) for a, b in zip(*told, strict=True))


@pytest.mark.parametrize("kind,chunks,tied", [("1f1b", 1, True), ("interleaved_1f1b", 2, False), ("zero_bubble", 2, True)])
def test_accumulation_over_steps(ranks, kind, chunks, tied):
    ranks.run(2, accumulated, kind, chunks, tied)


def train_file(path: str, config: DecoderConfig, m: int) -> tuple[float | None, dict[tuple[str, tuple[int, ...]], np.ndarray]]:
    """As `train`, by the schedule of a file and the stages that it places here."""
    schedule = Schedule.load(path).only(COMPUTE)
    mesh = ParallelMesh(pp=len(schedule.ranks))
    places = [stage for stage, rank in enumerate(schedule.stage_to_rank) if rank == mesh.pp.rank]
    stages = [DecoderStage(config, VOCABULARY, mesh, layers=(place, place + 1)) for place in places]
    main_grads = MainGrads(p for stage in stages for p in stage.parameters())
    last = next((stage for stage in stages if stage.is_last), stages[0])
    runner = PipelineRunner([Chunk(stage) for stage in stages], mesh, schedule)
    totals = runner.step(micro_batches(m), loss_of(last))
    main_grads.finish()
    boxes = {key: g.numpy() for stage in stages for key, g in logical(stage, lambda p: p.main_grad).items()}
    main_grads.detach()
    return float(totals.loss) if runner.is_last else None, boxes


@pytest.mark.parametrize("name", ["Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_torchs_own_schedules(ranks, tmp_path, name):
    """Files that torch writes run here, the V placements too, in which a stage hands over to the next one on its own rank."""
    torchs("Schedule" + name, 4, 2, 8)._dump_csv(tmp_path / "schedule.csv", format="compute_only")
    case = {"pp": 4, "chunks": 2, "m": 8, "tp": 1, "tied": False, "uneven": False, "varying": False, "gpt": False, "kv_heads": 2}
    compare(case, ranks.run(4, train_file, str(tmp_path / "schedule.csv"), config_for(case), 8))


def test_every_combination_is_there():
    """Of any two factors all that is legal, and of schedule, pp and chunks together."""
    assert not missing(CASES, FACTORS, legal, GROUPS)
    assert len(CASES) <= 60


def test_covering_array(ranks):
    worlds = defaultdict(list)
    for case in CASES:
        worlds[case["pp"] * case["tp"]].append(case)
    for world, cases in sorted(worlds.items()):
        told = ranks.run(world, train, cases, timeout=120)
        for index, case in enumerate(cases):
            compare(case, [rank[index] for rank in told])
