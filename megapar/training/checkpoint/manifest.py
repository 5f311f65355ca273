"""The manifest of a checkpoint, which is written last: which box of which logical tensor lies in which file, and the hash of every file.

    {"format", "versions": {megapar, torch}, "layout": {tp, dp, pp}, "state": {...},
     "files": {name: {"bytes", "sha256"}},
     "tensors": [{"kind", "name", "shape", "start", "stop", "dtype", "file", "key"}],
     "sha256": of all of this, with sorted keys}

Boxes are those of logical tensors (`params.ParamSpec`): a checkpoint does not know the layout that wrote it, and only tells it to people.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megapar import __version__
from megapar.mesh import ParallelMesh

FORMAT = "megapar-checkpoint-2"
MANIFEST = "manifest.json"

Entry = dict[str, Any]
"""A stored box, an element of the manifest's "tensors"."""


def make_manifest(state: Mapping[str, Any], files: Mapping[str, Any], tensors: list[Entry], mesh: ParallelMesh) -> str:
    """Its text. Raises ValueError for a box that is there twice."""
    places = [(entry["kind"], entry["name"], *entry["start"]) for entry in tensors]
    if len(set(places)) < len(places):
        name = next(name for (_, name, *_), seen in Counter(places).items() if seen > 1)
        raise ValueError(f"two parameters hold {name}: give the stages of a model the names that they have in the whole")
    manifest = {
        "format": FORMAT,
        "versions": {"megapar": __version__, "torch": torch.__version__},
        "layout": {axis.name: axis.size for axis in (mesh.tp, mesh.dp, mesh.pp)},
        "state": dict(state),
        "files": dict(files),
        "tensors": tensors,
    }
    return json.dumps({**manifest, "sha256": digest(manifest)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after checking it, and that every file that it names is there with its size; what is in them it does not read.

    Raises ValueError, naming the file, for what is missing, edited, cut short or of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        told = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is missing, cut short or not a manifest ({error}): use another checkpoint") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')} and this version reads {FORMAT}: use the version that wrote it")
    if told != digest(manifest):
        raise ValueError(f"{path} was edited, its sha256 does not match: use another checkpoint")
    for entry in manifest["tensors"]:
        if entry["file"] not in manifest["files"]:
            raise ValueError(f"{path} names {folder / entry['file']}, which has no sha256 in it: use another checkpoint")
    for name, file in manifest["files"].items():
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing from the checkpoint: use another one")
        if (folder / name).stat().st_size != file["bytes"]:
            raise ValueError(f"{folder / name} was cut short or edited, its size does not match: use another checkpoint")
    return dict(manifest)


def digest(manifest: Mapping[str, Any]) -> str:
    """Of all that it says but this."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def by_tensor(manifest: Mapping[str, Any]) -> dict[tuple[str, str], list[Entry]]:
    """The stored boxes of each (kind, name), in the manifest's order."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in manifest["tensors"]:
        found.setdefault((entry["kind"], entry["name"]), []).append(entry)
    return found


def numel(entry: Entry) -> int:
    """Elements of a stored box."""
    return math.prod(b - a for a, b in zip(entry["start"], entry["stop"], strict=True))


def problem(boxes: list[Entry]) -> str:
    """What is wrong with the stored boxes of one tensor, which must lie in it and apart from each other; empty if nothing is."""
    shape = boxes[0]["shape"]
    for box in boxes:
        if box["shape"] != shape:
            return f"has the shapes {shape} and {box['shape']}"
        if any(not 0 <= a < b <= n for a, b, n in zip(box["start"], box["stop"], shape, strict=True)):
            return f"has a box {box['start']} to {box['stop']} outside of its shape {shape}"
    for one, other in _neighbours(boxes):
        if all(max(a, c) < min(b, d) for a, b, c, d in zip(one["start"], one["stop"], other["start"], other["stop"], strict=True)):
            return f"has boxes that overlap, at {one['start']} and {other['start']}"
    return ""


def _neighbours(boxes: Iterable[Entry]) -> Iterator[tuple[Entry, Entry]]:
    """Pairs that share rows. Few are open at a time: boxes are runs of rows, or columns of them on each rank of tp."""
    open_boxes: list[Entry] = []
    for box in sorted(boxes, key=lambda entry: entry["start"]):
        open_boxes = [other for other in open_boxes if not box["start"] or other["stop"][0] > box["start"][0]]
        yield from ((box, other) for other in open_boxes)
        open_boxes.append(box)
