"""What a ZeroOptimizer is made of, checked before any rank waits for another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megapar.collectives import gather_json
from megapar.grads import has_main_grad
from megapar.mesh import Axis, ParallelMesh
from megapar.ops.adamw import check_options
from megapar.optim.precision import Precision
from megapar.params import ParamSpec, named_specs, spec_of
from megapar.zero.buckets import Reduction, Window
from megapar.zero.gather import units_of
from megapar.zero.layout import Entry

BUCKET_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
"""Of fp32 gradients. Three packed buckets may exist at once; GPUs want messages that are large after division by dp."""


@dataclass(frozen=True)
class AdamW:
    """The update (arXiv:1711.05101). seed: rounds what is kept in bf16 alone stochastically. Raises ValueError for options out of range."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    seed: int | None = None

    def __post_init__(self) -> None:
        check_options(lr=self.lr, beta1=self.betas[0], beta2=self.betas[1], eps=self.eps, weight_decay=self.weight_decay)

    @property
    def defaults(self) -> dict[str, Any]:
        """As torch's optimizers have them."""
        return {name: value for name, value in asdict(self).items() if name != "seed"}


@dataclass(frozen=True)
class Options:
    """What every rank of a ZeroOptimizer must be given alike; `ZeroOptimizer` says what each is. Raises ValueError for what is none."""

    stage: int
    max_norm: float | None
    reduce_every: Window
    reshard_every: Window
    reduction: Literal["ordered", "native"] | None
    payload: torch.dtype
    bucket_bytes: int
    overlap: bool
    gather_ahead: bool
    load_later: bool

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"stage={self.stage} must be 0 (replicated), 1 (optimizer state), 2 (gradients) or 3 (parameters)")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm={self.max_norm} must be above 0: give None to not clip")
        for name in ("reduce_every", "reshard_every"):
            if getattr(self, name) not in ("step", "micro_batch"):
                raise ValueError(f'{name}="{getattr(self, name)}" must be "step" or "micro_batch": choose one')
        if self.reduction not in (None, "ordered", "native"):
            raise ValueError(f'reduction="{self.reduction}" must be "ordered", "native" or None (by device): choose one')
        if self.payload not in (torch.float32, torch.bfloat16):
            raise ValueError(f"payload={self.payload} must be torch.float32 or torch.bfloat16: choose one")
        if self.bucket_bytes < 1:
            raise ValueError(f"bucket_bytes={self.bucket_bytes} must be 1 or more: leave it out for the default")


def reduction_of(options: Options, precision: Precision, device: torch.device) -> Reduction:
    """How gradients are summed: as the options and formats say, by NCCL itself on CUDA unless they say otherwise."""
    native = options.reduction == "native" if options.reduction else device.type == "cuda"
    pooled, whole = options.stage >= 2, options.stage == 0
    return Reduction(options.reduce_every, pooled, whole, precision.main_grad, options.payload, options.overlap, native)


@dataclass(frozen=True)
class Listed:
    """The parameters of the chunks that train, each once, with what is known of them; and the chunk of each group of the layout."""

    params: list[nn.Parameter]
    specs: list[ParamSpec]
    entries: list[Entry]
    chunk_of: dict[str, int]


def listed(chunks: Sequence[nn.Module], options: Options, mesh: ParallelMesh) -> Listed:
    """Plain parameters are the same on all ranks of tp and belong to the first.

    Raises ValueError for a model without parameters, on several devices, with values that are not finite, or with something on meta that
    nothing is known to give values to.
    """
    found = Listed([], [], [], {})
    seen: set[nn.Parameter] = set()
    for number, chunk in enumerate(chunks):
        unit_of = units_of(chunk, number)[1]
        _check_meta(chunk, options.load_later)
        for name, param, spec in named_specs(chunk):
            if not param.requires_grad or param in seen:
                continue
            seen.add(param)
            _check_param(name, param)
            if spec_of(param) is None:
                spec = replace(spec, owner=mesh.tp.rank == 0)
            # In stage 3 a block's weights come and go together; elsewhere buckets are as long as they like.
            group = f"{unit_of[param].name if options.stage == 3 else number}"
            found.chunk_of[group] = number
            name = name if len(chunks) == 1 else f"{number}.{name}"
            found.params.append(param)
            found.specs.append(spec)
            found.entries.append(Entry(name, param.numel(), group, spec.unit))
    if not found.params:
        raise ValueError("the model has no parameter that requires a gradient: there is nothing to optimize")
    _check_apart(found)
    devices = sorted({str(mesh.device if param.is_meta else param.device) for param in found.params})
    if len(devices) > 1:
        raise ValueError(f"parameters are on {' and '.join(devices)}: move the model to one device")
    return found


