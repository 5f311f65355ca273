"""Training throughput of a tensor-parallel decoder on two ranks: megapar against torch's DTensor, the same math, shapes and weights.

    python -m benchmarks.tensor_parallel

fp32, one thread a rank, gloo. Both have a vocabulary-parallel embedding, head and loss (DTensor: `loss_parallel`); DTensor follows
torchtitan's plan for Llama, eager and with each block compiled, without and with sequence parallelism.

tokens/s     forward + backward, from the median of the repeats; of the slowest rank
x ...        tokens/s over that of the contender named, median of the ratios taken within each repeat
ops, kernels aten ops below autograd; those a GPU would launch (no views, no empty); of a compiled block only what it leaves to aten
collectives, MB sent   in one step, and the bytes a rank must send for them if each uses the fewest

"plain, one process" runs the whole model on rank 0 with both cores, as context. Before timing, the mean loss of all contenders must agree
to 1e-5 relative. A compiled contender that fails or takes too long in a launch of its own is named as missing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel

from benchmarks.common import Contender, Counts, Grid, LaunchError, Verdict, count, interleaved, ratio, report, start
from benchmarks.plain_llama import Llama, load, with_dtensor
from megapar import vocab_parallel_cross_entropy
from megapar.mesh import ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.models.decoder import Decoder

OURS, DTENSOR, PLAIN = "megapar", "DTensor", "plain, one process, 2 threads"
SEQUENCE, COMPILED = ", sequence-parallel", ", compiled"
AGREE = 1e-5


@dataclass(frozen=True)
class Sizes:
    b: int
    s: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    layers: int = 4

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self).items())


SIZES = (
    Sizes(b=2, s=128, hidden=256, heads=4, ffn=704, vocab=4096),
    Sizes(b=2, s=128, hidden=512, heads=8, ffn=1408, vocab=4096),
)


def draw(sizes: Sizes, repeat: int) -> tuple[Tensor, Tensor]:
    """Fresh (tokens, targets), int64 [b, s], the same on every rank."""
    generator = torch.Generator().manual_seed(1000 + repeat)
    tokens = torch.randint(0, sizes.vocab, (sizes.b, sizes.s + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def ours(sizes: Sizes, plain: Llama, mesh: ParallelMesh, sequence_parallel: bool) -> Contender:
    config = DecoderConfig(hidden_size=sizes.hidden, layers=sizes.layers, heads=sizes.heads, ffn_size=sizes.ffn)
    model = Decoder(config, sizes.vocab, mesh, sequence_parallel=sequence_parallel)
    load(model, plain)
    params = list(model.parameters())

    def step(data: tuple[Tensor, Tensor]) -> Tensor:
        for param in params:
            param.grad = None
        tokens, targets = data
        loss = vocab_parallel_cross_entropy(model(tokens), targets.view(-1), tp=model.tp, vocab_size=sizes.vocab).sum()
        loss.backward()
        return loss.detach()

    return Contender(OURS + SEQUENCE * sequence_parallel, lambda data: data, step)


def theirs(name: str, model: nn.Module, parallel: bool) -> Contender:
    params = list(model.parameters())

    def step(data: tuple[Tensor, Tensor]) -> Any:
        for param in params:
            param.grad = None
        tokens, targets = data
        with loss_parallel() if parallel else nullcontext():
            loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
            loss.backward()
        return loss.detach()

    return Contender(name, lambda data: data, step, one_rank_threads=0 if parallel else 2)


def contenders(sizes: Sizes, names: Sequence[str]) -> list[Contender]:
    """Those of `names`, with equal weights."""
    torch.manual_seed(0)
    plain = Llama(sizes.vocab, sizes.hidden, sizes.heads, sizes.ffn, sizes.layers)
    for param in plain.parameters():
        if param.dim() > 1:
            nn.init.normal_(param, std=0.02)
    mesh, device_mesh = ParallelMesh(tp=dist.get_world_size()), init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for name in names:
        sequence_parallel, compiled = SEQUENCE in name, COMPILED in name
        if name.startswith(OURS):
            found.append(ours(sizes, plain, mesh, sequence_parallel))
        elif name == PLAIN:
            found.append(theirs(name, plain, parallel=False))
        else:
            found.append(theirs(name, with_dtensor(copy.deepcopy(plain), device_mesh, sequence_parallel, compiled), parallel=True))
    return found


def losses(found: Sequence[Contender], sizes: Sizes) -> dict[str, float]:
    """Mean loss of a token, by contender, after one step of each."""
    data = draw(sizes, -1)
    values = {}
    for contender in found:
        loss = contender.step(data)
        loss = loss.full_tensor() if hasattr(loss, "full_tensor") else loss
        values[contender.name] = float(loss) / (sizes.b * sizes.s)
    return values


def check(values: dict[str, float]) -> None:
    """Raises AssertionError unless all losses agree with the first one."""
    first = next(iter(values.values()))
    for name, value in values.items():
        assert abs(value - first) <= AGREE * abs(first), f"{name}: loss {value:.7f}, expected {first:.7f}"


def measure(sizes: Sizes, names: Sequence[str], repeats: int, inner: int) -> tuple[list[list[float]], list[Counts]]:
    """In one rank: (wall seconds by repeat and contender, counts)."""
    found = contenders(sizes, names)
    check(losses(found, sizes))
    seconds = interleaved(found, partial(draw, sizes), repeats=repeats, inner=inner)
    return seconds[0].tolist(), [count(c, draw(sizes, -1)) for c in found]


def try_compiled(name: str, sizes: Sizes) -> None:
    """In one rank: compiles and runs a contender, which also fills the compiler's cache."""
    found = contenders(sizes, [PLAIN, name])
    check(losses(found, sizes))


