"""FusedAdamW stands in for torch.optim.AdamW: its steps, its state, its schedulers and scalers; and clips by the norm of the whole."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapar import Axis, ColumnParallelLinear, FusedAdamW, ParallelMesh, RowParallelLinear
from megapar.grads import MainGrads
from megapar.optim.noise import parts_of, place_of
from megapar.params import Piece
from tests.counting import counted
from tests.row_ops import DEVICE, drawn

BF16, FP16 = torch.bfloat16, torch.float16
# A large eps keeps AdamW smooth: where g is near 0 its update would otherwise be the sign of rounding.
SMOOTH = {"lr": 1e-2, "eps": 1e-3}
LAYOUTS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.float64, {}),
    (BF16, {}),
    (BF16, {"master_weights": "fp32"}),
    (BF16, {"master_weights": "remainder"}),
    (FP16, {"master_weights": "fp32"}),
    (BF16, {"moment_dtype": BF16, "seed": 3}),
    (torch.float32, {"moment_dtype": BF16, "seed": 3, "max_norm": 0.1}),
    (BF16, {"master_weights": "remainder", "max_norm": 0.1}),
]


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 3)).to(dtype)


def backward(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x, y = drawn(16, 7, generator=generator).to(dtype), drawn(16, 3, generator=generator).to(dtype)
    loss = F.mse_loss(model(x), y)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, dtype: torch.dtype = torch.float32) -> None:
    for i in steps:
        optimizer.zero_grad()
        backward(model, i, dtype)
        optimizer.step()


def parameters_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_defaults_are_torchs():
    ours, theirs = (make(model_of().parameters()).defaults for make in (FusedAdamW, torch.optim.AdamW))
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("main_grads", [False, True])
def test_steps_are_those_of_torch(max_norm, main_grads):
    """Two groups with a scheduler each; a parameter without gradient in the first steps; the gradients themselves stay as they are."""
    ours, theirs = model_of(), model_of().double()
    optimizers = []
    for model, make in ((ours, FusedAdamW), (theirs, torch.optim.AdamW)):
        groups = [
            {"params": list(model[0].parameters()), "weight_decay": 0.3},
            {"params": list(model[2].parameters()), "betas": (0.8, 0.9)},
        ]
        optimizers.append(make(groups, **SMOOTH, **({"max_norm": max_norm} if model is ours else {})))
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in optimizers]
    if main_grads:
        main = MainGrads(ours.parameters())
    for i in range(8):
        for model, optimizer, scheduler in zip((ours, theirs), optimizers, schedulers, strict=True):
            model.zero_grad()
            backward(model, i, next(model.parameters()).dtype)
            if i < 3 and not main_grads:
                model[2].bias.grad = None
            if model is ours and main_grads:
                main.finish()
            grads = [p.main_grad.clone() if main_grads else p.grad for p in model.parameters()] if model is ours else []
            if model is theirs and max_norm is not None:
                norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                assert float(optimizers[0].grad_norm) == pytest.approx(float(norm), rel=1e-5)
            optimizer.step()
            scheduler.step()
            for grad, param in zip(grads, model.parameters(), strict=False):
                assert grad is None or torch.equal(grad, param.main_grad if main_grads else param.grad)
            if model is ours and main_grads:
                main.zero()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6)
    assert int(optimizers[0].state[ours[2].bias]["step"]) == (8 if main_grads else 5)


@pytest.mark.parametrize("lr", [torch.tensor(1e-2), torch.tensor([1e-2], dtype=torch.float64)])
def test_a_rate_in_memory_is_the_number(lr):
    """Bit for bit, under a scheduler that writes into the tensor, and through a saved state."""
    ours, theirs = model_of(), model_of()
    optimizers = FusedAdamW(ours.parameters(), lr=lr), FusedAdamW(theirs.parameters(), lr=float(lr))
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in optimizers]
    for i in range(4):
        for model, optimizer, scheduler in zip((ours, theirs), optimizers, schedulers, strict=True):
            train(model, optimizer, range(i, i + 1))
            scheduler.step()
    assert parameters_equal(ours, theirs)
    assert optimizers[0].param_groups[0]["lr"] is lr and float(lr) == optimizers[1].param_groups[0]["lr"]
    file = io.BytesIO()
    torch.save(optimizers[0].state_dict(), file)
    file.seek(0)
    resumed = FusedAdamW(ours.parameters(), lr=torch.ones(()))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for model, optimizer in ((ours, resumed), (theirs, optimizers[1])):
        train(model, optimizer, range(4, 6))
    assert isinstance(resumed.param_groups[0]["lr"], Tensor) and parameters_equal(ours, theirs)


def test_a_rate_on_a_device_is_not_read():
    FusedAdamW([nn.Parameter(torch.ones(2, device="meta"))], lr=torch.ones((), device="meta"))


@pytest.mark.parametrize("master", ["fp32", "remainder"])
def test_masters_keep_what_16_bits_lose(master):
    """Updates far below bf16's resolution, 200 of them, against fp32."""
    start = torch.linspace(-2, 2, 501).bfloat16()
    low, high = nn.Parameter(start.clone()), nn.Parameter(start.float())
    ours, theirs = FusedAdamW([low], lr=1e-5, master_weights=master), torch.optim.AdamW([high], lr=1e-5)
    for i in range(200):
        grad = drawn(501, generator=torch.Generator().manual_seed(i)).bfloat16()
        low.grad, high.grad = grad, grad.float()
        ours.step()
        theirs.step()
    torch.testing.assert_close(low.float(), high, rtol=2.0**-8, atol=1e-30)
    assert not torch.equal(low, start)


