"""AdamW (arXiv:1711.05101), one pass over each parameter: unscaling, clipping, decay, moments, master and low-precision weight.

    g  = grad * grad_scale                                 clip coefficient / (loss scale * count), from `step_state_`
    m += (1 - beta1) (g - m)
    v += (1 - beta2) (g g - v)
    w  = w - lr weight_decay w - lr step_scale m / (sqrt(v) root_scale + eps)

with step_scale = 1 / (1 - beta1^t), root_scale = 1 / sqrt(1 - beta2^t): one square root and one division an element. Not decoupled, the
decay is Adam's L2 (arXiv:1412.6980): g += weight_decay w instead. Arithmetic in at least fp32; what is denormal may count as 0.

w is the master where there is one: fp32, or the weight's bf16 and an int16 remainder, which together are an fp32 number, split half away
from zero. The bf16 weight is then the fp32 one rounded, half to even without a remainder. Bytes a parameter: fp32 28; bf16 weight and
gradient with fp32 master 28, with a remainder 26, with neither 22; fp32 gradients 2 more. Stochastic rounding, which what is kept in bf16
alone needs (a bf16 v does not decay by less than 2^-9 of itself), takes its bits from a hash of seed, step, tensor and index in the
logical tensor: any sharding and any number of threads rounds alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megapar.ops.dispatch import use_reference
from megapar.ops.step_state import StepState

MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Noise:
    """Where stochastic rounding takes its bits from.

    ids: a number for each logical tensor. places: (base, columns, stride) of each: element i of the tensor is element
    base + i // columns * stride + i % columns of the logical one. Without places each is a whole logical tensor.
    """

    seed: int
    ids: Sequence[int]
    places: Sequence[tuple[int, int, int]] = field(default=())


def adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state: StepState,
    rows: Sequence[int],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    noise: Noise | None = None,
) -> None:
    """Updates weights, masters and moments in place, unless `state.skip`. Everything but a gradient is contiguous and apart from the rest.

    weights, grads: fp32, bf16 or fp16. masters: none, or all fp32 (beside 16-bit weights) or int16 (beside bf16). Moments: fp32, or both
    bf16. rows: of each tensor in `state.counters`. lr: a number; or a tensor of one, whose value the device reads and nobody checks.
    noise: rounds what is kept in bf16 alone (moments, a weight without master) stochastically. Raises ValueError for options out of
    range, and for tensors that do not fit together, before anything is written.
    """
    lists = [list(tensors) for tensors in (weights, grads, masters, exp_avgs, exp_avg_sqs)]
    run: Any = adamw_reference if any(map(use_reference, lists[0])) else torch.ops.megapar.adamw_.default
    options: dict[str, Any] = {
        "lr": 1.0 if isinstance(lr, Tensor) else float(lr),
        "beta1": betas[0],
        "beta2": betas[1],
        "eps": eps,
        "weight_decay": weight_decay,
        "decoupled": decoupled,
    }
    if isinstance(lr, Tensor):
        options["lr_scale"] = lr.detach().to(state.scalars)
    if noise is not None:
        options |= {"seed": noise.seed, "ids": list(noise.ids), "places": [n for place in noise.places for n in place]}
    run(*lists, state.scalars, state.counters, list(rows), **options)


def check_options(*, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    """Raises ValueError for what AdamW cannot work with."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name}={value} must not be negative: raise it")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value} must lie in [0, 1): change it")


