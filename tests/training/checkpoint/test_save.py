"""Saving: in the background or not it is the same bytes, no rank that fails stops training, and only what may go goes."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from megapar import ParallelMesh
from megapar.training.checkpoint import Saver, checkpoints, read_manifest
from tests.training.checkpoint.values import Values


def save_one(root: Path, asynchronous: bool, how: dict[str, Any] | None = None) -> dict[str, Any]:
    """Saves step 3, with garbage in the boxes as soon as it may be there."""
    mesh = ParallelMesh()
    saver = Saver(root, mesh, asynchronous=asynchronous, **{"file_bytes": 128, **(how or {})})
    assert not saver.pending
    assert saver.ended == 1.0
    values, state = Values(mesh, 3), {"step": 3, "list": [1]}
    assert saver.save(3, values.boxes(), state) is None
    assert saver.pending
    saver.before_update()
    values.spoil()
    state["list"].append(2)
    saved = saver.commit()
    assert not saver.pending
    assert saver.finish() is None
    assert saver.snapshot_bytes == 0
    assert (saved.step, saved.path, saved.error) == (3, root / "step-00000003", "")
    assert saved.bytes == sum(path.stat().st_size for path in saved.path.glob("*.safetensors"))
    assert 0 < saved.stall <= saved.seconds
    assert values.check(saved.path, mesh, 3) == {"step": 3, "list": [1]}
    saver.close()
    return {}


@pytest.mark.parametrize("world", [1, 2])
def test_in_the_background_the_same_bytes_are_written(ranks, tmp_path, world):
    for asynchronous in (False, True):
        ranks.run(world, save_one, tmp_path / str(asynchronous), asynchronous)
    files = [{path.name: path.read_bytes() for path in (tmp_path / kind / "step-00000003").iterdir()} for kind in ("False", "True")]
    assert files[0] == files[1]
    assert len(files[0]) > 2 * world, "several files a rank"
    assert sorted(path.name for path in (tmp_path / "True").iterdir()) == ["latest", "step-00000003"]
    assert (tmp_path / "True" / "latest").read_text() == "step-00000003\n"


def save_around_a_failure(root: Path, asynchronous: bool, failing: int, point: str) -> list[str]:
    """What went wrong, as each rank says it, when rank `failing` has no room at `point` of step 2; steps 1 and 3 are saved."""
    mesh, full = ParallelMesh(), [False]

    def on_point(name: str) -> None:
        if full[0] and mesh.world.rank == failing and name == point:
            raise OSError(28, "No space left on device")

    saver = Saver(root, mesh, asynchronous=asynchronous, keep_last=2, on_point=on_point, file_bytes=128)
    errors = []
    for step in (1, 2, 3):
        full[0] = step == 2
        values = Values(mesh, step)
        saver.save(step, values.boxes(), {})
        saver.before_update()
        values.spoil()
        saved = saver.finish()
        assert (saved.path is None) == (step == 2), saved
        errors.append(saved.error)
        if step == 2:
            assert not list(root.glob("step-00000002*"))
            assert (root / "latest").read_text() == "step-00000001\n"
    for step in (1, 3):
        Values(mesh).check(root / f"step-{step:08d}", mesh, step)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    return errors


FAILURES = [
    (1, "before write rank-00001-00000.safetensors"),
    (1, "after write rank-00001-00001.safetensors"),
    (1, "before fsync rank-00001-00000.safetensors"),
    (0, "before mkdir step-00000002.tmp"),
    (0, "before open manifest.json"),
    (0, "before rename step-00000002.tmp"),
]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("failing", "point"), FAILURES)
def test_a_full_disk_costs_one_checkpoint(ranks, tmp_path, asynchronous, failing, point):
    first, second = ranks.run(2, save_around_a_failure, tmp_path, asynchronous, failing, point)
    assert first == second
    assert first[0] == first[2] == ""
    assert first[1] == f"rank {failing} could not save {tmp_path / 'step-00000002'}: [Errno 28] No space left on device"


def fail_after(root: Path, point: str) -> Any:
    """How a save ended in which rank 0 failed at `point`, when it already had its name."""
    mesh = ParallelMesh()

    def on_point(name: str) -> None:
        if name == point:
            raise OSError(5, "Input/output error")

    Values(mesh, 1)
    for step, watch in ((1, None), (2, on_point)):
        saver = Saver(root, mesh, asynchronous=True, keep_last=1, on_point=watch)
        saver.save(step, Values(mesh, step).boxes(), {})
        saved = saver.finish()
    Values(mesh).check(root / "step-00000002", mesh, 2)
    return saved.error if saved.path is not None else f"not saved: {saved.error}"


@pytest.mark.parametrize("point", ["before rename latest.tmp", "before remove step-00000001.old.tmp"])
def test_what_fails_after_the_rename_is_told_and_the_checkpoint_stays(ranks, tmp_path, point):
    first, second = ranks.run(2, fail_after, tmp_path, point.format(root=tmp_path.name))
    assert first == second
    assert "is saved, but rank 0 failed afterwards: [Errno 5]" in first
    assert (tmp_path / "step-00000001").exists() == ("remove" not in point)


def test_a_name_that_may_be_lost_is_not_announced(ranks, tmp_path):
    """Nor does the checkpoint before it go, although this one would load."""
    first, second = ranks.run(2, fail_after, tmp_path, f"before fsync of {tmp_path.name} after rename step-00000002")
    assert first == second and first.startswith("not saved: rank 0 could not save") and "[Errno 5]" in first
    assert (tmp_path / "step-00000001").exists()


class Odd(BaseException):
    pass


def test_no_kind_of_exception_is_lost_in_the_thread(tmp_path):
    mesh = ParallelMesh()
    for error, told in ((Odd("what\never"), "Odd: what ever"), (MemoryError(), "MemoryError: "), (SystemExit(3), "SystemExit: 3")):

        def on_point(name: str, error: BaseException = error) -> None:
            if name == "after open rank-00000-00000.safetensors":
                raise error

        saver = Saver(tmp_path, mesh, asynchronous=True, on_point=on_point)
        saver.save(1, Values(mesh).boxes(), {})
        saver.before_update()
        saved = saver.finish()
        assert saved.error == f"rank 0 could not save {tmp_path / 'step-00000001'}: {told}"
        assert not list(tmp_path.iterdir())


def test_a_box_that_cannot_be_read_does_not_hang_the_update(tmp_path):
    mesh = ParallelMesh()
    (box, *others) = Values(mesh).boxes()
    broken = type(box)(box.kind, box.piece, True, box.dtype, lambda: [][0], box.write)
    saver = Saver(tmp_path, mesh, asynchronous=True)
    saver.save(1, [*others, broken], {})
    saver.before_update()
    assert "IndexError: list index out of range" in saver.finish().error


def overlap(root: Path) -> list[Any]:
    """A rank whose thread is held, and what the other sees of it."""
    mesh, release = ParallelMesh(), threading.Event()

    def on_point(name: str) -> None:
        if mesh.world.rank == 1 and name == "before open rank-00001-00000.safetensors":
            assert release.wait(20)

    saver = Saver(root, mesh, asynchronous=True, on_point=on_point)
    values = Values(mesh, 1)
    saver.save(1, values.boxes(), {})
    saver.before_update()
    values.spoil()
    if mesh.world.rank == 1:
        assert saver.ended == 0.0
        assert saver.snapshot_bytes == sum(box.bytes for box in values.boxes() if box.owned)
    assert saver.pending
    release.set()
    earlier = saver.save(2, Values(mesh, 2).boxes(), {})  # ends the first one before
    assert (earlier.step, earlier.error) == (1, "")
    while saver.ended == 0.0:
        pass
    assert saver.pending
    assert saver.snapshot_bytes == 0
    saved = saver.commit()
    for step in (1, 2):
        Values(mesh).check(root / f"step-{step:08d}", mesh, step)
    return [earlier, saved]


def test_one_save_at_a_time(ranks, tmp_path):
    first, second = ranks.run(2, overlap, tmp_path)
    assert first == second
    assert all(saved.stall <= saved.seconds for saved in first)


def test_an_existing_checkpoint_is_refused(ranks, tmp_path):
    mesh = ParallelMesh()
    for asynchronous in (False, True):
        saver = Saver(tmp_path, mesh, asynchronous=asynchronous)
        saver.save(1, Values(mesh, 1).boxes(), {})
        error = saver.finish().error
    assert "exists and checkpoints are never overwritten" in error
    Values(mesh).check(tmp_path / "step-00000001", mesh, 1)


def test_which_checkpoints_stay(tmp_path):
    mesh = ParallelMesh()
    saver = Saver(tmp_path, mesh, asynchronous=False, keep_last=2, keep_every=10)
    for step in (5, 10, 15, 20, 25):
        saver.save(step, Values(mesh, step).boxes(), {})
        saver.finish()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000010", "step-00000020", "step-00000025"]
    assert (tmp_path / "latest").read_text() == "step-00000025\n"
    saver.save(7, Values(mesh, 7).boxes(), {})  # what went back to an earlier step keeps what it saves
    assert saver.finish().error == ""
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000007", "step-00000010", "step-00000020", "step-00000025"]
    for name in ("keep_last", "keep_every"):
        with pytest.raises(ValueError, match=f"{name}=0 must be 1 or more"):
            Saver(tmp_path, mesh, asynchronous=False, **{name: 0})


def test_the_state_must_be_json(tmp_path):
    saver = Saver(tmp_path, ParallelMesh(), asynchronous=True)
    with pytest.raises(TypeError):
        saver.save(1, [], {"path": Path()})
    assert not saver.pending


def test_the_manifest_tells_who_wrote_it(ranks, tmp_path):
    ranks.run(2, save_one, tmp_path, True)
    manifest = read_manifest(tmp_path / "step-00000003")
    assert manifest["layout"] == {"tp": 1, "dp": 2, "pp": 1}
    assert manifest["versions"].keys() == {"megapar", "torch"}
    assert json.loads((tmp_path / "step-00000003" / "manifest.json").read_text())["format"] == "megapar-checkpoint-2"
