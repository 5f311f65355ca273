"""Saving: in the background or not it is the same bytes, no rank that fails stops training, and only what may go goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megapar import ParallelMesh
from megapar.params import Piece
from megapar.training.checkpoint import Saver, load_checkpoint
from megapar.zero.state import StateBox

ROWS, WIDTH = 12, 8
SHAPES = {"a": (ROWS, WIDTH), "b": (5,), "c": (ROWS, 2, WIDTH), "scalar": ()}


class Values:
    """This rank's rows of some tensors; `values[name]` is rank * 1000 + step at first."""

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


def save_one(root: Path, asynchronous: bool, how: dict[str, Any] | None = None) -> dict[str, Any]:
    """Saves step 3, with garbage in the boxes as soon as it may be there."""
    mesh = ParallelMesh()
    saver = Saver(root, mesh, asynchronous=asynchronous, **{"file_bytes": 128, **(how or {})})
    assert not saver.pending
    assert saver.ended == 1.0
    values, state = Values(mesh, 3), {"step": 3, "list": [1]}
    assert saver.save(3, values.boxes(), state) is None
    assert saver.pending
    saver.before_update()
    values.spoil()
    state["list"].append(2)
    saved = saver.commit()
    assert not saver.pending
    assert saver.finish() is None
    assert saver.snapshot_bytes == 0
    assert (saved.step, saved.path, saved.error) == (3, root / "step-00000003", "")
    assert saved.bytes == sum(path.stat().st_size for path in saved.path.glob("*.safetensors"))
    assert 0 < saved.stall <= saved.seconds + 1
    assert values.check(saved.path, mesh, 3) == {"step": 3, "list": [1]}
    saver.close()
    return {}


@pytest.mark.parametrize("world", [1, 2])
def test_in_the_background_the_same_bytes_are_written(ranks, tmp_path, world):
    for asynchronous in (False, True):
        ranks.run(world, save_one, tmp_path / str(asynchronous), asynchronous)
    files = [{path.name: path.read_bytes() for path in (tmp_path / kind / "step-00000003").iterdir()} for kind in ("False", "True")]
    assert files[0] == files[1]
    assert len(files[0]) > 2 * world, "several files a rank"
    assert sorted(path.name for path in (tmp_path / "True").iterdir()) == ["latest", "step-00000003"]
    assert (tmp_path / "True" / "latest").read_text() == "step-00000003\n"
