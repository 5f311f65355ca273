"""What crosses from one pipeline rank to another: tagged messages, sent and received while the rank computes.

Both ends of a boundary know the shapes and dtypes that cross it: the sender says them in a header the first time that a micro-batch of a
new signature (the shapes and dtypes in it, `signature`) comes along, and both remember. So sequence length and micro-batch size may
change at every micro-batch, and a step that brings nothing new sends hidden states and nothing else. The gradient that comes back has the
form of what went out.

Every message has a tag of its own kind, stage and micro-batch. Between two ranks that are both next and previous of each other (pp=2 with
several chunks) activations and gradients pass in both directions at once, and a receive that is posted ahead may overtake another: matched
by order alone they could be swapped (tests/pipeline/test_wire.py::test_tags_differ, test_runtime.py::test_two_ranks_several_chunks).
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megapar.mesh import Axis
from megapar.pipeline.schedule import Action
from megapar.transport import Work, flush, host_device, start_receive, start_send, wait

HEADER_BYTES = 1024
MOST_PARTS = 16
"""Tensors that one stage may hand to the next."""
UNDER_WAY = 2
"""Messages of a kind and stage, of those that go through no channel, that are kept until they have arrived: a third waits for the first."""


class Payload(NamedTuple):
    """What a stage returned: one tensor, or a tuple of them."""

    tensors: tuple[Tensor, ...]
    is_tuple: bool

    @property
    def value(self) -> Any:
        return self.tensors if self.is_tuple else self.tensors[0]

    @staticmethod
    def of(value: Any, what: str) -> Payload:
        """Raises ValueError for anything else."""
        parts = value if isinstance(value, tuple) else (value,)
        if not 0 < len(parts) <= MOST_PARTS or not all(isinstance(part, Tensor) for part in parts):
            raise ValueError(f"{what} returned {described(value)}: return one tensor, or a tuple of 1 to {MOST_PARTS} tensors")
        return Payload(parts, isinstance(value, tuple))


def described(value: Any) -> str:
    """What it is, for error messages."""
    if not isinstance(value, tuple):
        return f"a {type(value).__name__}"
    if len(value) > MOST_PARTS:
        return f"a tuple of {len(value)}"
    return f"a tuple of ({', '.join(type(part).__name__ for part in value)})"


def takes_gradient(dtype: torch.dtype) -> bool:
    """Whether gradients flow to the parts of this dtype, all of them: the others' are zeros if nothing needs them."""
    return dtype.is_floating_point or dtype.is_complex


class Form(NamedTuple):
    """Shapes and dtypes of a payload."""

    parts: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    is_tuple: bool

    def __str__(self) -> str:
        parts = ", ".join(f"{dtype} {list(shape)}" for shape, dtype in self.parts)
        return f"a tuple of {parts}" if self.is_tuple else parts

    @staticmethod
    def of(payload: Payload) -> Form:
        return Form(tuple((tuple(part.shape), part.dtype) for part in payload.tensors), payload.is_tuple)

    @property
    def gradient(self) -> Form:
        """The form of the gradient that comes back."""
        return Form(tuple(part for part in self.parts if takes_gradient(part[1])), True)

    def empty(self, device: torch.device) -> Payload:
        return Payload(tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.parts), self.is_tuple)

    def encoded(self) -> Tensor:
        """uint8 [HEADER_BYTES]. Raises ValueError for shapes that it cannot hold."""
        text = json.dumps([self.is_tuple, [[shape, str(dtype).removeprefix("torch.")] for shape, dtype in self.parts]]).encode()
        if len(text) > HEADER_BYTES:
            raise ValueError(f"the shapes of {len(self.parts)} tensors take {len(text)} of {HEADER_BYTES} bytes: hand over fewer")
        return torch.frombuffer(bytearray(text.ljust(HEADER_BYTES)), dtype=torch.uint8)

    @staticmethod
    def decoded(header: Tensor) -> Form:
        is_tuple, parts = json.loads(bytes(header.tolist()))
        return Form(tuple((tuple(shape), getattr(torch, name)) for shape, name in parts), is_tuple)


def signature(value: Any) -> Hashable:
    """The shapes and dtypes of the tensors in a micro-batch, and whatever in it is no tensor: what decides the shapes that a stage
    returns. Raises ValueError for an object that cannot be looked into."""
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(signature(item) for item in value)
    if isinstance(value, Mapping):
        return tuple((str(key), signature(item)) for key, item in value.items())
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value) if not f.name.startswith("_")]
        return tuple((name, signature(getattr(value, name))) for name in names)
    if value is None or isinstance(value, (bool, int, float, str)):
        return str(value)
    raise ValueError(f"a micro-batch holds a {type(value).__name__}: use tensors, numbers, strings, lists, dicts and dataclasses of them")