def _check_apart(found: Listed) -> None:
    """Raises ValueError for two parameters in one memory, which would be two after wrapping."""
    spans = []
    for param, entry in zip(found.params, found.entries, strict=True):
        if param.numel() and not param.is_meta:
            spans.append((param.data_ptr(), param.data_ptr() + param.numel() * param.element_size(), entry.name))
    for (_, stop, name), (start, _, other) in pairwise(sorted(spans)):
        if start < stop:
            raise ValueError(f"{name} and {other} share memory and would not any more: tie them by assigning the same nn.Parameter")


def check_same_values(chunks: Sequence[nn.Module], dp: Axis) -> None:
    """Raises ValueError on all ranks unless parameters and buffers are the same on all replicas, by two numbers of each; on meta, by what
    they are to be drawn with."""
    mine = {}
    for number, chunk in enumerate(chunks):
        for name, tensor in (*chunk.named_parameters(), *chunk.named_buffers()):
            if tensor.is_meta:
                mine[f"{number}.{name}"] = ["meta", str(getattr(spec_of(tensor), "seeds", ()))]
                continue
            values = tensor.detach()
            largest = values.abs().max() if values.is_floating_point() and values.numel() else 0.0
            mine[f"{number}.{name}"] = [str(float(values.sum(dtype=torch.float64))), str(float(largest))]  # as text a nan is itself
    everyone = gather_json(mine, dp)
    for name, told in everyone[0].items():
        if any(values.get(name) != told for values in everyone):
            raise ValueError(f"{name} has different values on the replicas: seed them alike, or load the same weights")


def _check_param(name: str, param: nn.Parameter) -> None:
    if has_main_grad(param):
        raise ValueError(f"{name} has an optimizer or MainGrads already, which this one would leave without it: build the model anew")
    if not param.is_meta:
        check_finite(name, param.detach())


def check_finite(name: str, values: Tensor) -> None:
    """Raises ValueError unless all values are. Their extremes say so (NaN is one) with no memory beside them."""
    if values.numel() and not all(bool(extreme.isfinite()) for extreme in torch.aminmax(values)):
        raise ValueError(f"{name} has values that are not finite: check what it was loaded from, or its init")


def _check_meta(chunk: nn.Module, load_later: bool) -> None:
    """Raises ValueError for what is on meta and will not be drawn, nor, as frozen parameters and buffers are in no checkpoint, loaded."""
    for name, param, spec in named_specs(chunk):
        if param.is_meta and not spec.seeds and not (load_later and param.requires_grad):
            fix = "give load_later=True and load them" if param.requires_grad else "build it on a real device, as it is frozen"
            raise ValueError(f'{name} is on meta and has no values: call initialize(model, seed, device="meta") first, or {fix}')
    for name, buffer in chunk.named_buffers():
        if buffer.is_meta:
            raise ValueError(f"buffer {name} is on meta and has no values: register it on a real device")


def grouped(found: Listed, update: AdamW, groups: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """torch's param_groups: given ones, checked, or matrices with weight decay and vectors without."""
    if groups is None:
        decays = {True: update.weight_decay, False: 0.0}
        made: list[dict[str, Any]] = [
            {"params": [p for p, spec in zip(found.params, found.specs, strict=True) if spec.decay is decay], "weight_decay": decays[decay]}
            for decay in (True, False)
        ]
        return made  # also an empty one: the groups of all pipeline ranks are alike
    made = [{**group, "params": [one] if isinstance(one := group["params"], Tensor) else list(one)} for group in groups]
    given: list[nn.Parameter] = [param for group in made for param in group["params"]]
    if len(given) != len(set(given)):
        raise ValueError("groups name a parameter twice: give each to one group")
    missing = [entry.name for param, entry in zip(found.params, found.entries, strict=True) if param not in set(given)]
    if missing or len(given) != len(found.params):
        what = f"leave out {missing[0]}" if missing else "have a parameter that is not the model's, or does not require a gradient"
        raise ValueError(f"groups {what}: give all of the model's that require a gradient, and no others")
    for group in made:
        options = {**update.defaults, **{k: v for k, v in group.items() if k != "params"}}
        beta1, beta2 = options["betas"]
        check_options(lr=options["lr"], beta1=beta1, beta2=beta2, eps=options["eps"], weight_decay=options["weight_decay"])
    return made
