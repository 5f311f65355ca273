"""What is allocated and alive is the ZeRO paper's arithmetic (arXiv:1910.02054, section 3.1), for each stage and format.

Psi parameters, n ranks of dp, bytes of a rank: weights 2 Psi, main_grads 4 Psi, master and moments 12 Psi; what a stage shards is divided
by n. Counted are the storages of every tensor that Python knows, whoever holds it.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from megapar import ParallelMesh
from megapar.optim.precision import LossScaler, Precision
from megapar.zero.buckets import UNDER_WAY
from tests.zero.common import wrapped

WIDTH, BLOCKS = 128, 30
PSI = WIDTH * WIDTH * BLOCKS
BUCKET = 4 * WIDTH * WIDTH
"""Bytes: each weight has one of its own."""


class Blocks(nn.Module):
    """Nothing but blocks: what stage 3 keeps for a whole micro-batch (embedding, head) is not in the arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@contextmanager
def made_here() -> Iterator[Callable[[], int]]:
    """What it gives tells the bytes of all storages that tensors made inside use."""
    gc.collect()
    gc.freeze()  # hides all there is from get_objects

    def alive() -> int:
        gc.collect()
        found = {}
        with torch._C.DisableTorchFunctionSubclass():
            for thing in gc.get_objects():
                if issubclass(type(thing), Tensor):
                    storage = thing.untyped_storage()
                    found[storage._cdata] = storage.nbytes()
        return sum(found.values())

    try:
        yield alive
    finally:
        gc.unfreeze()


FORMATS: dict[str, tuple[Precision, int, int, int]] = {
    # bytes a parameter of weight, main_grad, master and moments
    "bf16": (Precision(), 2, 4, 12),
    "remainder": (Precision(master="remainder"), 2, 4, 10),
    "bf16 gradients": (Precision(main_grad=torch.bfloat16), 2, 2, 12),
    "bf16 all": (Precision(main_grad=torch.bfloat16, moments=torch.bfloat16, master="remainder"), 2, 2, 6),
    "fp16": (Precision(torch.float16, scaler=LossScaler()), 2, 4, 12),
    "fp32": (Precision.of("fp32"), 4, 4, 8),
}


def expected(stage: int, every: str, n: int, weight: int, grad: int, rest: int) -> float:
    """Bytes a parameter, between steps and between micro-batches."""
    sharded = {"weight": stage >= 3, "grad": stage >= 2, "rest": stage >= 1}
    sizes = {"weight": weight, "grad": grad, "rest": rest}
    total = sum(size / (n if sharded[kind] else 1) for kind, size in sizes.items())
    # Sums of earlier micro-batches beside the gradients of this one.
    return total + (grad / n if every == "micro_batch" and stage < 2 and n > 1 else 0)


def measure(cases: list[tuple[str, int, str]]) -> list[list[float]]:
    """Bytes a parameter for each case: between steps, at the end of a backward with last=False, and with last=True."""
    mesh, found = ParallelMesh(), []
    for name, stage, every in cases:
        with made_here() as alive:
            model = Blocks()
            optimizer = wrapped(model, mesh, stage=stage, precision=FORMATS[name][0], reduce_every=every, bucket_bytes=BUCKET)
            numbers = []
            for last in (False, True):
                optimizer.backward(model(torch.randn(2, WIDTH).to(FORMATS[name][0].param)).float().sum(), last=last)
                numbers.append(alive() / PSI)
            optimizer.step(4)
            numbers.append(alive() / PSI)
        found.append(numbers)
    return found


def check(n: int, cases: list[tuple[str, int, str]], told: list[list[list[float]]]) -> None:
    bucket = BUCKET / PSI
    for rank in told:
        for (name, stage, every), (within, at_end, between) in zip(cases, rank, strict=True):
            weight, grad, rest = FORMATS[name][1:]
            want = expected(stage, every, n, weight, grad, rest)
            case = (n, name, stage, every, want, within, at_end, between)
            assert abs(between - want) <= 0.02 * want + bucket, case
            # A reduction under way has what it sends and what it receives.
            under_way = 2 * UNDER_WAY * bucket if n > 1 else 0.0
            assert want * 0.98 - bucket <= at_end <= want * 1.02 + bucket + under_way, case
            # With one reduction a step whole gradients are kept until then, beside the room for their sums.
            kept = want + (grad if every == "step" and stage >= 2 and n > 1 else 0.0)
            assert kept * 0.98 - bucket <= within <= kept * 1.02 + bucket + under_way, case


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_arithmetic(ranks, n):
    cases = [("bf16", stage, every) for stage in range(4) for every in ("step", "micro_batch")]
    if n == 2:
        cases += [(name, stage, "micro_batch") for name in FORMATS if name != "bf16" for stage in (0, 3)]
    if n == 8:
        cases = [("bf16", 0, "step"), *(("bf16", stage, "micro_batch") for stage in (1, 2, 3))]
    check(n, cases, ranks.run(n, measure, cases, timeout=150))


def test_paper():
    """Its figure 1, of 7.5e9 parameters on 64 ranks with 16 bytes a parameter of fp16 training: 120, 31.4, 16.6 and 1.9 GB."""
    giga = [7.5 * expected(stage, "step", 64, 2, 2, 12) for stage in range(4)]
    assert [round(value, 1) for value in giga] == [120.0, 31.4, 16.6, 1.9]


def grows() -> list[list[int]]:
    """Nothing is left behind: after ten steps as much is alive as after two."""
    mesh = ParallelMesh()
    told = []
    for stage in range(4):
        with made_here() as alive:
            model = Blocks()
            optimizer = wrapped(model, mesh, stage=stage, precision="bf16", bucket_bytes=BUCKET, reduce_every="micro_batch")
            sizes = []
            for step in range(6):
                for m in range(2):
                    optimizer.backward(model(torch.randn(2, WIDTH).bfloat16()).float().sum(), last=m == 1)
                optimizer.step(4)
                if step in (1, 5):
                    sizes.append(alive())
            told.append(sizes)
    return told


def test_nothing_is_left_behind(ranks):
    for told in ranks.run(2, grows):
        for early, late in told:
            assert abs(late - early) < 4096
