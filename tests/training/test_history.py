"""A run's history: which records count after rollbacks, resumes and skips, and what is read of them."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.training.history import history_of, read_history, running_mean, series


def step(number: int, loss: float = 2.0, **more: object) -> dict[str, object]:
    return {"step": number, "loss": loss, "tokens": 10, **more}


def rollback(at: int, to: int) -> dict[str, object]:
    return {"step": at, "recovery": {"action": "rollback", "reason": "spike", "to_step": to, "samples": [to * 4, at * 4]}}


def test_the_latest_record_of_a_step_counts():
    records = [step(1, 5.0), step(2, 4.0), step(3, 9.0), {"step": 3, "held_out_loss": 8.0}, rollback(3, 1), step(2, 3.5), step(3, 3.0)]
    history = history_of([*records, {"step": 3, "held_out_loss": 2.5}])
    assert [(r["step"], r["loss"]) for r in history.steps] == [(1, 5.0), (2, 3.5), (3, 3.0)]
    assert [[(r["step"], r["loss"]) for r in line] for line in history.abandoned] == [[(2, 4.0), (3, 9.0)]]
    assert [r["held_out_loss"] for r in history.evaluations] == [2.5], "the one of the line that was left does not count"
    assert history.rolled_back == [(1, 3)] and history.skipped == []


def test_the_test_loss_is_that_of_the_line_that_counts():
    told = [step(1), step(2), {"step": 2, "test_loss": 3.0}]
    assert [r["test_loss"] for r in history_of(told).tests] == [3.0]
    assert history_of([*told, step(2)]).tests == [], "of weights that are no more"


def test_objectives_are_named_once():
    records = [step(1, objectives={"b": 1.0}), step(2, objectives={"a": 1.0}), {"step": 2, "held_out_loss": 1.0, "held_out": {"c": 2.0}}]
    assert history_of(records).objectives == ["a", "b", "c"]


def test_a_run_that_ends_before_it_was_where_it_had_been():
    """What the rollback undid does not count though nothing came in its place."""
    history = history_of([step(1), step(2), step(3), rollback(3, 1), step(2)])
    assert [r["step"] for r in history.steps] == [1, 2]
    assert [[r["step"] for r in line] for line in history.abandoned] == [[2, 3]]


def test_a_step_that_comes_again_without_a_word():
    history = history_of([step(1), step(2), step(3), step(2, 1.0)])
    assert [(r["step"], r["loss"]) for r in history.steps] == [(1, 2.0), (2, 1.0)]
    assert [[r["step"] for r in line] for line in history.abandoned] == [[2, 3]]


@given(st.lists(st.one_of(st.just("step"), st.integers(0, 12)), max_size=60))
def test_any_run(moves):
    """Steps go on from where they are, rollbacks go back: what counts is one line without gaps, and nothing is lost."""
    records, at, logged = [], 0, 0
    for move in moves:
        if move == "step":
            at += 1
            logged += 1
            records.append(step(at, float(logged)))
        elif move <= at:
            records.append(rollback(at, move))
            at = move
    history = history_of(records)
    assert [r["step"] for r in history.steps] == list(range(1, at + 1))
    losses = [r["loss"] for line in (history.steps, *history.abandoned) for r in line]
    assert sorted(losses) == [float(i + 1) for i in range(logged)]
    assert all(latest["loss"] >= left["loss"] for latest in history.steps for line in history.abandoned for left in line
               if left["step"] == latest["step"])  # fmt: skip


def test_skips_are_told_once():
    """By the step's record, a recovery, or both, in any order; what says more stays."""
    told = {"step": 2, "recovery": {"action": "skip", "reason": "norm 1e9", "samples": [4, 8]}}
    for records in ([step(2, skipped=1)], [step(2, skipped=1), told], [told, step(2, skipped=1)], [told]):
        history = history_of([step(1, skipped=0), *records, step(3)])
        assert history.skipped == [2]
        reason = "norm 1e9" if told in records else "gradients were not finite"
        assert history.recoveries[0]["recovery"]["reason"] == reason
    again = history_of([step(1), step(2, skipped=1), rollback(2, 1), step(2, skipped=1, reason="spike")])
    assert again.skipped == [2, 2]


def test_tokens():
    history = history_of([step(1), step(2), rollback(2, 1), step(2), step(3)])
    assert history.tokens_at([0, 1, 2, 2.5, 3, 9]).tolist() == [0, 10, 20, 20, 30, 30]
    assert history_of([]).tokens_at([1, 2]).tolist() == [0, 0]


def test_series():
    records = [step(1), step(2, lr=0.5), step(3, lr=None), step(4, lr="high"), step(5, lr=True), step(6, lr=1, checkpoint={"stall": 0.25})]
    assert [a.tolist() for a in series(records, "lr")] == [[2, 6], [0.5, 1]]
    assert [a.tolist() for a in series(records, "checkpoint", "stall")] == [[6], [0.25]]
    assert [a.tolist() for a in series(records, "lr", "deeper")] == [[], []]


def test_running_mean():
    assert running_mean([4.0] * 3) == pytest.approx([4.0] * 3)
    found = running_mean([math.nan, 1.0, math.inf, 3.0], keep=0.5)
    assert math.isnan(found[0]) and found[1:] == pytest.approx([1.0, 1.0, 7 / 3])


def test_a_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_history(path).steps == []
    path.write_text("")
    assert read_history(path).steps == []
    other = {"step": 1, "from a later version": {"x": 1}}
    durable = {"step": 2, "checkpoint": {"step": 1, "stall": 0.1}}
    lines = [json.dumps(record) for record in (step(1), other, durable, {"step": 1, "resumed": {"from": 1, "changed": {}}})]
    path.write_text("\n".join(lines) + '\n{"step": 2, "lo')
    history = read_history(path)
    assert (len(history.steps), len(history.checkpoints), len(history.resumes)) == (1, 1, 1)
    for text, words in (("[]\n", "line 1 is no record"), ('{"loss": 1}\n', "line 1 is no record"), ("{\n", "holds a line that is no JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_history(path)
