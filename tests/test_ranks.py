"""The rank harness itself: values, errors, deaths and hangs of rank processes."""

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, RankPool


class Point(NamedTuple):
    x: torch.Tensor
    name: str


def sum_of_ranks(scale: float, *, shift: float = 0.0) -> float:
    x = torch.full((4,), scale * dist.get_rank() + shift)
    dist.all_reduce(x)
    return x[0].item()


def environment() -> tuple[str, ...]:
    return tuple(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))


def threads() -> tuple[int, int, str]:
    return torch.get_num_threads(), torch.get_num_interop_threads(), os.environ["OMP_NUM_THREADS"]


def pid() -> int:
    return os.getpid()


def move(point: Point) -> Point:
    return Point(point.x + dist.get_rank(), point.name)


def raise_on(rank: int) -> int:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} does not like this")
    return rank


def raise_everywhere(sentence: str) -> None:
    x = torch.ones(1)
    dist.all_reduce(x)
    raise RuntimeError(f"{sentence} ({x.item():.0f} ranks)")


def raise_before_collective() -> None:
    if dist.get_rank() == 1:
        raise ValueError("not I")
    dist.all_reduce(torch.ones(1))


def exit_on(rank: int, code: int) -> None:
    if dist.get_rank() == rank:
        os._exit(code)
    dist.barrier()


def kill_on(rank: int) -> None:
    """Once all ranks have joined: one that still connects to a rank that is gone fails too."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"joined {dist.get_rank()}", "")
    if dist.get_rank() == rank:
        store.wait([f"joined {r}" for r in range(dist.get_world_size())])
        os.kill(os.getpid(), signal.SIGKILL)


def system_exit() -> None:
    raise SystemExit(3)


def skip_collective(rank: int) -> None:
    if dist.get_rank() != rank:
        dist.all_reduce(torch.ones(1))


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)
    dist.all_reduce(torch.ones(1))


def return_function() -> object:
    return lambda: None


def test_collective(ranks: RankPool) -> None:
    assert ranks.run(3, sum_of_ranks, 2.0, shift=1.0) == [9.0] * 3


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_environment_and_values_by_rank(ranks: RankPool, world_size: int) -> None:
    size = str(world_size)
    assert ranks.run(world_size, environment) == [(str(rank), size, str(rank), size) for rank in range(world_size)]
    assert "LOCAL_WORLD_SIZE" not in os.environ


def test_one_thread_per_rank(ranks: RankPool) -> None:
    assert ranks.run(2, threads) == [(1, 1, "1")] * 2


def test_types_of_the_test_module_travel(ranks: RankPool) -> None:
    moved = ranks.run(2, move, Point(torch.zeros(2), "p"))
    assert [type(point) is Point and point.x.tolist() for point in moved] == [[0.0, 0.0], [1.0, 1.0]]


def test_processes_are_kept(ranks: RankPool) -> None:
    pids = ranks.run(2, pid)
    assert ranks.run(3, pid)[:2] == pids
    assert os.getpid() not in pids
    with pytest.raises(RankError):
        ranks.run(2, raise_on, 0)
    assert ranks.run(2, pid) == pids


def test_exception_on_one_rank(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="1 of 3 ranks failed") as caught:
        ranks.run(3, raise_on, 1)
    assert list(caught.value.errors) == [1]
    assert caught.value.errors[1].type == "ValueError"
    assert caught.value.errors[1].message == "rank 1 does not like this"
    assert 'raise ValueError(f"rank {rank} does not like this")' in str(caught.value)


def test_errors_of_every_rank(ranks: RankPool) -> None:
    assert ranks.errors(3, raise_everywhere, "no") == ["no (3 ranks)"] * 3
    with pytest.raises(AssertionError, match=r"every rank of tests\.test_ranks\.raise_on .* ranks \[0, 2\] returned"):
        ranks.errors(3, raise_on, 1)


def test_failed_rank_ends_the_collectives_of_the_others(ranks: RankPool) -> None:
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        ranks.run(3, raise_before_collective)
    assert time.monotonic() - begin < 12  # less than the group timeout
    assert sorted(caught.value.errors) == [0, 1, 2]
    assert caught.value.errors[1].message == "not I"


def test_system_exit_is_an_error(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="SystemExit"):
        ranks.run(1, system_exit)


def test_value_that_cannot_travel(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="pickle"):
        ranks.run(2, return_function)


def test_death_by_exit(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="rank 2: RankDied ----\nthe process died with exit code 7"):
        ranks.run(3, exit_on, 2, 7)
    assert ranks.run(3, sum_of_ranks, 1.0) == [3.0] * 3


def test_death_by_signal(ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"the process died by signal SIGKILL \(exit code -9\)") as caught:
        ranks.run(2, kill_on, 0)
    assert list(caught.value.errors) == [0]
    assert ranks.run(2, sum_of_ranks, 1.0) == [1.0] * 2


def test_death_between_runs(ranks: RankPool) -> None:
    os.kill(ranks.run(2, pid)[1], signal.SIGKILL)
    time.sleep(0.2)
    assert ranks.run(2, sum_of_ranks, 1.0) == [1.0] * 2


@pytest.mark.parametrize("hang", [skip_collective, sleep_on])
def test_hang_shows_the_stacks_of_all_ranks(ranks: RankPool, hang) -> None:
    pids = ranks.run(3, pid)
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        ranks.run(3, hang, 1, timeout=3)
    assert time.monotonic() - begin < 3 + 15
    assert list(caught.value.errors) == [0, 1, 2]
    for rank, error in caught.value.errors.items():
        assert hang.__name__ in error.trace
        assert "most recent call first" in error.trace
        if rank != 1 or hang is sleep_on:
            assert error.type == "RankHung"
            assert f"in {hang.__name__}\n" in error.trace
    assert not any(Path("/proc", str(pid)).exists() for pid in pids)
    assert ranks.run(3, sum_of_ranks, 1.0) == [3.0] * 3


def test_only_module_level_functions(ranks: RankPool) -> None:
    with pytest.raises(TypeError, match="module-level functions only"):
        ranks.run(2, lambda: None)
    with pytest.raises(ValueError, match="1 to 8 ranks"):
        ranks.run(9, pid)
    assert ranks.run(1, os.cpu_count) == [os.cpu_count()]


def test_close_ends_the_processes() -> None:
    with RankPool() as pool:
        pids = pool.run(2, pid)
    assert not any(Path("/proc", str(pid)).exists() for pid in pids)
