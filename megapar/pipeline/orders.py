"""The order of forwards and backwards on each rank: GPipe, 1F1B, interleaved 1F1B.

A rank runs `warmup` forwards, then pairs of a forward and a backward, then the backwards that are left. The orders differ in the warm-up
and in which chunk is next.

    GPipe              all forwards are warm-up                     Huang et al. 2019, arXiv:1811.06965
    1F1B               pp - rank - 1                                Narayanan et al. 2019 (PipeDream-Flush), arXiv:2006.09503
    interleaved 1F1B   2 (pp - rank - 1) + (chunks - 1) group       Narayanan et al. 2021, arXiv:2104.04473

Bubble, as a fraction of the ideal time: (pp - 1) / microbatches, and chunks times less when interleaved. Most live activations on a rank:
min(microbatches, pp - rank) for 1F1B; min(chunks microbatches, 2 (pp - rank - 1) + (chunks - 1) group + 1) when interleaved, of stages
chunks times smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

from megapar.pipeline.schedule import Action, Schedule


def gpipe(pp: int, chunks: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards; chunk after chunk (breadth first)."""
    _refuse_none(pp=pp, chunks=chunks, microbatches=microbatches)
    forwards = [(chunk, m) for chunk in range(chunks) for m in range(microbatches)]
    return _schedule(pp, chunks, forwards, [len(forwards)] * pp)


def one_f_one_b(pp: int, microbatches: int) -> Schedule:
    """1F1B: one stage a rank, and as soon as there is a backward to do, forwards and backwards take turns."""
    _refuse_none(pp=pp, microbatches=microbatches)
    return _schedule(pp, 1, [(0, m) for m in range(microbatches)], [pp - rank - 1 for rank in range(pp)])


def interleaved_1f1b(pp: int, chunks: int, microbatches: int, group: int | None = None) -> Schedule:
    """Interleaved 1F1B: stage s is chunk s // pp of rank s % pp, and a rank takes `group` micro-batches (default pp) through a chunk
    before it turns to its next chunk. With one chunk it is 1F1B.

    Megatron-LM's order wherever that is defined: a last group shorter than pp makes ranks wait for one another for ever. There the order
    is that of the next number of micro-batches that has none, without the micro-batches that are too many. ValueError if group < pp.
    """
    _refuse_none(pp=pp, chunks=chunks, microbatches=microbatches)
    group = pp if group is None else group
    if group < pp:
        raise ValueError(f"group={group} is smaller than pp={pp}, ranks would wait for each other's chunks: give {pp} or more, or None")
    if chunks == 1:
        return one_f_one_b(pp, microbatches)
    whole, group = padded(pp, microbatches, group), max(pp, min(group, microbatches))
    forwards = []
    for first in range(0, whole, group):
        forwards += [(chunk, m) for chunk in range(chunks) for m in range(first, min(first + group, whole))]
    warmups = [2 * (pp - rank - 1) + (chunks - 1) * group for rank in range(pp)]
    return without_phantoms(_schedule(pp, chunks, forwards, warmups), microbatches)


def forward_only(stage_to_rank: Sequence[int], microbatches: int) -> Schedule:
    """Forwards alone, for evaluation: as many micro-batches as there are ranks go through a rank's first stage, then its next one."""
    _refuse_none(microbatches=microbatches)
    pp = 1 + max(stage_to_rank)
    lists: list[list[Action]] = [[] for _ in range(pp)]
    for first in range(0, microbatches, pp):
        for stage, rank in enumerate(stage_to_rank):
            lists[rank] += [Action("F", stage, m) for m in range(first, min(first + pp, microbatches))]
    return Schedule(tuple(tuple(actions) for actions in lists), tuple(stage_to_rank))


def padded(pp: int, microbatches: int, group: int) -> int:
    """The least number of micro-batches, not below this one, whose last group is not shorter than pp."""
    rest = microbatches % max(pp, min(group, microbatches))
    return microbatches if rest == 0 or rest >= pp else microbatches + pp - rest


def without_phantoms(schedule: Schedule, microbatches: int) -> Schedule:
    """The schedule without the micro-batches from this number on; the others keep their order, so it needs no more time and memory."""
    ranks = tuple(tuple(a for a in actions if a.microbatch is None or a.microbatch < microbatches) for actions in schedule.ranks)
    return Schedule(ranks, schedule.stage_to_rank)


def _schedule(pp: int, chunks: int, forwards: Sequence[tuple[int, int]], warmups: Sequence[int]) -> Schedule:
    """`forwards`: chunk and micro-batch in the order of the forwards; backwards go through the chunks the other way round."""
    ranks = []
    for rank, warmup in enumerate(warmups):
        fs = [Action("F", chunk * pp + rank, m) for chunk, m in forwards]
        bs = [Action("B", (chunks - 1 - chunk) * pp + rank, m) for chunk, m in forwards]
        warmup = min(warmup, len(fs))
        actions = fs[:warmup]
        for forward, backward in zip(fs[warmup:], bs, strict=False):
            actions += [forward, backward]
        ranks.append(tuple(actions + bs[len(fs) - warmup :]))
    return Schedule(tuple(ranks), tuple(stage % pp for stage in range(pp * chunks)))


def _refuse_none(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1: raise it")
