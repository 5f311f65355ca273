"""A decoder's whole training step in bf16: 8 micro-batches forward and backward, gradients in fp32, clip, AdamW on an fp32 master.

    python -m benchmarks.training_step

Alone with both cores, and at tp=2 on two ranks of one thread. Everyone has bf16 weights, adds each micro-batch's gradients into fp32,
clips by the global norm, updates an fp32 master, and writes the weights in bf16. Peers do the last part with torch's foreach and fused
functions (on local tensors under DTensor, which costs it least). "autocast": fp32 weights and torch.autocast, no bf16 weights at all.

tokens/s     of the median step; of the slowest rank
x ...        tokens/s over that of the contender named, median of the ratios taken within each repeat
peak MB      what one step adds at its peak to the memory of the process, weights and optimizer state included (of an own process each)

Before timing, the losses of the first step must agree to 1 %, bf16's noise. Compiled contenders that fail are named as missing.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from benchmarks.common import Contender, Grid, LaunchError, Verdict, interleaved, ratio, report, start
from benchmarks.plain_llama import Llama, load, seeded, with_dtensor
from megapar.grads import MainGrads
from megapar.mesh import ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.models.decoder import Decoder
from megapar.objectives.causal_lm import causal_lm_loss
from megapar.optim.adamw import FusedAdamW

OURS, EAGER, AUTOCAST = "megapar", "torch", "torch, autocast"
BLOCKS, WHOLE = ", blocks compiled", ", compiled whole"
DTENSOR = "DTensor"
ALONE = (OURS, EAGER, EAGER + BLOCKS, EAGER + WHOLE, AUTOCAST)
PARALLEL = (OURS, DTENSOR, DTENSOR + BLOCKS)
LR, MAX_NORM = 1e-4, 1.0
AGREE = 1e-2


@dataclass(frozen=True)
class Sizes:
    layers: int = 8
    hidden: int = 512
    heads: int = 8
    ffn: int = 1536
    vocab: int = 8192
    b: int = 2
    s: int = 256
    micro_batches: int = 8

    @property
    def tokens(self) -> int:
        return self.b * self.s * self.micro_batches


def draw(sizes: Sizes, repeat: int) -> list[tuple[Tensor, Tensor]]:
    """A step's micro-batches of (inputs, targets), int64 [b, s], the same on every rank."""
    generator = torch.Generator().manual_seed(1000 + repeat)
    tokens = torch.randint(0, sizes.vocab, (sizes.micro_batches, sizes.b, sizes.s + 1), generator=generator)
    return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


def plain_model(sizes: Sizes) -> Llama:
    return seeded(sizes.vocab, sizes.hidden, sizes.heads, sizes.ffn, sizes.layers)


def ours(sizes: Sizes) -> Callable[[Any], float]:
    mesh = ParallelMesh(tp=dist.get_world_size())
    config = DecoderConfig(hidden_size=sizes.hidden, layers=sizes.layers, heads=sizes.heads, ffn_size=sizes.ffn)
    model = Decoder(config, sizes.vocab, mesh, dtype=torch.bfloat16)
    load(model, plain_model(sizes))
    grads = MainGrads(model.parameters())
    optimizer = FusedAdamW(model.parameters(), lr=LR, master_weights="fp32", max_norm=MAX_NORM, mesh=mesh)
    share = torch.tensor(1 / sizes.tokens)

    def step(data: list[tuple[Tensor, Tensor]]) -> float:
        total = torch.zeros(())
        for inputs, targets in data:
            loss, _ = causal_lm_loss(model, inputs, targets)
            loss.backward(share)
            total += loss.detach()
        grads.finish()
        optimizer.step()
        grads.zero()
        return float(total) / sizes.tokens

    return step


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def gradient(param: Any) -> Tensor:
    """This rank's part of the gradient, cut as the parameter is: DTensor leaves some whole, or as partial sums."""
    return param.grad.redistribute(param.device_mesh, param.placements).to_local() if isinstance(param, DTensor) else param.grad


