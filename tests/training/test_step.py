"""One optimizer step against plain PyTorch: the division, the norm, the clipping, the decay groups, AdamW."""

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megapar import ParallelMesh
from megapar.batch import TokenBatch
from megapar.models.config import DecoderConfig, gpt_style
from megapar.models.decoder import Decoder
from megapar.models.pipelined import PipelinedDecoder
from megapar.objectives.causal_lm import IGNORED
from megapar.ops.step_state import LossScaling
from megapar.optim.precision import LossScaler, Precision
from megapar.params import named_specs
from megapar.pipeline.kinds import make_schedule
from megapar.pipeline.schedule import Schedule
from megapar.training.config import OptimizerConfig, ParallelConfig
from megapar.training.step import TrainStep, zero
from tests.parity import boxes, logical

VOCAB = 31
LLAMA = DecoderConfig(hidden_size=16, layers=1, heads=4, kv_heads=1, ffn_size=23, init_std=0.3)
GPT = gpt_style(hidden_size=16, layers=1, heads=4, max_positions=8, init_std=0.3)
# A large eps keeps AdamW smooth: where g is near 0 its update would otherwise be the sign of rounding.
SMOOTH = OptimizerConfig(eps=1e-3, max_norm=0.5, weight_decay=0.3)


def micro_batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Three of different token counts, so that a mean of means is wrong."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for ignored in (0, 5, 9):
        tokens = torch.randint(0, VOCAB, (2, 8), generator=generator)
        targets = tokens[:, 1:].clone()
        targets.view(-1)[:ignored] = IGNORED
        found.append((tokens[:, :-1], targets))
    return found


def batches(step: int) -> list[TokenBatch]:
    return [TokenBatch.of(inputs, targets) for inputs, targets in micro_batches(step)]


def step_of(config: DecoderConfig, options: OptimizerConfig, mesh: ParallelMesh) -> TrainStep:
    return TrainStep(PipelinedDecoder(config, VOCAB, mesh, seed=1, optimize=zero(options, mesh)), mesh)


def train(
    config: DecoderConfig, options: OptimizerConfig, mesh: ParallelMesh, sequence_parallel: bool, schedule: Schedule | None = None
) -> tuple[list[Any], PipelinedDecoder]:
    """Each step's micro-batches in one go if there is a schedule, else one by one."""
    made = {"schedule": schedule, "sequence_parallel": sequence_parallel, "optimize": zero(options, mesh)}
    model = PipelinedDecoder(config, VOCAB, mesh, seed=1, **made)
    step, told = TrainStep(model, mesh), []
    for i in range(3):
        together = [batches(i)] if schedule is not None else [[batch] for batch in batches(i)]
        for number, some in enumerate(together):
            step.accumulate(some, last=number == len(together) - 1)
        result = step.update(0.01 * (i + 1))
        told.append([result.loss, result.grad_norm, result.tokens])
    return told, model


def train_plainly(config: DecoderConfig, options: OptimizerConfig) -> tuple[list[Any], Decoder]:
    """The same in fp64 with torch alone, one batch a step."""
    model = Decoder(config, VOCAB, ParallelMesh.alone(), seed=1).double()
    no_decay = [p for p in model.parameters() if p.dim() == 1]
    decay = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decay, "weight_decay": options.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer, told = torch.optim.AdamW(groups, betas=options.betas, eps=options.eps, foreach=False), []
    for i in range(3):
        inputs, targets = (torch.cat(column) for column in zip(*micro_batches(i), strict=True))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets.reshape(-1), ignore_index=IGNORED)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_norm or 1e9)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (i + 1)
        optimizer.step()
        told.append([float(loss.detach()), float(norm), int((targets != IGNORED).sum())])
    return told, model


def compare(
    config: DecoderConfig, tp: int, sequence_parallel: bool, max_norm: float | None, pp: int = 1, schedule: Schedule | None = None
) -> list[Any]:
    options = OptimizerConfig(eps=1e-3, max_norm=max_norm, weight_decay=0.3)
    expected_told, expected_model = train_plainly(config, options)
    told, model = train(config, options, ParallelMesh(tp=tp, pp=pp), sequence_parallel, schedule)
    for found, expected in zip(told, expected_told, strict=True):
        assert found == pytest.approx(expected, rel=2e-5)
    mine = logical(model.stages, lambda p: p)
    for key, weight in boxes(model.stages, logical(expected_model, lambda p: p)).items():
        worst = float((mine[key].double() - weight).abs().max())
        assert worst <= 2e-5, f"{key[0]}: {worst:.1e}"
    return told


