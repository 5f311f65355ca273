"""Runs in which a step goes wrong: what recovery makes of them is bitwise the run whose data never had the bad samples."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megapar import ParallelMesh
from megapar.training import resume
from megapar.training.checkpoint.folder import remove_checkpoints
from megapar.training.checkpoint.manifest import read_manifest
from megapar.training.config import Config
from megapar.training.examples import Examples
from megapar.training.loop import train
from megapar.training.metrics import read_metrics
from megapar.training.run_checkpoints import RunCheckpoints
from megapar.training.step import TrainStep
from tests.training.common import config_for, events_of, metrics_of, replaced, weights_of

BAD = 14
"""The sample that is poisoned: of step 4."""
NAN, SPIKE, UNREADABLE = float("nan"), 50.0, 0.0
LAYOUTS: dict[str, dict[str, int]] = {
    "alone": {},
    "tp": {"tp": 2},
    "pp": {"pp": 2},
    "dp, stage 2": {"dp": 2, "zero_stage": 2},
    "dp, stage 3": {"dp": 2, "zero_stage": 3},
}


def small(folder: Path, layout: dict[str, int], **recovery: Any) -> Config:
    config = replaced(config_for(folder, 1), "parallel", **layout)
    config = replaced(replaced(config, "model", layers=2), "recovery", window=4, sigma=None, factor=8.0, **recovery)
    return replaced(config, "run", steps=7, eval_every=0, out=str(folder / "out"), save_every=1)


def ranks_in(config: Config) -> int:
    return config.parallel.tp * config.parallel.dp * config.parallel.pp


def run(config: Config, poison: float | None = None) -> str:
    """Trains. Only a rank that computes the loss of sample BAD meets it: times `poison`, or unreadable. How it was refused."""
    os.environ["XDG_CACHE_HOME"] = str(Path(config.data.corpus).parent / "cache")
    mesh = ParallelMesh(tp=config.parallel.tp, pp=config.parallel.pp)
    real_loss, real_samples, window = TrainStep.loss, Examples.samples, []

    def samples(self: Examples, first: int, count: int) -> list[Any]:
        if poison == UNREADABLE and first <= BAD < first + count and mesh.world.rank == mesh.world.size - 1:
            raise OSError(5, "Input/output error")
        found = real_samples(self, first, count)
        window[:] = [torch.from_numpy(real_samples(self, BAD, 1)[0].tokens)]
        return found

    def loss(self: TrainStep, output: torch.Tensor, batch: Any, **options: Any) -> Any:
        total, counted = real_loss(self, output, batch, **options)
        bad = bool(window) and bool((batch.tokens.view(batch.b, batch.s) == window[0]).all(1).any())
        return (total * poison if bad and poison else total), counted

    TrainStep.loss, Examples.samples = loss, samples  # type: ignore[method-assign]
    try:
        train(config, mesh)
    except ValueError as error:
        return str(error)
    finally:
        TrainStep.loss, Examples.samples = real_loss, real_samples  # type: ignore[method-assign]
    return ""


def told(config: Config) -> list[dict[str, Any]]:
    """The steps of the line that counts, the last record of each."""
    by_step = {record["step"]: record for record in metrics_of(config) if "loss" in record and "skipped" not in record}
    return [by_step[step] for step in sorted(by_step)]


@pytest.mark.parametrize("poison", [NAN, SPIKE])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rollback_is_bitwise_the_run_without_these_samples(ranks, tmp_path, layout, poison):
    """And the saved state too. Two steps back, because the newest checkpoint but one is asked for."""
    actions = {"non_finite": "rollback", "spike": "rollback", "back": 2}
    config = small(tmp_path, LAYOUTS[layout], **actions)
    assert ranks.run(ranks_in(config), run, config, poison) == [""] * ranks_in(config)
    (event,) = events_of(config, "recovery")
    assert (event["action"], event["step"], event["to_step"], event["samples"]) == ("rollback", 4, 2, [12, 16])
    clean = replaced(replaced(config, "data", skip="12:16"), "run", out=str(tmp_path / "clean"))
    assert ranks.run(ranks_in(config), run, clean) == [""] * ranks_in(config)
    assert events_of(clean, "recovery") == []
    for step in range(1, 8):
        assert weights_of(config, step) == weights_of(clean, step) != {}
    assert told(config) == told(clean)


@pytest.mark.parametrize("poison", [NAN, SPIKE, UNREADABLE])
@pytest.mark.parametrize("layout", ["alone", "pp", "dp, stage 3"])
def test_a_skipped_step_leaves_what_the_run_without_these_samples_has(ranks, tmp_path, layout, poison):
    config = small(tmp_path, LAYOUTS[layout], non_finite="skip", spike="skip", data_error="skip")
    assert ranks.run(ranks_in(config), run, config, poison) == [""] * ranks_in(config)
    (event,) = events_of(config, "recovery")
    assert (event["action"], event["step"], event["to_step"], event["samples"]) == ("skip", 4, None, [12, 16])
    clean = replaced(replaced(config, "data", skip="12:16"), "run", out=str(tmp_path / "clean"))
    assert ranks.run(ranks_in(config), run, clean) == [""] * ranks_in(config)
    assert weights_of(config, 3) == weights_of(config, 4), "a step that is skipped changes nothing"
    for step in (4, 5, 6):
        assert weights_of(config, step + 1) == weights_of(clean, step) != {}


UNREADABLE_WORDS = "rank 1 has no samples: OSError: [Errno 5] Input/output error"


@pytest.mark.parametrize(("poison", "words"), [(NAN, "the loss is nan"), (SPIKE, "times the median"), (UNREADABLE, UNREADABLE_WORDS)])
def test_stop_is_the_same_sentence_on_all_ranks_when_only_one_saw_it(ranks, tmp_path, poison, words):
    config = small(tmp_path, {"dp": 2}, spike="stop")
    first, second = ranks.run(2, run, config, poison)
    assert first == second
    assert first.startswith("step 4, samples 12 to 15: ") and words in first
    assert weights_of(config, 3) != {} and weights_of(config, 4) == {}
    assert events_of(config, "recovery")[0]["action"] == "stop"


def test_a_rollback_that_finds_no_checkpoint_stops(tmp_path):
    config = small(tmp_path, {}, non_finite="rollback", back=4)
    assert "there is no checkpoint from before to roll back to" in run(config, NAN)


def test_rollbacks_are_bounded(tmp_path, monkeypatch):
    """Every sample is bad from step 4 on: each rollback leaves one step's samples out, and the third one does not come."""
    config = small(tmp_path, {}, non_finite="rollback", max_rollbacks=2)
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    real, calls = TrainStep.loss, []

    def loss(self: TrainStep, *rest: Any, **options: Any) -> Any:
        calls.append(1)
        total, counted = real(self, *rest, **options)
        return (total * NAN if len(calls) > 6 else total), counted

    monkeypatch.setattr(TrainStep, "loss", loss)
    with pytest.raises(ValueError, match="rolled back 2 times already"):
        train(config, ParallelMesh.alone())
    events = events_of(config, "recovery")
    assert [event["action"] for event in events] == ["rollback", "rollback", "stop"]
    assert [event["samples"] for event in events] == [[12, 16], [16, 20], [20, 24]]


