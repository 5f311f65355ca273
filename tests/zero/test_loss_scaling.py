"""fp16: what overflows on one rank is skipped by all, and only that; the scale follows; small gradients survive."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megapar import ParallelMesh
from megapar.ops.step_state import LossScaling
from megapar.optim.precision import LossScaler, Precision
from megapar.zero.optimizer import ZeroOptimizer
from megapar.zero.setup import AdamW
from tests.parity import boxes, logical
from tests.zero.common import TOKENS, decoder, loss_sum, micro_batch, weights, wrapped


def precision(scale: float = 2.0**10, **options: Any) -> Precision:
    return Precision(torch.float16, scaler=LossScaler(scale, LossScaling(**options)))


def poison(optimizer: ZeroOptimizer, value: float) -> None:
    """One element of one local gradient overflows, before any reduction."""
    real = optimizer.grads.end_window

    def end_window(chunk: int | None = None) -> None:
        optimizer.grads.end_window = real
        param = optimizer.chunks[0].blocks["1"].mlp.down.weight
        param.main_grad.view(-1)[5] = value
        real(chunk)

    optimizer.grads.end_window = end_window


def train(tp: int, stage: int, at: tuple[int, int] | None, steps: tuple[int, ...], hysteresis: int, value: float) -> dict[str, Any]:
    """8 steps; the rank `at` of (dp, tp) overflows in `steps`. Nothing of a skipped step may stay."""
    mesh = ParallelMesh(tp=tp)
    optimizer = wrapped(
        decoder(mesh), mesh, stage=stage, precision=precision(hysteresis=hysteresis, growth_interval=3), overlap=False, bucket_bytes=3000
    )
    told: dict[str, Any] = {"skipped": [], "scale": [], "norm": []}
    for step in range(8):
        before = [box.read().clone() for box in optimizer.boxes()]
        applied = optimizer.step_state.applied_steps.clone()
        if step in steps and at in (None, (mesh.dp.rank, mesh.tp.rank)):
            poison(optimizer, value)
        for m in range(2):
            optimizer.backward(loss_sum(optimizer.chunks[0], micro_batch(mesh.dp.rank, step, m)), last=m == 1)
        result = optimizer.step(2 * TOKENS)
        unchanged = all(torch.equal(old, box.read()) for old, box in zip(before, optimizer.boxes(), strict=True))
        assert unchanged == bool(result.skipped), step
        assert torch.equal(optimizer.step_state.applied_steps, applied + (1 - result.skipped)), step
        told["skipped"].append(int(result.skipped))
        told["scale"].append(float(result.loss_scale))
        told["norm"].append(float(result.grad_norm))
    assert optimizer.skipped_steps == sum(told["skipped"])
    told["weights"] = weights(optimizer)
    return told


def scales(skips: list[int], hysteresis: int) -> list[float]:
    """By the definition: halved at the hysteresis-th skip since the last good step and at each further one, doubled after 3 good ones."""
    scale, found, left, good = 2.0**10, [], hysteresis, 0
    for skip in skips:
        if skip:
            left, good = left - 1, 0
            scale = scale / 2 if left <= 0 else scale
        else:
            left, good = hysteresis, good + 1
            if good == 3:
                scale, good = scale * 2, 0
        found.append(scale)
    return found


@pytest.mark.parametrize("hysteresis", [1, 2])
@pytest.mark.parametrize("world,tp,at", [(2, 1, (0, 0)), (2, 1, (1, 0)), (2, 2, (0, 1)), (4, 2, (1, 0))])
def test_overflow_on_one_rank(ranks, world, tp, at, hysteresis):
    """The ranks skip what one process skips with the same injection, scale alike, and go on as it does."""
    steps = (2, 5, 6)
    expected = [int(step in steps) for step in range(8)]
    for stage, value in ((0, torch.inf), (1, torch.nan), (2, -torch.inf), (3, torch.inf)):
        if stage >= 2 and tp == 2 and hysteresis == 2:
            continue
        for told in ranks.run(world, train, tp, stage, at, steps, hysteresis, value):
            assert told["skipped"] == expected
            assert told["scale"] == scales(expected, hysteresis)
            assert all(norm == norm and norm < 1e3 for norm, skip in zip(told["norm"], expected, strict=True) if not skip)


def test_any_stage_takes_the_same_way(ranks):
    """To the last bit for a given dp; and on one rank it is what one rank does."""
    for world in (1, 2):
        told = [ranks.run(world, train, 1, stage, (0, 0), (2, 5, 6), 1, torch.inf)[0] for stage in range(4)]
        for other in told[1:]:
            assert other["scale"] == told[0]["scale"] and other["skipped"] == told[0]["skipped"]
            assert all(torch.equal(other["weights"][key], value) for key, value in told[0]["weights"].items())


def beside_one_process(tp: int, at: tuple[int, int]) -> None:
    """The trajectory of one process with the same injection, which sees all ranks' samples: within what fp16 leaves open."""
    mesh, alone = ParallelMesh(tp=tp), ParallelMesh.alone()
    update = AdamW(lr=1e-2, eps=1e-2)
    nets = [wrapped(decoder(m), m, stage=1, precision=precision(), overlap=False, update=update) for m in (mesh, alone)]
    start = logical(nets[1].chunks, lambda p: p)
    for step in range(6):
        for optimizer in nets:
            dp = mesh.dp.size if optimizer is nets[1] else 1
            if step == 2 and (optimizer is nets[1] or at == (mesh.dp.rank, mesh.tp.rank)):
                poison(optimizer, torch.inf)
            for place in range(dp):
                rank = place if optimizer is nets[1] else mesh.dp.rank
                optimizer.backward(loss_sum(optimizer.chunks[0], micro_batch(rank, step, 0)), last=place == dp - 1)
        together, single = nets[0].step(TOKENS), nets[1].step(TOKENS * mesh.dp.size)
        assert float(together.skipped) == float(single.skipped) == (step == 2)
        assert float(together.loss_scale) == float(single.loss_scale)
        if step != 2:
            assert abs(float(together.grad_norm) - float(single.grad_norm)) <= 2e-3 * float(single.grad_norm)
    final = boxes(nets[0].chunks, logical(nets[1].chunks, lambda p: p))
    moved = max(float((value - start[key]).abs().max()) for key, value in logical(nets[1].chunks, lambda p: p).items())
    for key, value in weights(nets[0]).items():
        assert float((value.float() - final[key].float()).abs().max()) <= 0.05 * moved, key


