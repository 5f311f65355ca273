"""Runs in which a step goes wrong: what recovery makes of them is bitwise the run whose data never had the bad samples."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megapar import ParallelMesh
from megapar.training.config import Config
from megapar.training.examples import Examples
from megapar.training.loop import train
from megapar.training.metrics import read_metrics
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

    def loss(self: TrainStep, output: torch.Tensor, batch: Any, z_loss: float = 0.0) -> Any:
        total, counted = real_loss(self, output, batch, z_loss)
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


@pytest.mark.parametrize(("poison", "words"), [(NAN, "the loss is nan"), (SPIKE, "times the median"), (UNREADABLE, "")])
def test_stop_is_the_same_sentence_on_all_ranks_when_only_one_saw_it(ranks, tmp_path, poison, words):
    config = small(tmp_path, {"dp": 2}, spike="stop", data_error="rollback", max_rollbacks=0)
    first, second = ranks.run(2, run, config, poison)
    assert first == second
    assert first.startswith("step 4, samples 12 to 15: ") and words in first
    if poison == UNREADABLE:
        assert "rank 1 has no samples: OSError: [Errno 5] Input/output error, and the run rolled back 0 times already" in first
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

    def loss(self: TrainStep, *rest: Any) -> Any:
        calls.append(1)
        total, counted = real(self, *rest)
        return (total * NAN if len(calls) > 6 else total), counted

    monkeypatch.setattr(TrainStep, "loss", lambda self, output, batch, z_loss=0.0: loss(self, output, batch, z_loss))
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
