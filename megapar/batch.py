"""What every block must know about the tokens it is given, beside their hidden states."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """`b` sequences of `s` tokens, flattened b-major to t = b * s rows.

    tokens: int64 [t], the ids.
    position_ids: int64 [t], the position that RoPE and learned embeddings read.
    segment_ids: int64 [t] or None; a token attends only within its own segment (packed documents).
    prefix_len: int64 [b] or None; the first prefix_len tokens of a sequence attend to each other in both directions. Or [t], where packed
        documents have prefixes: for each token, the index in its sequence at which its document's prefix ends.
    targets: int64 [t] or None; what the loss asks for at each token.
    objective_ids: int64 [b] or None; which of a mixture's objectives made a sequence.
    """

    b: int
    s: int
    tokens: Tensor
    position_ids: Tensor
    segment_ids: Tensor | None = None
    prefix_len: Tensor | None = None
    targets: Tensor | None = None
    objective_ids: Tensor | None = None
    _memo: dict[Hashable, object] = field(default_factory=dict, repr=False, init=False)  # of this batch: dataclasses.replace leaves it out

    def __post_init__(self) -> None:
        if self.tokens.dtype != torch.int64:
            raise ValueError(f"tokens have dtype {self.tokens.dtype} and must be ids of dtype torch.int64: convert them with .long()")
        for name in ("tokens", "position_ids", "segment_ids", "targets"):
            ids: Tensor | None = getattr(self, name)
            if ids is not None and ids.shape != (self.t,):
                raise ValueError(f"{name} have shape {tuple(ids.shape)} and must be [b * s] = [{self.t}]: flatten them b-major")
        if self.objective_ids is not None and self.objective_ids.shape != (self.b,):
            raise ValueError(f"objective_ids have shape {tuple(self.objective_ids.shape)} and must be [{self.b}]: give one a sequence")
        if self.prefix_len is not None and self.prefix_len.shape not in ((self.b,), (self.t,)):
            shape = tuple(self.prefix_len.shape)
            raise ValueError(f"prefix_len has shape {shape} and must be [{self.b}] or [{self.t}]: give one length a sequence or a token")

    @staticmethod
    def of(tokens: Tensor, targets: Tensor | None = None) -> TokenBatch:
        """The batch of `tokens`, and of `targets`, int64 [b, s] each, at positions 0 to s - 1, attending causally."""
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)} and must be [b, s] with b and s of 1 or more: reshape or feed some")
        b, s = tokens.shape
        positions = torch.arange(s, device=tokens.device).repeat(b)
        return TokenBatch(b, s, tokens.reshape(-1), positions, targets=None if targets is None else targets.reshape(-1))

    def to(self, device: torch.device) -> TokenBatch:
        """The batch on a device."""

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        tokens, positions = self.tokens.to(device), self.position_ids.to(device)
        mask = moved(self.segment_ids), moved(self.prefix_len)
        return TokenBatch(self.b, self.s, tokens, positions, *mask, moved(self.targets), moved(self.objective_ids))

    @property
    def t(self) -> int:
        """Number of tokens."""
        return self.b * self.s

    def unpad(self, x: Tensor) -> Tensor:
        """[t or more, ...] to [t, ...]: drops the rows that sequence parallelism pads the tokens with."""
        # Not x[: t] alone: the backward of a slice that keeps everything copies the whole gradient into zeros.
        return x if x.shape[0] == self.t else x[: self.t]

    @property
    def is_causal(self) -> bool:
        """Whether the mask is plain causal within each sequence."""
        return self.segment_ids is None and self.prefix_len is None

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, computed once for this batch: what all blocks derive alike (RoPE angles, a dense mask)."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]  # type: ignore[return-value]

    def attention_spans(self) -> Tensor | None:
        """int32 [b, s, 2]: query i attends to the keys from the first number on, up to and without the second.

        None where a query attends to keys with others in between: those of a segment in pieces, or of several prefixes in one segment. And
        in a graph that is being compiled, which cannot look at them, unless they were asked for before: the batch remembers them.
        """
        key = "attention_spans"
        return None if key not in self._memo and torch.compiler.is_compiling() else self.memo(key, self._spans)

    def _spans(self) -> Tensor | None:
        b, s, index = self.b, self.s, torch.arange(self.s, device=self.tokens.device)
        begins, inside = torch.zeros(2, b, s, dtype=torch.bool, device=index.device)
        begins[:, :1] = True
        if self.segment_ids is not None:
            segment = self.segment_ids.view(b, s)
            begins[:, 1:] = segment[:, 1:] != segment[:, :-1]
            ordered = segment.sort(1).values
            if (begins.sum(1) != 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)).any():
                return None
        if self.prefix_len is not None:
            inside = index < self.prefix_len.view(b, -1)
        # A run of tokens inside a prefix ends with it or its segment. Its first one, unless it is its segment's first run, tells a second.
        enters = inside.clone()
        enters[:, 1:] &= begins[:, 1:] | ~inside[:, :-1]
        entered = enters.cumsum(1)
        if (entered - torch.where(begins, entered - enters.long(), 0).cummax(1).values > 1).any():
            return None
        ends = torch.where(begins | ~inside, index, s)
        ends = torch.cat([ends[:, 1:], ends.new_full((b, 1), s)], 1).flip(1).cummin(1).values.flip(1)
        first = torch.where(begins, index, 0).cummax(1).values
        return torch.stack([first, torch.where(inside, ends, index + 1)], -1).int()

    def attention_mask(self) -> Tensor:
        """bool [b, 1, s, s], True where query i may attend to key j: for backends that need it dense."""
        return self.memo("attention_mask", self._dense_mask)

    def _dense_mask(self) -> Tensor:
        index = torch.arange(self.s, device=self.tokens.device)
        allowed = (index[:, None] >= index[None, :]).expand(self.b, self.s, self.s)
        if self.prefix_len is not None:
            in_prefix = index < self.prefix_len.view(self.b, -1)
            allowed = allowed | (in_prefix[:, :, None] & in_prefix[:, None, :])
        if self.segment_ids is not None:
            segment = self.segment_ids.view(self.b, self.s)
            allowed = allowed & (segment[:, :, None] == segment[:, None, :])
        return allowed[:, None]