def test_trajectory_of_one_process(ranks):
    ranks.run(2, beside_one_process, 1, (1, 0))
    ranks.run(2, beside_one_process, 2, (0, 1))


class Faint(nn.Module):
    """Its gradient is 1e-8 a sample, which fp16 rounds to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, factor: float) -> Tensor:
        return self.weight * factor


def faint(scaler: LossScaler) -> tuple[float, float, float, float]:
    """(skipped, mean gradient by the norm, by the first moment, biggest change of a weight)."""
    mesh = ParallelMesh()
    model = Faint()
    optimizer = wrapped(model, mesh, precision=Precision(torch.float16, scaler=scaler), update=AdamW(lr=1e-3, eps=1e-12), max_norm=None)
    # The product is fp16: a factor of 1e-8 arrives scaled, and would be 0 unscaled.
    loss = (model(1.0).float() * 1e-8).sum()
    optimizer.backward(loss)
    told = optimizer.step(1)
    moment = next(box.read().clone() for box in optimizer.boxes() if box.kind == "exp_avg")
    master = next(box.read().clone() for box in optimizer.boxes() if box.kind == "weight")
    assert moment.dtype == torch.float32
    return float(told.skipped), float(told.grad_norm) / 8, float(moment.mean()) / 0.1, float((1 - master).abs().max())


def test_small_gradients_survive(ranks):
    """Two ranks' sum of 1e-8 each over a count of 2, unscaled in fp32: the update is as large as any of Adam's."""
    for scaler in (LossScaler(), LossScaler.static(2.0**14)):
        for skipped, norm, moment, moved in ranks.run(2, faint, scaler):
            assert skipped == 0
            assert abs(norm - 1e-8) <= 1e-3 * 1e-8 and abs(moment - 1e-8) <= 1e-3 * 1e-8
            assert 0.9e-3 <= moved <= 1.1e-3
    for skipped, norm, moment, _ in ranks.run(2, faint, LossScaler.static(1.0)):
        assert skipped == norm == moment == 0, "without a scale there is nothing left"


def ranges(name: str, value: float) -> list[float]:
    """A gradient of this size that each of two ranks has."""
    mesh = ParallelMesh()
    model = Faint()
    how = Precision.of("bf16") if name == "bf16" else Precision(torch.float16, scaler=LossScaler.static(1.0))
    optimizer = wrapped(model, mesh, precision=how, max_norm=None)
    optimizer.backward((model(1.0) * torch.tensor(value, dtype=how.param)).float().sum())
    told = optimizer.step(1)
    return [float(told.skipped), float(told.grad_norm)]


def test_ranges(ranks):
    """fp16 has 65504 and no more; the sum of two such is not fp16's affair. bf16 goes as far as fp32, whose squares are summed in fp64."""
    assert all(told[0] == 0 and abs(told[1] / 8 - 65504) < 1 for told in ranks.run(2, ranges, "fp16", 65504.0))
    assert all(told[0] == 1 for told in ranks.run(2, ranges, "fp16", 65520.0))
    assert all(told[0] == 0 and told[1] > 1e38 for told in ranks.run(2, ranges, "bf16", 1.5e38))
    assert all(told[0] == 1 for told in ranks.run(2, ranges, "bf16", 3.0e38)), "3e38 + 3e38 is no fp32"


