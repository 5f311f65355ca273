"""Checkpoints for other tools: whole logical tensors as safetensors files with an index, or in torch.distributed.checkpoint's format.

Both are loads into files that are mapped into memory: beside them one file of the checkpoint is held at a time, and each is read once.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megapar.mesh import ParallelMesh
from megapar.params import Piece
from megapar.training.checkpoint.disk import Disk
from megapar.training.checkpoint.folder import PARTIAL
from megapar.training.checkpoint.load import load_checkpoint
from megapar.training.checkpoint.manifest import by_tensor, read_manifest
from megapar.training.checkpoint.tensor_file import Told, header, memory_size, ordered
from megapar.zero.state import StateBox

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
"""Of a file for others, but where one tensor is larger."""


def convert(folder: Path, out: Path, to: str, dtype: torch.dtype | None = None) -> str:
    """Writes the checkpoint `folder` as the new folder `out`; what there is then, in a sentence.

    to: "safetensors", the weights only, as Hugging Face's tools read them; or "dcp", weights and moments by kind and name. dtype: of the
    weights; None leaves them as they are. Raises ValueError for an `out` that exists and a checkpoint that is not whole, OSError where
    there is no room, and leaves nothing then.
    """
    if out.exists():
        raise ValueError(f"{out} exists and is not overwritten: give another --out")
    if to not in ("safetensors", "dcp"):
        raise ValueError(f'"{to}" is not a format to convert to: use safetensors or dcp')
    partial = out.with_name(out.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        told = _to_safetensors(folder, partial, dtype) if to == "safetensors" else _to_dcp(folder, partial, dtype)
        disk = Disk()
        disk.sync(partial, "the files")
        disk.rename(partial, out)
        disk.sync(out.parent, "rename")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return f"{out}: {told}"


def _to_safetensors(folder: Path, partial: Path, dtype: torch.dtype | None) -> str:
    tensors = [(name, found, shape) for (kind, name), (found, shape) in _tensors(folder, dtype).items() if kind == "weight"]
    shards = list(_shards(tensors, SHARD_BYTES))
    places: dict[str, str] = {}
    boxes: list[StateBox] = []
    maps = []
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        maps.append(MappedFile(partial / name, shard, {"format": "pt"}))
        places.update({tensor: name for tensor, *_ in shard})
        boxes += [_box("weight", tensor, view) for tensor, view in maps[-1].tensors.items()]
    load_checkpoint(folder, boxes, ParallelMesh.alone("cpu"))
    boxes.clear()
    for file in maps:
        file.close()
    total = sum(memory_size(told) for told in tensors)
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=2)
    Disk().write(partial / INDEX, [index.encode()])
    return f"{len(tensors)} tensors, {total:,} bytes, in {len(shards)} files and {INDEX}"


def _to_dcp(folder: Path, partial: Path, dtype: torch.dtype | None) -> str:
    """Through a file of raw tensors, which torch's writer reads: it wants them all at once."""
    tensors = _tensors(folder, dtype)
    raw = partial / "raw"
    file = MappedFile(raw, [(f"{kind}/{name}", found, shape) for (kind, name), (found, shape) in tensors.items()])
    boxes = [_box(kind, name, file.tensors[f"{kind}/{name}"]) for kind, name in tensors]
    load_checkpoint(folder, boxes, ParallelMesh.alone("cpu"))
    state: dict[str, dict[str, Tensor]] = {}
    for box in boxes:
        state.setdefault(box.kind, {})[box.piece.name] = box.read()
    dcp.save(state, storage_writer=dcp.FileSystemWriter(partial), no_dist=True)
    state.clear()
    boxes.clear()
    file.close()
    raw.unlink()
    kinds = ", ".join(sorted({kind for kind, _ in tensors}))
    return f"{len(tensors)} tensors for torch.distributed.checkpoint, by kind ({kinds}) and name"


def _tensors(folder: Path, dtype: torch.dtype | None) -> dict[tuple[str, str], tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape, by kind and name."""
    return {
        (kind, name): (dtype if dtype is not None and kind == "weight" else getattr(torch, boxes[0]["dtype"]), tuple(boxes[0]["shape"]))
        for (kind, name), boxes in by_tensor(read_manifest(folder)).items()
    }


def _shards(tensors: Sequence[Told], limit: int) -> Iterator[list[Told]]:
    shard: list[Told] = []
    for told in tensors:
        if shard and sum(map(memory_size, shard)) + memory_size(told) > limit:
            yield shard
            shard = []
        shard.append(told)
    if shard:
        yield shard


def _box(kind: str, name: str, view: Tensor) -> StateBox:
    def write(value: Tensor, at: tuple[slice, ...] = ()) -> None:
        view[at].copy_(value)

    return StateBox(kind, Piece.whole(name, tuple(view.shape)), True, view.dtype, lambda: view, write)


class MappedFile:
    """A new safetensors file as memory: `tensors` by key, written to the disk by the system, and surely by `close`."""

    def __init__(self, path: Path, tensors: Sequence[Told], metadata: Mapping[str, str] | None = None) -> None:
        order = ordered(tensors)
        begin = header(order, metadata)
        size = len(begin) + sum(map(memory_size, order))
        with open(path, "xb+") as file:
            # A map of room that the disk does not have would end the process with SIGBUS; this raises OSError.
            os.posix_fallocate(file.fileno(), 0, size)
            self._map = mmap.mmap(file.fileno(), size)
        self._map[: len(begin)] = begin
        self.tensors: dict[str, Tensor] = {}
        at = len(begin)
        for key, dtype, shape in order:
            count = math.prod(shape)
            flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=at) if count else torch.empty(0, dtype=dtype)
            self.tensors[key] = flat.view(tuple(shape))
            at += count * dtype.itemsize

    def close(self) -> None:
        """Durable then. Nobody may use the tensors any more."""
        self.tensors.clear()
        self._map.flush()
        self._map.close()
