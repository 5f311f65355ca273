"""The training loop: resuming is bitwise, refusals come before training, the data and the seed decide everything."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megapar import ParallelMesh
from megapar.models.decoder import Decoder
from megapar.models.pipelined import PipelinedDecoder
from megapar.pipeline.kinds import make_schedule
from megapar.training.checkpoint.disk import Disk
from megapar.training.checkpoint.folder import lock, newest_checkpoint
from megapar.training.config import Config, RecomputeConfig
from megapar.training.config_file import to_dict
from megapar.training.examples import Examples
from megapar.training.layout import check_layout
from megapar.training.loop import evaluate, train
from megapar.training.resume import accept
from megapar.training.step import TrainStep, zero
from megapar.training.text import load_text
from tests.training.common import config_for, corpus, events_of, metrics_of, replaced, run, weights_of


def run_or_refuse(configs: list[Config]) -> str:
    """The sentence with which this rank's config is refused."""
    mesh = ParallelMesh(tp=configs[0].parallel.tp, pp=configs[0].parallel.pp)
    try:
        train(configs[mesh.world.rank % len(configs)], mesh)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def whole_runs(ranks, tmp_path_factory) -> dict[int, Config]:
    """Six steps without a stop, by tp."""
    configs = {tp: config_for(tmp_path_factory.mktemp(f"tp{tp}"), tp) for tp in (1, 2)}
    for tp, config in configs.items():
        assert all(result[:2] == [6, False] for result in ranks.run(tp, run, config))
    return configs


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("at", "accident"), [(3, "interrupt"), (4, "failure")])
def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(ranks, whole_runs, tmp_path, tp, at, accident):
    whole = whole_runs[tp]
    # A failure does not wait for a checkpoint that is still being written.
    config = replaced(whole, "run", out=str(tmp_path / "out"), async_save=accident == "interrupt")
    if accident == "interrupt":
        assert ranks.run(tp, run, config, at, accident) == [[at, True, None]] * tp
    else:
        assert all("something else broke" in error for error in ranks.errors(tp, run, config, at, accident))
        with (tmp_path / "out" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "lo')
    resumed = replaced(config, "run", resume="yes", sample_tokens=3)
    assert all(result[:2] == [6, False] for result in ranks.run(tp, run, resumed))
    assert metrics_of(config) == metrics_of(whole)
    assert weights_of(config, 6) == weights_of(whole, 6)
    assert len(weights_of(config, 6)) == tp


def piped(config: Config, pp: int, chunks: int, kind: str) -> Config:
    config = replaced(replaced(config, "parallel", pp=pp, chunks=chunks, schedule=kind), "model", layers=4)
    return replaced(config, "run", batch_size=6, micro_batch_size=None, microbatches=3)


@pytest.mark.parametrize(("tp", "pp", "chunks", "kind"), [(1, 2, 2, "auto"), (2, 2, 1, "zero_bubble")])
def test_a_resumed_pipeline_is_bitwise_the_run_that_never_stopped(ranks, tmp_path, tp, pp, chunks, kind):
    whole = piped(config_for(tmp_path, tp), pp, chunks, kind)
    assert all(result[:2] == [6, False] for result in ranks.run(tp * pp, run, whole))
    config = replaced(whole, "run", out=str(tmp_path / "again"))
    assert ranks.run(tp * pp, run, config, 3, "interrupt") == [[3, True, None]] * (tp * pp)
    assert all(result[:2] == [6, False] for result in ranks.run(tp * pp, run, replaced(config, "run", resume="yes")))
    assert metrics_of(config) == metrics_of(whole)
    assert weights_of(config, 6) == weights_of(whole, 6)
    assert len(weights_of(config, 6)) == tp * pp


def test_a_pipeline_takes_the_steps_of_one_process(ranks, tmp_path):
    """Losses, gradient norms and counts of the whole run, and what is held out, which is no multiple of the micro-batches."""
    alone = piped(config_for(tmp_path, 1), 1, 1, "auto")
    run(alone)
    for pp, chunks, kind in ((2, 2, "interleaved_1f1b"), (4, 1, "gpipe")):
        config = replaced(piped(alone, pp, chunks, kind), "run", out=str(tmp_path / kind))
        ranks.run(pp, run, config)
        for ours, theirs in zip(metrics_of(config), metrics_of(alone), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"pp": 2, "chunks": 3}, "needs at least 6 layers, the model has 4"),
        ({"pp": 2, "chunks": 2, "schedule": "1f1b"}, "1f1b has one chunk"),
        ({"pp": 2, "split": "1,2"}, "add up to the model's 4 layers"),
        ({"pp": 1, "chunks": 2}, "chunks=2 needs pp of 2 or more"),
    ],
)
def test_layouts_that_cannot_be_are_refused_before_anything_starts(tmp_path, values, told):
    config = replaced(piped(config_for(tmp_path, 1), 1, 1, "auto"), "parallel", **values)
    with pytest.raises(ValueError, match=told):
        check_layout(config, config.parallel.pp)


