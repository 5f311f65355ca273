"""What training starts from: the values that parameters have or, on `meta`, those that are drawn for them, no more than this rank keeps.

One parameter after the other gets its memory: a model that fits on no rank is built from shards of it, and one full logical tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megapar.collectives import raise_together
from megapar.mesh import ParallelMesh
from megapar.optim.precision import Precision
from megapar.params import Interval, ParamSpec, fill, materialize, named_specs, seeded
from megapar.zero.layout import Layout, boxes
from megapar.zero.setup import Listed, Options, check_finite
from megapar.zero.state import ShardedState
from megapar.zero.weights import Weights


def lay_out(
    chunks: Sequence[nn.Module], found: Listed, layout: Layout, mesh: ParallelMesh, precision: Precision, options: Options
) -> tuple[ShardedState, Weights]:
    """Moments and masters, and the weights, converted. Raises ValueError on every rank for drawn values that are not finite."""
    replicated, dp = options.stage == 0, mesh.dp
    intervals = [(0, p.numel()) if replicated else layout.interval(i, dp.rank) for i, p in enumerate(found.params)]
    state = ShardedState(found.params, found.specs, intervals, precision)  # on meta where the parameter is
    weights = Weights(found.params, layout, dp, replicated=replicated, sharded=options.stage == 3)
    draws, error = not options.load_later, None
    try:
        _convert_frozen(chunks, precision.param, mesh.device)
        for index, (param, spec, (start, stop)) in enumerate(zip(found.params, found.specs, intervals, strict=True)):
            kept = (start, stop) if weights.sharded else (0, param.numel())
            values = _values(found.entries[index].name, param, spec, kept, mesh.device, draws)
            if param.is_meta:
                mine = values if weights.sharded else values[start:stop]
                one = ShardedState([mine], [spec], [(0, stop - start)], precision)  # type: ignore[list-item]
                state.moments[index], state.masters[index : index + 1] = one.moments[0], one.masters
            weights.place(index, precision.convert(values))
    except (TypeError, ValueError) as caught:
        error = caught
    raise_together(error, mesh.world)
    return state, weights


def _values(name: str, param: nn.Parameter, spec: ParamSpec, kept: Interval, device: torch.device, draws: bool) -> Tensor:
    """Elements `kept` of a parameter, flat, in its own dtype. On meta: drawn, or NaN, which nobody takes for weights."""
    start, stop = kept
    if not param.is_meta:
        return param.detach().reshape(-1)[start:stop]
    values = torch.full((stop - start,), torch.nan, dtype=param.dtype, device=device)
    if draws:
        assert spec.init is not None
        parts = ((box, values[at - start : at - start + box.numel].view(box.box)) for box, at in boxes(spec, start, stop))
        fill(parts, spec.init, seeded(spec, spec.seeds))
        check_finite(name, values)
    return values


def _convert_frozen(chunks: Sequence[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
    """Parameters that do not train meet those that do in the same products."""
    for name, param, spec in (named for chunk in chunks for named in named_specs(chunk)):
        if param.requires_grad:
            continue
        if param.is_meta:
            materialize(param, _values(name, param, spec, (0, param.numel()), device, draws=True).view(param.shape))
        if param.is_floating_point():
            param.data = param.data.to(dtype)
