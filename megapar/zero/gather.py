"""When whole weights are there: a block's are gathered before it runs and, in stage 3, freed after it, forward and backward.

A *unit* is a block, a child of a ModuleList or ModuleDict, or what a chunk holds beside its blocks (embedding, last norm, output
projection), whose weights the loss function may use after the module has returned: they stay until the step, or `release`. While a unit
computes, the next one's gather is under way; in backward the one's before. Weights come back into the same storage, so what autograd saved
of them is whole again; a weight that is freed raises when it is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from megapar.transport import Pending
from megapar.zero.buckets import UNDER_WAY
from megapar.zero.layout import Bucket
from megapar.zero.weights import Weights

Blocks = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class Unit:
    """A block or, without a module, the rest of a chunk."""

    name: str
    chunk: int
    module: nn.Module | None


def units_of(chunk: nn.Module, number: int) -> tuple[list[Unit], dict[nn.Parameter, Unit]]:
    """The blocks of a chunk in their order, its rest last; and whose each parameter is: the rest's, if several units share it."""
    rest = Unit(f"{number}", number, None)
    units: list[Unit] = []
    owner: dict[nn.Parameter, Unit] = {}

    def visit(module: nn.Module, name: str) -> None:
        for key, child in module.named_children():
            path = f"{name}.{key}"
            if not isinstance(module, Blocks) or isinstance(child, Blocks):  # a list in a list is never called itself
                visit(child, path)
                continue
            unit = Unit(path, number, child)
            units.append(unit)
            for param in child.parameters():
                owner[param] = unit if owner.setdefault(param, unit) is unit else rest

    visit(chunk, f"{number}")
    outside = {param for module in chunk.modules() if not _inside(module, units) for param in module.parameters(recurse=False)}
    return [*units, rest], {param: rest if param in outside else owner[param] for param in chunk.parameters()}


def _inside(module: nn.Module, units: Sequence[Unit]) -> bool:
    return any(module is inner for unit in units if unit.module is not None for inner in unit.module.modules())