def test_more_samples_before_and_after_the_bad_step_can_be_left_out(tmp_path):
    config = small(tmp_path, {}, non_finite="rollback", back=3, skip_before=1, skip_after=2)
    assert run(config, NAN) == ""
    (event,) = events_of(config, "recovery")
    assert (event["to_step"], event["samples"]) == (1, [8, 24])
    before = replaced(replaced(config, "recovery", back=1, skip_before=9, skip_after=0), "run", out=str(tmp_path / "before"))
    assert run(before, NAN) == ""
    (event,) = events_of(before, "recovery")
    assert (event["to_step"], event["samples"]) == (3, [12, 16]), "what the checkpoint has seen is not left out"


def test_a_run_killed_after_a_rollback_goes_on_from_the_line_that_counts(tmp_path):
    """A rollback writes what it is about to do before it removes checkpoints of the line that it leaves."""
    config = small(tmp_path, {}, non_finite="rollback", back=2)
    assert run(config, NAN) == ""
    whole = {step: weights_of(config, step) for step in range(1, 8)}
    again = replaced(config, "run", out=str(tmp_path / "again"))
    assert run(replaced(again, "recovery", max_rollbacks=0), NAN).startswith("step 4"), "checkpoints 1 to 3 are of the line to be left"
    folders = [Path(c.run.out) / "checkpoints" for c in (config, again)]
    (folders[1] / "rollbacks.json").write_bytes((folders[0] / "rollbacks.json").read_bytes())
    assert run(replaced(again, "run", resume="yes"), NAN) == ""
    assert {step: weights_of(again, step) for step in range(1, 8)} == whole
    (resumed,) = events_of(again, "resumed")
    assert resumed["from"] == 2, "step 3 is of the line that was left"