@pytest.mark.parametrize(("dtype", "options"), LAYOUTS)
def test_resuming_is_bitwise(dtype, options):
    """Through torch.save and a load that allows nothing but tensors."""
    whole = model_of(dtype)
    optimizer = FusedAdamW(whole.parameters(), **options)
    train(whole, optimizer, range(3), dtype)
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(whole, optimizer, range(3, 6), dtype)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = model_of(dtype)
    other = FusedAdamW(resumed.parameters(), **{**options, "lr": 0.5})
    train(resumed, other, range(7, 8), dtype)  # what is there before is replaced
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert other.param_groups[0]["lr"] == 1e-3
    train(resumed, other, range(3, 6), dtype)
    assert parameters_equal(whole, resumed)
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_loading_what_torch_saved():
    ours, theirs = model_of(), model_of()
    reference = torch.optim.AdamW(theirs.parameters(), **SMOOTH)
    train(theirs, reference, range(3))
    ours.load_state_dict(theirs.state_dict())
    optimizer = FusedAdamW(ours.parameters())
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    for model, o in ((ours, optimizer), (theirs, reference)):
        train(model, o, range(3, 6))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_loading_is_refused():
    def saved(dtype: torch.dtype, **options: Any) -> dict[str, Any]:
        model = model_of(dtype)
        optimizer = FusedAdamW(model.parameters(), **options)
        train(model, optimizer, range(1), dtype)
        return optimizer.state_dict()

    cases = [
        (BF16, {}, saved(BF16, master_weights="fp32"), "saved state has masters and master_weights is None"),
        (BF16, {"master_weights": "remainder"}, saved(BF16, master_weights="fp32"), r"saved master has dtype torch.float32 and here it is"),
        (BF16, {"moment_dtype": BF16, "seed": 1}, saved(BF16), "saved exp_avg.* has dtype torch.float32 and here it is torch.bfloat16"),
    ]
    for dtype, options, state, message in cases:
        optimizer = FusedAdamW(model_of(dtype).parameters(), **options)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert not optimizer.state
    state = saved(torch.float32)
    state["state"][0]["exp_avg"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"saved exp_avg has shape \(2,\) and its parameter \(33, 7\)"):
        FusedAdamW(model_of().parameters()).load_state_dict(state)