@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt"])
@pytest.mark.parametrize("max_norm", [0.5, None])
def test_three_steps_are_those_of_plain_torch(config, max_norm):
    told = compare(config, 1, False, max_norm)
    assert [tokens for _, _, tokens in told] == [28, 28, 28]
    assert all(norm > 0.5 for _, norm, _ in told), "else nothing is clipped"


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(2, False), (2, True), (3, True)])
def test_three_parallel_steps_are_those_of_plain_torch(ranks, tp, sequence_parallel):
    for config in (LLAMA, GPT):
        results = ranks.run(tp, compare, config, tp, sequence_parallel, 0.5)
        assert all(told == results[0] for told in results)


@pytest.mark.parametrize(
    ("tp", "pp", "chunks", "kind"), [(1, 2, 1, "1f1b"), (1, 4, 1, "gpipe"), (2, 2, 2, "interleaved_1f1b"), (1, 3, 2, "zero_bubble")]
)
def test_three_pipelined_steps_are_those_of_plain_torch(ranks, tp, pp, chunks, kind):
    """The tied weight of GPT's two ends counts once in the norm, and both copies take the same step."""
    for config in (LLAMA, GPT):
        config = replace(config, layers=pp * chunks)
        schedule = make_schedule(kind, pp, chunks, 3)
        results = ranks.run(tp * pp, compare, config, tp, tp > 1, 0.5, pp, schedule)
        assert all(told == results[0] for told in results)


def test_only_matrices_decay():
    mesh = ParallelMesh.alone()
    # With a huge eps the gradient moves nothing, and what changes is the decay.
    model = PipelinedDecoder(GPT, VOCAB, mesh, optimize=zero(OptimizerConfig(eps=1e30, weight_decay=0.5), mesh))
    step = TrainStep(model, mesh)
    with torch.no_grad():
        for param in model.grads.params:
            param.data.add_(1.0)
    before = {name: param.detach().clone() for name, param, _ in named_specs(model.stages)}
    step.accumulate(batches(0)[:1])
    step.update(0.1)
    for name, param, _ in named_specs(model.stages):
        kept = 1.0 if name.endswith("bias") or "norm" in name else 1.0 - 0.1 * 0.5
        assert torch.allclose(param, kept * before[name], rtol=1e-6), name


def test_the_same_gradients_give_torchs_weights():
    """Each update is within a few ulp of its terms, of which the weight and a few lr are the largest."""
    mesh, lr = ParallelMesh.alone(), 1e-3
    step = step_of(LLAMA, OptimizerConfig(max_norm=None, weight_decay=0.0), mesh)
    theirs = Decoder(LLAMA, VOCAB, mesh, seed=1)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for i in range(3):
        for number, batch in enumerate(batches(i)):
            step.accumulate([batch], last=number == 2)
        for mine, other in zip(step.model.grads.params, theirs.parameters(), strict=True):
            other.grad = mine.main_grad * (1.0 / 28)
        step.update(lr)
        optimizer.step()
        for a, b in zip(step.model.grads.params, theirs.parameters(), strict=True):
            assert ((a - b).abs() <= (i + 1) * 4 * 2.0**-23 * (b.abs() + 10 * lr)).all()


def test_gradients_do_not_leak_into_the_next_step():
    mesh = ParallelMesh.alone()
    step = step_of(LLAMA, SMOOTH, mesh)
    results = []
    for _ in range(2):
        step.accumulate(batches(0)[1:2])
        results.append(step.update(1e-30))  # too small to change a weight
    assert results[0] == results[1]


def refused(poison: str) -> list[Any]:
    """What this rank raises when rank 1's share of the step is poisoned; whether its weights are as before."""
    mesh = ParallelMesh(tp=2)
    step = step_of(LLAMA, SMOOTH, mesh)
    batch = batches(0)[0]
    step.accumulate([replace(batch, targets=torch.full_like(batch.tokens, IGNORED)) if poison == "nothing counted" else batch])
    if mesh.world.rank == 1 and poison != "nothing counted":
        step.model.grads.params[0].main_grad[0, 0] = float(poison)
    before = [p.detach().clone() for p in step.model.grads.params]
    try:
        step.update(0.1)
    except ValueError as error:
        return [str(error), all(torch.equal(a, b) for a, b in zip(before, step.model.grads.params, strict=True))]
    return []


