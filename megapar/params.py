"""What a parameter is: which logical tensors it holds, which box of each lives here, and how its gradient is to be treated.

A *logical tensor* is a matrix or vector of the model as a single process would hold it: WQ, WK, WV, WG and WU are five of them even
where one fused GEMM computes with three at once. Every rank's parameter is a stack, along dimension 0, of boxes of logical tensors.
`ParamSpec` says so, and it is the only source for initial values, gradient sums, norms, decay groups, checkpoints and verification.
"""

from __future__ import annotations

import hashlib
import math
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from megapar.mesh import Axis

Init = Callable[[Tensor, torch.Generator | None], None]
"""Fills a full logical tensor (CPU, fp32) in place with draws from the generator (torch's default one if None)."""

Interval = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """The box `[start, stop)` of one logical tensor of global `shape`.

    `name` is relative to the module that holds the parameter (`weight`, `../q.weight`) until `named_specs` makes it global.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @staticmethod
    def whole(name: str, shape: tuple[int, ...]) -> Piece:
        return Piece(name, shape, (0,) * len(shape), shape)

    @property
    def index(self) -> tuple[slice, ...]:
        """Indexes the box in the full logical tensor."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    @property
    def box(self) -> tuple[int, ...]:
        """The shape of the box."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.box)

    def overlap(self, start: Sequence[int], stop: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """What it has in common with the box `[start, stop)` of the same tensor: an index of this box and one of that; None if nothing."""
        low = [max(a, b) for a, b in zip(self.start, start, strict=True)]
        high = [min(a, b) for a, b in zip(self.stop, stop, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return None
        here, there = (tuple(slice(a - o, b - o) for a, b, o in zip(low, high, base, strict=True)) for base in (self.start, start))
        return here, there

    @property
    def is_whole(self) -> bool:
        return self.shape == self.box


@dataclass(frozen=True)
class ParamSpec:
    """Carried by a parameter (`SpecParameter`, `spec_of`).

    pieces: what it holds, stacked along dimension 0; boxes of one logical tensor lie next to each other.
    init: fills each logical tensor; None leaves the values to whoever made the parameter.
    grad_sum: the axis over which its gradient is a partial sum (norm gains and row biases under sequence parallelism, KV heads that
        several ranks share); None where each rank's gradient is complete.
    tie: the ranks of a pipeline that use the same logical tensors elsewhere in the model (tied embeddings). Their gradients are summed
        once a step, by `grads.MainGrads.finish`.
    owner: whether this rank's copy counts in norms and is saved; of several equal copies exactly one is owned.
    decay: whether weight decay applies: to matrices, not to biases and gains.
    unit: elements of the local tensor that ZeRO's shards keep together (a quantisation block, a matrix).
    defers: whether its layer hands the gradient to `grads.accumulate`, so that it can be computed after that of the layer's input.
    seeds: what each piece's logical tensor is to be drawn with, where `initialize` left the parameter on `meta`.
    """

    pieces: tuple[Piece, ...]
    init: Init | None = None
    grad_sum: Axis | None = None
    tie: Axis | None = None
    owner: bool = True
    decay: bool = True
    unit: int = 1
    defers: bool = False
    seeds: tuple[int, ...] = ()

    @property
    def is_sharded(self) -> bool:
        return not all(piece.is_whole for piece in self.pieces)

    def views(self, local: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece with its part of `local`, a tensor laid out as the parameter (the parameter, its gradient, a moment)."""
        row = 0
        for piece in self.pieces:
            rows = piece.stop[0] - piece.start[0] if piece.shape else 0
            yield piece, local.narrow(0, row, rows) if piece.shape else local
            row += rows


class SpecParameter(nn.Parameter):
    """An nn.Parameter that carries its spec, also through copy.deepcopy (where attributes of a plain one are lost)."""

    spec: ParamSpec

    @staticmethod
    def of(data: Tensor, spec: ParamSpec) -> SpecParameter:
        param = SpecParameter(data)
        param.spec = spec
        return param

    def __deepcopy__(self, memo: dict[int, Any]) -> SpecParameter:
        result: SpecParameter = super().__deepcopy__(memo)
        result.spec = self.spec
        return result


def spec_of(param: Tensor) -> ParamSpec | None:
    """The spec that `param` carries; None means a plain parameter: whole, and the same on all ranks."""
    return getattr(param, "spec", None)


Modules = nn.Module | Sequence[nn.Module]
"""A model, or the stages of one, whose names are those of the whole."""


