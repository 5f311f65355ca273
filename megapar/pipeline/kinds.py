"""The schedules by name, for configs and command lines."""

from __future__ import annotations

from megapar.pipeline.orders import gpipe, interleaved_1f1b, one_f_one_b
from megapar.pipeline.schedule import Schedule
from megapar.pipeline.simulate import Costs
from megapar.pipeline.zero_bubble import zero_bubble

KINDS = ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble")


def make_schedule(
    kind: str | None, pp: int, chunks: int, microbatches: int, group: int | None = None, costs: Costs | None = None
) -> Schedule:
    """The schedule of this name. None: 1f1b, or interleaved_1f1b if there are several chunks. `costs` are for zero_bubble, which is either
    of these with its backward split. ValueError for an unknown name and for what does not go together."""
    kind = kind or ("1f1b" if chunks == 1 else "interleaved_1f1b")
    if kind not in KINDS:
        raise ValueError(f'"{kind}" is no schedule: use one of {", ".join(KINDS)}')
    if kind == "1f1b" and chunks != 1:
        raise ValueError(f"1f1b has one chunk a rank, {chunks} are asked for: take interleaved_1f1b, or 1 chunk")
    if group is not None and kind in ("gpipe", "1f1b"):
        raise ValueError(f"group={group} is for interleaved schedules, {kind} is asked for: leave it out")
    if kind == "gpipe":
        return gpipe(pp, chunks, microbatches)
    if kind == "1f1b":
        return one_f_one_b(pp, microbatches)
    if kind == "zero_bubble":
        return zero_bubble(pp, chunks, microbatches, group, costs=costs)
    return interleaved_1f1b(pp, chunks, microbatches, group)
