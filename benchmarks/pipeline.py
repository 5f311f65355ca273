"""The pipeline runtime: against its simulation, with sleeps for compute; against torch.distributed.pipelining, with a decoder.

    python -m benchmarks.pipeline
    python -m benchmarks.pipeline --sleeps     against the simulation alone

gloo, fp32, one thread a rank. What has no model is in benchmarks/pipeline_host.py.

The decoder is the same for all: plain PyTorch (benchmarks/plain_llama.py) under torch's schedules, eager and with each block compiled,
scale_grads=False and the loss divided; megapar's layers under ours. Also megapar with MEGAPAR_BACKEND=reference, plain PyTorch instead of
the kernels: what the runtime alone is worth, beside eager torch in the same launch. The gradients of all must agree with one process's to
1e-5 of the largest one before anything is timed.

tokens/s     of the median step; of the slowest rank
x ...        tokens/s over that of the contender named, median of the ratios taken within each repeat
of limit     the limit over the step's time. The limit: the fullest rank's CPU time x the larger of ranks / cores and 1 + the schedule's
             simulated bubble (F, I and W taken for equally long)
peak MB      what building and three steps add to the memory of the process, of the fullest rank (of own processes each)
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble

from benchmarks.common import Contender, Grid, LaunchError, Verdict, interleaved, ratio, report, start
from benchmarks.pipeline_host import MICRO_BATCHES, OURS, SCALES, SCHEDULES, SLEEPERS, asleep, grid_of_hosts, grid_of_sleeps, host_seconds
from benchmarks.plain_llama import Llama, boxes, load, megapar_name, rotary, seeded
from megapar.batch import TokenBatch
from megapar.grads import MainGrads
from megapar.mesh import ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.models.decoder import DecoderStage
from megapar.objectives.causal_lm import token_loss
from megapar.params import split
from megapar.pipeline.kinds import make_schedule
from megapar.pipeline.runtime import PipelineRunner
from megapar.pipeline.simulate import simulate


@dataclass(frozen=True)
class Sizes:
    layers: int = 8
    hidden: int = 512
    heads: int = 8
    ffn: int = 1408
    vocab: int = 4096
    b: int = 1
    s: int = 256

    @property
    def tokens(self) -> int:
        return self.b * self.s * MICRO_BATCHES


def draw(sizes: Sizes, repeat: int) -> tuple[Tensor, Tensor]:
    """A step's (inputs, targets), int64 [micro-batches * b, s], the same on every rank."""
    generator = torch.Generator().manual_seed(1000 + repeat)
    tokens = torch.randint(0, sizes.vocab, (MICRO_BATCHES * sizes.b, sizes.s + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def plain_model(sizes: Sizes) -> Llama:
    return seeded(sizes.vocab, sizes.hidden, sizes.heads, sizes.ffn, sizes.layers)


class Cut(nn.Module):
    """Layers [start, stop) of a Llama, whose names its parameters keep."""

    def __init__(self, plain: Llama, start: int, stop: int, s: int) -> None:
        super().__init__()
        self.tok_embeddings = plain.tok_embeddings if start == 0 else None
        self.layers = nn.ModuleDict({str(layer): plain.layers[layer] for layer in range(start, stop)})
        self.norm, self.output = (plain.norm, plain.output) if stop == len(plain.layers) else (None, None)
        self.cos, self.sin = rotary(s, plain.d)

    def forward(self, x: Tensor) -> Tensor:
        if self.tok_embeddings is not None:
            x = self.tok_embeddings(x)
        for layer in self.layers.values():
            x = layer(x, self.cos, self.sin)
        return x if self.output is None else self.output(self.norm(x))


def cuts(sizes: Sizes, chunks: int) -> list[tuple[int, int]]:
    """This rank's layers."""
    pp = dist.get_world_size()
    return split(sizes.layers, pp * chunks)[dist.get_rank() :: pp]


def ours(sizes: Sizes, name: str, kind: str, chunks: int) -> Contender:
    mesh = ParallelMesh(pp=dist.get_world_size())
    config = DecoderConfig(hidden_size=sizes.hidden, layers=sizes.layers, heads=sizes.heads, ffn_size=sizes.ffn)
    stages = [DecoderStage(config, sizes.vocab, mesh, layers=cut) for cut in cuts(sizes, chunks)]
    plain = plain_model(sizes)
    for stage in stages:
        load(stage, plain)
    del plain
    grads = MainGrads(p for stage in stages for p in stage.parameters())
    runner = PipelineRunner(stages, mesh, make_schedule(kind, mesh.pp.size, chunks, MICRO_BATCHES))

    def step(data: tuple[Tensor, Tensor]) -> None:
        grads.zero()
        pairs = zip(*(x.chunk(MICRO_BATCHES) for x in data), strict=True)
        batches = [TokenBatch.of(tokens, targets) for tokens, targets in pairs]
        runner.step(batches, partial(token_loss, stages[-1]), loss_scale=1 / sizes.tokens)
        grads.finish()

    def gradients() -> list[tuple[str, Any, Tensor]]:
        return [box for stage in stages for box in boxes(stage, "main_grad")]

    return Contender(name, lambda data: data, step, extra={"gradients": gradients})


def theirs(sizes: Sizes, name: str, schedule: type, chunks: int) -> Contender:
    pp, rank, plain = dist.get_world_size(), dist.get_rank(), plain_model(sizes)
    modules = [Cut(plain, *cut, sizes.s) for cut in cuts(sizes, chunks)]
    del plain
    for layer in (layer for module in modules for layer in module.layers.values() if COMPILED in name):
        layer.compile(fullgraph=True)
    stages = [PipelineStage(module, rank + chunk * pp, pp * chunks, torch.device("cpu")) for chunk, module in enumerate(modules)]

    def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / sizes.tokens

    made = schedule(stages if chunks > 1 else stages[0], MICRO_BATCHES, loss_fn=loss_fn, scale_grads=False)
    params = {key: param for module in modules for key, param in module.named_parameters()}

    def step(data: tuple[Tensor, Tensor]) -> None:
        for param in params.values():
            param.grad = None
        given = {"target": data[1]} if rank == pp - 1 else {}
        made.step(*data[:1] * (rank == 0), **given, return_outputs=False)

    def gradients() -> list[tuple[str, Any, Tensor]]:
        return [(megapar_name(key.replace("._orig_mod", "")), (), param.grad) for key, param in params.items()]

    return Contender(name, lambda data: data, step, extra={"gradients": gradients})


TORCH, COMPILED = "torch", ", compiled"
THEIR_SCHEDULES = {"1F1B": (Schedule1F1B, 1), "Interleaved1F1B": (ScheduleInterleaved1F1B, 2)}
THEIR_SCHEDULES["InterleavedZeroBubble"] = (ScheduleInterleavedZeroBubble, 2)
OUR_SCHEDULES = {f"{kind}, {chunks} chunk{'s' * (chunks > 1)}": (kind, chunks) for kind, chunks in SCHEDULES[1:]}
ALL_OURS = [f"{OURS} {schedule}" for schedule in OUR_SCHEDULES]
EAGER = [f"{TORCH} {schedule}" for schedule in THEIR_SCHEDULES]
SAME = dict(zip(THEIR_SCHEDULES, (list(OUR_SCHEDULES)[i] for i in (0, 1, 3)), strict=True))
LIKE = {f"{OURS} {own}": f"{TORCH} {peer}" for peer, own in SAME.items()}
"""Whose memory is compared with whose."""
AGREE = 1e-5


def contender(sizes: Sizes, name: str) -> Contender:
    who, _, schedule = name.removesuffix(COMPILED).partition(" ")
    return ours(sizes, name, *OUR_SCHEDULES[schedule]) if who == OURS else theirs(sizes, name, *THEIR_SCHEDULES[schedule])


def errors(found: Sequence[Contender], sizes: Sizes) -> dict[str, float]:
    """In one rank: by contender, the largest difference of its gradients from one process's, over the largest gradient."""
    plain, data = plain_model(sizes), draw(sizes, -1)
    for tokens, targets in zip(*(x.chunk(MICRO_BATCHES) for x in data), strict=True):
        (F.cross_entropy(plain(tokens).flatten(0, 1), targets.flatten(), reduction="sum") / sizes.tokens).backward()
    right: dict[str, Any] = {megapar_name(name): param.grad for name, param in plain.named_parameters()}
    largest, values = max(float(grad.abs().max()) for grad in right.values()), {}
    for one in found:
        one.step(data)
        values[one.name] = max(float((got - right[name][index]).abs().max()) for name, index, got in one.extra["gradients"]()) / largest
    return values


def measure(sizes: Sizes, names: Sequence[str], repeats: int) -> list[list[list[float]]]:
    """In one rank: wall and CPU seconds by repeat and contender."""
    found = [contender(sizes, name) for name in names]
    for name, value in errors(found, sizes).items():
        assert value <= AGREE, f"{name}: a gradient is off by {value:.1e}"
    return interleaved(found, partial(draw, sizes), repeats=repeats, inner=1, warmup=1).tolist()


def peak(sizes: Sizes, name: str) -> float:
    """In one rank: MB that building the contender and three steps added to the peak of the process."""
    data = draw(sizes, -1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = contender(sizes, name)
    for _ in range(3):
        made.step(data)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


def with_backend(backend: str, world: int, fn: Any, *args: Any, timeout: float = 900) -> list[Any]:
    """`start` with MEGAPAR_BACKEND, which a process reads once; "" is the kernels."""
    with mock.patch.dict(os.environ, {"MEGAPAR_BACKEND": backend}):
        return start(world, fn, *args, timeout=timeout)


def bubble(name: str, pp: int) -> float:
    """Simulated, of the schedule that a contender runs, at equal costs."""
    schedule = name.removesuffix(COMPILED).partition(" ")[2]
    kind, chunks = OUR_SCHEDULES[schedule if name.startswith(OURS) else SAME[schedule]]
    return simulate(make_schedule(kind, pp, chunks, MICRO_BATCHES)).bubble


def grid_of_decoders(title: str, sizes: Sizes, pp: int, names: list[str], seconds: Tensor, peaks: list[float], bases: list[str]) -> Grid:
    rows, (wall, cpu) = [], seconds
    for i, name in enumerate(names):
        rate, busy = sizes.tokens / wall[:, i].median(), cpu[:, i].median()
        limit = busy * max(pp / (os.cpu_count() or 1), 1 + bubble(name, pp))
        ratios = [f"{ratio(wall, names, base, name):.2f}" for base in bases]
        rows.append([name, f"{rate:.0f}", *ratios, f"{limit / wall[:, i].median():.2f}", f"{peaks[i]:.0f}"])
    return Grid(title, ["forward + backward", "tokens/s", *(f"x {base}" for base in bases), "of limit", "peak MB"], rows)


def fastest(names: Sequence[str], wall: Tensor, who: str) -> str:
    return min((name for name in names if name.startswith(who)), key=lambda name: float(wall[:, names.index(name)].median()))


def decoders(
    sizes: Sizes, pp: int, backend: str, asked: Sequence[str], repeats: int, timeout: float
) -> tuple[Grid, list[Verdict], dict, Any]:
    """One launch: its table, bars, missing contenders and samples."""
    names, peaks, missing = [], [], dict[str, str]()
    for name in asked:
        try:
            peaks.append(max(with_backend(backend, pp, peak, sizes, name, timeout=timeout)))
            names.append(name)
        except LaunchError as error:
            missing[f"{name}, pp={pp}"] = str(error).strip().splitlines()[-1]
    listed = with_backend(backend, pp, measure, sizes, names, repeats)[0]
    seconds = torch.tensor(listed, dtype=torch.float64)
    wall = seconds[0]
    own, peer = fastest(names, wall, OURS), fastest(names, wall, TORCH)
    where = f"pp={pp}, {backend or 'kernels'}"
    bar = 1.0 if backend else 1.5
    bars = [Verdict(f"{where}: tokens/s of {own} / {peer}", ratio(wall, names, peer, own), at_least=bar)]
    for kind, theirs_named in LIKE.items():
        if kind in names and theirs_named in names:
            value = peaks[names.index(kind)] / peaks[names.index(theirs_named)]
            bars.append(Verdict(f"{where}: peak memory of {kind} / {theirs_named}", value, at_most=1.0))
    title = f"Pipeline, {where}: fp32, {MICRO_BATCHES} micro-batches, {sizes}"
    bases = [peer, *(name for name in EAGER[:1] if name in names and name != peer)]
    return (
        grid_of_decoders(title, sizes, pp, names, seconds, peaks, bases),
        bars,
        missing,
        {"names": names, "seconds": listed, "peak_mb": peaks},
    )


def main(sleeps: bool = False, repeats: int = 7, compiled: bool = True, compile_timeout: float = 400, pp: tuple[int, ...] = (2, 4)) -> None:
    """Measures, prints, writes results/pipeline.json.

    Args:
        sleeps: against the simulation alone.
        repeats: measurements of each contender, at least 7.
        compiled: also torch with compiled blocks.
        compile_timeout: seconds that a contender gets to start.
        pp: ranks of the decoder.
    """
    grids, bars, samples, missing = [], [], dict[str, Any](), dict[str, str]()
    for scale in SCALES:
        listed, simulated, actions = start(SLEEPERS, asleep, scale, repeats)[0]
        grid, more = grid_of_sleeps(scale, torch.tensor(listed, dtype=torch.float64), simulated, actions)
        grids.append(grid)
        bars += more
        samples[f"asleep x {scale}"] = {"seconds": listed, "simulated": simulated}
    if not sleeps:
        samples["host"] = start(2, host_seconds, 3 * repeats)[0]
        grids.append(grid_of_hosts(torch.tensor(samples["host"], dtype=torch.float64)))
    for world in () if sleeps else pp:
        for backend in ("", "reference"):
            peers = EAGER + [name + COMPILED for name in EAGER if compiled and not backend]
            grid, more, absent, sampled = decoders(Sizes(), world, backend, ALL_OURS + peers, repeats, compile_timeout)
            grids.append(grid)
            bars += more
            missing |= absent
            samples[f"pp={world} {backend}"] = sampled
    report("pipeline", grids, bars, missing, samples)


if __name__ == "__main__":
    tyro.cli(main)
