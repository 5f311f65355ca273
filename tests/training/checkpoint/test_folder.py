"""The folder of a run: what counts as a checkpoint, what may go, and who may write there."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.training.checkpoint import checkpoints, lock, newest_checkpoint
from megapar.training.checkpoint.folder import remove_partial, superfluous


def test_newest_is_by_number_among_complete_ones(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None
    assert checkpoints(tmp_path / "none") == []
    for name in ("step-9", "step-00000010", "step-00000011.tmp", "step-00000012.old.tmp", "step-x", "best", "step-", "old-step-00000099"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000010"
    assert checkpoints(tmp_path) == [tmp_path / "step-9", tmp_path / "step-00000010"]


def test_only_what_was_never_whole_is_removed(tmp_path):
    for name in ("step-00000010", "step-00000011.tmp", "step-00000012.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "latest").touch()
    (tmp_path / "latest.tmp").touch()
    remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000010"]
    remove_partial(tmp_path / "none")


@given(st.sets(st.integers(0, 50), min_size=1), st.none() | st.integers(1, 5), st.none() | st.integers(1, 10), st.data())
def test_what_may_go(steps, last, every, data):
    newest = data.draw(st.sampled_from(sorted(steps)))
    gone = set(superfluous(steps, newest, last, every))
    kept = steps - gone
    assert newest in kept
    assert kept >= set(sorted(steps)[-last:] if last else steps)
    assert every is None or all(step % every for step in gone)
    assert last is None or len(kept) <= last + 1 + sum(every is not None and step % every == 0 for step in steps)


def test_two_runs_cannot_write_to_one_folder(tmp_path):
    out = tmp_path / "runs" / "mine"
    with lock(out):
        with pytest.raises(ValueError, match=f"another run writes to {out}"):
            lock(out)
        with lock(tmp_path / "other"):
            pass
    lock(out).close()


def hold(out: Path, pipe) -> None:
    held = lock(out)
    pipe.send("held")
    pipe.recv()
    held.close()


def test_the_lock_of_a_killed_run_is_free(tmp_path):
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path, theirs), daemon=True)
    process.start()
    try:
        assert ours.recv() == "held"
        with pytest.raises(ValueError, match="another run writes to"):
            lock(tmp_path)
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        lock(tmp_path).close()
    finally:
        process.kill()
        process.join()