def test_metrics_hold_each_step_once_and_each_evaluation(whole_runs):
    records = metrics_of(whole_runs[1])
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "held_out_loss" in r] == [3, 6]
    assert all(r["tokens"] == 4 * 12 for r in records if "loss" in r)
    assert records[0]["lr"] == pytest.approx(5e-4), "warm-up over round(0.3 * 6) = 2 steps"
    assert [r["samples"] for r in records if "loss" in r] == [4, 8, 12, 16, 20, 24]
    assert records[-2]["lr"] == 1e-4, "the last step has the floor"


def test_a_finished_run_that_is_resumed_only_evaluates(ranks, whole_runs, tmp_path):
    config = replaced(whole_runs[1], "run", out=str(tmp_path / "out"))
    run(config)
    before = metrics_of(config)
    run(replaced(config, "run", resume="yes"))
    assert metrics_of(config) == before


def test_losses_at_tp_1_and_2(whole_runs):
    for alone, parallel in zip(metrics_of(whole_runs[1]), metrics_of(whole_runs[2]), strict=True):
        assert parallel == pytest.approx(alone, abs=1e-4)


def test_the_seed_decides(whole_runs, tmp_path):
    again, other = (replaced(whole_runs[1], "run", out=str(tmp_path / str(seed)), seed=seed, save_every=0) for seed in (0, 1))
    for config in (again, other):
        run(config)
    assert metrics_of(again) == metrics_of(whole_runs[1])
    assert metrics_of(other)[0]["loss"] != metrics_of(again)[0]["loss"]


def test_recomputation_changes_no_step(ranks, whole_runs, tmp_path):
    """A run that stops with one mode and goes on with another is the run without."""
    whole = whole_runs[2]
    config = replaced(replaced(whole, "run", out=str(tmp_path / "out")), "recompute", mode="full", shard_saved_input=True)
    assert ranks.run(2, run, config, 3, "interrupt") == [[3, True, None]] * 2
    resumed = dataclasses.replace(replaced(config, "run", resume="yes"), recompute=RecomputeConfig("mlp"))
    assert all(result[:2] == [6, False] for result in ranks.run(2, run, resumed))
    assert metrics_of(config) == metrics_of(whole) and weights_of(config, 6) == weights_of(whole, 6)


def test_more_blocks_to_recompute_than_a_stage_has_are_refused(tmp_path):
    config = replaced(piped(config_for(tmp_path, 1), 2, 1, "auto"), "recompute", mode="full", blocks=2)
    with pytest.raises(ValueError, match="recompute blocks=2 is more than the 1 of a stage"):  # the other has 3, and no output projection
        check_layout(config, 2)


def test_config_is_saved_beside_the_metrics(whole_runs):
    saved = json.loads((Path(whole_runs[2].run.out) / "config.json").read_text())
    assert saved["parallel"]["tp"] == 2
    assert saved["model"]["ffn_size"] == 23


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("optimizer", {"lr": 0.5}, ["optimizer.lr is 0.5", "was 0.001"]),
        ("run", {"seed": 3}, ["run.seed is 3", "was 0"]),
        ("run", {"steps": 9}, ["run.steps is 9", "was 6"]),
        ("model", {"ffn_size": 24}, ["model.ffn_size is 24", "was 23"]),
        ("model", {"layers": 2}, ["model.layers is 2", "was 1"]),
        ("data", {"sequence_length": 10}, ["data.sequence_length is 10", "was 12"]),
    ],
)
def test_resuming_another_run_is_refused_by_key_and_values(whole_runs, section, values, told):
    before = metrics_of(whole_runs[1])
    message = run_or_refuse([replaced(replaced(whole_runs[1], "run", resume="yes"), section, **values)])
    assert all(part in message for part in told), message
    assert "step-00000006" in message
    assert metrics_of(whole_runs[1]) == before


