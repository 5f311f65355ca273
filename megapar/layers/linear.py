"""Column- and row-parallel linear layers: stand-ins for `nn.Linear` (arXiv:1909.08053, section 3).

ColumnParallelLinear cuts the output features over tp, RowParallelLinear the input features: one after the other costs one all-reduce
forward and one backward. With sequence parallelism (arXiv:2205.05198) each becomes an all-gather and a reduce-scatter of tokens. The
input gradient's collective runs while the weight gradient is computed (`layers/linear_function.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megapar.collectives import gather_last, split_last, with_summed_grad
from megapar.layers.linear_function import column_linear, row_linear
from megapar.mesh import Axis, TensorParallel, as_axis
from megapar.params import Init, Interval, ParamSpec, Piece, SpecParameter, draw, split


@dataclass(frozen=True)
class Shards:
    """A run of features that is cut over the ranks at multiples of `unit` (the head size, for attention heads).

    name: makes the part a logical tensor of its own, beside the layer: part `q` of layer `attention.qkv` is `attention.q.weight`.
        Parts without a name are rows of the layer's one weight, as in the nn.Linear it stands for.
    intervals: the cut itself, one interval a rank, where it is not the even one; equal intervals are shared by their ranks.
    """

    size: int
    unit: int = 1
    name: str | None = None
    intervals: tuple[Interval, ...] | None = None

    def cut(self, ranks: int, what: str) -> tuple[Interval, ...]:
        """Every rank's interval of [0, size)."""
        if self.intervals is None:
            return tuple(split(self.size, ranks, self.unit, what))
        distinct = sorted(set(self.intervals))
        tiles = [0, *(stop for _, stop in distinct)] == [*(start for start, _ in distinct), self.size]
        if len(self.intervals) != ranks or not tiles or any(a >= b for a, b in distinct):
            raise ValueError(f"{what}: intervals {self.intervals} must be {ranks}, one a rank, and tile [0, {self.size}): correct them")
        return self.intervals


Features = int | Shards | Sequence[int | Shards]


class ColumnParallelLinear(nn.Module):
    """y = x W^T + bias with the output features cut over tp.

    x [..., in_features], the same on all ranks (with `sequence_parallel`, this rank's tokens along dimension 0); y [..., this rank's
    features], or all of them with `gather_output`. `out_features` may be several parts, each cut by itself: one GEMM for q, k and v, or
    gate and up. Weight [out, in]. Initial values are nn.Linear's from the same torch seed, whatever tp is; `init` overrides the weight's.
    Raises ValueError for sizes that cannot be cut, and for an input of another width or dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: Features,
        *,
        tp: TensorParallel = None,
        bias: bool = True,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        init: Init | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.tp = as_axis(tp)
        self.parts = _parts(out_features)
        self.cuts = tuple(part.cut(self.tp.size, "out_features") for part in self.parts)
        self.in_features = _positive(in_features, "in_features")
        self.out_features = sum(part.size for part in self.parts)
        self.gather_output, self.sequence_parallel = gather_output, sequence_parallel
        self.is_shared = any(len(set(cut)) < len(cut) for cut in self.cuts)
        if gather_output and self.is_shared:
            raise ValueError("gather_output=True cannot join features that several ranks share: gather them yourself or pass False")
        rows = sum(b - a for a, b in (cut[self.tp.rank] for cut in self.cuts))
        weight = torch.empty(rows, in_features, device=device, dtype=dtype)
        self.weight = SpecParameter.of(weight, self._spec("weight", init or kaiming_uniform))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = SpecParameter.of(weight.new_empty(rows), self._spec("bias", uniform(in_features**-0.5)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the full logical tensors from torch's generator, as nn.Linear does, and keeps this rank's part."""
        draw(self)

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.in_features, self.weight, self.sequence_parallel)
        bias = None if self.bias is None else with_summed_grad(self.bias)
        y = column_linear(x, with_summed_grad(self.weight), bias, self.tp, self.sequence_parallel)
        return self._gather(y) if self.gather_output and self.tp.size > 1 else y

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={'+'.join(str(p.size) for p in self.parts)}, tp={self.tp.rank}/{self.tp.size}"

    def _gather(self, y: Tensor) -> Tensor:
        widths = [b - a for a, b in (cut[self.tp.rank] for cut in self.cuts)]
        return torch.cat([gather_last(p, self.tp, cut) for p, cut in zip(y.split(widths, -1), self.cuts, strict=True)], -1)

    def _spec(self, leaf: str, init: Init) -> ParamSpec:
        pieces, offset = [], 0
        rest = (self.in_features,) if leaf == "weight" else ()
        zeros = (0,) * len(rest)
        for part, cut in zip(self.parts, self.cuts, strict=True):
            start, stop = cut[self.tp.rank]
            if part.name:
                pieces.append(Piece(f"../{part.name}.{leaf}", (part.size, *rest), (start, *zeros), (stop, *rest)))
            else:
                pieces.append(Piece(leaf, (self.out_features, *rest), (offset + start, *zeros), (offset + stop, *rest)))
            offset += part.size
        sharers = _sharers(self.tp, self.cuts)
        grad_sum = self.tp.subset(sharers) if len(sharers) > 1 else None
        return ParamSpec(tuple(pieces), init, grad_sum, owner=self.tp.rank == sharers[0], decay=leaf == "weight", defers=True)