@pytest.mark.parametrize(("poison", "told"), [("nan", "norm is nan"), ("inf", "norm is inf"), ("nothing counted", "counted 0 on all")])
def test_a_step_that_cannot_be_taken_is_refused_by_all(ranks, poison, told):
    first, second = ranks.run(2, refused, poison)
    assert first == second
    assert told in first[0]
    assert first[1], "no weight has moved"


def stop_wanted(by: int) -> bool:
    mesh = ParallelMesh(tp=2)
    step = step_of(LLAMA, SMOOTH, mesh)
    step.accumulate(batches(0)[:1])
    return bool(step.update(0.1, [float(mesh.world.rank == by)]).flags[0])


def test_one_rank_that_wants_to_stop_stops_all(ranks):
    assert ranks.run(2, stop_wanted, 1) == [True, True]
    assert ranks.run(2, stop_wanted, 5) == [False, False]


def with_z_loss(tp: int) -> list[Any]:
    """[training loss, gradient of the embedding on rank 0 as it is summed, evaluated loss, targets]."""
    mesh = ParallelMesh(tp=tp)
    model = PipelinedDecoder(LLAMA, VOCAB, mesh, seed=1, optimize=zero(SMOOTH, mesh))
    step = TrainStep(model, mesh, z_loss=0.01)
    step.accumulate(batches(0)[:1])
    gradient = model.stages[0].norm.weight.main_grad.clone()
    result = step.update(1e-9)
    return [result.loss, gradient, *step.evaluate(batches(0)[:1])[:2]]


def test_z_loss_is_trained_and_not_evaluated(ranks):
    model = Decoder(LLAMA, VOCAB, ParallelMesh.alone(), seed=1).double()
    inputs, targets = micro_batches(0)[0]
    logits = model(inputs)
    plain = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    trained = plain + 0.01 * logits.logsumexp(-1).square().sum()
    trained.backward()
    for tp in (1, 2):
        for loss, gradient, evaluated, count in ranks.run(tp, with_z_loss, tp):
            assert loss == pytest.approx(float(trained) / count, rel=1e-5)
            assert evaluated == pytest.approx(float(plain), rel=1e-5)
            torch.testing.assert_close(gradient.double(), model.norm.weight.grad, rtol=1e-4, atol=1e-5)


NAMES = ("plain", "never", "noised")


def mixed(step: int) -> list[TokenBatch]:
    """Three micro-batches of two sequences: plain and noised, two noised ones, noised and plain."""
    ids = [[0, 2], [2, 2], [2, 0]]
    return [replace(batch, objective_ids=torch.tensor(which)) for batch, which in zip(batches(step), ids, strict=True)]


def by_objective(options: dict[str, Any], schedule: Schedule | None, dp: int) -> list[Any]:
    """[loss, tokens and losses by objective of a step, the sums of an evaluation], of these batches, once in all replicas together."""
    mesh = ParallelMesh(**options)
    model = PipelinedDecoder(replace(LLAMA, layers=2), VOCAB, mesh, seed=1, schedule=schedule, optimize=zero(SMOOTH, mesh))
    step, mine = TrainStep(model, mesh, objectives=NAMES), mixed(0)[mesh.dp.rank :: dp]
    some = [mine] if schedule is not None else [[batch] for batch in mine]
    evaluated = step.evaluate(mine + mine[:1] * (len(mixed(0)[::dp]) - len(mine)))
    for number, together in enumerate(some):
        step.accumulate(together, last=number == len(some) - 1)
    result = step.update(1e-9)
    return [result.loss, result.tokens, dict(result.objectives), *evaluated]


