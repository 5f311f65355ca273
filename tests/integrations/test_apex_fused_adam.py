"""FusedAdam stands in for apex's: the steps of torch's Adam and AdamW, its state, GradScaler, and what apex gets wrong."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapar.integrations.apex import FusedAdam, MultiTensorApply, multi_tensor_applier
from tests.row_ops import DEVICE, drawn

BF16, FP16 = torch.bfloat16, torch.float16
# A large eps keeps Adam smooth: where g is near 0 its update would otherwise be the sign of rounding.
SMOOTH = {"lr": 1e-2, "eps": 1e-3}
MASTERS = {"capturable": True, "master_weights": True}
# torch deprecates that GradScaler passes itself to a step that has apex's signature.
SCALED = pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself")


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 3)).to(dtype)


def backward(model: nn.Module, step: int) -> Tensor:
    generator, dtype = torch.Generator().manual_seed(step), next(model.parameters()).dtype
    x, y = drawn(16, 7, generator=generator).to(dtype), drawn(16, 3, generator=generator).to(dtype)
    loss = F.mse_loss(model(x), y)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        optimizer.zero_grad()
        backward(model, i)
        optimizer.step()


def parameters_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("capturable", [True, False])
def test_steps_are_those_of_torch(adam_w_mode, capturable):
    """In fp64, two groups with a scheduler each."""
    ours, theirs = model_of(), model_of().double()
    make = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    optimizers: list[torch.optim.Optimizer] = []
    for model in (ours, theirs):
        groups = [
            {"params": list(model[0].parameters()), "weight_decay": 0.3},
            {"params": list(model[2].parameters()), "betas": (0.8, 0.9)},
        ]
        kind = {"adam_w_mode": adam_w_mode, "capturable": capturable} if model is ours else {}
        optimizers.append((FusedAdam if model is ours else make)(groups, weight_decay=0.01, **SMOOTH, **kind))
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in optimizers]
    for i in range(8):
        for model, optimizer, scheduler in zip((ours, theirs), optimizers, schedulers, strict=True):
            train(model, optimizer, range(i, i + 1))
            scheduler.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6)


def test_without_bias_correction():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 2.0)
    FusedAdam([p], lr=0.1, bias_correction=False).step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.1 * 0.2 / 0.004**0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_masters_are_used(dtype):
    """Updates below the parameter's resolution, 100 of them, against fp32. Without masters, and in apex with bf16, they are lost."""
    start = torch.linspace(0.5, 2, 501).to(dtype)
    low, high = nn.Parameter(start.clone()), nn.Parameter(start.float())
    lost = nn.Parameter(start.clone())
    ours, without = FusedAdam([low], lr=1e-4, **MASTERS), FusedAdam([lost], lr=1e-4)
    theirs = torch.optim.AdamW([high], lr=float(torch.tensor(1e-4)), weight_decay=0.0)
    for i in range(100):
        grad = (drawn(501, generator=torch.Generator().manual_seed(i)) / 4 + 1).to(dtype)
        low.grad, lost.grad, high.grad = grad, grad, grad.float()
        for optimizer in (theirs, without, ours):
            optimizer.step()
    torch.testing.assert_close(ours.state[low]["master_param"], high.detach(), rtol=0, atol=5e-6)
    assert torch.equal(low.detach(), ours.state[low]["master_param"].to(dtype))
    assert bool((low < start).all()) and bool((lost[start > 1] == start[start > 1]).all())


def test_masters_are_found_where_apex_has_them():
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (BF16, torch.float32)]
    optimizer = FusedAdam(params, **MASTERS)
    (group,) = optimizer.param_groups_master
    assert group["params"][0] is optimizer.state[params[0]]["master_param"] and group["params"][1] is params[1]
    assert FusedAdam(params).param_groups_master is None


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("options", [{}, {"capturable": True}, MASTERS], ids=str)
def test_moments_are_not_rounded(dtype, options):
    """apex's capturable kernels round them to the parameter's 16 bits at each step."""
    low, high = nn.Parameter(torch.ones(100, dtype=dtype)), nn.Parameter(torch.ones(100))
    ours, theirs = FusedAdam([low], **options), FusedAdam([high])
    for i in range(3):
        grad = drawn(100, generator=torch.Generator().manual_seed(i)).to(dtype)
        low.grad, high.grad = grad, grad.float()
        ours.step()
        theirs.step()
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(ours.state[low][name], theirs.state[high][name])
        assert not torch.equal(theirs.state[high][name], theirs.state[high][name].to(dtype).float())


