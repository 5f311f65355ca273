"""The ranks of a job, arranged in a grid: `ParallelMesh`, and one `Axis` per direction of it.

Rank order is Megatron's (arXiv:2104.04473, section 3.1): `tp` varies fastest, so that a tensor-parallel group sits on neighbouring
devices, then `dp`, and `pp` is outermost. An axis of size 1 has no process group and communicates nothing, so that the same model
file runs in plain `python`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megapar.channels import Channels, connect_channels
from megapar.shared_memory import SharedMemory, connect

DP_TAGS = REDUCE, GATHER = 1, 2
"""Of collectives along dp that keep one order on all ranks, each for itself."""


@dataclass(frozen=True, eq=False)
class Axis:
    """This rank's view of one direction of the mesh.

    `ranks` are the global ranks along the axis, `rank` is this process's position among them, and `group` is the process group that
    joins them: None for an axis of size 1, and for one that only describes a layout and never communicates. `timeout` is that of the
    group, for the groups made from it. If the ranks are on one host's CPUs, collectives go through `memory`, one for each tag, of which
    they keep one order on all ranks, and messages through `channels`.
    """

    name: str
    rank: int
    size: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None = None
    timeout: timedelta | None = None
    memory: Mapping[int, SharedMemory] = field(default_factory=dict, repr=False)
    channels: Channels | None = field(default=None, repr=False)
    _subsets: dict[tuple[int, ...], Axis] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict[int, object]) -> Axis:
        # Process groups cannot be copied, and a copied layer lives on the same ranks.
        return self

    @staticmethod
    def single(name: str) -> Axis:
        """An axis of size 1."""
        return Axis(name, 0, 1, (dist.get_rank() if dist.is_initialized() else 0,))

    @staticmethod
    def layout(name: str, rank: int, size: int) -> Axis:
        """Rank `rank` of `size` without processes: enough to build a layer's shard, not to run it."""
        return Axis(name, rank, size, tuple(range(size)))

    def subset(self, members: Sequence[int]) -> Axis:
        """The axis that joins only `members`, positions on this one; this rank must be among them.

        Every member must ask for it, in the same order as its other subsets. Made once and kept.
        """
        key = tuple(members)
        if self.rank not in key:
            raise ValueError(f"rank {self.rank} of axis {self.name} is not in the subset {key}: ask for a subset on its members only")
        if len(key) == self.size:
            return self
        if key not in self._subsets:
            ranks = tuple(self.ranks[i] for i in key)
            group = None
            if len(key) > 1 and self.group is not None:
                group = dist.new_group(list(ranks), timeout=self.timeout, use_local_synchronization=True)
            self._subsets[key] = Axis(self.name, key.index(self.rank), len(key), ranks, group, self.timeout)
        return self._subsets[key]

    def subsets(self) -> list[Axis]:
        """Those that `subset` has made so far."""
        return list(self._subsets.values())


TensorParallel = Axis | DeviceMesh | dist.ProcessGroup | None


def as_axis(tp: TensorParallel, name: str = "tp") -> Axis:
    """The Axis for what a user passed as `tp=`: an Axis, one dimension of a DeviceMesh, a ProcessGroup, or None (size 1)."""
    if tp is None:
        return Axis.single(name)
    if isinstance(tp, Axis):
        return tp
    if isinstance(tp, ParallelMesh):
        raise TypeError("tp= got a ParallelMesh, which has several axes: pass mesh.tp")
    if isinstance(tp, DeviceMesh):
        if tp.ndim != 1:
            raise ValueError(f"tp= got a DeviceMesh with {tp.ndim} dimensions and needs one: pass mesh['tp']")
        tp = tp.get_group()
    if isinstance(tp, dist.ProcessGroup):
        return Axis(name, dist.get_rank(tp), tp.size(), tuple(dist.get_process_group_ranks(tp)), tp)
    raise TypeError(f"tp= got a {type(tp).__name__}: pass an Axis (mesh.tp), a 1-D DeviceMesh, a ProcessGroup or None")


