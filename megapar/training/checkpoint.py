"""Checkpoints: safetensors files, one a rank, and a JSON manifest that says which box of which logical tensor lies where.

A folder either loads whole or is refused with the name of the bad file: files are written under a temporary name, flushed, synced to
disk and hashed; the manifest, written last, holds the hashes and one of itself; then the folder is renamed. Because boxes are those of
logical tensors (`params.ParamSpec`), a checkpoint does not know the layout that wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megapar.collectives import gather_json, raise_together
from megapar.mesh import ParallelMesh
from megapar.params import Piece
from megapar.zero.state import StateBox

FORMAT = "megapar-checkpoint-1"
MANIFEST = "manifest.json"


def save_checkpoint(folder: Path, boxes: Iterable[StateBox], state: Mapping[str, Any], mesh: ParallelMesh) -> None:
    """Writes the boxes that this rank owns and the JSON-able `state`; returns, on every rank, when the folder is complete under its name.

    Raises the same sentence on every rank, leaving nothing under the name, when a rank cannot write or the folder exists.
    """
    partial = folder.with_name(folder.name + ".tmp")
    error: Exception | None = None
    if mesh.world.rank == 0:
        if folder.exists():
            error = ValueError(f"{folder} exists and checkpoints are never overwritten: choose another folder")
        else:
            shutil.rmtree(partial, ignore_errors=True)
            error = _attempt(lambda: partial.mkdir(parents=True))
    raise_together(error, mesh.world)
    written: list[dict[str, Any]] = []
    error = _attempt(lambda: written.append(_write_rank(partial, boxes, mesh.world.rank)))
    raise_together(error, mesh.world)
    ranks = gather_json(written[0], mesh.world)
    if mesh.world.rank == 0:
        error = _attempt(lambda: _commit(partial, folder, ranks, state))
    raise_together(error, mesh.world)


def load_checkpoint(
    folder: Path, boxes: Iterable[StateBox], mesh: ParallelMesh, accept: Callable[[dict[str, Any]], None] = lambda state: None
) -> dict[str, Any]:
    """Fills the boxes from the folder, whatever layout wrote it, and returns its state.

    `accept` is given the state first and may raise ValueError to refuse it. Raises ValueError on every rank, naming the file or tensor,
    when anything is missing, cut short, edited or of another shape.
    """
    state: dict[str, Any] = {}
    error = _attempt(lambda: state.update(_read(folder, boxes, accept)))
    raise_together(error, mesh.world)
    return state


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint `step-N` with the largest N in `folder`."""
    steps = [(int(m[1]), p) for p in (folder.iterdir() if folder.is_dir() else ()) if (m := re.fullmatch(r"step-(\d+)", p.name))]
    return max(steps)[1] if steps else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after checking it and the hash of every file it names."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        digest = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is missing, cut short or not a manifest ({error}): use another checkpoint") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')} and this version reads {FORMAT}: use the version that wrote it")
    if digest != _digest(manifest):
        raise ValueError(f"{path} was edited, its sha256 does not match: use another checkpoint")
    for entry in manifest["tensors"]:
        if entry["file"] not in manifest["files"]:
            raise ValueError(f"{path} names {folder / entry['file']}, which has no sha256 in it: use another checkpoint")
    for name, told in manifest["files"].items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise ValueError(f"{file} is missing from the checkpoint: use another one")
        if file.stat().st_size != told["bytes"] or _sha256(file) != told["sha256"]:
            raise ValueError(f"{file} was cut short or edited, its size or sha256 does not match: use another checkpoint")
    return dict(manifest)


def _attempt(work: Any) -> Exception | None:
    """What a rank cannot do alone must be told to the others, or they wait in the next collective."""
    try:
        work()
    except (OSError, ValueError, SafetensorError) as error:
        return error
    return None


def _write_rank(folder: Path, boxes: Iterable[StateBox], rank: int) -> dict[str, Any]:
    file = f"rank-{rank:05d}.safetensors"
    tensors, entries = {}, []
    for kind, piece, values in ((box.kind, box.piece, box.read()) for box in boxes if box.owned):
        key = f"{kind}/{piece.name}@{','.join(map(str, piece.start))}"
        if key in tensors:
            raise ValueError(f"two parameters hold {piece.name}: give the stages of a model the names that they have in the whole")
        tensors[key] = values.detach().cpu().contiguous()
        told = {"shape": piece.shape, "start": piece.start, "stop": piece.stop, "dtype": str(values.dtype).removeprefix("torch.")}
        entries.append({"kind": kind, "name": piece.name, "file": file, "key": key, **told})
    save_file(tensors, folder / file)
    _sync(folder / file)
    return {"entries": entries, "files": {file: {"bytes": (folder / file).stat().st_size, "sha256": _sha256(folder / file)}}}


def _commit(partial: Path, folder: Path, ranks: list[dict[str, Any]], state: Mapping[str, Any]) -> None:
    files = {name: told for rank in ranks for name, told in rank["files"].items()}
    places = [(e["kind"], e["name"], *e["start"]) for rank in ranks for e in rank["entries"]]
    if len(set(places)) < len(places):
        name = next(name for (_, name, *_), seen in Counter(places).items() if seen > 1)
        raise ValueError(f"two ranks hold {name}: give the stages of a model the names that they have in the whole")
    manifest = {"format": FORMAT, "state": dict(state), "files": files, "tensors": [e for rank in ranks for e in rank["entries"]]}
    with open(partial / MANIFEST, "w", encoding="utf-8") as out:
        json.dump({**manifest, "sha256": _digest(manifest)}, out)
    _sync(partial / MANIFEST)
    _sync(partial)
    os.rename(partial, folder)
    _sync(folder.parent)


def _read(folder: Path, boxes: Iterable[StateBox], accept: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    manifest = read_manifest(folder)
    accept(manifest["state"])
    stored: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in manifest["tensors"]:
        stored.setdefault((entry["kind"], entry["name"]), []).append(entry)
    with torch.no_grad():
        for box in boxes:
            values = torch.empty_like(box.read())
            _fill(folder, box.piece, values, box.kind, stored.get((box.kind, box.piece.name), []))
            box.write(values)
    return dict(manifest["state"])


def _fill(folder: Path, piece: Piece, view: Tensor, kind: str, boxes: list[dict[str, Any]]) -> None:
    """Copies into this rank's box what each stored box has in common with it."""
    filled = 0
    for box in boxes:
        if tuple(box["shape"]) != piece.shape:
            shapes = f"of shape {box['shape']} and the model has {list(piece.shape)}"
            raise ValueError(f"{folder} holds {kind} {piece.name} {shapes}: check the config")
        common = piece.overlap(box["start"], box["stop"])
        if common is None:
            continue
        target, source = common
        with safe_open(folder / box["file"], framework="pt") as stored:
            part = stored.get_slice(box["key"])[source]
        view[target].copy_(part)
        filled += part.numel()
    if filled != view.numel():
        raise ValueError(f"{folder} holds {filled} of the {view.numel()} elements needed of {kind} {piece.name}: it is another model's")


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
