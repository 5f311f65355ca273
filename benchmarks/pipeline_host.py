"""The pipeline runtime without a model: against its simulation, with sleeps for compute; its host time against torch's.

Asleep, every F, I and W takes the time that it is given, so ranks may be more than cores. The limit is the simulated makespan, without
communication; the bar is 2 % above it. Twice, the second time with sleeps three times as long: what is above the limit is then seen to be
the host's and the messages' time, which does not grow with them. `host us / action`: CPU time of a step (all threads, without the
millisecond at the end of each sleep that is waited for awake), for each action, sends and receives too.

us / action  wall (CPU) time of a step of layers that do next to nothing, for each F and B: what the host needs, messages included
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from benchmarks.common import Contender, Grid, Verdict, interleaved
from megapar.grads import MainGrads, accumulate, put
from megapar.mesh import ParallelMesh
from megapar.pipeline.kinds import make_schedule
from megapar.pipeline.runtime import PipelineRunner
from megapar.pipeline.schedule import Schedule
from megapar.pipeline.simulate import Costs, simulate

OURS = "megapar"
SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("zero_bubble", 1), ("zero_bubble", 2))
SLEEPS = Costs(forward=0.024, input_gradient=0.032, weight_gradient=0.020)
"""Seconds."""
SCALES = (1, 3)
"""Of the sleeps."""
SLEEPERS, MICRO_BATCHES = 4, 8
NEAR = 0.02
AWAKE = 1e-3


def sleep(seconds: float) -> None:
    """Not longer than it says: a sleeper is woken late, by 0.2 ms and more, so the last part is waited for awake."""
    end = time.perf_counter() + seconds
    time.sleep(seconds - AWAKE)
    while time.perf_counter() < end:
        pass


class _Sleep(torch.autograd.Function):
    """Computes nothing, for as long as `costs` say: the gradient of the weight too, when it is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, costs: Costs) -> Tensor:
        ctx.weight, ctx.costs = weight, costs
        sleep(costs.forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, costs = ctx.weight, ctx.costs

        def write(main_grad: Tensor, beta: float) -> None:
            sleep(costs.weight_gradient)
            put(main_grad, beta, torch.ones(1))

        sleep(costs.input_gradient)
        accumulate(weight, write)
        return grad, None, None


HOST_SCHEDULES = {"1F1B": ("1f1b", 1), "Interleaved1F1B": ("interleaved_1f1b", 2)}
HOST_MICRO_BATCHES = 32
HOSTS = [f"{who} {schedule}" for schedule in HOST_SCHEDULES for who in ("megapar", "torch")]


class Sleeper(nn.Module):
    def __init__(self, costs: Costs) -> None:
        super().__init__()
        self.weight, self.costs = nn.Parameter(torch.zeros(1)), costs

    def forward(self, x: Tensor | None, micro_batch: Tensor) -> Tensor:
        return _Sleep.apply(micro_batch if x is None else x, self.weight, self.costs)


def summed(x: Tensor, micro_batch: Tensor) -> tuple[Tensor, int]:
    return x.sum(), x.numel()


def sleeping(schedule: Schedule, mesh: ParallelMesh, costs: Costs, name: str) -> Contender:
    chunks = [Sleeper(costs) for _ in range(schedule.stages // mesh.pp.size)]
    grads = MainGrads(p for chunk in chunks for p in chunk.parameters())
    runner = PipelineRunner(chunks, mesh, schedule)

    def step(data: list[Tensor]) -> None:
        grads.zero()
        runner.step(data, summed)
        grads.finish()

    return Contender(name, lambda data: data, step, extra={"runner": runner})


def asleep(scale: float, repeats: int) -> tuple[list[list[list[float]]], list[float], list[int]]:
    """In one rank: (wall and CPU seconds by repeat and schedule, simulated seconds, actions of the busiest rank)."""
    mesh = ParallelMesh(pp=dist.get_world_size())
    costs = Costs(scale * SLEEPS.forward, scale * SLEEPS.input_gradient, scale * SLEEPS.weight_gradient)
    schedules = [make_schedule(kind, mesh.pp.size, chunks, MICRO_BATCHES, costs=costs) for kind, chunks in SCHEDULES]
    found = [sleeping(schedule, mesh, costs, str(key)) for schedule, key in zip(schedules, SCHEDULES, strict=True)]
    actions = [max(map(len, one.extra["runner"].schedule.ranks)) for one in found]
    seconds = interleaved(found, lambda repeat: [torch.randn(2, 4) for _ in range(MICRO_BATCHES)], repeats=repeats, inner=1, warmup=1)
    for i, (_, chunks) in enumerate(SCHEDULES):
        seconds[1, :, i] -= AWAKE * 3 * chunks * MICRO_BATCHES
    return seconds.tolist(), [simulate(s, costs).makespan for s in schedules], actions


def grid_of_sleeps(scale: float, seconds: Tensor, simulated: Sequence[float], actions: Sequence[int]) -> tuple[Grid, list[Verdict]]:
    rows, bars = [], []
    wall, cpu = seconds.median(dim=1).values.tolist()
    times = [1e3 * scale * time for time in (SLEEPS.forward, SLEEPS.input_gradient, SLEEPS.weight_gradient)]  # type: ignore[operator]
    what = f"asleep, F, I, W {times[0]:.0f}, {times[1]:.0f}, {times[2]:.0f} ms"
    for i, (kind, chunks) in enumerate(SCHEDULES):
        name, quotient = f"{kind}, {chunks} chunk{'s' * (chunks > 1)}", wall[i] / simulated[i]
        host = f"{1e6 * cpu[i] / actions[i]:.0f}"
        rows.append([name, f"{1e3 * wall[i]:.1f}", f"{1e3 * simulated[i]:.1f}", f"{quotient:.4f}", host])
        bars.append(Verdict(f"{what}, {name}: measured / simulated step, from 1", abs(quotient - 1), at_most=NEAR))
    columns = ["schedule", "measured ms", "simulated ms", "ratio", "host us / action"]
    return Grid(f"{what[0].upper()}{what[1:]}: pp={SLEEPERS}, {MICRO_BATCHES} micro-batches", columns, rows), bars


def hosts(name: str) -> Contender:
    """The runtime alone: a small layer a stage, with messages of a few bytes."""
    kind, chunks = HOST_SCHEDULES[name.partition(" ")[2]]
    mesh, rank = ParallelMesh(pp=dist.get_world_size()), dist.get_rank()
    modules = [nn.Linear(8, 8) for _ in range(chunks)]
    pp = mesh.pp.size
    if name.startswith(OURS):
        schedule = make_schedule(kind, pp, chunks, HOST_MICRO_BATCHES)
        runner = PipelineRunner(modules, mesh, schedule, inputs=lambda micro_batch: micro_batch)
        return Contender(name, lambda x: list(x.chunk(HOST_MICRO_BATCHES)), lambda data: runner.step(data, summed))
    stages = [PipelineStage(module, rank + chunk * pp, pp * chunks, torch.device("cpu")) for chunk, module in enumerate(modules)]
    made: Any = ScheduleInterleaved1F1B if chunks > 1 else Schedule1F1B
    schedule = made(stages if chunks > 1 else stages[0], HOST_MICRO_BATCHES, loss_fn=lambda x, target: x.sum(), scale_grads=False)

    def step(x: Tensor) -> None:
        schedule.step(*[x] * (rank == 0), **({"target": x} if rank == pp - 1 else {}), return_outputs=False)

    return Contender(name, lambda x: x, step)


def host_seconds(repeats: int) -> list[list[list[float]]]:
    """In one rank: wall and CPU seconds by repeat and contender, for each F and B."""
    found = [hosts(name) for name in HOSTS]
    draw_x = lambda repeat: torch.randn(HOST_MICRO_BATCHES, 8)  # noqa: E731
    seconds = interleaved(found, draw_x, repeats=repeats, inner=2)
    for i, name in enumerate(HOSTS):
        seconds[:, :, i] /= 2 * HOST_MICRO_BATCHES * HOST_SCHEDULES[name.partition(" ")[2]][1]
    return seconds.tolist()


def grid_of_hosts(seconds: Tensor) -> Grid:
    wall, cpu = (1e6 * seconds.median(dim=1).values).tolist()
    rows = [[name, f"{w:.0f}", f"{c:.0f}"] for name, w, c in zip(HOSTS, wall, cpu, strict=True)]
    return Grid(f"Host time, pp=2, {HOST_MICRO_BATCHES} micro-batches of 8 numbers", ["for each F and B", "wall us", "CPU us"], rows)
