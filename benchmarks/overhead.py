"""Host time of one decoder block, forward + backward, at shapes so small that arithmetic hardly counts.

    python -m benchmarks.overhead

16 tokens (b=2, s=8), width 64, 4 heads, ffn 128, fp32, one thread a rank. Three tables: one rank; two ranks; two ranks without
the wire, where torch's "fake" process group makes every collective free: what is left is the host's own work, which a GPU waits for.

us, cpu us   microseconds of the slowest rank, median of the repeats: wall, and CPU time of all its threads
x plain, x DTensor, x gloo   median of the ratios taken within each repeat
ops          aten ops below autograd; kernels: those a GPU would launch (no views, no empty)
allocations  blocks asked from the CPU allocator
collectives, sent   collectives, and the bytes a rank must send for them if each uses the fewest

Two ranks: the peers go over gloo, megapar through memory that the ranks share. Beside them, what gloo alone takes for the four
all-reduces of hidden states that Megatron's scheme consists of. Before timing, the gradients of
all contenders are compared with the plain block's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.common import Contender, Counts, Grid, Verdict, count, interleaved, ratio, report, start
from benchmarks.plain_llama import EPS, Block, gradient_error, load, rotary, with_dtensor
from megapar.batch import TokenBatch
from megapar.grads import MainGrads
from megapar.layers.attention import Attention
from megapar.layers.block import DecoderBlock
from megapar.layers.mlp import MLP
from megapar.layers.norm import RMSNorm
from megapar.mesh import Axis, ParallelMesh

PLAIN, OURS, DTENSOR, LIMIT = "plain nn.Module", "megapar", "DTensor", "gloo alone: 4 all-reduces"
AGREE = 1e-5
COUNTED = ["ops", "kernels", "allocations", "collectives", "sent"]


@dataclass(frozen=True)
class Sizes:
    b: int = 2
    s: int = 8
    hidden: int = 64
    heads: int = 4
    ffn: int = 128

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self).items())


def draw(sizes: Sizes, repeat: int) -> tuple[Tensor, Tensor]:
    """Fresh x and dy, [b, s, h], the same on every rank."""
    generator = torch.Generator().manual_seed(1000 + repeat)
    shape = (sizes.b, sizes.s, sizes.hidden)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def step_of(block: nn.Module, *extra: Any) -> Callable[[tuple[Tensor, Tensor]], None]:
    """Forward + backward of the block, from no gradients."""
    params = list(block.parameters())

    def step(inputs: tuple[Tensor, Tensor]) -> None:
        x, dy = inputs
        x.grad = None
        for param in params:
            param.grad = None
        block(x, *extra).backward(dy)

    return step


def megapar_block(sizes: Sizes, tp: Axis, sequence_parallel: bool) -> DecoderBlock:
    common: dict[str, Any] = {"tp": tp, "sequence_parallel": sequence_parallel}
    return DecoderBlock(
        RMSNorm(sizes.hidden, eps=EPS, **common),
        Attention(sizes.hidden, sizes.heads, **common),
        RMSNorm(sizes.hidden, eps=EPS, **common),
        MLP(sizes.hidden, sizes.ffn, bias=False, **common),
    )


def ours(sizes: Sizes, plain: Block, mesh: ParallelMesh, sequence_parallel: bool, main_grad: bool) -> Contender:
    tp = mesh.tp
    block = megapar_block(sizes, tp, sequence_parallel)
    load(block, plain)
    main = MainGrads(block.parameters()) if main_grad else None
    batch = TokenBatch.of(torch.zeros(sizes.b, sizes.s, dtype=torch.int64))

    def prepare(data: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        rows = [z.reshape(-1, sizes.hidden) for z in data]
        if sequence_parallel:
            rows = [z.chunk(tp.size)[tp.rank] for z in rows]
        return rows[0].clone().requires_grad_(), rows[1].clone()

    step = step_of(block, batch)

    def error(data: tuple[Tensor, Tensor]) -> float:
        if main is None:
            step(prepare(data))
            return gradient_error(block, plain)
        main.zero()
        step(prepare(data))
        main.finish()
        return gradient_error(block, plain, "main_grad")

    name = OURS + (", sequence-parallel" if sequence_parallel else "") + (", main_grad" if main_grad else "")
    return Contender(name, prepare, step, extra={"error": error})


def theirs(name: str, block: nn.Module, sizes: Sizes, plain: Block, sequence_parallel: bool = False) -> Contender:
    def prepare(data: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        parts = data
        if sequence_parallel:
            parts = tuple(z.chunk(dist.get_world_size(), dim=1)[dist.get_rank()] for z in data)  # type: ignore[assignment]
        return parts[0].clone().requires_grad_(), parts[1].clone()

    step = step_of(block, *rotary(sizes.s, sizes.hidden // sizes.heads))

    def error(data: tuple[Tensor, Tensor]) -> float:
        step(prepare(data))
        return gradient_error(block, plain)

    return Contender(name, prepare, step, extra={"error": error})


def limit(sizes: Sizes) -> Contender:
    def step(x: Tensor) -> None:
        for _ in range(4):
            dist.all_reduce(x)

    # Zeros: the sums must not grow without bound.
    return Contender(LIMIT, lambda data: torch.zeros(sizes.b * sizes.s, sizes.hidden), step)


def contenders(sizes: Sizes, wire: bool = True) -> list[Contender]:
    """All that run in this world, with equal weights."""
    torch.manual_seed(0)
    world = dist.get_world_size()
    plain = Block(sizes.hidden, sizes.heads, sizes.ffn)
    mesh, device_mesh = ParallelMesh(tp=world), init_device_mesh("cpu", (world,))
    found = [theirs(PLAIN, plain, sizes, plain)]
    found += [ours(sizes, plain, mesh, sp, main) for sp in (False, True) for main in (False, True)]
    for sp in (False, True):
        name = DTENSOR + (", sequence-parallel" if sp else "")
        found.append(theirs(name, with_dtensor(copy.deepcopy(plain), device_mesh, sp), sizes, plain, sp))
    sharded = fully_shard(copy.deepcopy(plain), mesh=device_mesh)
    found.append(theirs("FSDP2", sharded, sizes, plain))
    return [*found, limit(sizes)] if world > 1 and wire else found


def errors(found: Sequence[Contender], sizes: Sizes) -> dict[str, float]:
    """Each contender's largest gradient error against the plain block (the first one), relative to its largest gradient."""
    data = draw(sizes, -1)
    found[0].step(found[0].prepare(data))
    return {c.name: c.extra["error"](data) for c in found[1:] if "error" in c.extra}