@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.float32, {}), (BF16, {}), (FP16, {"capturable": True}), (BF16, MASTERS), (FP16, MASTERS)], ids=str
)
def test_resuming_is_bitwise(dtype, options):
    """Through torch.save and a load that allows nothing but tensors; moments and masters stay fp32."""
    whole = model_of(dtype)
    optimizer = FusedAdam(whole.parameters(), **options)
    train(whole, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(whole, optimizer, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = model_of(dtype)
    other = FusedAdam(resumed.parameters(), **{**options, "lr": 0.5})
    train(resumed, other, range(7, 8))
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, range(3, 6))
    assert parameters_equal(whole, resumed)
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and b[key].dtype == torch.float32 for key in a)


def test_the_state_is_apexs():
    model = model_of()
    optimizer = FusedAdam(model.parameters(), weight_decay=0.1)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    assert saved["param_groups"][0].keys() == {"lr", "bias_correction", "betas", "eps", "weight_decay", "step", "params"}
    assert saved["param_groups"][0]["step"] == 2 and saved["state"][0].keys() == {"exp_avg", "exp_avg_sq"}
    captured = FusedAdam(model.parameters(), capturable=True)
    captured.load_state_dict(saved)
    group = captured.param_groups[0]
    assert group["step"].dtype == torch.int32 and group["step"].tolist() == [2] and group["lr"].dtype == torch.float32
    back = FusedAdam(model.parameters())
    back.load_state_dict(captured.state_dict())
    assert back.param_groups[0]["step"] == 2 and isinstance(back.param_groups[0]["lr"], float)
    broken = copy.deepcopy(saved)
    broken["state"][0]["exp_avg"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"the saved exp_avg has shape \(2,\) and its parameter \(33, 7\)"):
        back.load_state_dict(broken)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam])
def test_loading_what_torch_saved(make):
    """Whose groups know no bias_correction, and whose steps are those of each parameter."""
    ours, theirs = model_of(), model_of()
    reference = make(theirs.parameters(), weight_decay=0.1, **SMOOTH)
    train(theirs, reference, range(3))
    ours.load_state_dict(theirs.state_dict())
    optimizer = FusedAdam(ours.parameters(), adam_w_mode=make is torch.optim.AdamW)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    for model, o in ((ours, optimizer), (theirs, reference)):
        train(model, o, range(3, 6))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    broken = copy.deepcopy(reference.state_dict())
    broken["state"][0]["step"] += 1
    with pytest.raises(ValueError, match=r"have taken \[6, 7\] steps and share one here"):
        optimizer.load_state_dict(broken)


@SCALED
@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(options, unscale):
    """The steps without a scaler, with those that overflow left out; the first and a later one do. `unscale_` unscales once."""
    ours, plain = model_of(), model_of()
    optimizer, other = FusedAdam(ours.parameters(), **options, **SMOOTH), FusedAdam(plain.parameters(), **SMOOTH)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**13)
    bad = {0: float("inf"), 3: float("nan")}
    for i in range(6):
        optimizer.zero_grad()
        other.zero_grad()
        x = drawn(16, 7, generator=torch.Generator().manual_seed(i))
        scaler.scale(ours(x).square().mean()).backward()
        plain(x).square().mean().backward()
        if i in bad:
            ours[0].weight.grad[-1, -1] = bad[i]
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if i not in bad:
            other.step()
            for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)
    assert scaler.get_scale() == 2.0**11 and int(optimizer.param_groups[0]["step"]) == 4
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@SCALED
def test_grad_scaler_with_masters():
    model = model_of(FP16)
    optimizer, scaler = FusedAdam(model.parameters(), **MASTERS), torch.amp.GradScaler(DEVICE, init_scale=2.0**6)
    scaler.scale(backward(model, 0))
    before = copy.deepcopy(model)
    model[2].bias.grad[-1] = float("inf")
    scaler.step(optimizer)
    assert parameters_equal(model, before)
    assert all(not state["exp_avg"].any() for state in optimizer.state.values())
    assert int(optimizer.param_groups[0]["step"]) == 0


