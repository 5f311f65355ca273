"""Metrics for TensorBoard: what is a scalar, what TensorBoard reads back, and what is said where it is missing."""

import builtins

import pytest

from megapar.training.tensorboard import TensorBoardSink, scalars

RECORD = {"step": 3, "loss": 2.5, "skipped": 0, "reason": "none", "samples": [1, 2], "checkpoint": {"stall": 0.5, "step": 2, "error": None}}


def test_scalars():
    assert scalars(RECORD) == {"loss": 2.5, "skipped": 0.0, "checkpoint/stall": 0.5, "checkpoint/step": 2.0}


def test_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path / "events")
    for step in (3, 4):
        sink.log({**RECORD, "step": step, "loss": 2.5 - step})
    sink.close()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(scalars(RECORD))
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, -0.5), (4, -1.5)]


def test_not_installed(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError("No module named 'tensorboard'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"TensorBoard is not installed .*: pip install 'megapar\[tensorboard\]'"):
        TensorBoardSink(tmp_path)
    assert not [*tmp_path.iterdir()]