def measure(sizes: Sizes, repeats: int, inner: int, wire: bool) -> tuple[list[str], list[list[list[float]]], list[Counts]]:
    """In one rank: (names, seconds as `interleaved` has them, counts)."""
    found = contenders(sizes, wire)
    if wire:
        for name, error in errors(found, sizes).items():
            assert error <= AGREE, f"{name}: gradients differ from the plain block's by {error:.1e} of the largest, above {AGREE:.0e}"
    seconds = interleaved(found, partial(draw, sizes), repeats=repeats, inner=inner)
    data = draw(sizes, -1)
    return [c.name for c in found], seconds.tolist(), [count(c, data) for c in found]


def grid(title: str, names: list[str], seconds: Tensor, counts: list[Counts]) -> Grid:
    """The table of one launch."""
    wall, cpu = seconds
    bases = [("x plain", PLAIN), ("x DTensor", DTENSOR)] + ([("x gloo", LIMIT)] if LIMIT in names else [])
    rows = []
    for i, (name, c) in enumerate(zip(names, counts, strict=True)):
        times = [f"{1e6 * float(t[:, i].median()):.0f}" for t in (wall, cpu)]
        ratios = [f"{ratio(wall, names, name, base):.2f}" for _, base in bases]
        numbers = [c.ops, c.kernels, c.allocations, c.collectives, c.sent]
        rows.append([name, *times, *ratios, *map(str, numbers)])
    return Grid(title, ["one block, forward + backward", "us", "cpu us", *(label for label, _ in bases), *COUNTED], rows)


def verdicts(launches: dict[str, tuple[list[str], Tensor]]) -> list[Verdict]:
    """The bars, on launches "tp=1", "tp=2" and "tp=2, no wire"."""
    found = []
    for key in ("tp=1", "tp=2", "tp=2, no wire"):
        names, (seconds, _) = launches[key]
        if key == "tp=1":
            found.append(Verdict(f"{key}: {OURS} / {PLAIN}", ratio(seconds, names, OURS, PLAIN), at_most=1.2))
        else:
            found.append(Verdict(f"{key}: {OURS} / {DTENSOR}", ratio(seconds, names, OURS, DTENSOR), at_most=0.25))
    return found


def main(repeats: int = 15, inner: int = 20) -> None:
    """Measures, prints, writes results/overhead.json.

    Args:
        repeats: measurements of each contender, at least 7.
        inner: steps in a measurement.
    """
    sizes = Sizes()
    plan = {"tp=1": (1, "gloo"), "tp=2": (2, "gloo"), "tp=2, no wire": (2, "fake")}
    grids, launches, samples = [], {}, {}
    for key, (world, backend) in plan.items():
        names, listed, counts = start(world, measure, sizes, repeats, inner, backend == "gloo", backend=backend)[0]
        seconds = torch.tensor(listed, dtype=torch.float64)
        launches[key] = (names, seconds)
        grids.append(grid(f"Overhead, {key}: fp32, {sizes}", names, seconds, counts))
        samples[key] = {"names": names, "seconds": listed, "counts": [asdict(c) for c in counts]}
    report("overhead", grids, verdicts(launches), {}, samples)


if __name__ == "__main__":
    tyro.cli(main)
