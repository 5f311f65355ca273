"""Recomputation: what each mode keeps between forward and backward, what the formula says, and the time that it costs.

    python -m benchmarks.recompute

Four Llama blocks of 512 x 1408 with embedding and last norm, 8 heads, 2 sequences of 256 tokens, one process, one thread, gradients
into fp32 main_grad.

MB kept   of storages that forward made and that are alive when it has returned, each once, wherever they are held
formula   megapar.planning.activations
ms        CPU time of forward and backward, median repeat
extra     that time over that of `none`, median of the ratios taken within each repeat
plain     of the same blocks: torch.utils.checkpoint without leaving out what only a block's result needs

Before timing, gradients must be those of `none` to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from benchmarks.common import Contender, Grid, Verdict, interleaved, ratio, report, start
from megapar.batch import TokenBatch
from megapar.grads import MainGrads
from megapar.mesh import ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.models.decoder import DecoderStage
from megapar.planning.activations import activation_bytes
from megapar.recompute import Recompute

VOCABULARY = 256
NONE, PLAIN = "none", "full, plain"
NAMES = (NONE, "attention", "mlp", "full", PLAIN)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Sizes:
    b: int = 2
    s: int = 256
    hidden: int = 512
    heads: int = 8
    ffn: int = 1408
    layers: int = 4

    @property
    def config(self) -> DecoderConfig:
        return DecoderConfig(hidden_size=self.hidden, layers=self.layers, heads=self.heads, ffn_size=self.ffn)


class LiveStorages(TorchDispatchMode):
    """Knows every storage that an op made in its block, and which of them are alive: whoever holds them, saved or not."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in given:
                # The weak reference keeps the address taken, so that it names one storage.
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self) -> int:
        """Bytes. Nothing that a forward leaves waits for the garbage collector."""
        return sum(size for reference, size in self._seen.values() if not reference.expired())


def kept_bytes(forward: Callable[[], Any]) -> tuple[int, Any]:
    """(bytes of storages made by `forward()` that are alive after it, its result, which is one of them)."""
    live = LiveStorages()
    with live:
        result = forward()
    return live.alive(), result


def draw(sizes: Sizes, repeat: int) -> tuple[Tensor, Tensor]:
    """Fresh (tokens [b, s], gradient of the output [t, h])."""
    generator = torch.Generator().manual_seed(1000 + repeat)
    tokens = torch.randint(0, VOCABULARY, (sizes.b, sizes.s), generator=generator)
    return tokens, torch.randn(sizes.b * sizes.s, sizes.hidden, generator=generator)


def contender(sizes: Sizes, name: str, dtype: torch.dtype) -> Contender:
    mode: Any = NONE if name == PLAIN else name
    stage = DecoderStage(sizes.config, VOCABULARY, ParallelMesh.alone(), recompute=Recompute(mode), dtype=dtype)
    if name == PLAIN:
        for block in stage.blocks.values():
            block.forward = partial(checkpoint, partial(type(block).forward, block), use_reentrant=False)
    grads = MainGrads(stage.parameters())

    def prepare(data: tuple[Tensor, Tensor]) -> tuple[TokenBatch, Tensor]:
        return TokenBatch.of(data[0]), data[1].to(dtype)

    def step(data: tuple[TokenBatch, Tensor]) -> None:
        grads.zero()
        stage(None, data[0]).backward(data[1])

    return Contender(name, prepare, step, extra={"stage": stage, "grads": grads})


def kept(made: Contender, data: Any) -> int:
    """Bytes that the contender keeps after forward."""
    batch, _ = made.prepare(data)
    return kept_bytes(lambda: made.extra["stage"](None, batch))[0]


def check(contenders: list[Contender], data: Any) -> None:
    """Raises AssertionError unless all gradients are the first contender's to the last bit."""
    found = []
    for made in contenders:
        made.step(made.prepare(data))
        found.append({name: p.main_grad.clone() for name, p in made.extra["stage"].named_parameters() if p._main_grad_written})
    for made, grads in zip(contenders[1:], found[1:], strict=True):
        assert grads.keys() == found[0].keys(), f"{made.name} writes other gradients"
        for name, grad in grads.items():
            assert torch.equal(grad, found[0][name]), f"{made.name}: the gradient of {name} differs"


def measure(sizes: Sizes, dtype: torch.dtype, repeats: int) -> tuple[list[int], list[list[float]]]:
    """In the rank: bytes by contender; CPU seconds by repeat and contender."""
    contenders = [contender(sizes, name, dtype) for name in NAMES]
    check(contenders, draw(sizes, -1))
    found = [kept(made, draw(sizes, -1)) for made in contenders]
    return found, interleaved(contenders, partial(draw, sizes), repeats=repeats, inner=1)[1].tolist()


def grid(sizes: Sizes, told: str, found: list[int], seconds: Tensor) -> tuple[Grid, list[Verdict]]:
    """The table of a dtype, and whether it keeps to the bars."""
    rows, bars = [], []
    for i, name in enumerate(NAMES):
        mode: Any = "full" if name == PLAIN else name
        formula = activation_bytes(sizes.config, sizes.b * sizes.s, Recompute(mode), dtype=DTYPES[told], fused_attention=True)
        extra = ratio(seconds, NAMES, name, NONE) - 1
        ms = float(seconds[:, i].median()) * 1e3
        rows.append([name, f"{found[i] / 1e6:.2f}", f"{formula / 1e6:.2f}", f"{ms:.0f}", f"{extra:+.1%}"])
        bars.append(Verdict(f"{told}, {name}: bytes kept and formula, distance / formula", abs(found[i] / formula - 1), at_most=0.05))
    # A block's forward without its last product, a fifth of it, beside a forward and a backward of twice that.
    bars.append(Verdict(f"{told}: time of full / none", ratio(seconds, NAMES, "full", NONE), at_most=1.3))
    bars.append(Verdict(f"{told}: time of full / full, plain", ratio(seconds, NAMES, "full", PLAIN), at_most=1.0))
    title = f"Recomputation, {told}: {sizes.layers} blocks, h={sizes.hidden}, f={sizes.ffn}, t={sizes.b} x {sizes.s}"
    return Grid(title, ["mode", "MB kept", "formula", "ms", "extra"], rows), bars


def main(repeats: int = 9) -> None:
    """Measures, prints, writes results/recompute.json.

    Args:
        repeats: measurements of each mode, at least 7.
    """
    sizes, grids, bars, samples = Sizes(), [], [], {}
    for told, dtype in DTYPES.items():
        found, listed = start(1, measure, sizes, dtype, repeats)[0]
        table, verdicts = grid(sizes, told, found, torch.tensor(listed, dtype=torch.float64))
        grids.append(table)
        bars += verdicts
        samples[told] = {"names": NAMES, "bytes": found, "seconds": listed}
    report("recompute", grids, bars, {}, samples)


if __name__ == "__main__":
    tyro.cli(main)