@pytest.mark.parametrize(
    ("options", "schedule"),
    [({}, None), ({"tp": 2}, None), ({"pp": 2}, make_schedule("1f1b", 2, 1, 3)), ({"tp": 2, "pp": 2}, make_schedule("gpipe", 2, 1, 3))],
)
def test_losses_by_objective_are_those_of_their_sequences(ranks, options, schedule):
    model = Decoder(replace(LLAMA, layers=2), VOCAB, ParallelMesh.alone(), seed=1).double()
    losses = torch.stack(
        [F.cross_entropy(model(inputs), targets.flatten(), reduction="none").view(2, -1) for inputs, targets in micro_batches(0)]
    )
    counted = torch.stack([(targets != IGNORED) for _, targets in micro_batches(0)])
    noised = torch.tensor([[0, 1], [1, 1], [1, 0]])[..., None].bool().expand_as(counted)
    want = {name: (float(losses[where].sum()), int(counted[where].sum())) for name, where in (("plain", ~noised), ("noised", noised))}
    assert want["plain"][1] != want["noised"][1] > 0
    means = {name: pytest.approx(total / count, rel=1e-5) for name, (total, count) in want.items()}
    sums = {"never": (0.0, 0)} | {name: (pytest.approx(total, rel=1e-5), count) for name, (total, count) in want.items()}
    size = options.get("tp", 1) * options.get("pp", 1)
    for loss, tokens, objectives, total, count, each in ranks.run(size, by_objective, options, schedule, 1):
        assert objectives == means and each == sums
        assert tokens == count == int(counted.sum())
        assert loss * tokens == pytest.approx(total, rel=1e-5) == sum(value for value, _ in each.values())


def test_a_loss_that_is_not_finite_is_its_own_objectives():
    mesh = ParallelMesh.alone()
    step = TrainStep(step_of(LLAMA, SMOOTH, mesh).model, mesh, objectives=NAMES)
    batch, table = mixed(0)[0], step._empty_table()
    output = torch.randn(batch.t, LLAMA.hidden_size)
    output[batch.s :] = float("nan")  # all of the second sequence
    step.loss(output, batch, table)
    assert table[0].isfinite().all() and table[0, 1] == batch.s and not table[1].any() and table[2, 0].isnan()


def test_losses_by_objective_are_those_of_all_replicas(ranks):
    (alone,), (first, second) = ranks.run(1, by_objective, {}, None, 1), ranks.run(2, by_objective, {}, None, 2)
    assert first == second and first[2] == pytest.approx(alone[2], rel=1e-6)


def embedding_gradients(tp: int, factor: float) -> list[torch.Tensor]:
    """Of every parameter of this rank, by name, before the step."""
    mesh = ParallelMesh(tp=tp)
    model = PipelinedDecoder(dataclasses.replace(LLAMA, embedding_gradient=factor), VOCAB, mesh, seed=1, optimize=zero(SMOOTH, mesh))
    TrainStep(model, mesh).accumulate(batches(0)[:1])
    return [(name, param.main_grad.clone()) for name, param in model.stages[0].named_parameters()]


@pytest.mark.parametrize("tp", [1, 2])
def test_the_embeddings_gradient_shrinks_by_exactly_its_factor_and_no_other_changes(ranks, tp):
    """A power of two, so that the product has no rounding."""
    for plain, shrunk in zip(ranks.run(tp, embedding_gradients, tp, 1.0), ranks.run(tp, embedding_gradients, tp, 0.125), strict=True):
        for (name, one), (_, other) in zip(plain, shrunk, strict=True):
            assert torch.equal(other, one * 0.125 if name.startswith("embedding") else one), name
            assert one.any()


def rejected(stage: int) -> list[Any]:
    """A step that is not accepted, then one that is, and the same without the first: [what is told, weights alike, scales alike]."""
    mesh, found = ParallelMesh(), []
    for turns in ((False, True), (True,)):
        how = ParallelConfig(zero_stage=stage)
        precision = Precision(torch.float16, master="fp32", scaler=LossScaler(64.0, LossScaling(growth_interval=1)))
        model = PipelinedDecoder(LLAMA, VOCAB, mesh, seed=1, optimize=zero(SMOOTH, mesh, how, precision))
        step = TrainStep(model, mesh)
        for accepted in turns:
            step.accumulate(batches(mesh.dp.rank)[:1])
            result = step.update(0.1, judge=lambda loss, norm, accepted=accepted: accepted)
            found.append([result.skipped, result.loss_scale, result.loss])
        found.append([box.read().clone() for box in step.optimizer.boxes()])
    (no, yes, first, alone, second) = found
    return [no, yes, alone, all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), step.optimizer.skipped_steps]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_accepted_changes_nothing_not_even_the_loss_scale(ranks, stage):
    for no, yes, alone, alike, skipped in ranks.run(2, rejected, stage):
        assert no[:2] == [True, 64.0], "an accepted step doubles it"
        assert yes == alone and alone[:2] == [False, 128.0]
        assert alike and skipped == 0
