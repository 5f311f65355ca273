"""Checkpoints: how long a save takes, how long training waits for one in the background, a load, and the memory of each.

    python -m benchmarks.checkpoint

A decoder of 98 M parameters with fp32 AdamW, 1.2 GB of weights and moments, in one process and in two with ZeRO-1, a thread each. A
step is a forward and a backward of 128 tokens and an update. Every repeat runs all contenders, in a rotating order:

limit          the same bytes written to one file a rank, and one fsync: nothing hashed
megapar        Saver, several files a rank, hashed; asynchronous: until the checkpoint has its name, steps go on meanwhile
torch          torch.distributed.checkpoint's save and async_save of the same tensors, two threads, staged in a thread where it can be

seconds        until the save is durable, or the load done; files are in the page cache then
GB/s           of weights and moments, all ranks together
stall          seconds that training stood in calls of the save, on the rank that stood longest
extra          seconds that the steps until it was durable took longer than as many steps of the same repeat without a save: on as
               many cores as ranks a save in the background is paid there
MB             memory at the peak beyond what the process held before, in the background beyond the peak of a step, of the fullest rank
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks.common import Grid, Verdict, report, start
from megapar.batch import TokenBatch
from megapar.mesh import ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.models.pipelined import PipelinedDecoder
from megapar.training.checkpoint import Saver, load_checkpoint
from megapar.training.checkpoint.tensor_file import memory
from megapar.training.config import OptimizerConfig, ParallelConfig
from megapar.training.memory import MemoryPeak
from megapar.training.step import TrainStep, zero

LIMIT, OURS, TORCH = "limit", "megapar", "torch"
ASYNC = ", asynchronous"
SAVES = (LIMIT, OURS, OURS + ASYNC, TORCH, TORCH + ASYNC)
LOADS = (OURS, TORCH)
CHUNK = 64 << 20


@dataclass(frozen=True)
class Sizes:
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 2048
    vocab: int = 8192
    s: int = 128

    @property
    def config(self) -> DecoderConfig:
        return DecoderConfig(hidden_size=self.hidden, layers=self.layers, heads=self.heads, ffn_size=self.ffn)


@dataclass
class Took:
    """Seconds of a save: all of it, those that training stood, those that the steps meanwhile took longer."""

    seconds: float
    stall: float = 0.0
    extra: float = 0.0


class Bench:
    """In a rank: the training, and the ways to save and load it."""

    def __init__(self, sizes: Sizes, root: Path) -> None:
        torch.manual_seed(0)
        self.sizes, self.root, self.number = sizes, root, 0
        self.mesh = ParallelMesh()
        self.group = dist.new_group(backend="gloo")  # of torch's thread, whose collectives must not meet the training's
        make = zero(OptimizerConfig(), self.mesh, ParallelConfig(dp=self.mesh.dp.size, zero_stage=1))
        self.train = TrainStep(PipelinedDecoder(sizes.config, sizes.vocab, self.mesh, optimize=make), self.mesh)
        self.bytes = agreed(float(sum(box.bytes for box in self.train.optimizer.boxes() if box.owned)), dist.ReduceOp.SUM)

    def step(self, before_update: Callable[[], Any] = lambda: None) -> None:
        generator = torch.Generator().manual_seed(self.number + self.mesh.world.rank)
        tokens = torch.randint(0, self.sizes.vocab, (1, self.sizes.s + 1), generator=generator)
        self.train.accumulate([TokenBatch.of(tokens[:, :-1], tokens[:, 1:].contiguous())])
        before_update()
        self.train.update(1e-5)

    def tensors(self) -> dict[str, Tensor]:
        """What this rank owns, by names of its own."""
        return {f"{b.kind}/{b.piece.name}@{b.piece.start}": b.read() for b in self.train.optimizer.boxes() if b.owned}

    def folder(self) -> Path:
        self.number += 1
        return self.root / f"save-{self.number}"

    def save(self, name: str, folder: Path) -> Took:
        """One save, timed after a barrier."""
        dist.barrier()
        begin = time.perf_counter()
        if name.endswith(ASYNC):
            return self._ours_asynchronous(folder) if name.startswith(OURS) else self._torch_asynchronous(folder)
        if name == LIMIT:
            self._plain(folder)
        elif name == TORCH:
            dcp.save(self.tensors(), storage_writer=writer(folder))
        else:
            saver = Saver(folder, self.mesh, asynchronous=False)
            saver.save(1, self.train.optimizer.boxes(), {})
            told = saver.finish()
            assert told is not None and told.path is not None, told
        seconds = agreed(time.perf_counter() - begin)
        return Took(seconds, seconds, seconds)

    def _plain(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        with open(folder / f"{self.mesh.world.rank}", "wb", buffering=0) as file:
            for tensor in self.tensors().values():
                whole = memory(tensor)
                for at in range(0, len(whole), CHUNK):
                    file.write(whole[at : at + CHUNK])
            os.fsync(file.fileno())

    def _meanwhile(self, before_update: Callable[[], Any], ended: Callable[[], float]) -> int:
        """Steps until every rank has ended; their number."""
        self.step(before_update)
        steps = 1
        while agreed(ended(), dist.ReduceOp.SUM) < self.mesh.world.size:
            self.step()
            steps += 1
        return steps

    def plain_step(self) -> float:
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(2):
            self.step()
        return agreed(time.perf_counter() - begin) / 2

    def _ours_asynchronous(self, folder: Path) -> Took:
        plain = self.plain_step()
        saver = Saver(folder, self.mesh, asynchronous=True)
        begin = time.perf_counter()
        saver.save(1, self.train.optimizer.boxes(), {})
        steps = self._meanwhile(saver.before_update, lambda: saver.ended)
        told = saver.commit()
        assert told.path is not None, told
        return Took(told.seconds, told.stall, agreed(time.perf_counter() - begin) - steps * plain)

    def _torch_asynchronous(self, folder: Path) -> Took:
        plain = self.plain_step()
        options = StagingOptions(use_pinned_memory=False, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=False)
        stager = DefaultStager(options)
        begin = time.perf_counter()
        response: Any = dcp.async_save(self.tensors(), storage_writer=writer(folder), async_stager=stager, process_group=self.group)
        stall = time.perf_counter() - begin

        def staged() -> None:
            nonlocal stall
            entry = time.perf_counter()
            response.staging_completion.result()
            stall += time.perf_counter() - entry

        done = response.upload_completion
        steps = self._meanwhile(staged, lambda: float(done.done()))
        done.result()
        seconds = agreed(time.perf_counter() - begin)
        stager.close()
        return Took(seconds, agreed(stall), seconds - steps * plain)

    def load(self, name: str, folder: Path) -> float:
        dist.barrier()
        begin = time.perf_counter()
        if name == OURS:
            load_checkpoint(folder / "step-00000001", self.train.optimizer.boxes(), self.mesh)
        else:
            dcp.load(self.tensors(), storage_reader=dcp.FileSystemReader(folder))
        seconds = agreed(time.perf_counter() - begin)
        self.train.optimizer.loaded()
        return seconds

    def remove(self, folder: Path) -> None:
        dist.barrier()
        if self.mesh.world.rank == 0:
            shutil.rmtree(folder)
        dist.barrier()


def writer(folder: Path) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(folder, single_file_per_rank=False, thread_count=2)


def agreed(value: float, how: Any = dist.ReduceOp.MAX) -> float:
    """Over the ranks."""
    told = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(told, how)
    return float(told)


def peaks(sizes: Sizes, root: str, name: str) -> tuple[float, float]:
    """In a rank of a launch that does nothing else: bytes at the peak of a save, and of a load, of the fullest rank."""
    warnings.filterwarnings("ignore")
    bench = Bench(sizes, Path(root))
    bench.plain_step()
    peak = MemoryPeak(bench.mesh.device)
    if name.endswith(ASYNC):
        bench.plain_step()
    step = agreed(float(peak.bytes()))
    folder, peak = bench.folder(), MemoryPeak(bench.mesh.device)
    bench.save(name, folder)
    saving = agreed(float(peak.bytes())) - step
    peak = MemoryPeak(bench.mesh.device)
    if name in LOADS:
        bench.load(name, folder)
    loading = agreed(float(peak.bytes()))
    bench.remove(folder)
    return saving, loading


def measure(sizes: Sizes, root: str, repeats: int) -> dict[str, Any]:
    """In a rank: bytes; seconds, stalls and extras of each save, and seconds of each load, by repeat."""
    warnings.filterwarnings("ignore")
    bench = Bench(sizes, Path(root))
    for _ in range(2):
        bench.step()
    saves: dict[str, list[list[float]]] = {name: [] for name in SAVES}
    loads: dict[str, list[float]] = {name: [] for name in LOADS}
    for repeat in range(-1, repeats):
        for i in range(len(SAVES)):
            name = SAVES[(i + repeat) % len(SAVES)]
            folder = bench.folder()
            took = bench.save(name, folder)
            loaded = bench.load(name, folder) if name in LOADS else 0.0
            bench.remove(folder)
            if repeat >= 0:
                saves[name].append([took.seconds, took.stall, took.extra])
                if name in LOADS:
                    loads[name].append(loaded)
    shard = agreed(sum(box.bytes for box in bench.train.optimizer.boxes() if box.owned))
    return {"bytes": bench.bytes, "shard": shard, "saves": saves, "loads": loads}


def tables(ranks: int, told: dict[str, Any]) -> tuple[list[Grid], list[Verdict]]:
    """The tables of a launch, and whether it keeps to the bars."""
    saves = {name: torch.tensor(values, dtype=torch.float64) for name, values in told["saves"].items()}
    size = told["bytes"]

    def against(name: str, column: int, other: str, other_column: int = 0) -> float:
        return float((saves[name][:, column] / saves[other][:, other_column]).median())

    rows = []
    for name, values in saves.items():
        seconds, stall, extra = (float(column.median()) for column in values.T)
        peak = told["peaks"].get(name, (None, None))[0]
        waits = [f"{stall:.3f}", f"{extra:.2f}"] if name.endswith(ASYNC) else ["", ""]
        rate = f"{size / seconds / 1e9:.2f}"
        needs = "" if peak is None else f"{peak / 1e6:.0f}"
        rows.append([name, f"{seconds:.2f}", rate, f"{against(name, 0, LIMIT):.2f}", *waits, needs])
    where = "one process" if ranks == 1 else f"{ranks} ranks, ZeRO-1"
    title = f"Saves, {where}: {size / 1e9:.2f} GB, {told['shard'] / 1e6:.0f} MB of the fullest rank"
    saved = Grid(title, ["contender", "seconds", "GB/s", "/ limit", "stall", "extra", "MB"], rows)
    rows = []
    for name, listed in told["loads"].items():
        seconds = float(torch.tensor(listed).median())
        rows.append([name, f"{seconds:.2f}", f"{size / seconds / 1e9:.2f}", f"{told['peaks'][name][1] / 1e6:.0f}"])
    loaded = Grid(f"Loads, {where}", ["contender", "seconds", "GB/s", "MB"], rows)
    bars = [
        Verdict(f"{where}: stall of an asynchronous save / a synchronous one", against(OURS + ASYNC, 1, OURS), at_most=0.05),
        Verdict(f"{where}: stall of an asynchronous save / torch's", against(OURS + ASYNC, 1, TORCH + ASYNC, 1), at_most=1.0),
        Verdict(f"{where}: memory of a synchronous save / 64 MiB", told["peaks"][OURS][0] / CHUNK, at_most=3.0),
        Verdict(f"{where}: memory of a load / 64 MiB", told["peaks"][OURS][1] / CHUNK, at_most=3.0),
    ]
    return [saved, loaded], bars


def main(repeats: int = 7, worlds: tuple[int, ...] = (1, 2), folder: Path | None = None) -> None:
    """Measures, prints, writes results/checkpoint.json.

    Args:
        repeats: saves of each contender, at least 7.
        worlds: numbers of ranks.
        folder: on the disk that is measured; by default the system's for temporary files.
    """
    grids, bars, samples = [], [], {}
    for ranks in worlds:
        with tempfile.TemporaryDirectory(dir=folder) as root:
            told = start(ranks, measure, Sizes(), root, repeats, timeout=1800)[0]
            told["peaks"] = {name: start(ranks, peaks, Sizes(), root, name)[0] for name in SAVES if name != LIMIT}
        found, verdicts = tables(ranks, told)
        grids += found
        bars += verdicts
        samples[f"{ranks}"] = told
    report("checkpoint", grids, bars, {}, samples)


if __name__ == "__main__":
    tyro.cli(main)
