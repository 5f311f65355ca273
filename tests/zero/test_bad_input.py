"""What a user may do wrong, and what every rank is told."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from megapar import ParallelMesh
from megapar.zero.optimizer import ZeroOptimizer
from megapar.zero.setup import AdamW
from tests.zero.common import TOKENS, Plain, backward, decoder, loss_sum, micro_batch, wrapped

COUNTS: dict[str, tuple[Any, str]] = {
    "missing": (None, "step was given the count None and needs a number"),
    "negative": (-1, "step was given the count -1 and gradients are divided by it: it must be 0 or more"),
    "nan": (math.nan, "step was given the count nan"),
    "infinite": (math.inf, "step was given the count inf"),
    "bool": (True, "step was given the count True and needs a number"),
    "text": ("14", "step was given the count '14' and needs a number"),
    "two": (torch.ones(2), "needs a number"),
    "zero": (0, "the step counted 0 on all ranks and cannot divide by it: give samples with targets"),
    "zero tensor": (torch.tensor(0), "the step counted 0 on all ranks"),
    "nan tensor": (torch.tensor(math.nan), "the step counted nan on all ranks"),
}


def with_count(name: str, stage: int) -> None:
    mesh = ParallelMesh()
    optimizer = wrapped(decoder(mesh), mesh, stage=stage)
    backward(optimizer, 0)
    optimizer.step(*([] if name == "missing" else [COUNTS[name][0]]))


@pytest.mark.parametrize("name", COUNTS)
def test_counts(ranks, name):
    for told in ranks.errors(2, with_count, name, 2):
        assert COUNTS[name][1] in told


def one_rank_counts_none() -> float:
    """Rank 1 had no target in its samples: its gradient is 0, its count too."""
    mesh = ParallelMesh()
    optimizer = wrapped(decoder(mesh), mesh)
    optimizer.backward(loss_sum(optimizer.chunks[0], micro_batch(0, 0, 0)) * (mesh.dp.rank == 0))
    return float(optimizer.step(TOKENS if mesh.dp.rank == 0 else 0).grad_norm)


def test_one_rank_without_targets(ranks):
    two, one = ranks.run(2, one_rank_counts_none), ranks.run(1, one_rank_counts_none)
    assert two[0] == two[1] and math.isclose(two[0], one[0], rel_tol=1e-14)


MISUSES: dict[str, str] = {
    "added": "extra.weight requires a gradient and the optimizer does not know it: wrap the model after its last change",
    "frozen": "norm.weight was frozen or removed after the model was wrapped: wrap it after its last change",
    "removed": "norm.weight was frozen or removed after the model was wrapped",
    "replaced": "norm.weight requires a gradient and the optimizer does not know it",
    "grad": "norm.weight has a .grad, which the step would ignore: gradients arrive by optimizer.backward, clear it",
    "step first": "step was called and no backward before it: call optimizer.backward(loss_sum), then step",
    "step twice": "step was called and no backward before it",
    "zero_grad": "step was called and no backward before it",
    "no last": "the step's last backward had last=False and its gradients are not summed yet: give the last one last=True",
    "vector": "torch.float32 of shape (14,), requires_grad=True, and needs an fp32 scalar",
    "constant": "torch.float32 of shape (), requires_grad=False, and needs an fp32 scalar",
    "outside": "was given a gradient by a backward of yours: call optimizer.backward(loss_sum) instead",
}


def misuse(name: str, stage: int) -> None:
    mesh = ParallelMesh()
    model = decoder(mesh)
    optimizer = wrapped(model, mesh, stage=stage)
    if name == "step first":
        optimizer.step(1)
    if name == "added":
        model.extra = nn.Linear(2, 2)
    elif name == "frozen":
        model.norm.weight.requires_grad_(False)
    elif name == "vector":
        optimizer.backward(model(micro_batch(0, 0, 0)[:, :-1])[:, 0])
    elif name == "constant":
        optimizer.backward(torch.tensor(1.0))
    elif name == "outside":
        loss_sum(model, micro_batch(0, 0, 0)).backward()
    optimizer.backward(loss_sum(model, micro_batch(0, 0, 0)), last=name != "no last")
    if name == "removed":
        model.norm = nn.Identity()
    elif name == "replaced":
        model.norm.weight = nn.Parameter(torch.ones(16))
    elif name == "grad":
        model.norm.weight.grad = torch.ones(16)
    elif name == "zero_grad":
        optimizer.zero_grad()
    optimizer.step(TOKENS)
    if name == "step twice":
        optimizer.step(TOKENS)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", MISUSES)
def test_misuse(ranks, name, stage):
    for told in ranks.errors(2, misuse, name, stage):
        assert MISUSES[name] in told


def test_misuse_alone(ranks):
    """Without another rank no word of it is different."""
    for name, words in MISUSES.items():
        assert words in ranks.errors(1, misuse, name, 1)[0], name


def differing(name: str) -> None:
    mesh = ParallelMesh()
    other = mesh.dp.rank == 1
    model: nn.Module = Plain(blocks=3 if other and name == "model" else 2)
    options: dict[str, Any] = {}
    if name == "option" and other:
        options = {"max_norm": 2.0}
    elif name == "precision" and other:
        options = {"precision": "bf16"}
    elif name == "nan" and other:
        with torch.no_grad():
            model.head.weight[1, 2] = math.nan
    elif name == "bad option" and other:
        options = {"stage": 4}
    elif name == "frozen" and other:
        model.norm.weight.requires_grad_(False)
    wrapped(model, mesh, **options)


DIFFERS = "the parameters (a hash) and options must be the same on all ranks of dp"


@pytest.mark.parametrize(
    "name,words",
    [
        ("model", DIFFERS),
        ("option", DIFFERS),
        ("precision", DIFFERS),
        ("frozen", DIFFERS),
        ("nan", "head.weight has values that are not finite: check what it was loaded from"),
        ("bad option", "stage=4 must be 0 (replicated)"),
    ],
)
def test_a_rank_that_differs(ranks, name, words):
    for told in ranks.errors(2, differing, name):
        assert words in told


def another_update(name: str) -> None:
    """The step would end in other weights on other ranks: what `update` and groups say is compared too."""
    mesh = ParallelMesh()
    other = mesh.dp.rank == 1
    model = Plain(blocks=1)
    if name == "update":
        wrapped(model, mesh, update=AdamW(lr=2e-2 if other else 1e-2))
    else:
        groups = [{"params": list(model.parameters()), "lr": 2e-2 if other else 1e-2}]
        wrapped(model, mesh, groups=groups)


@pytest.mark.parametrize("name", ["update", "groups"])
def test_a_rank_whose_update_differs(ranks, name):
    for told in ranks.errors(2, another_update, name):
        assert DIFFERS in told


def test_options():
    mesh, model = ParallelMesh.alone(), Plain(blocks=1)
    for options, words in (
        ({"stage": 4}, r"stage=4 must be 0 \(replicated\), 1"),
        ({"max_norm": 0.0}, r"max_norm=0\.0 must be above 0"),
        ({"max_norm": math.nan}, "max_norm=nan must be above 0"),
        ({"reduce_every": "epoch"}, 'reduce_every="epoch" must be "step" or "micro_batch"'),
        ({"reshard_every": "never"}, 'reshard_every="never" must be'),
        ({"reduction": "tree"}, 'reduction="tree" must be "ordered", "native" or None'),
        ({"payload": torch.float16}, r"payload=torch.float16 must be torch.float32 or torch.bfloat16"),
        ({"bucket_bytes": 0}, "bucket_bytes=0 must be 1 or more"),
        ({"precision": "fp8"}, 'precision="fp8" is not known'),
        ({"groups": [{"params": list(model.parameters())[1:]}]}, "groups leave out embedding.weight"),
        ({"groups": [{"params": [*model.parameters(), nn.Parameter(torch.ones(2))]}]}, "have a parameter that is not the model's"),
        ({"groups": [{"params": list(model.parameters())}, {"params": [model.head.bias]}]}, "groups name a parameter twice"),
        ({"groups": [{"params": list(model.parameters()), "lr": -1.0}]}, r"lr=-1\.0 must not be negative"),
    ):
        with pytest.raises(ValueError, match=words):
            ZeroOptimizer(model, mesh, **options)
    for name, bad in (("lr", -1.0), ("betas", (1.0, 0.9)), ("eps", -1.0), ("weight_decay", -1.0)):
        with pytest.raises(ValueError, match=name[:4]):
            AdamW(**{name: bad})
    with pytest.raises(ValueError, match="the model has no parameter that requires a gradient"):
        ZeroOptimizer(nn.ReLU(), mesh)
    with pytest.raises(ValueError, match="weight is on meta and has no values"):
        ZeroOptimizer(nn.Linear(2, 2, device="meta"), mesh)
    ZeroOptimizer(model, mesh, precision="fp32")
    with pytest.raises(ValueError, match="has an optimizer or MainGrads already"):
        ZeroOptimizer(model, mesh, precision="fp32")


def test_params_of_a_group():
    """A list, a generator or one tensor, as torch takes them."""
    model = nn.Linear(4, 4)
    optimizer = wrapped(model, ParallelMesh.alone(), groups=[{"params": model.weight}, {"params": (p for p in [model.bias]), "lr": 0.5}])
    assert [(group["params"], group["lr"]) for group in optimizer.param_groups] == [([model.weight], 1e-2), ([model.bias], 0.5)]


def test_cannot_be_copied_or_given_more():
    optimizer = wrapped(Plain(blocks=1), ParallelMesh.alone())
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="ZeroOptimizer cannot be copied or pickled"):
            copied(optimizer)
    with pytest.raises(ValueError, match="groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
