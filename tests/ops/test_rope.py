"""Rotary positions against complex multiplication, in every dtype."""

import pytest
import torch

from megapar.ops.rope import rope, rope_angles


def rotated(x: torch.Tensor, position_ids: torch.Tensor, theta: float) -> torch.Tensor:
    """fp64: element i and element i + d/2 are one complex number, turned by p theta^(-2i/d)."""
    d = x.shape[-1]
    angle = position_ids.double()[:, None, None] * torch.tensor([theta ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)
    turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize(
    "dtype,error", [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-10)]
)
def test_rotation(dtype, error):
    """Positions up to 15: the angle's own rounding in fp32, 15 x 2^-24, stays below the bound."""
    x = torch.randn(7, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    position_ids = torch.tensor([3, 0, 1, 15, 2, 2, 9])
    cos, sin = rope_angles(position_ids, 8, 100.0, dtype)
    assert cos.dtype == sin.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    y = rope(x, cos, sin)
    assert y.dtype == dtype
    exact = rotated(x, position_ids, 100.0)
    assert float((y.double() - exact).abs().max()) <= error * float(exact.abs().max())


def test_gradcheck():
    x = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    cos, sin = rope_angles(torch.tensor([0, 5, 2]), 6, 10.0, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin), x)


def test_scores_depend_on_distance():
    """What rotary positions are for: q(p) . k(r) is a function of p - r."""
    q, k = (torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))

    def score(p: int, r: int) -> float:
        turned = [rope(x, *rope_angles(torch.tensor([at]), 8, 10000.0, torch.float64)) for x, at in ((q, p), (k, r))]
        return float((turned[0] * turned[1]).sum())

    assert abs(score(7, 3) - score(104, 100)) < 1e-12
    assert abs(score(7, 3) - score(7, 4)) > 1e-3