def adamw_reference(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scalars: Tensor,
    counters: Tensor,
    rows: Sequence[int],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    seed: int | None = None,
    ids: Sequence[int] = (),
    places: Sequence[int] = (),
    lr_scale: Tensor | None = None,
) -> None:
    """The formula, tensor by tensor."""
    check_options(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    rate: float | Tensor = lr if lr_scale is None else lr * lr_scale.reshape(())
    skip = scalars[2] != 0
    for i, (weight, grad, exp_avg, exp_avg_sq, row) in enumerate(zip(weights, grads, exp_avgs, exp_avg_sqs, rows, strict=True)):
        master = masters[i] if masters else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_scale, step_size, root_scale = (x.to(wide) for x in (scalars[0], rate * counters[row, 1], counters[row, 2]))
        if master is None:
            w = weight.to(wide)
        else:
            w = join(weight, master) if master.dtype == torch.int16 else master.clone()
        g = grad.to(wide) * grad_scale
        if not decoupled:
            g = g + weight_decay * w
        m, v = exp_avg.to(wide), exp_avg_sq.to(wide)
        m = m + (1 - beta1) * (g - m)
        v = v + (1 - beta2) * (g * g - v)
        decay = rate * weight_decay if decoupled else 0.0
        w = w - decay * w - step_size * m / (v.sqrt() * root_scale + eps)
        bits = None
        if seed is not None:
            bits = noise(weight, seed, counters[row, 0].long(), ids[i], tuple(places[3 * i : 3 * i + 3]) or (0, max(weight.numel(), 1), 0))
        stored = [(exp_avg, rounded(m, exp_avg.dtype, None if bits is None else bits >> 16))]
        stored.append((exp_avg_sq, rounded(v, exp_avg_sq.dtype, None if bits is None else mix(bits) & 0xFFFF)))
        if master is None:
            stored.append((weight, rounded(w, weight.dtype, None if bits is None else bits & 0xFFFF)))
        elif master.dtype == torch.int16:
            stored += zip((weight, master), split(w), strict=True)
        else:
            stored += [(master, w), (weight, w.to(weight.dtype))]
        for old, new in stored:
            old.copy_(torch.where(skip, old, new))


def split(w: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 to (bf16, int16 remainder): the upper half, rounded half away from zero, and the lower. A bijection of all 2^32 patterns.

    NaNs do not round, 0x7FFFFFFF would become -0. The place of 0x7F808000 to 0x7F80FFFF is taken by the finite numbers that round to
    infinity, so these signalling NaNs, which no arithmetic yields, take the one that the others leave: a zero with a negative remainder.
    """
    u = w.view(torch.int32).long() & MASK
    magnitude = u & 0x7FFFFFFF
    rounded_up = torch.where(magnitude >= 0x7F810000, u, u + 0x8000)
    high = torch.where((magnitude >= 0x7F808000) & (magnitude < 0x7F810000), u & 0x80000000, rounded_up) >> 16
    return high.to(torch.int16).view(torch.bfloat16), u.to(torch.int16)


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """The inverse of `split`."""
    high, low = weight.view(torch.int16).long() & 0xFFFF, remainder.long() & 0xFFFF
    magnitude, negative = high & 0x7FFF, low >= 0x8000
    u = (high << 16 | low) - torch.where(negative & (magnitude <= 0x7F80), 0x10000, 0)
    u = torch.where(negative & (magnitude == 0), (high | 0x7F80) << 16 | low, u)
    return u.to(torch.int32).view(torch.float32)


def rounded(x: Tensor, dtype: torch.dtype, random: Tensor | None) -> Tensor:
    """To `dtype`: to nearest, or to bf16 up with the probability that 16 random bits realise. Raises ValueError for float16 with them."""
    if random is None or dtype not in (torch.bfloat16, torch.float16):
        return x.to(dtype)
    if dtype == torch.float16:
        raise ValueError("a weight is float16 and stochastic rounding knows bfloat16: give it a float32 master, or no seed")
    u = x.float().view(torch.int32).long() & MASK
    high = torch.where((u & 0x7F800000) == 0x7F800000, u, u + random) >> 16
    return high.to(torch.int16).view(torch.bfloat16)


def noise(like: Tensor, seed: int, step: Tensor, tensor_id: int, place: tuple[int, ...]) -> Tensor:
    """32 random bits in an int64 for each element of `like`; place is (base, columns, stride)."""
    base, columns, stride = place
    i = torch.arange(like.numel(), device=like.device).view(like.shape)
    index = base + i // columns * stride + i % columns
    key = _mix64(_mix64(_mix64(torch.full_like(step, seed) + _signed(0x9E3779B97F4A7C15)) + step) + tensor_id)
    return mix((mix((index & MASK) ^ (key & MASK)) + ((index >> 32) ^ (key >> 32 & MASK))) & MASK)


def mix(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser, of 32 bits in an int64."""
    x = ((x ^ x >> 16) * 0x85EBCA6B) & MASK
    x = ((x ^ x >> 13) * 0xC2B2AE35) & MASK
    return x ^ x >> 16


def _mix64(x: Tensor) -> Tensor:
    """splitmix64's finaliser; int64 multiplication wraps as uint64 does, and right shifts drop the sign's copies."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


@torch.library.register_fake("megapar::adamw_")
def _(weights: Sequence[Tensor], *rest: object, **options: object) -> None:
    return None
