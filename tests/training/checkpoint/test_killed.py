"""A rank that is killed at any point of a save: what has the name of a checkpoint is one, bit for bit, and the next run saves again."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megapar import ParallelMesh
from megapar.training.checkpoint import Saver, checkpoints
from megapar.transport import CommunicationError
from tests.training.checkpoint.values import Values

WORLD = 2
FAILED, BROKEN = 3, 4
NAMED = "after rename step-00000002.tmp"
HOW: dict[str, Any] = {"keep_last": 1, "file_bytes": 320}


def saves(root: Path, rank: int, killed: int, point: str | None) -> list[str]:
    """Saves steps 1 and 2 and dies at `point` of the latter, on rank `killed`; the points that this rank came to."""
    mesh = ParallelMesh(timeout=timedelta(seconds=20))
    points: list[str] = []
    second = [False]

    def on_point(name: str) -> None:
        if second[0]:
            points.append(name)
            if rank == killed and name == point:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # the signal comes when it comes

    saver = Saver(root, mesh, asynchronous=True, on_point=on_point, **HOW)
    for step in (1, 2):
        second[0] = step == 2
        values = Values(mesh, step)
        saver.save(step, values.boxes(), {"step": step})
        saver.before_update()
        values.spoil()
        assert saver.finish().error == ""
    return points


def rank_process(root: Path, rank: int, killed: int, point: str | None) -> None:
    """What a forked process does; it never returns."""
    try:
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = f"file://{root.parent}.store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=20))
        points = saves(root, rank, killed, point)
        root.parent.with_name(f"points-{rank}.json").write_text(json.dumps(points))
    except CommunicationError:
        os._exit(FAILED)  # the other rank was killed
    except BaseException:
        traceback.print_exc()
        os._exit(BROKEN)
    os._exit(0)


def run(case: tuple[Path, int, str | None]) -> list[int]:
    """In a process that has imported everything and run no op, so that it can be forked: the ranks' exit codes."""
    root, killed, point = case
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            rank_process(root, rank, killed, point)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def check(root: Path) -> str:
    """What is a checkpoint by its name is one, the first is there until the second is; another run saves the second, where it is not."""
    mesh = ParallelMesh.alone("cpu")
    found = checkpoints(root)
    assert found, "there is no checkpoint any more"
    for path in found:
        step = int(path.name.removeprefix("step-"))
        assert Values(mesh).check(path, mesh, step) == {"step": step}
    newest = found[-1].name
    latest = (root / "latest").read_text().strip()
    assert (root / latest).is_dir() or latest == "step-00000001"
    saver = Saver(root, mesh, asynchronous=True, **HOW)
    assert not list(root.glob("*.tmp"))
    for step in (2, 3) if newest == "step-00000001" else (3,):
        saver.save(step, Values(mesh, step).boxes(), {"step": step})
        saved = saver.finish()
        assert saved.error == ""
        assert Values(mesh).check(saved.path, mesh, step) == {"step": step}
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000003"]
    return newest


@pytest.mark.slow
def test_killed_at_every_point(tmp_path):
    context = multiprocessing.get_context("forkserver")
    with context.Pool(2) as pool:
        whole = (tmp_path / "whole" / "checkpoints", -1, None)
        assert pool.map_async(run, [whole]).get(60) == [[0, 0]]
        cases, expected = [], []
        for rank in range(WORLD):
            points = json.loads((tmp_path / f"points-{rank}.json").read_text())
            assert len(points) == len(set(points)), "a point has two meanings"
            assert sum(point.startswith("before") for point in points) == sum(point.startswith("after") for point in points)
            cases += [(tmp_path / f"{rank} {point}" / "checkpoints", rank, point) for point in points]
            # Rank 1 has ended its part before rank 0 names the checkpoint.
            expected += [f"step-{1 + (rank == 0 and number >= points.index(NAMED)):08d}" for number in range(len(points))]
        assert len(cases) > 60
        told = pool.map_async(run, cases, chunksize=1).get(100)
    for (root, rank, point), newest, codes in zip(cases, expected, told, strict=True):
        assert codes[rank] == -signal.SIGKILL, f"rank {rank} never came to {point}"
        assert codes[1 - rank] in (0, FAILED), f"rank {1 - rank} at {point}"
        assert check(root) == newest, point
