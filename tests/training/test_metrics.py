"""Metrics and progress: what a killed run leaves, what a person sees, and the picture."""

import json

from hypothesis import given
from hypothesis import strategies as st

from megapar.training.metrics import MetricsFile, RunProgress, read_metrics


def record(step: int) -> dict[str, float]:
    return {"step": step, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.75, "tokens": 64, "tokens_per_second": 1234.0, "seconds": 0.05}


@given(cut=st.integers(0, 400), steps=st.integers(0, 4))
def test_a_file_cut_anywhere_gives_its_complete_records(tmp_path_factory, cut, steps):
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    text = "".join(json.dumps(record(i)) + "\n" for i in range(steps))
    path.write_text(text[:cut])
    assert read_metrics(path) == [record(i) for i in range(text[:cut].count("\n"))]


def test_a_record_is_on_disk_when_logged(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.log(record(1))
    assert read_metrics(path) == [record(1)]
    metrics.close()


def test_resuming_drops_what_comes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    for step in range(1, 6):
        metrics.log(record(step))
        if step % 2 == 0:
            metrics.log({"step": step, "held_out_loss": 3.0})
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    MetricsFile(path, 4).close()
    # The evaluation after step 4 is repeated by the run that resumes there.
    assert read_metrics(path) == [record(1), record(2), {"step": 2, "held_out_loss": 3.0}, record(3), record(4)]


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("anything\n")
    MetricsFile(path).close()
    assert read_metrics(path) == []


def test_plain_progress_lines(capsys):
    progress = RunProgress(100)
    for step in range(1, 101):
        progress.step(record(step), eta=100.0 - step)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21  # the first, and one in twenty parts
    assert lines[0] == "step 1/100  loss 2.5000  lr 1.00e-03  grad_norm 0.750  1,234 tokens/s  eta 99 s"
    assert lines[-1].startswith("step 100/100 ")
