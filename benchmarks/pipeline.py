"""The pipeline runtime against its simulation, with sleeps for compute.

python -m benchmarks.pipeline --sleeps     with sleeps alone
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn

from benchmarks.common import Contender, Grid, Verdict, interleaved, report, start
from megapar.grads import MainGrads, accumulate, put
from megapar.mesh import ParallelMesh
from megapar.pipeline.kinds import make_schedule
from megapar.pipeline.runtime import PipelineRunner
from megapar.pipeline.schedule import Schedule
from megapar.pipeline.simulate import Costs, simulate

SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("zero_bubble", 1), ("zero_bubble", 2))
SLEEPS = Costs(forward=0.024, input_gradient=0.032, weight_gradient=0.020)
"""Seconds."""
SLEEPERS, MICRO_BATCHES = 4, 8
NEAR = 0.02


def sleep(seconds: float) -> None:
    """Not longer than it says: the last millisecond is waited for awake, since a sleeper is woken up to 0.5 ms late."""
    end = time.perf_counter() + seconds
    time.sleep(seconds - 1e-3)
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

    return Contender(name, lambda data: data, step)


def asleep(costs: Costs, repeats: int) -> tuple[list[list[list[float]]], list[float], list[int]]:
    """In one rank: (wall and CPU seconds by repeat and schedule, simulated seconds, actions of the busiest rank)."""
    mesh = ParallelMesh(pp=dist.get_world_size())
    schedules = [make_schedule(kind, mesh.pp.size, chunks, MICRO_BATCHES, costs=costs) for kind, chunks in SCHEDULES]
    found = [sleeping(schedule, mesh, costs, str(key)) for schedule, key in zip(schedules, SCHEDULES, strict=True)]
    seconds = interleaved(found, lambda repeat: [torch.randn(2, 4) for _ in range(MICRO_BATCHES)], repeats=repeats, inner=1, warmup=1)
    return seconds.tolist(), [simulate(s, costs).makespan for s in schedules], [max(map(len, s.ranks)) for s in schedules]


def grid_of_sleeps(seconds: Tensor, simulated: Sequence[float], actions: Sequence[int]) -> tuple[Grid, list[Verdict]]:
    rows, bars = [], []
    wall, cpu = seconds.median(dim=1).values.tolist()
    for i, (kind, chunks) in enumerate(SCHEDULES):
        name = f"{kind}, {chunks} chunk{'s' * (chunks > 1)}"
        rows.append(
            [name, f"{1e3 * wall[i]:.1f}", f"{1e3 * simulated[i]:.1f}", f"{wall[i] / simulated[i]:.4f}", f"{1e6 * cpu[i] / actions[i]:.0f}"]
        )
        bars.append(Verdict(f"asleep, {name}: measured / simulated step, from 1", abs(wall[i] / simulated[i] - 1), at_most=NEAR))
    columns = ["schedule", "measured ms", "simulated ms", "ratio", "host us / action"]
    return Grid(f"Sleeps for compute: pp={SLEEPERS}, {MICRO_BATCHES} micro-batches", columns, rows), bars


def main(sleeps: bool = False, repeats: int = 7) -> None:
    """Measures, prints, writes results/pipeline.json.

    Args:
        sleeps: with sleeps alone.
        repeats: measurements of each contender, at least 7.
    """
    listed, simulated, actions = start(SLEEPERS, asleep, SLEEPS, repeats)[0]
    seconds = torch.tensor(listed, dtype=torch.float64)
    grid, bars = grid_of_sleeps(seconds, simulated, actions)
    report("pipeline", [grid], bars, {}, {"asleep": {"seconds": listed, "simulated": simulated}})


if __name__ == "__main__":
    tyro.cli(main)