class _Outgoing(NamedTuple):
    tensors: Sequence[Tensor]  # kept alive until it has arrived
    works: list[Work]


class Incoming(NamedTuple):
    """A message that is on its way."""

    payload: Payload
    works: list[Work]

    def arrived(self) -> Payload:
        for work in self.works:
            wait(work)
        return self.payload


class Wire:
    """One rank's end of all boundaries along the pipeline's axis."""

    def __init__(self, axis: Axis, stage_to_rank: Sequence[int], device: torch.device) -> None:
        self.axis, self.stage_to_rank, self.device = axis, stage_to_rank, device
        self.bytes_sent = self.header_bytes_sent = 0
        self._header_device = host_device(axis)
        self._forms: dict[tuple[int, Hashable], Form] = {}
        self._outgoing: dict[tuple[str, int], deque[_Outgoing]] = {}

    def send(self, action: Action, payload: Payload, signed: Hashable) -> None:
        """Starts sending what `action`, a SEND_F or SEND_B, sends; the caller may forget it."""
        tensors = [part.detach().contiguous() for part in payload.tensors]
        self.bytes_sent += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if action.kind == "SEND_F":
            form, known = Form.of(payload), self._forms.get((action.stage + 1, signed))
            if known is None:
                tensors.insert(0, form.encoded().to(self._header_device))
                self._forms[action.stage + 1, signed] = form
                self.header_bytes_sent += HEADER_BYTES
            elif known != form:
                raise ValueError(
                    f"stage {action.stage} returned {form} for a micro-batch whose like gave {known} before: "
                    "let the shapes of what a stage returns depend on the shapes in the micro-batch alone"
                )
        waiting = self._outgoing.setdefault((action.kind, action.stage), deque())
        while len(waiting) >= UNDER_WAY:
            self._finish(waiting.popleft())
        peer, tag = self._peer(action), self._tag(action)
        works = [work for tensor in tensors if (work := start_send(tensor, self.axis, peer, tag)) is not None]
        if works:
            waiting.append(_Outgoing(tensors, works))

    def knows(self, action: Action, signed: Hashable) -> bool:
        """Whether a RECV_F or RECV_B of a micro-batch of this signature can be posted without waiting for a header."""
        return self._boundary(action, signed) in self._forms

    def receive(self, action: Action, signed: Hashable) -> Incoming:
        """Starts receiving what `action`, a RECV_F or RECV_B, receives; waits for the header if there has to be one."""
        peer, tag, boundary = self._peer(action), self._tag(action), self._boundary(action, signed)
        if boundary not in self._forms:
            header = torch.empty(HEADER_BYTES, dtype=torch.uint8, device=self._header_device)
            wait(start_receive(header, self.axis, peer, tag))
            self._forms[boundary] = Form.decoded(header)
        form = self._forms[boundary]
        payload = (form if action.kind == "RECV_F" else form.gradient).empty(self.device)
        return Incoming(payload, [start_receive(part, self.axis, peer, tag) for part in payload.tensors])

    def flush(self) -> None:
        """Waits until all that was sent has arrived."""
        flush(self.axis)
        for waiting in self._outgoing.values():
            while waiting:
                self._finish(waiting.popleft())

    def _finish(self, sent: _Outgoing) -> None:
        for work in sent.works:
            wait(work)

    def _peer(self, action: Action) -> int:
        """The rank at the other end."""
        there = {"SEND_F": 1, "RECV_F": -1, "SEND_B": -1, "RECV_B": 1}[action.kind]
        return self.stage_to_rank[action.stage + there]

    @staticmethod
    def _boundary(action: Action, signed: Hashable) -> tuple[int, Hashable]:
        """Boundaries are numbered by the stage after them."""
        return action.stage + (action.kind == "RECV_B"), signed

    def _tag(self, action: Action) -> int:
        """The same on both ends, and of no other message of a step. Header and parts of a message share it: they keep their order."""
        assert action.microbatch is not None
        boundary = action.stage + (action.kind in ("SEND_F", "RECV_B"))
        return 2 * (action.microbatch * len(self.stage_to_rank) + boundary) + action.kind.endswith("B")
