"""Formats that go together, and sentences about those that do not."""


import pytest
import torch

from megapar.ops.step_state import LossScaling
from megapar.optim.precision import LossScaler, Precision

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def test_the_usual_ones():
    fp32, bf16, fp16 = (Precision.of(name) for name in ("fp32", "bf16", "fp16"))
    assert fp32 == Precision(FP32, FP32, FP32, None, None)
    assert bf16 == Precision(BF16, FP32, FP32, "fp32", None) == Precision()
    assert fp16 == Precision(FP16, FP32, FP32, "fp32", LossScaler(65536.0, LossScaling()))


def test_of():
    assert Precision.of("bf16", master="remainder").master == "remainder"
    assert Precision.of("bf16", master=None).master is None
    mine = Precision(main_grad=BF16)
    assert Precision.of(mine) is mine
    with pytest.raises(ValueError, match='precision="fp8" is not known: use "fp32", "bf16" or "fp16"'):
        Precision.of("fp8")


def test_of_does_not_ignore_a_master():
    """One that is given beside a Precision takes effect there too."""
    assert Precision.of(Precision(), master="remainder").master == "remainder"


@pytest.mark.parametrize(
    "options,told",
    [
        ({"param": torch.float64}, "parameters cannot be float64: use float32, bfloat16 or float16"),
        ({"param": torch.int16}, "parameters cannot be int16"),
        ({"master": "fp16"}, "master=fp16 must be None, 'fp32' or 'remainder'"),
        ({"main_grad": FP16}, "main_grad=torch.float16 must be torch.float32 or the parameters' torch.bfloat16"),
        ({"param": FP32, "master": None, "main_grad": BF16}, "main_grad=torch.bfloat16 must be torch.float32"),
        ({"moments": FP16}, "moments=torch.float16 must be torch.float32 or torch.bfloat16"),
        ({"param": FP16, "master": "remainder", "scaler": LossScaler()}, "master='remainder' splits bfloat16 and parameters are float16"),
        ({"param": FP32, "master": "remainder"}, "master='remainder' splits bfloat16 and parameters are float32"),
        ({"param": FP32, "master": "fp32"}, "master='fp32' would copy parameters that are fp32 themselves"),
        ({"param": FP16}, "float16 gradients underflow without a loss scale: give scaler=LossScaler"),
    ],
)
def test_what_does_not_go_together(options, told):
    with pytest.raises(ValueError, match=told):
        Precision(**options)


def test_scaler():
    assert LossScaler.static(8.0) == LossScaler(8.0, None)
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="must be positive and finite: 65536 is the default"):
            LossScaler(scale)
    with pytest.raises(ValueError, match=r"init_scale=0\.5 is below min_scale=1\.0"):
        LossScaler(0.5)
    assert LossScaler(0.5, LossScaling(min_scale=0.25)).init_scale == 0.5
    assert LossScaler.static(0.5).init_scale == 0.5


def test_ranges():
    """Why fp16 needs a scale and bf16 none."""
    assert torch.finfo(FP16).max == 65504 and torch.finfo(BF16).max > 3.38e38 and torch.finfo(FP32).max > 3.4e38
    assert torch.tensor(65520.0).to(FP16).isinf() and not torch.tensor(65520.0).to(BF16).isinf()
    small = torch.tensor(1e-8)
    assert small.to(FP16) == 0 and (small * LossScaler().init_scale).to(FP16) > 0 and small.to(BF16) > 0
