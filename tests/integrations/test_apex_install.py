"""`install` makes apex's two extensions importable, and never hides real ones; their weight gradients."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megapar.integrations.apex import FUNCTIONS, fused_weight_gradient, install
from tests.row_ops import kernels_only

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def test_install(monkeypatch):
    for name in FUNCTIONS:
        monkeypatch.delitem(sys.modules, name, raising=False)
        assert importlib.util.find_spec(name) is None, "an apex is installed: this test cannot tell"
    try:
        assert install() == ("amp_C", "fused_weight_gradient_mlp_cuda")
        assert install() == ()
        for name, functions in FUNCTIONS.items():
            module = importlib.import_module(name)
            assert importlib.util.find_spec(name) is not None
            assert all(getattr(module, function.__name__) is function for function in functions)
        assert "apex" not in sys.modules
    finally:
        for name in FUNCTIONS:
            sys.modules.pop(name, None)


def test_real_ones_stay(tmp_path):
    """In a process of its own, with an amp_C on its path."""
    (tmp_path / "amp_C.py").write_text("real = True\n")
    code = "from megapar.integrations.apex import install; made = install(); import amp_C; print(made, amp_C.real)"
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = [{root!r}, {str(tmp_path)!r}]; {code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "('fused_weight_gradient_mlp_cuda',) True\n", done.stderr


@pytest.mark.parametrize("dtype", [F32, BF16, FP16])
@pytest.mark.parametrize("shape", [(17,), (3, 5)])
def test_weight_gradients(dtype, shape):
    """Against fp64: products are exact in 16 bits, sums of t terms in fp32."""
    torch.manual_seed(0)
    x, dy = torch.randn(*shape, 33).to(dtype), torch.randn(*shape, 21).to(dtype)
    start = torch.randn(21, 33)
    x2, dy2 = x.double().flatten(0, -2), dy.double().flatten(0, -2)
    terms = dy2.abs().t() @ x2.abs()
    for function in (fused_weight_gradient.wgrad_gemm_accum_fp32, fused_weight_gradient.wgrad_gemm_accum_fp16):
        target = start.clone() if function.__name__.endswith("32") else start.to(dtype)
        if target.dtype == F32 and function.__name__.endswith("16"):
            continue
        exact = target.double() + dy2.t() @ x2
        bound = (len(x2) + 2) * 2.0**-24 * (terms + target.double().abs())
        if target.dtype != F32:
            bound = bound + exact.abs() * torch.finfo(target.dtype).eps * 0.51
        function(x, dy, target)
        assert bool(((target.double() - exact).abs() <= bound).all())
    expanded = torch.ones(1, 1, dtype=dtype).expand(len(x2), 21)  # the gradient of a sum
    target = torch.zeros(21, 33)
    fused_weight_gradient.wgrad_gemm_accum_fp32(x.flatten(0, -2), expanded, target)
    torch.testing.assert_close(target, x2.sum(0).float().expand(21, 33), rtol=1e-4, atol=1e-5)


X, DY, DW = torch.ones(4, 3), torch.ones(4, 2), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("function", "tensors", "message"),
    [
        ("fp32", (X, DY, DW.bfloat16()), r"d_weight has dtype torch\.bfloat16 and must be float32"),
        ("fp16", (X, DY, DW), "both must be bfloat16, or both float16"),
        ("fp16", (X.half(), DY.half(), DW.bfloat16()), "both must be bfloat16, or both float16"),
        ("fp32", (X, DY, DW.to("meta")), f"input is on {X.device} and d_weight on meta"),
        pytest.param("fp32", (X, torch.ones(5, 2), DW), "dy has 5 rows and x 4", marks=kernels_only),
        pytest.param("fp32", (X, DY, torch.ones(3, 2)), r"shape \[3, 2\].* must be a contiguous \[2, 3\]", marks=kernels_only),
        pytest.param("fp32", (X, DY, torch.ones(3, 2).t()), r"shape \[2, 3\] and strides \[1, 2\]", marks=kernels_only),
        pytest.param("fp32", (X.bfloat16(), DY, DW), "x has dtype BFloat16 and dy Float", marks=kernels_only),
    ],
)
def test_weight_gradients_that_do_not_fit(function, tensors, message):
    with pytest.raises(ValueError, match=message):
        getattr(fused_weight_gradient, f"wgrad_gemm_accum_{function}")(*tensors)