class ParallelMesh:
    """The grid of ranks: `mesh.tp`, `mesh.dp`, `mesh.pp` and `mesh.world` are axes; `dp` fills the world. `mesh.pp_ends` joins the first
    and the last pipeline rank, which share tied embeddings.

    Under torchrun it initialises the default process group if nobody did (NCCL for CUDA tensors, gloo otherwise) and sets the CUDA
    device; without torchrun the world is one process. `timeout` bounds how long a collective waits for a rank that died or hangs.
    Raises ValueError, before anything is initialised, when the sizes do not divide the world.
    """

    def __init__(
        self, *, tp: int = 1, pp: int = 1, device: torch.device | str | None = None, timeout: timedelta = timedelta(seconds=60)
    ) -> None:
        world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
        dp = data_parallel_size(world_size, tp=tp, pp=pp)
        self.device = torch.device(device) if device is not None else _local_device()
        self.store: dist.Store | None = None
        self._owns_world = False
        if world_size > 1:
            if not dist.is_initialized():
                self._join_world(timeout)
            # It outlives a broken process group: through it the survivors learn which rank is gone, and why (failures.py).
            self.store = self.store or dist.distributed_c10d._get_default_store()
            self.store.set(f"megapar/process/{dist.get_rank()}", f"{socket.gethostname()} {os.getpid()}")
        rank = dist.get_rank() if world_size > 1 else 0
        group = dist.group.WORLD if world_size > 1 else None
        self.world = Axis("world", rank, world_size, tuple(range(world_size)), group, timeout)
        self.tp = self._axis("tp", [[start + i for i in range(tp)] for start in range(0, world_size, tp)], timeout)
        self.tp = self._with_memory(self.tp, (0,))
        self.dp = self._axis("dp", [[p * tp * dp + i + j * tp for j in range(dp)] for p in range(pp) for i in range(tp)], timeout)
        self.dp = self._with_memory(self.dp, DP_TAGS)
        self.pp = self._axis("pp", [[i + p * tp * dp for p in range(pp)] for i in range(tp * dp)], timeout)
        self.pp = self._with_memory(self.pp, (), channels=True)
        # Made on every rank, though only some are in one: torch names a group made by its members alone after how many groups they have.
        ends = [[i, i + (pp - 1) * tp * dp] for i in range(tp * dp)] if pp > 2 else []
        self.pp_ends = self.pp if pp <= 2 else self._axis("pp_ends", ends, timeout)

    @classmethod
    def alone(cls, device: torch.device | str | None = None) -> ParallelMesh:
        """A mesh of this process by itself, whatever world it lives in: every axis has size 1."""
        mesh = cls.__new__(cls)
        mesh.device = torch.device(device) if device is not None else _local_device()
        mesh.store, mesh._owns_world = None, False
        mesh.world, mesh.tp, mesh.dp, mesh.pp = (Axis.single(name) for name in ("world", "tp", "dp", "pp"))
        mesh.pp_ends = mesh.pp
        return mesh

    def __repr__(self) -> str:
        return f"ParallelMesh(tp={self.tp.size}, dp={self.dp.size}, pp={self.pp.size}, rank={self.world.rank}, device={self.device})"

    def close(self) -> None:
        """Leaves the world, if this mesh initialised it."""
        if self._owns_world and dist.is_initialized():
            dist.destroy_process_group()
            self._owns_world = False

    def _join_world(self, timeout: timedelta) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        self.store = store
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        prefixed = dist.PrefixStore("megapar", store)
        dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world_size, timeout=timeout)
        self._owns_world = True

    def _with_memory(self, axis: Axis, tags: Sequence[int], channels: bool = False) -> Axis:
        """The axis with memory for collectives of these tags, and for messages, where its ranks can share any."""
        if axis.group is None or axis.timeout is None or self.device.type != "cpu" or dist.get_backend(axis.group) != "gloo":
            return axis
        place = axis.rank, axis.size, axis.group, axis.timeout.total_seconds()
        made = {tag: connect(*place, len(tags)) for tag in tags}
        memory = {tag: shared for tag, shared in made.items() if shared is not None}
        return replace(axis, memory=memory, channels=connect_channels(*place) if channels else None)

    def _axis(self, name: str, grid: list[list[int]], timeout: timedelta) -> Axis:
        """The row of `grid` that holds this rank, else an axis of 1. Every rank makes every group, in one order, as new_group demands."""
        mine = Axis.single(name)
        for ranks in grid:
            group: dist.ProcessGroup | None = None
            if len(ranks) == self.world.size:
                group = self.world.group
            elif len(ranks) > 1:
                group = dist.new_group(ranks, timeout=timeout)
            if self.world.rank in ranks:
                mine = Axis(name, ranks.index(self.world.rank), len(ranks), tuple(ranks), group, timeout)
        return mine


def data_parallel_size(world_size: int, *, tp: int, pp: int = 1) -> int:
    """How many data-parallel replicas a world of `world_size` ranks holds. Raises ValueError when the sizes do not divide it."""
    for name, size in (("tp", tp), ("pp", pp)):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size} is not a size: it must be a whole number of ranks, 1 or more")
    if world_size % (tp * pp):
        more = -(-world_size // (tp * pp)) * tp * pp
        raise ValueError(
            f"tp={tp} x pp={pp} must divide the world, which has {world_size} rank{'s' if world_size > 1 else ''}: "
            f"start {more} (torchrun --nproc-per-node {more}, or megapar train --nproc {more}) or lower tp or pp"
        )
    return world_size // (tp * pp)


def _local_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
