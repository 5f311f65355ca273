"""A few small tensors, cut into rows over the ranks, that a save can be made of without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megapar import ParallelMesh
from megapar.params import Piece
from megapar.training.checkpoint import load_checkpoint
from megapar.zero.state import StateBox

ROWS, WIDTH = 12, 8
SHAPES = {"a": (ROWS, WIDTH), "b": (5,), "c": (ROWS, 2, WIDTH), "scalar": ()}


class Values:
    """This rank's rows of the tensors as they are at `step`."""

    def __init__(self, mesh: ParallelMesh, step: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.pieces: dict[str, Piece] = {}
        self.owned: dict[str, bool] = {}
        rank, size = mesh.world.rank, mesh.world.size
        for name, shape in SHAPES.items():
            start, stop = [0] * len(shape), list(shape)
            if shape and shape[0] == ROWS:
                start[0], stop[0] = ROWS * rank // size, ROWS * (rank + 1) // size
            self.owned[name] = rank == 0 or (bool(shape) and shape[0] == ROWS)
            self.pieces[name] = Piece(name, shape, tuple(start), tuple(stop))
            whole = torch.arange(max(1, torch.Size(shape).numel()), dtype=dtype).view(shape) + 1000 * step
            self.tensors[name] = whole[self.pieces[name].index].clone()

    def boxes(self) -> list[StateBox]:
        return [self._box(name) for name in self.tensors]

    def _box(self, name: str) -> StateBox:
        tensor = self.tensors[name]

        def write(value: torch.Tensor, at: tuple[slice, ...] = ()) -> None:
            tensor[at] = value

        return StateBox("weight", self.pieces[name], self.owned[name], tensor.dtype, lambda: tensor, write)

    def spoil(self) -> None:
        for tensor in self.tensors.values():
            tensor.fill_(float("nan"))

    def check(self, folder: Path, mesh: ParallelMesh, step: int) -> dict[str, Any]:
        """Loads it over what is here: every bit is that of `step`."""
        self.spoil()
        state = load_checkpoint(folder, self.boxes(), mesh)
        expected = Values(mesh, step)
        for name, tensor in self.tensors.items():
            assert torch.equal(tensor, expected.tensors[name]), name
        return state
