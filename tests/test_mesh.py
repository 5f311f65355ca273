"""The grid of ranks: order, groups, sizes that do not fit, what `tp=` may be."""

import multiprocessing
import os
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from megapar import Axis, ColumnParallelLinear, ParallelMesh
from megapar.mesh import as_axis, data_parallel_size
from tests.counting import counted


def grid() -> dict[str, tuple[int, int, tuple[int, ...], float]]:
    """Every axis of this rank, and the sum of the global ranks that its group really joins."""
    mesh = ParallelMesh(tp=2, pp=2)
    told = {}
    for axis in (mesh.tp, mesh.dp, mesh.pp, mesh.world):
        total = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(total, group=axis.group)
        assert axis.ranks[axis.rank] == dist.get_rank()
        told[axis.name] = (axis.rank, axis.size, axis.ranks, float(total))
    return told


def test_rank_order(ranks):
    """tp fastest, then dp, pp outermost: rank = (pp * dp_size + dp) * tp_size + tp."""
    for rank, told in enumerate(ranks.run(8, grid)):
        tp, dp, pp = rank % 2, rank // 2 % 2, rank // 4
        assert told["tp"] == (tp, 2, (rank - tp, rank - tp + 1), float(2 * (rank - tp) + 1))
        assert told["dp"] == (dp, 2, (rank - 2 * dp, rank - 2 * dp + 2), float(2 * (rank - 2 * dp) + 2))
        assert told["pp"] == (pp, 2, (rank - 4 * pp, rank - 4 * pp + 4), float(2 * (rank - 4 * pp) + 4))
        assert told["world"] == (rank, 8, tuple(range(8)), 28.0)


def whole_world_axes() -> None:
    """An axis as large as the world is the world's group, one of size 1 has none: the only group made joins the ends of the pipeline."""
    for sizes, filled in (({"tp": 4}, "tp"), ({"pp": 4}, "pp"), ({}, "dp")):
        with counted() as calls:
            mesh = ParallelMesh(**sizes)
        assert calls["new_group"] == (filled == "pp"), calls
        for axis in (mesh.tp, mesh.dp, mesh.pp):
            assert axis.group is (dist.group.WORLD if axis.name == filled else None)
    assert {axis.size for axis in (lambda m: (m.world, m.tp, m.dp, m.pp))(ParallelMesh.alone())} == {1}


def ends(tp: int, pp: int) -> tuple[int, ...]:
    mesh = ParallelMesh(tp=tp, pp=pp)
    assert mesh.pp_ends.ranks[mesh.pp_ends.rank] == dist.get_rank()
    if mesh.pp_ends.size > 1:
        total = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(total, group=mesh.pp_ends.group)
        assert float(total) == sum(mesh.pp_ends.ranks)
    return mesh.pp_ends.ranks


@pytest.mark.parametrize(
    "tp,pp,expected",
    [
        (1, 2, [(0, 1)] * 2),
        (1, 3, [(0, 2), (1,), (0, 2)]),
        (2, 3, [(0, 4), (1, 5), (2,), (3,), (0, 4), (1, 5)]),
        (2, 1, [(0,), (1,)]),
    ],
)
def test_ends_of_the_pipeline(ranks, tp, pp, expected):
    """The first and the last pipeline rank of each row share an axis; those between have one of their own."""
    assert ranks.run(tp * pp, ends, tp, pp) == expected


def test_no_needless_groups(ranks):
    ranks.run(4, whole_world_axes)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_data_parallel_size(world, tp, pp):
    if world % (tp * pp) == 0:
        assert data_parallel_size(world, tp=tp, pp=pp) * tp * pp == world
    else:
        with pytest.raises(ValueError, match="must divide the world") as error:
            data_parallel_size(world, tp=tp, pp=pp)
        more = int(str(error.value).split("start ")[1].split()[0])
        assert more % (tp * pp) == 0 and world < more < world + tp * pp


def test_bad_sizes():
    with pytest.raises(ValueError) as error:
        data_parallel_size(1, tp=2)
    assert str(error.value) == (
        "tp=2 x pp=1 must divide the world, which has 1 rank: start 2 (torchrun --nproc-per-node 2, or megapar train --nproc 2) "
        "or lower tp or pp"
    )
    for sizes, told in (({"tp": 0}, "tp=0"), ({"pp": -1}, "pp=-1"), ({"tp": 1.0}, "tp=1.0")):
        with pytest.raises(ValueError, match=f"{told} is not a size"):
            ParallelMesh(**sizes)


def too_large() -> None:
    ParallelMesh(tp=2)