def grid(sizes: Sizes, names: list[str], seconds: Tensor, counts: list[Counts]) -> Grid:
    """The table of one launch."""
    bases = [name for name in (DTENSOR, DTENSOR + SEQUENCE, DTENSOR + COMPILED) if name in names]
    rows = []
    for i, (name, c) in enumerate(zip(names, counts, strict=True)):
        rate = sizes.b * sizes.s / float(seconds[:, i].median())
        ratios = [f"{ratio(seconds, names, base, name):.2f}" for base in bases]
        rows.append([name, f"{rate:.0f}", *ratios, str(c.ops), str(c.kernels), str(c.collectives), f"{c.sent / 1e6:.2f}"])
    columns = ["forward + backward", "tokens/s", *(f"x {base}" for base in bases), "ops", "kernels", "collectives", "MB sent"]
    return Grid(f"Tensor parallelism, tp=2: fp32, {sizes}", columns, rows)


def verdicts(sizes: Sizes, names: list[str], seconds: Tensor) -> list[Verdict]:
    """The bars at one size: tokens/s against eager DTensor, each variant against its like."""
    place = f"b={sizes.b}, s={sizes.s}, hidden={sizes.hidden}"
    found = []
    for variant in ("", SEQUENCE):
        value = ratio(seconds, names, DTENSOR + variant, OURS + variant)
        found.append(Verdict(f"{place}: tokens/s of {OURS + variant} / {DTENSOR + variant}", value, at_least=1.3))
    return found


def main(repeats: int = 9, inner: int = 2, compiled: bool = True, compile_timeout: float = 240) -> None:
    """Measures, prints, writes results/tensor_parallel.json.

    Args:
        repeats: measurements of each contender, at least 7.
        inner: steps in a measurement.
        compiled: also DTensor with compiled blocks.
        compile_timeout: seconds that a compiled contender gets to start.
    """
    grids, bars, samples = [], [], {}
    missing: dict[str, str] = {}
    for sizes in SIZES:
        names = [OURS, OURS + SEQUENCE, DTENSOR, DTENSOR + SEQUENCE, PLAIN]
        for name in (DTENSOR + COMPILED, DTENSOR + SEQUENCE + COMPILED) if compiled else ():
            if name in missing:
                continue
            try:
                start(2, try_compiled, name, sizes, timeout=compile_timeout)
                names.insert(-1, name)
            except LaunchError as error:
                missing[name] = str(error).strip().splitlines()[-1]
        listed, counts = start(2, measure, sizes, names, repeats, inner)[0]
        seconds = torch.tensor(listed, dtype=torch.float64)
        grids.append(grid(sizes, names, seconds, counts))
        bars += verdicts(sizes, names, seconds)
        samples[str(sizes)] = {"names": names, "seconds": listed, "counts": [asdict(c) for c in counts]}
    report("tensor_parallel", grids, bars, missing, samples)


if __name__ == "__main__":
    tyro.cli(main)