def test_resuming_on_another_corpus_is_refused(whole_runs, tmp_path):
    config = replaced(whole_runs[1], "run", resume="yes")
    other = replaced(replaced(config, "data", corpus=corpus(tmp_path, seed=1)), "run", out=config.run.out)
    assert run_or_refuse([other]).startswith("corpus is ")
    path = Path(config.data.corpus)
    text = path.read_text()
    path.write_text(text + " more")
    try:
        assert run_or_refuse([config]).startswith("corpus is ")
    finally:
        path.write_text(text)


def test_runs_that_would_lose_or_lack_files_are_refused_on_all_ranks(ranks, whole_runs, tmp_path):
    config = whole_runs[2]
    before = metrics_of(config)
    blocked = tmp_path / "file"
    blocked.write_text("")
    cases = {
        "holds checkpoints of an earlier run": config,
        "holds no checkpoint to resume from": replaced(config, "run", resume="yes", out=str(tmp_path / "none")),
        "cannot hold this run": replaced(config, "run", out=str(blocked / "out")),
        "does not exist": replaced(config, "data", corpus=str(tmp_path / "no.txt")),
    }
    for told, case in cases.items():
        first, second = ranks.run(2, run_or_refuse, [case])
        assert first == second
        assert told in first
    assert metrics_of(config) == before


def test_a_prompt_that_the_tokenizer_cannot_say_is_refused_before_training(whole_runs, tmp_path):
    config = replaced(replaced(whole_runs[1], "data", tokenizer="characters"), "run", prompt="\N{SNOWMAN}", out=str(tmp_path / "out"))
    assert "U+2603" in run_or_refuse([config])
    assert not (tmp_path / "out").exists()


def test_configs_that_differ_between_ranks_are_refused_on_all(ranks, whole_runs, tmp_path):
    config = replaced(whole_runs[2], "run", out=str(tmp_path / "out"))
    first, second = ranks.run(2, run_or_refuse, [config, replaced(config, "run", save_every=1)])
    assert first == second
    assert "run.save_every must be the same on all ranks of world and differs (rank 0: 2, rank 1: 1)" in first


def test_evaluation_covers_each_held_out_target_once(whole_runs):
    config = whole_runs[1]
    text = load_text(config.data)
    mesh = ParallelMesh.alone()
    model = Decoder(config.model, text.tokenizer.vocab_size, mesh, seed=1)
    made = {"schedule": make_schedule(None, 1, 1, 2), "optimize": zero(config.optimizer, mesh)}
    step = TrainStep(PipelinedDecoder(config.model, text.tokenizer.vocab_size, mesh, seed=1, **made), mesh)
    losses = []
    s = config.data.sequence_length
    tokens = torch.from_numpy(text.held_out).long()
    for first in range(0, len(tokens) - 1, s):
        inputs, targets = tokens[first : first + s], tokens[first + 1 : first + s + 1]
        losses += F.cross_entropy(model(inputs[None, : len(targets)]).detach(), targets, reduction="none").tolist()
    assert len(losses) == len(text.held_out) - 1
    assert len(losses) % s, "else no window is padded"
    for batch in (1, 3, 100):
        found = evaluate(step, Examples(text, config), batch)
        assert found == {"causal_lm": (pytest.approx(sum(losses), rel=1e-6), len(losses))}


def test_a_training_step_sees_the_samples_of_its_number(whole_runs):
    examples = Examples(load_text(whole_runs[1].data), whole_runs[1])
    batch = examples.batch(8, 4)
    assert torch.equal(batch.tokens.view(4, -1)[:, 1:], batch.targets.view(4, -1)[:, :-1])
    assert torch.equal(batch.tokens, torch.cat([examples.batch(8 + i, 1).tokens for i in range(4)]))


def test_no_step_is_taken_twice_by_a_newest_checkpoint_of_a_stopped_save(ranks, whole_runs, tmp_path):
    config = replaced(whole_runs[1], "run", out=str(tmp_path / "out"))
    run(config, 3, "interrupt")
    (tmp_path / "out" / "checkpoints" / "step-00000005.tmp").mkdir()
    assert newest_checkpoint(tmp_path / "out" / "checkpoints").name == "step-00000003"
    assert run(replaced(config, "run", resume="yes"))[:2] == [6, False]
    assert [r["step"] for r in metrics_of(config) if "loss" in r] == [1, 2, 3, 4, 5, 6]