def test_metrics_keep_the_line_that_was_left(tmp_path):
    config = small(tmp_path, {}, non_finite="rollback", back=2)
    assert run(config, NAN) == ""
    before = [r["step"] for r in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in r]
    assert before == [1, 2, 3, 4, 3, 4, 5, 6, 7]
    assert run(replaced(config, "run", resume="yes")) == ""
    assert [r["step"] for r in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in r] == before


def poisoned_from(config: Config, step: int, interrupt_at: int = 0) -> Any:
    """Trains; samples cannot be read from `step` on. What it ends with, or how it was refused."""
    os.environ["XDG_CACHE_HOME"] = str(Path(config.data.corpus).parent / "cache")
    real = Examples.batch

    def batch(self: Examples, first: int, count: int) -> Any:
        if first >= 4 * (step - 1):
            if first == 4 * (interrupt_at - 1):
                signal.raise_signal(signal.SIGTERM)
            raise OSError(5, "Input/output error")
        return real(self, first, count)

    Examples.batch = batch  # type: ignore[method-assign]
    try:
        trained = train(config, ParallelMesh.alone())
        return trained.step, trained.interrupted
    except ValueError as error:
        return str(error)
    finally:
        Examples.batch = real  # type: ignore[method-assign]


def test_steps_skipped_in_a_row_are_bounded(tmp_path):
    config = small(tmp_path, {}, data_error="skip", max_skips=2)
    assert "Input/output error, and the 2 steps before it were skipped" in poisoned_from(config, 3)
    assert [event["action"] for event in events_of(config, "recovery")] == ["skip", "skip", "stop"]


def test_a_run_can_be_stopped_while_its_data_is_bad(tmp_path):
    config = small(tmp_path, {}, data_error="skip", max_skips=100)
    assert poisoned_from(config, 3, interrupt_at=4) == (4, True)
    assert weights_of(config, 4) == weights_of(config, 2) != {}


def test_a_rollback_behind_a_change_that_was_asked_for(tmp_path):
    """The checkpoint that is gone back to has the config from before the change; the run has been told what holds now."""
    config = small(tmp_path, {}, non_finite="rollback", back=2)
    assert run(replaced(replaced(config, "recovery", non_finite="stop"), "run", steps=7), NAN).startswith("step 4")
    changed = replaced(replaced(config, "optimizer", lr=5e-4), "run", resume="yes", change="optimizer.lr")
    assert run(changed, NAN) == ""
    (*_, event) = events_of(config, "recovery")
    assert (event["action"], event["to_step"]) == ("rollback", 2)


def test_a_rollback_goes_past_checkpoints_that_are_damaged(tmp_path):
    config = small(tmp_path, {}, non_finite="stop")
    assert run(config, NAN).startswith("step 4")
    file = next((tmp_path / "out" / "checkpoints" / "step-00000002").glob("*.safetensors"))
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    assert run(replaced(replaced(config, "run", resume="yes"), "recovery", non_finite="rollback", back=2), NAN) == ""
    assert events_of(config, "recovery")[-1]["to_step"] == 1


