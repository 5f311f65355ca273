"""Any layout loads what any other saved, by a covering array: weights as their fp32 masters, moments, what the optimizer and the run know
of themselves, bit for bit; and training goes on from there."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megapar import ParallelMesh
from megapar.models.config import DecoderConfig, gpt_style
from megapar.models.pipelined import PipelinedDecoder
from megapar.ops.step_state import LossScaling
from megapar.optim.precision import LossScaler, Precision
from megapar.pipeline.kinds import make_schedule
from megapar.training.checkpoint import load_checkpoint, save_checkpoint
from megapar.training.config import OptimizerConfig, ParallelConfig
from megapar.training.step import zero
from megapar.zero.optimizer import ZeroOptimizer
from tests.covering import Case, covering_array, missing
from tests.training.checkpoint.test_load import VOCAB, expected
from tests.training.common import config_for, events_of, metrics_of, replaced, run, weights_of

MODELS = {
    "tied": gpt_style(hidden_size=24, layers=4, heads=6, max_positions=8),
    "uneven": DecoderConfig(hidden_size=16, layers=4, heads=8, kv_heads=4, head_size=6, ffn_size=23),  # 4 KV heads over 3 ranks
}
PRECISIONS: dict[str, Any] = {
    "fp32": Precision.of("fp32"),
    "bf16": Precision.of("bf16"),
    "remainder": Precision(torch.bfloat16, master="remainder"),
    "fp16": Precision(torch.float16, master="fp32", scaler=LossScaler(2.0**12, LossScaling(growth_interval=3))),
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2, 3),
    "pp": (1, 2),
    "chunks": (1, 2),
    "dp": (1, 2),
    "stage": (0, 1, 2, 3),
    "precision": tuple(PRECISIONS),
    "model": tuple(MODELS),
}
GROUPS = [("tp", "pp", "stage"), ("dp", "stage", "precision"), ("model", "tp", "pp")]
PROGRESS = {"skipped_steps": 3, "applied_steps": 11.0, "loss_scale": 2048.0, "growth": 2.0, "hysteresis": 1.0}


def legal(case: Case) -> bool:
    return (case["chunks"] == 1 or case["pp"] > 1) and world(case) <= 8


def world(case: Case) -> int:
    return case["tp"] * case["pp"] * case["dp"]


@cache
def cases() -> list[Case]:
    return covering_array(FACTORS, legal, GROUPS)


def optimizer_at(case: Case) -> tuple[ParallelMesh, ZeroOptimizer]:
    mesh = ParallelMesh(tp=case["tp"], pp=case["pp"])
    schedule = make_schedule(None, case["pp"], case["chunks"], 1)
    made = zero(OptimizerConfig(), mesh, ParallelConfig(zero_stage=case["stage"]), PRECISIONS[case["precision"]])
    optimizer = PipelinedDecoder(MODELS[case["model"]], VOCAB, mesh, schedule=schedule, optimize=made, seed=5).optimizer
    assert optimizer is not None
    return mesh, optimizer


def save(folder: Path, case: Case) -> None:
    mesh, optimizer = optimizer_at(case)
    for box in optimizer.boxes():
        box.write(expected(box.kind, box.piece))
    optimizer.loaded()
    optimizer.set_progress(PROGRESS)
    save_checkpoint(folder, optimizer.boxes(), {"progress": optimizer.progress()}, mesh)


def load(folders: list[Path], case: Case) -> int:
    """Loads them one after the other into one optimizer; how many elements were compared."""
    mesh, optimizer = optimizer_at(case)
    compared = 0
    for folder in folders:
        state = load_checkpoint(folder, optimizer.boxes(), mesh)
        optimizer.set_progress(state["progress"])
        optimizer.loaded()
        for box in optimizer.boxes():
            assert torch.equal(box.read(), expected(box.kind, box.piece)), f"{folder.name}: {box.kind} {box.piece.name}"
            compared += box.piece.numel
        with optimizer.unshard():
            for param, spec in zip(optimizer._listed.params, optimizer._listed.specs, strict=True):
                for piece, view in spec.views(param.detach()):
                    assert torch.equal(view, expected("weight", piece).to(view.dtype)), f"{folder.name}: {piece.name}"
        told = optimizer.progress()
        assert {name: told[name] for name in ("skipped_steps", "applied_steps")} == {"skipped_steps": 3, "applied_steps": 11.0}
        if case["precision"] == "fp16" and "fp16" in folder.name:
            assert told == PROGRESS
        for box in optimizer.boxes():
            box.write(torch.zeros(box.piece.box))
    return compared


def test_the_array_covers():
    assert not missing(cases(), FACTORS, legal, GROUPS)


def test_every_layout_loads_what_every_other_saved(ranks, tmp_path):
    folders: dict[str, list[Path]] = {name: [] for name in MODELS}
    for number, case in enumerate(cases()):
        folder = tmp_path / f"{number} {case['precision']}"
        ranks.run(world(case), save, folder, case)
        folders[case["model"]].append(folder)
    assert all(len(found) >= 6 for found in folders.values())
    for number, case in enumerate(cases()):
        others = folders[case["model"]][number % 3 :: 3]
        assert min(ranks.run(world(case), load, others, case, timeout=60)) > 0


LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "tp": {"tp": 2, "sequence_parallel": True},
    "pp": {"pp": 2, "chunks": 2},
    "stage 2": {"dp": 2, "zero_stage": 2},
    "stage 3": {"dp": 2, "tp": 2, "zero_stage": 3},
}


CHANGES = [("alone", "stage 3"), ("stage 3", "pp"), ("pp", "tp"), ("tp", "stage 2"), ("stage 2", "alone")]


@pytest.mark.parametrize(("first", "second"), CHANGES)
def test_a_run_that_goes_on_in_another_layout_follows_the_one_that_never_stopped(ranks, tmp_path, first, second):
    whole = replaced(replaced(config_for(tmp_path, 1), "model", layers=4), "parallel", **LAYOUTS[first])
    before = whole.parallel.tp * whole.parallel.dp * whole.parallel.pp
    assert ranks.run(before, run, whole) [0][:2] == [6, False]
    config = replaced(whole, "run", out=str(tmp_path / "again"))
    assert ranks.run(before, run, config, 3, "interrupt")[0] == [3, True, None]
    layout = {"tp": 1, "pp": 1, "dp": 1, "chunks": 1, **LAYOUTS[second]}
    resumed = replaced(replaced(config, "run", resume="yes"), "parallel", **layout)
    after = resumed.parallel.tp * resumed.parallel.dp * resumed.parallel.pp
    assert ranks.run(after, run, resumed)[0][:2] == [6, False]
    for ours, theirs in zip(metrics_of(config), metrics_of(whole), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    (event,) = events_of(config, "resumed")
    assert event["from"] == 3 and any(key.startswith("parallel.") for key in event["changed"])


def test_a_batch_that_grows_across_a_stop_and_another_world_takes_each_sample_once(ranks, tmp_path):
    """Steps of 4, 8 and 12 samples, stopped in the middle of the second stage, gone on with by two replicas."""
    whole = replaced(config_for(tmp_path, 1), "run", batch_size="0:4 8:8 24:12", micro_batch_size=2, steps=7, eval_every=3)
    assert run(whole)[:2] == [7, False]
    assert [(r["batch_size"], r["samples"]) for r in metrics_of(whole) if "loss" in r] == [
        (4, 4), (4, 8), (8, 16), (8, 24), (12, 36), (12, 48), (12, 60),
    ]  # fmt: skip
    for layout in ({}, {"dp": 2}):
        config = replaced(whole, "run", out=str(tmp_path / f"again {layout}"))
        assert run(config, 3, "interrupt") == [3, True, None]
        resumed = replaced(replaced(config, "run", resume="yes"), "parallel", **layout)
        assert ranks.run(resumed.parallel.dp, run, resumed)[0][:2] == [7, False]
        for ours, theirs in zip(metrics_of(config), metrics_of(whole), strict=True):
            assert ours == (pytest.approx(theirs, abs=1e-4) if layout else theirs)
        assert layout or weights_of(config, 7) == weights_of(whole, 7)


def test_what_was_asked_to_change_is_told_and_kept(tmp_path):
    whole = config_for(tmp_path, 1)
    run(whole, 3, "interrupt")
    changed = replaced(replaced(whole, "run", resume="yes", change="optimizer.lr run.steps", steps=8), "optimizer", lr=2e-3)
    assert run(changed)[0] == 8
    (event,) = events_of(changed, "resumed")
    assert event["changed"] == {"optimizer.lr": [1e-3, 2e-3], "run.steps": [6, 8]}
    again = replaced(changed, "run", change="")
    assert run(again)[0] == 8, "the checkpoints written since then have what was changed"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["optimizer"]["lr"] == 2e-3
