"""Where the elements of a parameter lie in its logical tensors: what stochastic rounding draws by.

Any sharding rounds alike, as long as the model has the same parameters in the same order: where ranks share KV heads, WQ is a parameter of
its own, and later ones then have other numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from megapar.params import Piece, seed_of, spec_of

Place = tuple[int, int, int]
"""(base, columns, stride): element i of a box is element base + i // columns * stride + i % columns of its logical tensor."""


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of a parameter, which are one box of the logical tensor `id`."""

    start: int
    stop: int
    id: int
    place: Place

    def of(self, local: Tensor) -> Tensor:
        return local[self.start : self.stop] if local.dim() else local


def place_of(piece: Piece) -> Place:
    """Raises ValueError for a box that is cut in its third or a later dimension."""
    shape, box = piece.shape, [b - a for a, b in zip(piece.start, piece.stop, strict=True)]
    if shape[2:] != tuple(box[2:]):
        raise ValueError(f"{piece.name} of shape {shape} is cut in dimension 2 or later: cut one of the first two")
    inner = math.prod(shape[2:])
    starts, sizes, widths = [0, 0, *piece.start[:2]][-2:], [1, 1, *shape[:2]][-2:], [1, 1, *box[:2]][-2:]
    return (starts[0] * sizes[1] + starts[1]) * inner, max(widths[1] * inner, 1), max(sizes[1] * inner, 1)


def parts_of(param: Tensor, index: int) -> list[Part]:
    """The boxes that parameter number `index` of a model holds; a plain parameter is one whole logical tensor."""
    spec = spec_of(param)
    if spec is None:
        return [Part(0, param.shape[0] if param.dim() else 1, seed_of(index), place_of(Piece.whole("weight", tuple(param.shape))))]
    parts, row = [], 0
    for piece in spec.pieces:
        rows = piece.stop[0] - piece.start[0] if piece.shape else 1
        parts.append(Part(row, row + rows, seed_of(index, piece.name), place_of(piece)))
        row += rows
    return parts