class Composite:
    """fp32 gradients, masters and moments beside a bf16 model, by torch's fastest functions: what people write without a library."""

    def __init__(self, model: nn.Module) -> None:
        self.params = list(model.parameters())
        self.weights = [local(p.data) for p in self.params]
        self.masters = [nn.Parameter(w.float()) for w in self.weights]
        self.sharded = [isinstance(p, DTensor) and any(place.is_shard() for place in p.placements) for p in self.params]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.optimizer = torch.optim.AdamW(self.masters, lr=LR, fused=True)
        self.grads = [master.grad for master in self.masters]

    @torch.no_grad()
    def accumulate(self) -> None:
        # A compiled block's input loses its gradient here with torch 2.13: the embedding is then not trained, which costs the peer less.
        reached = [i for i, p in enumerate(self.params) if p.grad is not None]
        torch._foreach_add_([self.grads[i] for i in reached], [gradient(self.params[i]) for i in reached])
        for param in self.params:
            param.grad = None

    @torch.no_grad()
    def step(self) -> None:
        if dist.get_world_size() == 1:
            nn.utils.clip_grad_norm_(self.masters, MAX_NORM, foreach=True)
        else:
            squares = torch.stack(torch._foreach_norm(self.grads)).square()
            whole = torch.tensor(self.sharded)
            total = squares[whole].sum()
            dist.all_reduce(total)
            norm = (total + squares[~whole].sum()).sqrt()
            torch._foreach_mul_(self.grads, (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        torch._foreach_copy_(self.weights, self.masters)
        torch._foreach_zero_(self.grads)


def theirs(sizes: Sizes, name: str) -> Callable[[Any], float]:
    parallel = name.startswith(DTENSOR)
    model: nn.Module = plain_model(sizes).bfloat16()
    if parallel:
        model = with_dtensor(model, init_device_mesh("cpu", (dist.get_world_size(),)), False, BLOCKS in name)
    elif BLOCKS in name:
        for block in model.layers:
            block.compile(fullgraph=True)
    composite = Composite(model)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten(), reduction="sum") / sizes.tokens

    forward = torch.compile(loss_of) if WHOLE in name else loss_of

    def step(data: list[tuple[Tensor, Tensor]]) -> float:
        total = torch.zeros(())
        for inputs, targets in data:
            if parallel:
                with loss_parallel():
                    loss = loss_of(inputs, targets)
                    loss.backward()
            else:
                loss = forward(inputs, targets)
                loss.backward()
            total += loss.detach().full_tensor() if isinstance(loss, DTensor) else loss.detach()
            composite.accumulate()
        composite.step()
        return float(total)

    return step


def autocast(sizes: Sizes, name: str) -> Callable[[Any], float]:
    model = plain_model(sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten(), reduction="sum") / sizes.tokens

    forward = torch.compile(loss_of) if WHOLE in name else loss_of

    def step(data: list[tuple[Tensor, Tensor]]) -> float:
        total = torch.zeros(())
        for inputs, targets in data:
            loss = forward(inputs, targets)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return float(total)

    return step


def contender(sizes: Sizes, name: str) -> Contender:
    make = {OURS: lambda: ours(sizes), AUTOCAST: lambda: autocast(sizes, name)}.get(name.replace(WHOLE, ""), lambda: theirs(sizes, name))
    return Contender(name, lambda data: data, make(), one_rank_threads=2 if dist.get_world_size() == 1 else 0)


def measure(sizes: Sizes, names: Sequence[str], repeats: int) -> list[list[float]]:
    """In one rank: wall seconds by repeat and contender."""
    torch.set_num_threads(2 if dist.get_world_size() == 1 else 1)
    found = [contender(sizes, name) for name in names]
    losses = {c.name: c.step(draw(sizes, -1)) for c in found}
    first = losses[OURS]
    for name, loss in losses.items():
        assert abs(loss - first) <= AGREE * abs(first), f"{name}: loss {loss:.5f}, expected {first:.5f}"
    return interleaved(found, partial(draw, sizes), repeats=repeats, inner=1, warmup=1)[0].tolist()


def peak(sizes: Sizes, name: str) -> float:
    """In one rank: MB that building the contender and three steps added to the peak of the process."""
    torch.set_num_threads(2 if dist.get_world_size() == 1 else 1)
    data = draw(sizes, -1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = contender(sizes, name)
    for _ in range(3):
        made.step(data)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


def runnable(world: int, sizes: Sizes, names: Sequence[str], timeout: float, missing: dict[str, str]) -> tuple[list[str], list[float]]:
    """Those of `names` that run, each tried in a launch of its own, with their peak memory."""
    kept, peaks = [], []
    for name in names:
        try:
            peaks.append(max(start(world, peak, sizes, name, timeout=timeout)))
            kept.append(name)
        except LaunchError as error:
            missing[f"{name}, tp={world}"] = str(error).strip().splitlines()[-1]
    return kept, peaks


def grid(title: str, sizes: Sizes, names: list[str], seconds: Tensor, peaks: list[float]) -> Grid:
    rows = []
    for i, name in enumerate(names):
        rate = sizes.tokens / float(seconds[:, i].median())
        rows.append([name, f"{rate:.0f}", *(f"{ratio(seconds, names, base, name):.2f}" for base in names[1:]), f"{peaks[i]:.0f}"])
    return Grid(title, ["one training step", "tokens/s", *(f"x {base}" for base in names[1:]), "peak MB"], rows)


def main(repeats: int = 7, compile_timeout: float = 400) -> None:
    """Measures, prints, writes results/training_step.json.

    Args:
        repeats: measurements of each contender, at least 7.
        compile_timeout: seconds that a contender gets to start.
    """
    sizes, missing, grids, bars, samples = Sizes(), dict[str, str](), [], [], {}
    for world, asked, bar in ((1, ALONE, 1.5), (2, PARALLEL, 2.0)):
        names, peaks = runnable(world, sizes, asked, compile_timeout, missing)
        listed = start(world, measure, sizes, names, repeats, timeout=1800)[0]
        seconds = torch.tensor(listed, dtype=torch.float64)
        where = "one process, 2 threads" if world == 1 else "tp=2, one thread a rank"
        grids.append(grid(f"Training step, {where}: bf16, {sizes}", sizes, names, seconds, peaks))
        compiled = [name for name in names if "compiled" in name and not name.startswith(AUTOCAST)]
        if compiled:
            best = min(compiled, key=lambda name: float(seconds[:, names.index(name)].median()))
            bars.append(Verdict(f"{where}: tokens/s of {OURS} / {best}", ratio(seconds, names, best, OURS), at_least=bar))
        base = EAGER if world == 1 else DTENSOR
        if base in names:
            memory = peaks[names.index(OURS)] / peaks[names.index(base)]
            bars.append(Verdict(f"{where}: peak memory of {OURS} / {base}", memory, at_most=1.0))
        samples[where] = {"names": names, "seconds": listed, "peak_mb": peaks}
    report("training_step", grids, bars, missing, samples)


if __name__ == "__main__":
    tyro.cli(main)
