"""What the benchmarks share: ranks, interleaved timing, counting, verdicts, tables and JSON."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from megapar.shared_memory import Kind, SharedMemory

RESULTS = Path(__file__).parent / "results"


class LaunchError(RuntimeError):
    """A rank failed, died or took too long; the message is its traceback or says so."""


def reason(error: LaunchError) -> str:
    """One line of it that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error: " in line), lines[-1])


def start(world: int, fn: Callable[..., Any], *args: Any, backend: str = "gloo", timeout: float = 900) -> list[Any]:
    """`fn(*args)`, a module-level function, in `world` ranks of one thread each; the values by rank.

    backend "fake" gives one process that believes it is rank 0 of `world`, with collectives that move nothing.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(1 if backend == "fake" else world):
            ours, theirs = context.Pipe()
            place = (rank, world, backend, f"{folder}/store")
            process = context.Process(target=_rank, args=(theirs, place, fn, args), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout, timeout)
        finally:
            for process in processes:
                process.join(0 if sys.exc_info()[0] else 10)
                process.kill()


def _collect(pipes: list[connection.Connection], deadline: float, timeout: float) -> list[Any]:
    values: dict[int, Any] = {}
    while len(values) < len(pipes):
        waiting = [p for i, p in enumerate(pipes) if i not in values]
        ready = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise LaunchError(f"no answer within {timeout:.0f} s")
        for i, pipe in enumerate(pipes):
            if pipe in ready:
                try:
                    error, values[i] = pipe.recv()
                except EOFError:
                    raise LaunchError(f"rank {i} died") from None
                if error:
                    raise LaunchError(error)
    return [values[i] for i in range(len(pipes))]


def _rank(pipe: connection.Connection, place: tuple[int, int, str, str], fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    rank, world, backend, path = place
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in names.items()} | {"GLOO_SOCKET_IFNAME": "lo"})
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        if backend == "fake":
            importlib.import_module("torch.testing._internal.distributed.fake_pg")  # which makes the backend known
            dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=world)
        else:
            dist.init_process_group(backend, init_method=f"file://{path}", rank=rank, world_size=world)
        pipe.send((None, fn(*args)))
        dist.destroy_process_group()
    except BaseException:
        pipe.send((traceback.format_exc(), None))


@dataclass
class Contender:
    """One way to do the same work.

    prepare: a repeat's fresh inputs to this contender's own form of them; not timed.
    step: forward + backward on what `prepare` returned.
    one_rank_threads: where set, rank 0 alone runs it, with so many threads, while the others wait.
    """

    name: str
    prepare: Callable[[Any], Any]
    step: Callable[[Any], Any]
    one_rank_threads: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


def interleaved(contenders: Sequence[Contender], draw: Callable[[int], Any], *, repeats: int, inner: int, warmup: int = 2) -> Tensor:
    """Seconds a step, [2, repeats, contenders]: wall and CPU (of all threads), of the slowest rank.

    Each repeat runs all contenders on inputs `draw(repeat)`, in an order that rotates from repeat to repeat; a measurement is `inner`
    steps after a barrier, without garbage collection.
    """
    seconds = torch.zeros(2, repeats, len(contenders), dtype=torch.float64)
    for repeat in range(-warmup, repeats):
        data = draw(repeat)
        for i in range(len(contenders)):
            at = (i + repeat) % len(contenders)
            took = _measure(contenders[at], data, inner)
            if repeat >= 0:
                seconds[:, repeat, at] = took
    if dist.get_world_size() > 1 and dist.get_backend() != "fake":
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds


def _measure(contender: Contender, data: Any, inner: int) -> Tensor:
    runs = not contender.one_rank_threads or dist.get_rank() == 0
    inputs = contender.prepare(data) if runs else None
    if contender.one_rank_threads:
        torch.set_num_threads(contender.one_rank_threads)
    gc.collect()
    gc.disable()
    dist.barrier()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    for _ in range(inner if runs else 0):
        contender.step(inputs)
    took = torch.tensor([time.perf_counter() - begin, time.process_time() - begin_cpu], dtype=torch.float64) / inner
    dist.barrier()
    gc.enable()
    torch.set_num_threads(1)
    return took


def ratio(seconds: Tensor, names: Sequence[str], top: str, bottom: str) -> float:
    """Median over the repeats of top / bottom, each taken within one repeat; seconds [repeats, contenders]."""
    return float((seconds[:, names.index(top)] / seconds[:, names.index(bottom)]).median())


@dataclass
class Counts:
    """What one step does on this rank.

    ops: aten ops below autograd; kernels: those that are neither views nor empty allocations, so that a GPU would launch them.
    sent: bytes this rank must send if every collective uses the fewest (n ranks: all-reduce 2 (n - 1) / n of the tensor,
    all-gather, reduce-scatter and all-to-all (n - 1) / n of the whole one); through shared memory, what it posts.
    """

    ops: int = 0
    kernels: int = 0
    allocations: int = 0
    collectives: int = 0
    sent: int = 0


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t is DTensor for t in types):
            return NotImplemented  # it runs next, and its local ops come back here
        if func.namespace in ("c10d", "_c10d_functional", "_dtensor"):
            name = func.name().partition("::")[2]
            # Between two ranks a send and its receive are one exchange.
            if not name.startswith(("wait_tensor", "_wrap", "monitored", "barrier", "recv")):
                self.counts.collectives += 1
                self.counts.sent += _sent(name, args)
        else:
            returns = func._schema.returns
            alias = returns[0].alias_info if returns else None
            self.counts.ops += 1
            self.counts.kernels += not ((alias is not None and not alias.is_write) or "empty" in func.name())
        return func(*args, **(kwargs or {}))


def _sent(name: str, args: Any) -> int:
    """Bytes a rank sends in one collective, by its name and its arguments (see Counts)."""
    n = dist.get_world_size()
    flat: list[Tensor] = []
    for arg in args[:2]:
        flat += [arg] if isinstance(arg, Tensor) else [t for t in arg if isinstance(t, Tensor)] if isinstance(arg, list | tuple) else []
    largest = max((t.numel() * t.element_size() for t in flat), default=0)
    if name.startswith("send"):
        return largest
    if "reduce" in name and "scatter" not in name:
        return 2 * largest * (n - 1) // n
    if name.startswith("all_gather_into_tensor"):
        return largest * (n - 1)  # the functional form is given this rank's part
    return largest * (n - 1) // n


def count(contender: Contender, data: Any) -> Counts:
    """Counts of one step."""
    inputs = contender.prepare(data)
    counter = _Counter()
    with counter, _counting_shared_memory(counter.counts):
        contender.step(inputs)
    inputs = contender.prepare(data)
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        contender.step(inputs)
    results: Any = profiled.profiler
    events = results.kineto_results.events()
    counter.counts.allocations = sum(e.name() == "[memory]" and e.nbytes() > 0 for e in events)
    return counter.counts


@contextlib.contextmanager
def _counting_shared_memory(counts: Counts) -> Iterator[None]:
    """Adds the collectives that torch does not see because they go through memory that the ranks share."""
    real = SharedMemory.start

    def start(memory: SharedMemory, kind: Kind, x: Tensor, *rest: Any) -> Any:
        counts.collectives += 1
        counts.sent += x.numel() * x.element_size()
        return real(memory, kind, x, *rest)

    with mock.patch.object(SharedMemory, "start", start):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without standard error, where the profiler writes a line at each start and stop."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


@dataclass
class Verdict:
    """Whether a measured ratio keeps to its bar."""

    bar: str
    ratio: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def holds(self) -> bool:
        if self.at_most is not None and not self.ratio <= self.at_most:
            return False
        return self.at_least is None or self.ratio >= self.at_least

    def __str__(self) -> str:
        limit = f"at most {self.at_most:.3g}" if self.at_most is not None else f"at least {self.at_least:.3g}"
        return f"{'holds' if self.holds else 'FAILS'}: {self.bar}: {self.ratio:.3g}, {limit}"


@dataclass
class Grid:
    """One table of a report."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def report(
    name: str, grids: Sequence[Grid], verdicts: Sequence[Verdict], missing: dict[str, str], samples: Any, write: bool = True
) -> None:
    """Prints the tables and, with `write`, writes results/<name>.json. `samples` are the raw numbers behind the tables."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    for grid in grids:
        table = Table(title=grid.title, title_justify="left")
        for i, column in enumerate(grid.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in grid.rows:
            table.add_row(*row)
        console.print(table)
    for line in [*map(str, verdicts), *(f"missing: {peer}: {why}" for peer, why in missing.items())]:
        console.print(line, markup=False, highlight=False)
    if not write:
        return
    RESULTS.mkdir(exist_ok=True)
    result = {
        "name": name,
        **environment(),
        "tables": [asdict(grid) for grid in grids],
        "verdicts": [asdict(v) | {"holds": v.holds} for v in verdicts],
        "missing": missing,
        "samples": samples,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Machine, date, versions and command, without paths."""
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    module = getattr(sys.modules["__main__"], "__spec__", None)
    arguments = [Path(argument).name if Path(argument).exists() else argument for argument in sys.argv[1:]]
    command = ["python", "-m", module.name if module else Path(sys.argv[0]).name, *arguments]
    return {
        "machine": {"cpu": models[0] if models else platform.machine(), "cores": os.cpu_count()},
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": " ".join(command),
    }