def named_specs(model: Modules) -> Iterator[tuple[str, nn.Parameter, ParamSpec]]:
    """(local name, parameter, spec with global names) of every parameter, shared ones once, under their first name."""
    stages = [model] if isinstance(model, nn.Module) else model
    for name, param in (named for stage in stages for named in stage.named_parameters()):
        prefix, _, leaf = name.rpartition(".")
        spec = spec_of(param) or ParamSpec((Piece.whole(leaf, tuple(param.shape)),), decay=param.dim() > 1)
        pieces = tuple(replace(piece, name=_resolve(prefix, piece.name)) for piece in spec.pieces)
        yield name, param, replace(spec, pieces=pieces)


def initialize(model: nn.Module, seed: int, device: torch.device | str | None = None) -> None:
    """Draws every parameter that has an `init` from a generator seeded by (seed, global name): the same model for any layout.

    Parameters on `meta` are made on `device` first. With device="meta" they stay there and only remember their seeds: a ZeroOptimizer
    draws them, shard by shard. One full logical tensor exists at a time. Raises ValueError for a parameter on `meta` without an `init`.
    """
    device = torch.device(device or "cpu")
    for name, param, spec in named_specs(model):
        if param.is_meta and spec.init is None:
            raise ValueError(f"parameter {name} is on meta and has no initial values: build its module on a real device")
    for _, param, spec in named_specs(model):
        seeds = tuple(seed_of(seed, piece.name) for piece in spec.pieces)
        if param.is_meta and device.type == "meta":
            param.spec = replace(param.spec, seeds=seeds)  # type: ignore[attr-defined]
            continue
        if param.is_meta:
            materialize(param, torch.empty_like(param, device=device))
        if spec.init is not None:
            fill(spec.views(param), spec.init, seeded(spec, seeds))


def draw(layer: nn.Module) -> None:
    """Draws the layer's own parameters from torch's default generator. Ranks with equal torch seeds get parts of one model."""
    for param in layer.parameters(recurse=False):
        spec = spec_of(param)
        if spec is not None and spec.init is not None and not param.is_meta:
            fill(spec.views(param), spec.init, lambda _: None)


def seeded(spec: ParamSpec, seeds: Sequence[int]) -> Callable[[str], torch.Generator]:
    """The generator of each logical tensor, by name; seeds: of the spec's pieces."""
    by_name = {piece.name: seed for piece, seed in zip(spec.pieces, seeds, strict=True)}
    return lambda name: torch.Generator().manual_seed(by_name[name])


@torch.no_grad()
def fill(parts: Iterable[tuple[Piece, Tensor]], init: Init, generator_of: Callable[[str], torch.Generator | None]) -> None:
    """Draws the logical tensors of which `parts` are boxes, and writes each box into its tensor. Boxes of one lie next to each other."""
    for name, boxes in groupby(parts, key=lambda part: part[0].name):
        full: Tensor | None = None  # the one before is free now (tests/test_params.py::test_one_full_tensor_at_a_time)
        for piece, view in boxes:
            if full is None:
                full = torch.empty(piece.shape, dtype=torch.float32, device="cpu")
                init(full, generator_of(name))
            view.copy_(full[piece.index])


def materialize(param: nn.Parameter, data: Tensor) -> None:
    """Gives a parameter on `meta` the memory of `data`. It stays the same object for whoever holds it: ties, lists, groups, its spec."""
    made = type(param)(data, requires_grad=param.requires_grad)
    made.__dict__.update(param.__dict__)
    torch.utils.swap_tensors(param, made)


def seed_of(*words: object) -> int:
    """A 63-bit seed that depends on nothing but `words`."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def split(size: int, parts: int, unit: int = 1, what: str = "size") -> list[Interval]:
    """Cuts [0, size) into `parts` intervals at multiples of `unit`; the first ones take the extra units.

    Raises ValueError when `size` is not a positive multiple of `unit`, or has fewer units than `parts`.
    """
    if size < 1 or unit < 1 or size % unit:
        raise ValueError(f"{what}={size} must be a positive multiple of its unit {unit}: change one of them")
    units = size // unit
    if units < parts:
        raise ValueError(f"{what}={size} has {units} units of {unit} and cannot be split over {parts} ranks: lower tp")
    small, extra = divmod(units, parts)
    edges = [unit * (i * small + min(i, extra)) for i in range(parts + 1)]
    return list(pairwise(edges))


def _resolve(prefix: str, name: str) -> str:
    """`../q.weight` beside module `layers.0.qkv` is `layers.0.q.weight`."""
    return posixpath.normpath(f"/{prefix.replace('.', '/')}/{name}").strip("/").replace("/", ".")
