"""What cannot be done is refused with one sentence on every rank, before anything is computed; the runner can be used on."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from megapar import ParallelMesh
from megapar.grads import MainGrads
from megapar.models.decoder import DecoderStage
from megapar.pipeline.kinds import make_schedule
from megapar.pipeline.orders import forward_only
from megapar.pipeline.passes import with_communication, with_sharding
from megapar.pipeline.runtime import PipelineRunner
from megapar.pipeline.schedule import Action, Schedule, parse_schedule
from tests.pipeline.decoders import VOCABULARY, Chunk, stages_of
from tests.pipeline.test_parity import config_of
from tests.pipeline.test_runtime import WIDTH, data, layers, loss_fn

DEADLOCK = "0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0"
CROSSED = "0F0,0F1,0SEND_F1,0SEND_F0,0RECV_B0,0B0,0RECV_B1,0B1\n1RECV_F0,1RECV_F1,1F0,1B0,1SEND_B0,1F1,1B1,1SEND_B1"
"""Edited by hand: what rank 0 computes waits for what rank 1 does only later, and sends that are received in another order."""


def runner_of(mesh: ParallelMesh, chunks: Any = None, schedule: Schedule | None = None, **options: Any) -> PipelineRunner:
    return PipelineRunner(
        layers(2)[mesh.pp.rank :][:1] if chunks is None else chunks,
        mesh,
        make_schedule("1f1b", 2, 1, 4) if schedule is None else schedule,
        inputs=lambda micro_batch: micro_batch[0],
        **options,
    )


def tied(mesh: ParallelMesh, chunks: int, schedule: Schedule) -> None:
    stages = stages_of(config_of(2 * chunks, True, False, 2), mesh, chunks)
    PipelineRunner([Chunk(stage) for stage in stages], mesh, schedule)


V_SHAPED = "0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0"

MAKING: dict[str, tuple[Callable[[ParallelMesh], Any], str]] = {
    "too many chunks on one rank": (
        lambda mesh: runner_of(mesh, layers(2) if mesh.pp.rank == 1 else None),
        r"rank 1 has 2 chunks and the schedule gives it stages \[1\]: give 1 chunks",
    ),
    "no module": (lambda mesh: runner_of(mesh, [len]), "'builtin_function_or_method' object has no attribute 'named_parameters'"),
    "another pp": (lambda mesh: runner_of(mesh, schedule=make_schedule("1f1b", 3, 1, 4)), "the schedule has 3 ranks and the mesh pp=2"),
    "an idle rank": (lambda mesh: runner_of(mesh, schedule=parse_schedule("0F0,0B0\n\n")), "the schedule (has|gives) "),
    "forwards alone": (lambda mesh: runner_of(mesh, schedule=forward_only([0, 1], 4)), "the schedule has no backward"),
    "differs between ranks": (
        lambda mesh: runner_of(mesh, schedule=make_schedule(("1f1b", "gpipe")[mesh.pp.rank], 2, 1, 4)),
        "the schedule's sha256 must be the same on all ranks of world and differs",
    ),
    "a deadlock": (
        lambda mesh: runner_of(mesh, schedule=parse_schedule(DEADLOCK)),
        r"deadlock: rank 0 at 0B0 waits for 1I0 \(or B\); rank 1 at 1F1 waits for 0F1\n"
        r"  step  rank 0 rank 1\n     0   0F0   >1F1\n     1  >0B0",
    ),
    "a deadlock of messages": (
        lambda mesh: runner_of(mesh, schedule=parse_schedule(CROSSED)),
        r"(?s)deadlock: rank 0 at 0SEND_F1 waits for 1RECV_F1 to be reached; rank 1 at 1RECV_F0 waits for 0SEND_F0\n.*>0SEND_F1",
    ),
    "W without megapar's layers": (
        lambda mesh: runner_of(mesh, schedule=make_schedule("zero_bubble", 2, 1, 4)),
        r"the schedule splits backwards, and 0\.weight of stage 0 cannot have its gradient computed later",
    ),
    "W without MainGrads": (
        lambda mesh: PipelineRunner(
            [Chunk(stages_of(config_of(2, False, False, 2), mesh, 1)[0])], mesh, make_schedule("zero_bubble", 2, 1, 4)
        ),
        r"and stage\.embedding\.weight of stage 0 cannot have its gradient computed later: give the parameters to MainGrads",
    ),
    "tied without MainGrads": (
        lambda mesh: tied(mesh, 1, make_schedule("1f1b", 2, 1, 4)),
        r"stage\.embedding\.weight of stage 0 is tied to another stage's, and only MainGrads sums the gradients of both",
    ),
    "tied on one rank": (
        lambda mesh: tied_v(mesh),
        r"stage\.embedding\.weight of stage 0 is tied to another stage's, and their gradients are summed over the first and the last rank",
    ),
    "sharding without callback": (
        lambda mesh: runner_of(mesh, schedule=with_sharding(make_schedule("1f1b", 2, 1, 4), 1)),
        "the schedule has sharding actions and the runner nobody to do them",
    ),
}


def tied_v(mesh: ParallelMesh) -> None:
    places = ([0, 3], [1, 2])[mesh.pp.rank]
    stages = [DecoderStage(config_of(4, True, False, 2), VOCABULARY, mesh, layers=(place, place + 1)) for place in places]
    MainGrads(p for stage in stages for p in stage.parameters())
    PipelineRunner([Chunk(stage) for stage in stages], mesh, parse_schedule(V_SHAPED))


def caught(fn: Callable[[], Any]) -> str:
    try:
        fn()
    except (ValueError, AttributeError) as error:
        return str(error)
    return "nothing was refused"


def refusals() -> dict[str, str]:
    mesh = ParallelMesh(pp=2)
    return {name: caught(lambda make=make: make(mesh)) for name, (make, _) in MAKING.items()}


def test_what_no_runner_is_made_of(ranks):
    first, second = ranks.run(2, refusals)
    for name, (_, words) in MAKING.items():
        assert re.match(words, first[name]) or re.search(words, first[name]), f"{name}: {first[name]}"
        assert first[name] == second[name], name


STEPS: dict[str, tuple[Callable[[PipelineRunner, int], Any], str]] = {
    "too few everywhere": (lambda r, _: r.step(data(3), loss_fn), "step was given 3 micro-batches and takes 4: give as many"),
    "too few on one rank": (
        lambda r, rank: r.step(data(4 - rank), loss_fn),
        r"the number of micro-batches must be the same on all ranks of pp and differs \(rank 0: 4, rank 1: 3\): give each rank the same",
    ),
    "none": (lambda r, _: r.step([], loss_fn), "step was given 0 micro-batches and takes 4: give as many"),
    "none to evaluate": (lambda r, _: r.evaluate([], loss_fn), "evaluate was given 0 micro-batches and takes 1 or more: give as many"),
    "a generator": (
        lambda r, rank: r.step(data(4) if rank else (x for x in data(4)), loss_fn),
        r"the number of micro-batches must be the same on all ranks of pp and differs \(rank 0: None, rank 1: 4\)",
    ),
    "generators": (lambda r, _: r.step((x for x in data(4)), loss_fn), "step was given a generator as micro-batches: give a list of them"),
    "other shapes on one rank": (
        lambda r, rank: r.step([(x[: 2 - rank], y) for x, y in data(4)], loss_fn),
        "what the micro-batches look like must be the same on all ranks of pp and differs",
    ),
    "an unknown object on one rank": (
        lambda r, rank: r.step([(*d, {1} if rank else 1) for d in data(4)], loss_fn),
        "a micro-batch holds a set: use tensors, numbers, strings, lists, dicts and dataclasses of them",
    ),
    "another method": (
        lambda r, rank: (r.evaluate if rank else r.step)(data(4), loss_fn),
        r"the method that is called must be the same on all ranks of pp and differs \(rank 0: step, rank 1: evaluate\)",
    ),
}


def refused_steps() -> dict[str, str]:
    mesh = ParallelMesh(pp=2)
    runner = runner_of(mesh)
    told = {name: caught(lambda step=step: step(runner, mesh.pp.rank)) for name, (step, _) in STEPS.items()}
    assert all(p.grad is None for stage in runner.stages.values() for p in stage.module.parameters())
    runner.step(data(4), loss_fn)  # it is as good as new
    return told


def test_what_no_step_is_made_of(ranks):
    first, second = ranks.run(2, refused_steps)
    for name, (_, words) in STEPS.items():
        assert re.match(words, first[name]), f"{name}: {first[name]}"
        assert first[name] == second[name], name


TAKEN: dict[str, tuple[Callable[[int], Schedule], str]] = {
    "stages elsewhere": (
        lambda _: parse_schedule("1F0,1B0\n0F0,0B0"),
        r"the schedule places stages on ranks \[1, 0\] and they are on \[0, 1\]: make one for these",
    ),
    "more stages": (lambda _: make_schedule(None, 2, 2, 3), r"the schedule places stages on ranks \[0, 1, 0, 1\] and they are on \[0, 1\]"),
    "another pp": (lambda _: make_schedule("1f1b", 3, 1, 4), "the schedule has 3 ranks and the mesh pp=2"),
    "differs between ranks": (
        lambda rank: make_schedule("1f1b", 2, 1, 3 + rank),
        "the schedule's sha256 must be the same on all ranks of world and differs",
    ),
    "a known one on one rank": (
        lambda rank: make_schedule("1f1b", 2, 1, 3 if rank else 4),
        "the schedule's sha256 must be the same on all ranks of world and differs",
    ),
    "refused on one rank": (
        lambda rank: forward_only([0, 1], 4) if rank else make_schedule("1f1b", 2, 1, 4),
        "the schedule has no backward, so it trains nothing",
    ),
    "a deadlock": (lambda _: parse_schedule(DEADLOCK), "deadlock: rank 0 at 0B0"),
    "W without megapar's layers": (lambda _: make_schedule("zero_bubble", 2, 1, 4), r"the schedule splits backwards, and 0\.weight of"),
}


def refused_schedules() -> dict[str, str]:
    mesh = ParallelMesh(pp=2)
    runner, told = runner_of(mesh), {}
    for name, (make, _) in TAKEN.items():
        told[name] = caught(lambda make=make: runner.set_schedule(make(mesh.pp.rank)))
        assert runner.schedule.microbatches == 4, name
    runner.step(data(4), loss_fn)  # by the one it was made with
    runner.set_schedule(make_schedule("gpipe", 2, 1, 3))
    runner.step(data(3), loss_fn)
    told["the count that was"] = caught(lambda: runner.step(data(4), loss_fn))
    return told


def test_what_no_runner_goes_on_by(ranks):
    first, second = ranks.run(2, refused_schedules)
    for name, (_, words) in TAKEN.items():
        assert re.match(words, first[name]), f"{name}: {first[name]}"
    assert first["the count that was"] == "step was given 4 micro-batches and takes 3: give as many"
    assert first == second


class Returning(nn.Module):
    def __init__(self, value: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.value = nn.Parameter(torch.ones(WIDTH)), value

    def forward(self, x: torch.Tensor) -> Any:
        return self.value(x * self.weight)


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def told_loss(loss: Any) -> Callable[..., Any]:
    return lambda y, _: loss(y)


# What rank 0's chunk returns, the loss function, where that is seen, and the sentence.
OUTPUTS: dict[str, tuple[Callable[..., Any], Callable[..., Any], int, str]] = {
    "a list": (lambda x: [x], loss_fn, 0, "stage 0 returned a list: return one tensor, or a tuple of 1 to 16 tensors"),
    "nothing": (lambda x: None, loss_fn, 0, "stage 0 returned a NoneType: return one tensor"),
    "a tuple with a number": (lambda x: (x, 1), loss_fn, 0, r"stage 0 returned a tuple of \(Tensor, int\): return one tensor"),
    "an empty tuple": (lambda x: (), loss_fn, 0, r"stage 0 returned a tuple of \(\): return one tensor"),
    "17 tensors": (lambda x: (x,) * 17, loss_fn, 0, "stage 0 returned a tuple of 17: return one tensor"),
    "a shape that depends on data": (
        lambda x: x[x[:, 0] > 0],
        told_loss(lambda y: (y.sum(), 1)),
        0,
        r"stage 0 returned torch.float32 \[\d, 6\] for a micro-batch whose like gave torch.float32 \[\d, 6\] before: let the shapes",
    ),
    "a loss that is no scalar": (
        same,
        told_loss(lambda y: (y.sum(0), 1)),
        1,
        r"loss_fn returned a loss of shape \(6,\), torch.float32, and must return an fp32 scalar: sum in fp32",
    ),
    "a loss in bf16": (same, told_loss(lambda y: (y.sum().bfloat16(), 1)), 1, r"loss_fn returned a loss of shape \(\), torch.bfloat16"),
    "a loss alone": (same, told_loss(lambda y: y.sum()), 1, r"loss_fn returned a Tensor and must return \(sum of the losses"),
    "a loss that is no tensor": (same, told_loss(lambda y: (1.0, 1)), 1, r"loss_fn returned a tuple of \(float, int\) and must"),
    "a count that is none": (same, told_loss(lambda y: (y.sum(), 1.5)), 1, r"loss_fn returned the count 1\.5 and must return a whole"),
    "a count of fractions": (
        same,
        told_loss(lambda y: (y.sum(), torch.tensor(2.0))),
        1,
        r"loss_fn returned the count tensor\(2\.\) and must return a whole number",
    ),
}


def bad_output(name: str) -> None:
    mesh = ParallelMesh(pp=2)
    value, loss, _, _ = OUTPUTS[name]
    chunk = Returning(value if mesh.pp.rank == 0 else same)
    generator = torch.Generator().manual_seed(3)
    batches = [(torch.randn(6, WIDTH, generator=generator), torch.zeros(6, WIDTH)) for _ in range(4)]
    runner_of(mesh, [chunk]).step(batches, loss)


@pytest.mark.parametrize("name", OUTPUTS)
def test_bad_outputs(ranks, name):
    """Seen while computing: every rank ends with the sentence, those that did not see it with the name of the one that did."""
    _, _, seen, words = OUTPUTS[name]
    errors = ranks.errors(2, bad_output, name, timeout=10)
    assert re.match(words, errors[seen]), errors[seen]
    assert re.fullmatch(rf"(?s)rank {seen} failed in {seen}(SEND_)?F\d: ValueError: {re.escape(errors[seen])}", errors[1 - seen])


def sharded() -> None:
    """The callback sees the schedule's sharding actions, in order, between what is computed."""
    mesh = ParallelMesh(pp=2)
    schedule = with_communication(make_schedule("interleaved_1f1b", 2, 2, 3))
    schedule = with_sharding(schedule, 1)
    seen: list[Action] = []
    chunks = layers(4)[mesh.pp.rank :: 2]
    for place, chunk in zip((mesh.pp.rank, mesh.pp.rank + 2), chunks, strict=True):
        chunk.register_forward_hook(lambda *_, place=place: seen.append(Action("F", place)))
    runner_of(mesh, chunks, schedule, sharding=seen.append).step(data(3), loss_fn)
    wanted = ("F", "UNSHARD", "RESHARD", "REDUCE_GRAD")
    assert seen == [Action(a.kind, a.stage) for a in schedule.ranks[mesh.pp.rank] if a.kind in wanted]


def test_sharding_actions(ranks):
    ranks.run(2, sharded)