def test_closures_and_groups_added_later():
    model = model_of()
    optimizer = FusedAdamW(model[0].parameters())
    train(model, optimizer, range(1))
    before = int(optimizer.state[model[0].weight]["step"])
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.1})

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model, 1)

    loss = optimizer.step(closure)
    assert loss.requires_grad or float(loss) > 0
    steps = [int(optimizer.state[layer.weight]["step"]) for layer in (model[0], model[2])]
    assert (before, steps) == (1, [2, 1])
    with pytest.raises(ValueError, match=r"lr=-1\.0 must not be negative"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": -1.0})
    assert len(optimizer.param_groups) == 2


def test_a_gradient_that_is_not_finite_is_skipped():
    model = model_of()
    optimizer = FusedAdamW(model.parameters(), max_norm=1.0)
    train(model, optimizer, range(1))
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    backward(model, 1)
    model[0].bias.grad[3] = float("inf")
    optimizer.step()
    assert optimizer.skipped and parameters_equal(model, before)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(state["state"][i][key], after[i][key]) for i in after for key in after[i])
    train(model, optimizer, range(2, 3))
    assert not optimizer.skipped and not parameters_equal(model, before)


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(max_norm, unscale):
    """The steps without a scaler, with those that overflow left out; fp16 gradients of a scaled loss."""
    ours, plain = model_of(), model_of()
    optimizer, other = (
        FusedAdamW(ours.parameters(), max_norm=max_norm, **SMOOTH),
        FusedAdamW(plain.parameters(), max_norm=max_norm, **SMOOTH),
    )
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**13)
    for i in range(6):
        optimizer.zero_grad()
        other.zero_grad()
        x = drawn(16, 7, generator=torch.Generator().manual_seed(i))
        scaler.scale(ours(x).square().mean()).backward()
        plain(x).square().mean().backward()
        if i == 2:
            ours[0].weight.grad[0, 0] = float("nan")
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if i != 2:
            assert not optimizer.skipped
            other.step()
    assert scaler.get_scale() == 2.0**12
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_grad_scaler_is_refused_with_main_grads():
    model = model_of()
    optimizer, scaler = FusedAdamW(model.parameters()), torch.amp.GradScaler(DEVICE)
    grads = MainGrads(model.parameters())
    scaler.scale(backward(model, 0))
    grads.finish()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"GradScaler looks at \.grad and a parameter has a main_grad"):
        scaler.step(optimizer)


def parallel_steps(tp: int, options: dict[str, Any]) -> float:
    """The largest difference to the model alone after three clipped steps; one all-reduce each."""
    mesh = ParallelMesh(tp=tp)

    def build(axis: Axis | None) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(ColumnParallelLinear(8, 13, tp=axis), nn.Tanh(), RowParallelLinear(13, 6, tp=axis))

    alone, model = build(None), build(mesh.tp)
    optimizers = FusedAdamW(alone.parameters(), **options), FusedAdamW(model.parameters(), mesh=mesh, **options)
    for i in range(3):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(i))
        for m, optimizer in zip((alone, model), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            with counted() as calls:
                optimizer.step()
            assert calls == ({"all_reduce": 1} if m is model and tp > 1 else {}) or not calls
        torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm, rtol=1e-6, atol=0)
    worst = 0.0
    for whole, part in zip(alone.parameters(), model.parameters(), strict=True):
        for piece, view in part.spec.views(part):
            worst = max(worst, float((whole[piece.index] - view).abs().max()))
    return worst


@pytest.mark.parametrize("tp", [2, 3])
def test_sharded_steps_are_those_of_the_whole(ranks, tp):
    assert max(ranks.run(tp, parallel_steps, tp, {**SMOOTH, "max_norm": 0.5})) <= 1e-6


