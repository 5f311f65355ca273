"""What users do beside the optimizer, which it must notice, or survive: conversions, writes, copies, second optimizers, rollbacks."""

import copy

import pytest
import torch
from torch import nn

from megapar import ParallelMesh
from megapar.ops.adamw import join
from megapar.optim.precision import Precision
from megapar.zero.optimizer import ZeroOptimizer
from tests.zero.common import TOKENS, backward, decoder, loss_sum, micro_batch, weights, wrapped

CHANGES = {
    "converted": (lambda model: model.bfloat16(), "was moved or converted after the model was wrapped"),
    "swapped": (lambda model: setattr(model.norm.weight, "data", torch.ones(16)), "was moved or converted"),
    "loaded": (lambda model: model.load_state_dict(decoder(ParallelMesh.alone()).state_dict()), "was written after the model was wrapped"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_the_step_would_not_see_or_undo(name):
    change, words = CHANGES[name]
    mesh = ParallelMesh.alone()
    model = decoder(mesh)
    optimizer = wrapped(model, mesh)
    backward(optimizer, 0)
    optimizer.step(2 * TOKENS)
    change(model)
    with pytest.raises(ValueError, match=words):
        optimizer.backward(loss_sum(model.float(), micro_batch(0, 0, 0)))
        optimizer.step(TOKENS)


def test_a_second_optimizer_is_refused_and_leaves_the_first_whole():
    mesh = ParallelMesh.alone()
    model = decoder(mesh)
    optimizer = wrapped(model, mesh)
    before = model.norm.weight.detach().clone()
    with pytest.raises(ValueError, match="has an optimizer or MainGrads already"):
        wrapped(model, mesh)
    backward(optimizer, 0)
    optimizer.step(2 * TOKENS)
    assert not torch.equal(model.norm.weight, before)


def test_a_last_backward_that_was_not_the_last():
    mesh = ParallelMesh.alone()
    model = decoder(mesh)
    optimizer = wrapped(model, mesh)
    optimizer.backward(loss_sum(model, micro_batch(0, 0, 0)))
    with pytest.raises(ValueError, match="give all but one last=False"):
        optimizer.backward(loss_sum(model, micro_batch(0, 0, 1)))


def test_parameters_in_one_memory():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model[1].weight = nn.Parameter(model[0].weight.data)
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight share memory"):
        ZeroOptimizer(model, ParallelMesh.alone())


def test_a_remainder_at_a_tie_is_the_value():
    """Half way between two bf16 numbers the weight rounds to even as torch does it, and away from zero as the remainder has it."""
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(1.00390625)
    optimizer = ZeroOptimizer(model, ParallelMesh.alone(), precision=Precision(master="remainder"))
    index = optimizer._index[model.weight]
    assert (join(optimizer.weights.shards[index][:16], optimizer.sharded.masters[index]) == 1.00390625).all()


def test_a_loss_scale_is_not_taken_over_from_a_run_without():
    mesh, states = ParallelMesh.alone(), {}
    for precision in ("bf16", "fp16"):
        optimizer = wrapped(decoder(mesh), mesh, precision=precision)
        states[precision] = (optimizer, optimizer.state_dict())
    for here, there, scale in (("bf16", "fp16", 1.0), ("fp16", "bf16", 65536.0)):
        states[here][0].load_state_dict(states[there][1])
        assert float(states[here][0].loss_scale) == scale


def other_values() -> None:
    mesh = ParallelMesh()
    model = decoder(mesh)
    if mesh.dp.rank == 1:
        with torch.no_grad():
            model.norm.weight[3] += 1e-6
    wrapped(model, mesh)


def test_replicas_that_start_from_different_weights(ranks):
    for told in ranks.errors(2, other_values):
        assert "norm.weight has different values on the replicas" in told


def copies_and_rollbacks() -> None:
    mesh = ParallelMesh()
    for stage in (1, 2):
        copy.deepcopy(wrapped(decoder(mesh), mesh, stage=stage).chunks[0])  # gathers hang on no module
    optimizer = wrapped(decoder(mesh), mesh, gather_ahead=True)
    saved = [None] * 2
    torch.distributed.all_gather_object(saved, optimizer.state_dict())
    first = weights(optimizer)
    for _ in range(2):  # a gather of the step before must not write over what is loaded
        backward(optimizer, 0)
        optimizer.step(4 * TOKENS)
        optimizer.load_state_dict(saved)
        assert not optimizer.gathers._pending, "when a model is loaded there is no room for all weights a second time"
        with optimizer.unshard():
            assert all(torch.equal(value, first[key]) for key, value in weights(optimizer).items())


def test_copies_and_rollbacks(ranks):
    ranks.run(2, copies_and_rollbacks)


def within_unshard() -> None:
    """The model runs inside, blocks stay whole, and what was freed before is freed after."""
    mesh = ParallelMesh()
    model = decoder(mesh)
    optimizer = wrapped(model, mesh, stage=3)
    with optimizer.unshard(), torch.no_grad():
        model(micro_batch(0, 0, 0))
        assert all(float(p.abs().sum()) > 0 for p in model.parameters())
    with pytest.raises(ValueError, match="unshard"):
        model.norm.weight + 1


def test_a_model_that_runs_inside_unshard(ranks):
    ranks.run(2, within_unshard)


def odd_buffers() -> None:
    """Masks of bool, infinities and nan are alike on replicas where they are."""
    model = nn.Linear(4, 4)
    for number, value in enumerate((torch.ones(2, 2).bool(), torch.tensor([-torch.inf, torch.inf]), torch.arange(3))):
        model.register_buffer(f"buffer_{number}", value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.init.normal_(model.weight)
        nn.init.zeros_(model.bias)
    ZeroOptimizer(model, ParallelMesh())


def test_buffers_of_any_kind(ranks):
    ranks.run(2, odd_buffers)