def static() -> None:
    """Its scale stays, an overflow is skipped, and it may go on for ever."""
    mesh = ParallelMesh()
    optimizer = wrapped(decoder(mesh), mesh, precision=Precision(torch.float16, scaler=LossScaler.static(256.0)), overlap=False)
    skipped = []
    for step in range(6):
        if step in (1, 2, 4):
            poison(optimizer, torch.inf)
        optimizer.backward(loss_sum(optimizer.chunks[0], micro_batch(mesh.dp.rank, step, 0)))
        told = optimizer.step(TOKENS)
        skipped.append(int(told.skipped))
        assert float(told.loss_scale) == 256.0
    assert skipped == [0, 1, 1, 0, 1, 0] and optimizer.skipped_steps == 3


def test_static(ranks):
    ranks.run(2, static)


def at_the_minimum() -> int:
    """4, 2, 1 and no further: the step after the one that overflowed at the minimum raises."""
    mesh = ParallelMesh()
    optimizer = wrapped(decoder(mesh), mesh, precision=precision(4.0, min_scale=1.0), overlap=False)
    for step in range(9):
        poison(optimizer, torch.inf)
        optimizer.backward(loss_sum(optimizer.chunks[0], micro_batch(mesh.dp.rank, step, 0)))
        try:
            told = optimizer.step(TOKENS)
        except ValueError as error:
            raise ValueError(f"step {step}: {error}") from error
        assert float(told.loss_scale) == max(4.0 / 2 ** (step + 1), 1.0)
    return 0


def test_scale_at_its_minimum(ranks):
    for told in ranks.errors(2, at_the_minimum):
        assert told.startswith("step 3: the loss scale is at its minimum of 1 and gradients still are not finite: lower the learning rate")


def recovers() -> None:
    """One overflow at the minimum, and then none: training goes on."""
    mesh = ParallelMesh()
    optimizer = wrapped(decoder(mesh), mesh, precision=precision(4.0, min_scale=4.0), overlap=False)
    for step in range(4):
        if step == 1:
            poison(optimizer, torch.inf)
        optimizer.backward(loss_sum(optimizer.chunks[0], micro_batch(mesh.dp.rank, step, 0)))
        if step == 2:
            with pytest.raises(ValueError, match="the loss scale is at its minimum of 4"):
                optimizer.step(TOKENS)
            return
        optimizer.step(TOKENS)


def test_one_overflow_at_the_minimum(ranks):
    ranks.run(2, recovers)


def bf16_without_scaler() -> list[int]:
    """A gradient that is not finite is skipped there too."""
    mesh = ParallelMesh()
    optimizer = wrapped(decoder(mesh), mesh, precision="bf16", overlap=False)
    skipped = []
    for step in range(3):
        if step == 1 and mesh.dp.rank == 1:
            poison(optimizer, torch.nan)
        optimizer.backward(loss_sum(optimizer.chunks[0], micro_batch(mesh.dp.rank, step, 0)))
        told = optimizer.step(TOKENS)
        skipped.append(int(told.skipped))
        assert float(told.loss_scale) == 1.0
    return skipped


def test_not_finite_in_bf16(ranks):
    assert ranks.run(2, bf16_without_scaler) == [[0, 1, 0]] * 2


def resumed(split: int) -> dict[str, Any]:
    """Scale, growth and hysteresis are part of the state."""
    mesh = ParallelMesh()

    def made() -> ZeroOptimizer:
        return wrapped(decoder(mesh), mesh, stage=2, precision=precision(growth_interval=4, hysteresis=2), overlap=False)

    optimizer, told = made(), []
    for step in range(10):
        if step == split:
            states: list[Any] = [None] * mesh.dp.size
            torch.distributed.all_gather_object(states, optimizer.state_dict())
            optimizer = made()
            optimizer.load_state_dict(states)
        if step in (2, 3, 8, 9):
            poison(optimizer, torch.inf)
        optimizer.backward(loss_sum(optimizer.chunks[0], micro_batch(mesh.dp.rank, step, 0)))
        told.append(float(optimizer.step(TOKENS).loss_scale))
    return {"scales": told, "skipped": optimizer.skipped_steps, "weights": weights(optimizer)}


def test_resuming(ranks):
    expected = ranks.run(2, resumed, -1)[0]
    for split in (3, 4, 7, 9):
        got = ranks.run(2, resumed, split)[0]
        assert got["scales"] == expected["scales"] and got["skipped"] == expected["skipped"] == 4, split
        assert all(torch.equal(got["weights"][key], value) for key, value in expected["weights"].items()), split