class RowParallelLinear(nn.Module):
    """y = x W^T + bias with the input features cut over tp; the bias is added once, after the sum over ranks.

    x [..., this rank's features] (all of them with `input_is_parallel=False`); y [..., out_features] the same on all ranks, or with
    `sequence_parallel` this rank's share of the tokens along dimension 0, ceil(t / tp) of them. Initial values are nn.Linear's from the
    same torch seed, whatever tp is. Raises ValueError for sizes that cannot be cut, and for an input of another width or dtype.
    """

    def __init__(
        self,
        in_features: int | Shards,
        out_features: int,
        *,
        tp: TensorParallel = None,
        bias: bool = True,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        init: Init | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.tp = as_axis(tp)
        shards = in_features if isinstance(in_features, Shards) else Shards(in_features)
        self.cut = shards.cut(self.tp.size, "in_features")
        if len(set(self.cut)) < self.tp.size:
            raise ValueError(f"in_features: intervals {self.cut} repeat, and shared inputs would be summed twice: give each rank its own")
        self.in_features, self.out_features = shards.size, _positive(out_features, "out_features")
        self.input_is_parallel, self.sequence_parallel = input_is_parallel, sequence_parallel
        start, stop = self.cut[self.tp.rank]
        self.local_features = stop - start
        weight = torch.empty(out_features, stop - start, device=device, dtype=dtype)
        piece = Piece("weight", (out_features, shards.size), (0, start), (out_features, stop))
        self.weight = SpecParameter.of(weight, ParamSpec((piece,), init or kaiming_uniform, defers=True))
        self.bias: nn.Parameter | None = None
        if bias:
            whole = Piece.whole("bias", (out_features,))
            partial = self.tp if sequence_parallel and self.tp.size > 1 else None
            spec = ParamSpec((whole,), uniform(shards.size**-0.5), partial, owner=self.tp.rank == 0, decay=False, defers=True)
            self.bias = SpecParameter.of(weight.new_empty(out_features), spec)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the full logical tensors from torch's generator, as nn.Linear does, and keeps this rank's part."""
        draw(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_is_parallel:
            check_input(x, self.local_features, self.weight, self.sequence_parallel)
        else:
            check_input(x, self.in_features, self.weight, self.sequence_parallel)
            x = split_last(x, self.tp, self.cut)
        bias = None if self.bias is None else with_summed_grad(self.bias)
        return row_linear(x, self.weight, bias, self.tp, self.sequence_parallel)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, tp={self.tp.rank}/{self.tp.size}"


def kaiming_uniform(full: Tensor, generator: torch.Generator | None) -> None:
    """nn.Linear's initial weight: uniform within 1 / sqrt(in_features)."""
    nn.init.kaiming_uniform_(full, a=5**0.5, generator=generator)


def uniform(bound: float) -> Init:
    """Uniform in [-bound, bound)."""

    def init(full: Tensor, generator: torch.Generator | None) -> None:
        full.uniform_(-bound, bound, generator=generator)

    return init


def _parts(features: Features) -> tuple[Shards, ...]:
    listed = features if isinstance(features, Sequence) else (features,)
    return tuple(part if isinstance(part, Shards) else Shards(part) for part in listed)


def _sharers(axis: Axis, cuts: Sequence[Sequence[Interval]]) -> list[int]:
    """The ranks that hold the same intervals as this one, which must be the same ranks for every part."""
    held = [tuple(cut[r] for cut in cuts) for r in range(axis.size)]
    for cut in cuts:
        same = [r for r in range(axis.size) if cut[r] == cut[axis.rank]]
        if any(held[r] != held[axis.rank] for r in same):
            raise ValueError("the parts of one layer must be shared by the same ranks: split the layer in two")
    return [r for r in range(axis.size) if held[r] == held[axis.rank]]


def _positive(size: int, what: str) -> int:
    if size < 1:
        raise ValueError(f"{what}={size} must be 1 or more: give the layer some features")
    return size


def check_input(x: Tensor, width: int, weight: Tensor, sequence_parallel: bool) -> None:
    """Raises ValueError for an input that a layer with this weight, `width` features in, cannot take."""
    if sequence_parallel and x.dim() == 1:
        raise ValueError(f"sequence_parallel=True shards tokens and an input of shape {tuple(x.shape)} has none: give it as [1, {width}]")
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(f"the input has shape {tuple(x.shape)} and the layer expects a last dimension of {width}: check what feeds it")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"the input is {x.dtype} and the weight {weight.dtype}: convert one of them, or use torch.autocast")