def test_bad_sizes_on_all_ranks(ranks):
    expected = (
        "tp=2 x pp=1 must divide the world, which has 3 ranks: start 4 (torchrun --nproc-per-node 4, or megapar train --nproc 4) "
        "or lower tp or pp"
    )
    assert ranks.errors(3, too_large) == [expected] * 3


def subsets() -> None:
    axis = ParallelMesh(tp=4).tp
    members = [[0, 2], [1, 3]][axis.rank % 2]
    axis_of_pair = axis.subset(members)
    assert (axis_of_pair.rank, axis_of_pair.size, axis_of_pair.ranks) == (axis.rank // 2, 2, tuple(members))
    total = torch.tensor(float(axis.rank))
    dist.all_reduce(total, group=axis_of_pair.group)
    assert float(total) == sum(members)
    assert axis.subset(range(4)) is axis
    with counted() as calls:
        assert axis.subset(tuple(members)) is axis_of_pair, "made twice"
        alone = axis.subset([axis.rank])
    assert not calls, calls
    assert (alone.rank, alone.size, alone.group) == (0, 1, None)
    other = (axis.rank + 1) % 4
    with pytest.raises(ValueError, match=f"rank {axis.rank} of axis tp is not in the subset \\({other},\\)"):
        axis.subset([other])


def test_subset(ranks):
    ranks.run(4, subsets)


def subset_of_second_replica() -> None:
    """Positions on the axis are not global ranks: on ranks 4 to 7 they differ."""
    axis = ParallelMesh(tp=4).tp
    pair = axis.subset([0, 3] if axis.rank in (0, 3) else [1, 2])
    assert pair.ranks == tuple(axis.ranks[i] for i in ((0, 3) if axis.rank in (0, 3) else (1, 2)))
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total, group=pair.group)
    assert float(total) == sum(pair.ranks)


def test_subset_of_second_replica(ranks):
    ranks.run(8, subset_of_second_replica)


def what_tp_may_be() -> None:
    mesh = ParallelMesh(tp=2)
    device_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for tp in (mesh.tp, device_mesh["tp"], mesh.tp.group):
        layer = ColumnParallelLinear(3, 5, tp=tp)
        assert (layer.tp.rank, layer.tp.size, layer.tp.ranks) == (mesh.tp.rank, 2, mesh.tp.ranks)
        assert layer.weight.shape == ((3, 2)[mesh.tp.rank], 3)
    assert as_axis(None).size == 1 and as_axis(None).group is None
    assert as_axis(mesh.tp) is mesh.tp
    with pytest.raises(ValueError, match=r"DeviceMesh with 2 dimensions and needs one: pass mesh\['tp'\]"):
        as_axis(device_mesh)
    with pytest.raises(TypeError, match=r"has several axes: pass mesh\.tp"):
        as_axis(mesh)
    for wrong in (2, "tp", [0, 1]):
        with pytest.raises(TypeError, match=f"tp= got a {type(wrong).__name__}: pass an Axis"):
            as_axis(wrong)


def test_what_tp_may_be(ranks):
    ranks.run(4, what_tp_may_be)


def test_layout_axis():
    axis = Axis.layout("tp", 1, 3)
    assert (axis.rank, axis.size, axis.ranks, axis.group) == (1, 3, (0, 1, 2), None)
    assert ColumnParallelLinear(3, 7, tp=axis).weight.shape == (2, 3)


def test_alone_without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    mesh = ParallelMesh(device="cpu")
    assert not dist.is_initialized()
    assert repr(mesh) == "ParallelMesh(tp=1, dp=1, pp=1, rank=0, device=cpu)"
    mesh.close()


def torchrun_rank(pipe: Connection, rank: int, port: int) -> None:
    environ = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environ.items()}, GLOO_SOCKET_IFNAME="lo")
    mesh = ParallelMesh(tp=2, device="cpu")
    assert dist.get_backend() == "gloo" and mesh.store is not None
    total = torch.tensor(float(mesh.tp.rank + 1))
    dist.all_reduce(total, group=mesh.tp.group)
    ParallelMesh(device="cpu").close()
    assert dist.is_initialized(), "closed by a mesh that did not open it"
    mesh.close()
    mesh.close()
    pipe.send((mesh.tp.rank, float(total), dist.is_initialized()))


def test_joins_and_leaves_the_world():
    """What torchrun sets is enough; only the mesh that initialised the world leaves it."""
    port = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    context = multiprocessing.get_context("forkserver")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [context.Process(target=torchrun_rank, args=(pipes[rank][1], rank, port), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    assert [ours.recv() if ours.poll(30) else None for ours, _ in pipes] == [(0, 3.0, False), (1, 3.0, False)]
    for process in processes:
        process.join(10)
        assert process.exitcode == 0