def sharded_rounding(tp: int) -> float:
    """With gradients that do not depend on the layout to the last bit, every weight rounds alike."""
    mesh = ParallelMesh(tp=tp)
    torch.manual_seed(0)
    alone = RowParallelLinear(12, 9, dtype=BF16)
    torch.manual_seed(0)
    model = RowParallelLinear(12, 9, tp=mesh.tp, dtype=BF16)
    for m in (alone, model):
        for i, param in enumerate(m.parameters()):
            full = torch.randn(12 * 9, generator=torch.Generator().manual_seed(i))[: 9 * 12 if i == 0 else 9].view(9, -1 if i == 0 else 1)
            for piece, _ in param.spec.views(param):
                param.grad = full.view(piece.shape)[piece.index].to(BF16).contiguous()
        FusedAdamW(m.parameters(), lr=1e-3, seed=5, moment_dtype=BF16).step()
    whole = dict(alone.named_parameters())
    return float(
        all(torch.equal(whole[name][piece.index], view) for name, p in model.named_parameters() for piece, view in p.spec.views(p))
    )


def test_any_layout_rounds_alike(ranks):
    assert ranks.run(2, sharded_rounding, 2) == [1.0, 1.0]


def test_places():
    def box(shape: tuple[int, ...], start: tuple[int, ...], stop: tuple[int, ...]) -> tuple[int, int, int]:
        return place_of(Piece("x", shape, start, stop))

    assert box((), (), ()) == (0, 1, 1)
    assert box((10,), (4,), (7,)) == (4, 3, 10)
    assert box((5, 10), (2, 4), (5, 7)) == (24, 3, 10)
    assert box((5, 10, 3), (2, 4, 0), (5, 7, 3)) == (72, 9, 30)
    assert box((0, 4), (0, 0), (0, 4)) == (0, 4, 4)
    with pytest.raises(ValueError, match="cut in dimension 2 or later"):
        box((5, 10, 3), (0, 0, 0), (5, 10, 2))
    parts = parts_of(nn.Parameter(torch.ones(4, 5)), 3)
    assert [(p.start, p.stop, p.place) for p in parts] == [(0, 4, (0, 5, 5))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 0.0}, r"max_norm=0\.0 must be above 0"),
        ({"master_weights": "fp16"}, "master_weights=fp16 must be None, 'fp32' or 'remainder'"),
        ({"moment_dtype": FP16}, r"moment_dtype=torch\.float16 must be"),
        ({"moment_dtype": BF16}, r"beta2=0\.999 moves a bfloat16 moment by less than it can round: lower it to 0\.99, or give a seed"),
        ({"lr": -0.1}, "lr=-0.1 must not"),
        ({"lr": torch.tensor(-0.5, device="cpu")}, r"lr=-0\.5 must not"),
        ({"lr": torch.ones(2)}, r"lr is torch\.float32 of shape \(2,\) and must be one floating-point number"),
        ({"lr": torch.tensor(1)}, r"lr is torch\.int64 of shape \(\) and must be"),
        ({"betas": (0.9, 1.0)}, r"beta2=1\.0 must lie in \[0, 1\)"),
        ({"eps": -1.0}, "eps=-1.0 must not"),
        ({"weight_decay": float("nan")}, "weight_decay=nan must not"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        FusedAdamW(model_of().parameters(), **options)


def test_parameters_that_do_not_go_with_the_options():
    with pytest.raises(ValueError, match="'remainder' splits bfloat16 and a parameter is float16"):
        FusedAdamW(model_of(FP16).parameters(), master_weights="remainder")
    shard = ColumnParallelLinear(4, 2, tp=Axis.layout("tp", 0, 2))
    with pytest.raises(ValueError, match=r"a parameter of shape \(1, 4\) is a shard"):
        FusedAdamW(shard.parameters(), max_norm=1.0)
    param = nn.Parameter(torch.ones(2))
    FusedAdamW(shard.parameters())  # without a norm each element is updated by itself
    with pytest.raises(ValueError, match=f"parameters are on {param.device} and meta: use one optimizer for each"):
        FusedAdamW([param, nn.Parameter(torch.ones(2, device="meta"))])