@pytest.mark.parametrize("killed", ["before anything is removed", "while checkpoints are removed"])
def test_a_rollback_that_is_cut_short_is_completed_by_the_next_start(tmp_path, monkeypatch, killed):
    """The same weights, and metrics that tell of it, as if it had not been."""
    config = small(tmp_path, {}, non_finite="rollback", back=3)
    assert run(config, NAN) == ""
    again = replaced(config, "run", out=str(tmp_path / "again"))

    def cut(gone: list[Path], disk: Any) -> None:
        if killed.startswith("while"):
            remove_checkpoints(gone[-1:], disk)
        raise OSError(4, "killed")

    with monkeypatch.context() as patch:
        patch.setattr(resume, "remove_checkpoints", cut)
        with pytest.raises(OSError, match="killed"):
            run(again, NAN)
    assert run(replaced(again, "run", resume="yes"), NAN) == ""
    for step in range(1, 8):
        assert weights_of(again, step) == weights_of(config, step) != {}
    assert [event["samples"] for event in events_of(again, "recovery")] == [[12, 16]]
    assert told(again) == told(config)
    assert (tmp_path / "again" / "checkpoints" / "latest").read_text() == "step-00000007\n"


def test_latest_names_a_checkpoint_that_is_there_after_a_rollback(tmp_path, monkeypatch):
    config = small(tmp_path, {}, non_finite="rollback", back=2)
    seen = []
    real = RunCheckpoints.roll_back

    def roll_back(self: RunCheckpoints, *rest: Any) -> Any:
        found = real(self, *rest)
        seen.append((self.folder / "latest").read_text().strip())
        assert (self.folder / seen[-1]).is_dir()
        return found

    monkeypatch.setattr(RunCheckpoints, "roll_back", roll_back)
    assert run(config, NAN) == ""
    assert seen == ["step-00000002"]


def test_rollbacks_of_a_run_that_is_no_more_are_forgotten(tmp_path):
    config = small(tmp_path, {}, non_finite="rollback", back=2)
    assert run(config, NAN) == ""
    for folder in (tmp_path / "out" / "checkpoints").glob("step-*"):
        shutil.rmtree(folder)
    assert run(replaced(config, "run", resume="auto")) == ""
    plain = replaced(config, "run", out=str(tmp_path / "plain"))
    assert run(plain) == ""
    assert weights_of(config, 7) == weights_of(plain, 7)
    assert not (tmp_path / "out" / "checkpoints" / "rollbacks.json").exists()


def progress_of(config: Config, step: int) -> dict[str, Any]:
    return read_manifest(Path(config.run.out) / "checkpoints" / f"step-{step:08d}")["state"]["progress"]


def test_several_rollbacks_and_stops_in_fp16_at_stage_3_are_the_run_without_these_samples(ranks, tmp_path):
    """The loss scale, which grows every second step, goes back too."""
    config = small(tmp_path, {"dp": 2, "zero_stage": 3}, non_finite="rollback", back=1, skip_after=1)
    config = replaced(config, "precision", kind="fp16", init_scale=8.0, growth_interval=2)
    assert ranks.run(2, run, replaced(config, "run", steps=7), NAN) == ["", ""]
    assert ranks.run(2, run, replaced(config, "run", resume="yes")) == ["", ""]
    clean = replaced(replaced(config, "data", skip="12:20"), "run", out=str(tmp_path / "clean"))
    assert ranks.run(2, run, clean) == ["", ""]
    for step in range(1, 8):
        assert weights_of(config, step) == weights_of(clean, step) != {}
        assert progress_of(config, step) == progress_of(clean, step)
    assert progress_of(config, 7)["loss_scale"] == 64.0


def test_data_skip_may_change_behind_what_was_used_only(tmp_path):
    config = small(tmp_path, {})
    assert run(replaced(config, "run", steps=3)) == ""
    on = replaced(config, "run", resume="yes", steps=5, change="data.skip run.steps")
    assert 'which used the samples up to 11: change only later ones' in run(replaced(on, "data", skip="0:4"))
    assert run(replaced(on, "data", skip="12:16")) == ""