def test_groups_closures_and_parameters_without_gradient():
    model = model_of()
    optimizer = FusedAdam(model[0].parameters(), capturable=True)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.1})
    assert float(optimizer.param_groups[1]["lr"]) == pytest.approx(0.1) and optimizer.param_groups[1]["lr"].dtype == torch.float32

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = backward(model, 1)
        model[0].bias.grad = None
        return loss

    bias = model[0].bias.clone()
    assert float(optimizer.step(closure).detach()) > 0
    assert torch.equal(model[0].bias, bias) and model[0].bias not in optimizer.state
    assert [group["step"].tolist() for group in optimizer.param_groups] == [[1], [1]]


@pytest.mark.parametrize("options", [{"capturable": True}, MASTERS], ids=str)
def test_a_captured_step_reads_nothing(options):
    """A meta tensor has no value that a host could wait for."""
    model = model_of().to("meta", BF16)
    optimizer = FusedAdam(model.parameters(), **options)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    for _ in range(2):
        optimizer.step()
    assert optimizer.param_groups[0]["step"].device.type == optimizer.param_groups[0]["lr"].device.type == "meta"


def test_zero_grad():
    for set_grad_none in (True, False):
        p = nn.Parameter(torch.ones(2))
        optimizer = FusedAdam([p], set_grad_none=set_grad_none)
        p.grad = torch.ones(2)
        optimizer.zero_grad()
        assert p.grad is None if set_grad_none else p.grad.tolist() == [0, 0]


def test_channels_last_and_mixed_dtypes():
    """One group of all dtypes, one parameter of them channels_last: each as alone."""

    def params() -> list[nn.Parameter]:
        torch.manual_seed(0)
        made = [torch.randn(4, 3, 2, 2).to(dtype) for dtype in (torch.float32, BF16, FP16)]
        made.append(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
        for p in (found := [nn.Parameter(x) for x in made]):
            p.grad = torch.randn_like(p)
        return found

    together, alone = params(), params()
    FusedAdam(together).step()
    for p, single in zip(together, alone, strict=True):
        single.data, single.grad = single.detach().contiguous(), single.grad.contiguous()
        FusedAdam([single]).step()
        assert torch.equal(p, single)


def test_refusals():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="amsgrad=True is not supported"):
        FusedAdam([p], amsgrad=True)
    with pytest.raises(RuntimeError, match="master_weights=True needs capturable=True"):
        FusedAdam([p], master_weights=True)
    optimizer = FusedAdam([p])
    for name in ("grads", "output_params", "scale", "grad_norms"):
        with pytest.raises(RuntimeError, match=f"takes no .*{name}.* any more"):
            optimizer.step(**{name: 1.0})
    p.grad = torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match="a gradient is sparse"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"a parameter has dtype torch\.float64"):
        FusedAdam([nn.Parameter(torch.ones(2, dtype=torch.float64))])
    with pytest.raises(ValueError, match=f"parameters of a group are on {p.device} and meta: make a group of each"):
        FusedAdam([p, nn.Parameter(torch.ones(2, device="meta"))])


def test_multi_tensor_apply():
    def op(*args: Any) -> tuple[Any, ...]:
        return args

    assert MultiTensorApply.available and multi_tensor_applier.available
    assert multi_tensor_applier.chunk_size == 65536
    multi_tensor_applier.check_avail()
    assert MultiTensorApply(7)(op, "flag", [[1]], 2, 3) == (7, "flag", [[1]], 2, 3)
