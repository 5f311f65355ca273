"""Output projection and loss, forward and backward in bf16, without the logits: against torch, which makes them all.

    python -m benchmarks.linear_cross_entropy

2,048 tokens x 512 x a vocabulary of 32,768, one process, two threads; gradients of input and weight. Torch's logits are widened to fp32
for the loss, as is usual ("bf16 loss": they are not).

ms           of the median repeat
x ...        speed over that of the contender named, median of the ratios taken within each repeat
peak MB      what three steps add to the peak memory of an own process, inputs and gradients included
limit        the three GEMMs alone at the rate of torch's best one in the same run

Before timing, the losses must agree to 0.1 % (1 % for torch's bf16 loss) and the gradients to 2 % in norm, bf16's roundings.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.common import Contender, Grid, LaunchError, Verdict, interleaved, ratio, report, start
from megapar.layers.linear_cross_entropy import vocab_parallel_linear_cross_entropy

OURS, EAGER, NARROW, COMPILED, LIMIT = "megapar", "torch", "torch, bf16 loss", "torch, compiled", "limit: three GEMMs"
T, H, V = 2048, 512, 32768
Data = tuple[Tensor, Tensor, Tensor]


def draw(repeat: int) -> Data:
    """Fresh (x [t, h], weight [v, h], target [t])."""
    generator = torch.Generator().manual_seed(1000 + repeat)
    x = torch.randn(T, H, generator=generator).bfloat16()
    weight = (torch.randn(V, H, generator=generator) * 0.05).bfloat16()
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (T,), generator=generator)


def forward(name: str) -> Callable[..., Tensor]:
    def wide(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), target, reduction="sum")

    if name == OURS:
        return lambda x, weight, target: vocab_parallel_linear_cross_entropy(x, weight, target, tp=None, vocab_size=V)
    if name == NARROW:
        return lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target, reduction="sum")
    return torch.compile(wide) if name == COMPILED else wide


def contender(name: str) -> Contender:
    loss_of = forward(name) if name != LIMIT else None

    def step(data: Data) -> Any:
        x, weight, target = data
        if loss_of is None:
            with torch.no_grad():
                for rows in x.split(256):
                    dy = F.linear(rows, weight)
                    dy @ weight, dy.t() @ rows
            return None
        x.grad = weight.grad = None
        loss = loss_of(x, weight, target)
        loss.backward()
        return loss.detach()

    return Contender(name, lambda data: data, step, one_rank_threads=2)


def check(names: list[str]) -> None:
    """Raises AssertionError unless losses and gradients agree with eager torch's."""
    x, weight, target = draw(-1)
    found = {}
    for name in names:
        loss = contender(name).step((x, weight, target))
        found[name] = (loss.double(), x.grad.double(), weight.grad.double())
    for name, values in found.items():
        # torch's bf16 loss adds up 2,048 losses in 8 bits.
        for value, want, bound in zip(values, found[EAGER], (1e-2 if name == NARROW else 1e-3, 2e-2, 2e-2), strict=True):
            error = float((value - want).norm() / want.norm())
            assert error <= bound, f"{name}: {error:.1e} above {bound:.0e}"


def measure(names: list[str], repeats: int) -> list[list[float]]:
    """In the rank: wall seconds by repeat and contender."""
    torch.set_num_threads(2)
    check([name for name in names if name != LIMIT])
    return interleaved([contender(name) for name in names], draw, repeats=repeats, inner=1)[0].tolist()


def peak(name: str) -> float:
    """In the rank: MB that three steps add to the peak of the process."""
    assert dist.is_initialized()
    torch.set_num_threads(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made, data = contender(name), draw(-1)
    for _ in range(3):
        made.step(data)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


def main(repeats: int = 9) -> None:
    """Measures, prints, writes results/linear_cross_entropy.json.

    Args:
        repeats: measurements of each contender, at least 7.
    """
    missing: dict[str, str] = {}
    names, peaks = [], {}
    for name in (OURS, EAGER, NARROW, COMPILED):
        try:
            peaks[name] = start(1, peak, name, timeout=240)[0]
            names.append(name)
        except LaunchError as error:
            missing[name] = str(error).strip().splitlines()[-1]
    names.append(LIMIT)
    listed = start(1, measure, names, repeats)[0]
    seconds = torch.tensor(listed, dtype=torch.float64)
    rows = []
    for i, name in enumerate(names):
        ratios = [f"{ratio(seconds, names, base, name):.2f}" for base in names[1:-1]]
        rows.append([name, f"{float(seconds[:, i].median()) * 1e3:.0f}", *ratios, f"{peaks[name]:.0f}" if name in peaks else ""])
    grid = Grid(f"Output projection and loss: bf16, t={T}, h={H}, v={V}", ["", "ms", *(f"x {n}" for n in names[1:-1]), "peak MB"], rows)
    bars = [
        Verdict(f"peak memory of {OURS} / {EAGER}", peaks[OURS] / peaks[EAGER], at_most=0.25),
        Verdict(f"speed of {OURS} / {EAGER}", ratio(seconds, names, EAGER, OURS), at_least=1.0),
    ]
    if COMPILED in names:
        bars += [
            Verdict(f"peak memory of {OURS} / {COMPILED}", peaks[OURS] / peaks[COMPILED], at_most=0.25),
            Verdict(f"speed of {OURS} / {COMPILED}", ratio(seconds, names, COMPILED, OURS), at_least=1.0),
        ]
    report("linear_cross_entropy", [grid], bars, missing, {"names": names, "seconds": listed, "peak_mb": peaks})


if __name__ == "__main__":
    tyro.cli(main)
