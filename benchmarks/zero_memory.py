"""The bytes of tensors that a step holds at once, and the largest micro-batch that fits under a cap: benchmarks/zero.py --memory.

Gradients are reduced after every micro-batch where a contender can (DDP and ZeRO-1 keep whole ones anyway), which is what saves memory.

fits         the most sequences in a micro-batch with which a step, of two micro-batches, stays under the cap
MB at 1      tensors at once in a step with one sequence: weights, optimizer state, gradients, buffers, and its activations
MB/sequence  what each further sequence adds, up to the most that fit
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Grid, LaunchError, _quiet, reason, start
from benchmarks.zero_case import ALL_OURS, DEEPSPEED, PEERS, Case, train
from benchmarks.zero_trainers import trainer

MOST = 1024
"""Sequences."""


class Meter:
    """Bytes of tensors on the CPU that are allocated while `measuring`, C++'s included: `held` now, `peak` of the last measuring.

    Everything that a step holds is counted if it was built while measuring too. Shared memory, and what gloo allocates, are no tensors.
    The profiler sees the calling thread alone: what another one frees counts as held.
    """

    def __init__(self) -> None:
        self.held = self.peak = 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
            yield
        results: Any = profiled.profiler
        memory = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
        self.peak = self.held
        for event in sorted(memory, key=lambda event: event.start_ns()):
            self.held += event.nbytes()
            self.peak = max(self.peak, self.held)


def tensors_of(case: Case, name: str) -> Callable[[int], int]:
    """In one rank: the contender, built and run for two steps, as a function from sequences in a micro-batch to the most bytes of tensors
    in a step, of the fullest rank."""
    meter = Meter()
    with meter.measuring():
        made = trainer(case, name)
        for repeat in range(2):
            train(made, case.draw(repeat, dist.get_rank()))

    held = meter.held

    def most(b: int) -> int:
        data = replace(case, sizes=replace(case.sizes, b=b)).draw(2, dist.get_rank())
        meter.held = held  # what a step leaves is the same each time, but what gloo's threads free the profiler does not see
        with meter.measuring():
            train(made, data)
        peak = torch.tensor(meter.peak)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        return int(peak)

    return most


def search(most: Callable[[int], int], cap: int) -> tuple[int, int, int]:
    """Of a function that grows: (the largest b up to MOST with most(b) <= cap, 0 if there is none; most(1); most(b), or most(1)).

    By doubling and halving: small micro-batches all peak alike, in the update, so that no line says where the cap is.
    """
    known: dict[int, int] = {}
    fits, fails = 0, 1
    while fails <= MOST:
        known[fails] = most(fails)
        if known[fails] > cap:
            break
        fits, fails = fails, 2 * fails
    fails = min(fails, MOST + 1)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        known[middle] = most(middle)
        fits, fails = (middle, fails) if known[middle] <= cap else (fits, middle)
    return fits, known[1], known[max(fits, 1)]


def under(case: Case, name: str, cap: int) -> tuple[int, int, int]:
    """In one rank: see `search`."""
    return search(tensors_of(case, name), cap)


def grid(case: Case, ranks: int, cap: int, found: dict[str, tuple[int, int, int]]) -> Grid:
    rows = []
    for name, (fits, first, last) in found.items():
        each = f"{(last - first) / (fits - 1) / 1e6:.2f}" if fits > 1 else ""
        rows.append([name, f"{fits}", f"{first / 1e6:.1f}", each])
    title = f"The largest micro-batch under {cap / 1e6:.0f} MB of tensors: {ranks} ranks, {case.precision}, {case.sizes}"
    return Grid(title, ["contender", "fits", "MB at 1", "MB/sequence"], rows)


def measure(case: Case, ranks: int, cap: int, timeout: float, missing: dict[str, str]) -> dict[str, tuple[int, int, int]]:
    """By contender that runs, each in a launch of its own."""
    found = {}
    for name in (*ALL_OURS, *PEERS):
        if name.startswith(DEEPSPEED) and not case.deepspeed:
            continue
        try:
            found[name] = start(ranks, under, case, name, cap, timeout=timeout)[0]
        except LaunchError as error:
            missing[f"{name}, {case.precision}"] = reason(error)
    return found