def full_disk(config: Config, bad_step: int) -> tuple[int, bool]:
    """Trains while the disk is full for the last rank's file of one checkpoint: its last step, and whether that one is said to be saved."""
    mesh_rank = int(os.environ.get("RANK", "0"))
    real = Disk.write

    def write(self: Disk, path: Path, parts: Any) -> None:
        if f"step-{bad_step:08d}" in str(path) and mesh_rank == 1:
            raise OSError(28, "No space left on device")
        real(self, path, parts)

    Disk.write = write  # type: ignore[method-assign]
    try:
        trained = train(config, ParallelMesh(tp=config.parallel.tp))
        return trained.step, trained.saved
    finally:
        Disk.write = real  # type: ignore[method-assign]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_goes_on_when_the_disk_is_full_and_says_so(ranks, whole_runs, tmp_path, asynchronous):
    config = replaced(whole_runs[2], "run", out=str(tmp_path / "out"), async_save=asynchronous)
    assert ranks.run(2, full_disk, config, 4) == [(6, True)] * 2
    saves = {saved["step"]: saved["error"] for saved in events_of(config, "checkpoint")}
    assert [step for step, error in saves.items() if not error] == [2, 6]
    assert saves[4].startswith("rank 1 could not save") and "No space left on device" in saves[4]
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == ["latest", "step-00000002", "step-00000006"]
    assert weights_of(config, 6) == weights_of(whole_runs[2], 6)


def test_a_last_checkpoint_that_could_not_be_written_is_not_called_saved(ranks, whole_runs, tmp_path):
    config = replaced(whole_runs[2], "run", out=str(tmp_path / "out"))
    assert ranks.run(2, full_disk, config, 6) == [(6, False)] * 2
    assert [saved["step"] for saved in events_of(config, "checkpoint") if saved["error"]] == [6]


def test_a_folder_that_another_run_writes_to_is_refused_on_all_ranks(ranks, whole_runs, tmp_path):
    config = replaced(whole_runs[2], "run", out=str(tmp_path / "out"))
    with lock(tmp_path / "out"):
        first, second = ranks.run(2, run_or_refuse, [config])
    assert first == second and f"another run writes to {tmp_path / 'out'}" in first
    assert ranks.run(2, run, config)[0][:2] == [6, False], "and it is free again when that run has ended"


def test_tensorboard_has_what_the_metrics_have(whole_runs, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replaced(whole_runs[1], "run", out=str(tmp_path / "out"), tensorboard=True)
    run(config)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    losses = [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")]
    assert losses == [(record["step"], record["loss"]) for record in metrics_of(config) if "loss" in record]


def test_resume_auto_begins_where_there_is_nothing_and_goes_on_where_there_is(whole_runs, tmp_path):
    config = replaced(whole_runs[1], "run", out=str(tmp_path / "out"), resume="auto")
    assert run(config, 3, "interrupt") == [3, True, None]
    assert run(config)[:2] == [6, False]
    assert metrics_of(config) == metrics_of(whole_runs[1]) and weights_of(config, 6) == weights_of(whole_runs[1], 6)
    assert [event["from"] for event in events_of(config, "resumed")] == [3]


@pytest.mark.parametrize(("change", "told"), [("optimizer.lrr", "which is no key of the config"), ("optimizer.eps", "must keep it")])
def test_only_what_change_names_may_change(whole_runs, change, told):
    other = replaced(replaced(whole_runs[1], "run", resume="yes", change=change), "optimizer", lr=0.5)
    message = run_or_refuse([other])
    assert told in message
    assert "lrr" in change or "or be told --change optimizer.lr" in message


def test_a_checkpoint_from_before_a_key_was_there_has_its_default(whole_runs, tmp_path):
    here = {"config": to_dict(whole_runs[1]), "corpus": "a", "tokenizer": "b"}
    state = json.loads(json.dumps(here))
    del state["config"]["optimizer"]["z_loss"]
    assert accept(state, here, "", tmp_path) == {}
    here["config"]["optimizer"]["z_loss"] = 0.5
    with pytest.raises(ValueError, match=r"optimizer\.z_loss is 0\.5 and was 0\.0"):
        accept(state, here, "", tmp_path)