class Gathers:
    """Brings whole weights to the units that use them.

    after_use: sharded weights (stage 3) are freed after each use, or once a step. Without sharded weights there is nothing to do, except
    after `start_all`, for which it `watches` the modules. ahead: whether gathers start before they are needed.
    """

    def __init__(self, chunks: Sequence[nn.Module], weights: Weights, *, after_use: bool, ahead: bool, watches: bool) -> None:
        self.weights, self.after_use, self.ahead = weights, after_use and weights.sharded, ahead
        self.units: list[list[Unit]] = []
        self._buckets: dict[Unit, tuple[Bucket, ...]] = {}
        self._pending: dict[int, tuple[Bucket, Pending]] = {}
        self._whole = {bucket.number for bucket in weights.layout.buckets}
        self._used_last: Unit | None = None
        self._reading = False
        self._given: dict[Unit, dict[int, int]] = {}
        index = {param: i for i, param in enumerate(weights.params)}
        for number, chunk in enumerate(chunks):
            units, owner = units_of(chunk, number)
            self.units.append(units)
            for unit in units:
                mine = {index[param] for param, holder in owner.items() if holder is unit and param in index}
                found = [b for b in weights.layout.buckets if any(member.index in mine for member in b.members)]
                self._buckets[unit] = tuple(reversed(found))
            if weights.sharded or (watches and weights.axis.size > 1):
                self._watch(chunk, units)
        if weights.sharded:
            for param, entry in zip(weights.params, weights.layout.entries, strict=True):
                param._zero_name = entry.name  # type: ignore[attr-defined]
            self.release()

    # The life of a unit's weights

    def start(self, unit: Unit) -> None:
        """Starts the gather of what is not whole yet."""
        for bucket in self._buckets[unit]:
            self._start(bucket)

    def use(self, unit: Unit) -> None:
        """Makes the unit's weights whole, and those of the unit used before it free, if weights are freed after use."""
        self.start(unit)
        for bucket in self._buckets[unit]:
            self._end(bucket)
        before, self._used_last = self._used_last, unit if unit.module is not None else self._used_last
        if before is not None and before is not unit:
            self.free(before)

    def free(self, unit: Unit) -> None:
        """Frees the weights of a block that has been used."""
        if self.after_use and unit.module is not None:
            self._free(bucket for bucket in self._buckets[unit] if bucket.number in self._whole)

    def start_all(self) -> None:
        """After an update of weights that are never freed: starts fetching the other ranks' parts of them, first block first."""
        self._whole.clear()
        for bucket in reversed(self.weights.layout.buckets):
            self._start(bucket)

    def gather_all(self) -> None:
        """As `start_all`, and waits; a few buckets are under way at once."""
        self._whole.clear()
        for bucket in reversed(self.weights.layout.buckets):
            self._start(bucket)
            while len(self._pending) > UNDER_WAY:
                self._end(next(iter(self._pending.values()))[0])
        self.release()

    def release(self) -> None:
        """Frees all weights that are sharded, waiting for gathers that nobody has used."""
        for bucket in self.weights.layout.buckets:
            if bucket.number in self._pending:
                self._end(bucket)
        self._used_last = None
        if self.weights.sharded:
            self._free(bucket for bucket in self.weights.layout.buckets if bucket.number in self._whole)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside it all weights are whole, to be read. Raises ValueError at its end if one was written: the change would be lost."""
        before = set(self._whole)
        for bucket in self.weights.layout.buckets:
            self._start(bucket)
            self._end(bucket)
        versions = [param._version for param in self.weights.params]
        self._reading = True
        try:
            yield
        finally:
            self._reading = False
        if self.weights.sharded:
            changed = [i for i, param in enumerate(self.weights.params) if param._version != versions[i]]
            if changed:
                name = self.weights.layout.entries[changed[0]].name
                raise ValueError(f"{name} was written inside unshard(), and its shards were not: load_state_dict changes weights")
            # A graph that was built here would find them freed: autograd is to say so.
            torch.autograd.graph.increment_version(self.weights.params)
            self._free(b for b in self.weights.layout.buckets if b.number in self._whole and b.number not in before)

    def _start(self, bucket: Bucket) -> None:
        if bucket.number not in self._whole and bucket.number not in self._pending:
            self._pending[bucket.number] = bucket, self.weights.start_gather(bucket)

    def _end(self, bucket: Bucket) -> None:
        if bucket.number not in self._pending:
            return
        # In the order of their starts, whatever this rank uses first: pieces of them are still to be posted, in one order on all ranks.
        while (first := next(iter(self._pending))) != bucket.number:
            self._end(self._pending[first][0])
        self._pending.pop(bucket.number)[1].wait()
        self._whole.add(bucket.number)
        for member in bucket.members:
            _set_freed(self.weights.params[member.index], False)

    def _free(self, buckets: Iterable[Bucket]) -> None:
        for bucket in [] if self._reading else list(buckets):
            self.weights.free([bucket])
            self._whole.discard(bucket.number)
            for member in bucket.members:
                _set_freed(self.weights.params[member.index], True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Gathers:
        raise TypeError("a model whose weights are gathered by its modules cannot be copied: copy it before wrapping, or copy state_dict()")

    # Hooks

    def _watch(self, chunk: nn.Module, units: Sequence[Unit]) -> None:
        *blocks, rest = units
        chunk.register_forward_pre_hook(partial(self._before_chunk, rest))
        for position, unit in enumerate(blocks):
            assert unit.module is not None
            following = blocks[position + 1] if position + 1 < len(blocks) else None
            before = blocks[position - 1] if position else None
            unit.module.register_forward_pre_hook(partial(self._before_forward, unit, following), with_kwargs=True)
            if self.weights.sharded:
                unit.module.register_forward_hook(partial(self._after_forward, unit, before))

    def _before_chunk(self, rest: Unit, module: nn.Module, args: Any) -> None:
        self.use(rest)

    def _before_forward(self, unit: Unit, following: Unit | None, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.use(unit)
        self._given[unit] = {id(tensor): tensor._version for tensor in _tensors((args, kwargs)) if tensor.requires_grad}
        if self.ahead and following is not None and not _in_backward():
            self.start(following)

    def _after_forward(self, unit: Unit, before: Unit | None, module: nn.Module, args: Any, output: Any) -> None:
        # In recomputation its backward follows, though not at once: a segment of several blocks is recomputed whole, then run backward
        # (tests/zero/test_buckets.py::test_stories).
        if not _in_backward():
            self.free(unit)
        found, given = list(_tensors(output)), self._given.pop(unit, {})
        if not found and torch.is_grad_enabled():
            what = f"a {type(output).__name__} in which no tensor is found"
            raise ValueError(f"block {unit.name} returned {what}: return tensors, or tuples, lists, dicts or dataclasses of them")
        for tensor in found:
            # What is only handed on gets its gradient when this block's backward is over
            # (tests/zero/test_gather.py::test_whatever_way_it_is_run).
            if tensor.requires_grad and given.get(id(tensor)) != tensor._version:
                tensor.register_hook(lambda grad: self._before_backward(unit, before))

    def _before_backward(self, unit: Unit, before: Unit | None) -> None:
        self.use(unit)
        if self.ahead and before is not None:
            self.start(before)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for item in vars(value).values():
            yield from _tensors(item)


ATTRIBUTES = {"shape", "dtype", "device", "requires_grad", "grad", "is_leaf", "grad_fn", "ndim", "layout", "_version", "is_cuda", "is_meta"}
METHODS = {"size", "dim", "numel", "__hash__", "is_floating_point", "register_hook", "register_post_accumulate_grad_hook", "requires_grad_"}
"""What may be asked of a parameter whose values are not there."""


def _set_freed(param: Any, freed: bool) -> None:
    """Through its class, which is the only thing that all of torch's functions ask."""
    kind: Any = type(param)
    if freed and not hasattr(kind, "_whole_class"):
        param.__class__ = _freed_class(kind)
    elif not freed and hasattr(kind, "_whole_class"):
        param.__class__ = kind._whole_class


@cache
def _freed_class(kind: type) -> type:
    def refuse(cls: type, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        attribute = getattr(getattr(function, "__self__", None), "__name__", "")
        if attribute in ATTRIBUTES or function.__name__ in METHODS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        freed = (tensor for tensor in _tensors((args, kwargs)) if hasattr(tensor, "_whole_class"))
        name = next((tensor._zero_name for tensor in freed), "a parameter")  # type: ignore[attr-defined]
        raise ValueError(f"{name} is sharded and its whole values are not here: read it inside `with optimizer.unshard():`")

    return type(kind)(f"Freed{kind.__name__}", (kind,), {"__torch_function__": classmethod(refuse), "_whole_class": kind})
