"""megapar checkpoint inspect | verify | convert: what is in a checkpoint, whether it is whole, and what other tools can read."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megapar.training.checkpoint.convert import convert
from megapar.training.checkpoint.folder import LATEST, checkpoints
from megapar.training.checkpoint.manifest import MANIFEST, by_tensor, numel, problem, read_manifest
from megapar.training.checkpoint.tensor_file import read_tensors

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def checkpoint_command(arguments: Sequence[str]) -> int:
    """`megapar checkpoint` with these arguments; the exit status: 0, or 1 where `verify` found what is not whole.

    Raises ValueError and OSError for what the others cannot read or write.
    """
    parser = argparse.ArgumentParser(prog="megapar checkpoint", description="Looks at checkpoints, proves and converts them.")
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "inspect": "state, layout and tensors of a checkpoint, or the checkpoints of a folder",
        "verify": "reads and hashes every file, and proves that the boxes cover every tensor once",
        "convert": "writes it for other tools, as a new folder",
    }
    parsers = {name: commands.add_parser(name, help=text, description=text, allow_abbrev=False) for name, text in helps.items()}
    for sub in parsers.values():
        sub.add_argument("folder", type=Path, help="a checkpoint; inspect and verify: or a folder of them")
    parsers["convert"].add_argument("--to", choices=("safetensors", "dcp"), required=True, help="weights, or torch.distributed.checkpoint")
    parsers["convert"].add_argument("--out", type=Path, required=True, help="the new folder")
    parsers["convert"].add_argument("--dtype", choices=tuple(DTYPES), help="of the weights; without it they stay as they are")
    told = parser.parse_args(list(arguments))
    if told.command == "convert":
        print(convert(told.folder, told.out, told.to, DTYPES.get(told.dtype)))
        return 0
    found = [told.folder] if (told.folder / MANIFEST).exists() else checkpoints(told.folder)
    if not found:
        raise ValueError(f"{told.folder} is no checkpoint and holds none: give a step-N folder, or the folder of them")
    if told.command == "verify":
        return max([_verify(folder) for folder in found])
    if found == [told.folder]:
        _inspect(told.folder)
    else:
        _list(told.folder, found)
    return 0


def _list(folder: Path, found: Sequence[Path]) -> None:
    latest = (folder / LATEST).read_text(encoding="utf-8").strip() if (folder / LATEST).is_file() else ""
    rows = []
    for path in found:
        manifest = read_manifest(path)
        size = sum(file["bytes"] for file in manifest["files"].values())
        rows.append([path.name, _layout(manifest), f"{len(manifest['files'])}", f"{size:,}", LATEST if path.name == latest else ""])
    _print(["checkpoint", "written by", "files", "bytes", ""], rows)


def _inspect(folder: Path) -> None:
    manifest = read_manifest(folder)
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    print(f"{folder}: {manifest['format']}, written by {_layout(manifest)} ({versions})")
    print(f"state: {json.dumps(manifest['state'], indent=2)}")
    rows = []
    totals: dict[str, list[int]] = {}
    for (kind, name), boxes in by_tensor(manifest).items():
        count, size = math.prod(boxes[0]["shape"]), sum(numel(b) * getattr(torch, b["dtype"]).itemsize for b in boxes)
        rows.append([kind, name, str(boxes[0]["shape"]), boxes[0]["dtype"], f"{size:,}", f"{len(boxes)}"])
        total = totals.setdefault(kind, [0, 0, 0])
        totals[kind] = [total[0] + 1, total[1] + count, total[2] + size]
    _print(["kind", "tensor", "shape", "dtype", "bytes", "boxes"], rows)
    for kind, (tensors, count, size) in totals.items():
        print(f"{kind}: {tensors} tensors, {count:,} elements, {size:,} bytes")
    print(f"{len(manifest['files'])} files, {sum(file['bytes'] for file in manifest['files'].values()):,} bytes")


def _verify(folder: Path) -> int:
    """Says whether the checkpoint is whole: 0, or 1."""
    try:
        files, tensors, size = verify(folder)
    except (ValueError, OSError) as error:
        print(f"{folder}: not whole: {error}")
        return 1
    print(f"{folder}: ok, {files} files, {tensors} tensors, {size:,} bytes")
    return 0


def verify(folder: Path) -> tuple[int, int, int]:
    """Reads all of a checkpoint: (files, tensors, bytes). Raises ValueError, naming the file or tensor, unless every file has the size and
    hash that the manifest tells and the boxes that it names, and the boxes cover every tensor, each element once."""
    manifest = read_manifest(folder)
    for (kind, name), boxes in by_tensor(manifest).items():
        wrong = problem(boxes)
        covered, whole = sum(map(numel, boxes)), math.prod(boxes[0]["shape"])
        if not wrong and covered != whole:
            wrong = f"has {covered} of its {whole} elements"
        if wrong:
            raise ValueError(f"{folder}: {kind} {name} {wrong}: use another checkpoint")
    entries: dict[str, list[dict[str, Any]]] = {name: [] for name in manifest["files"]}
    for entry in manifest["tensors"]:
        entries[entry["file"]].append(entry)
    buffer = bytearray(max((file["bytes"] for file in manifest["files"].values()), default=0))
    for name, told in manifest["files"].items():
        tensors = read_tensors(folder / name, told, buffer)
        here = {key: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for key, tensor in tensors.items()}
        there = {e["key"]: (e["dtype"], [b - a for a, b in zip(e["start"], e["stop"], strict=True)]) for e in entries[name]}
        if here != there:
            raise ValueError(f"{folder / name} does not hold the tensors that the manifest names: use another checkpoint")
    return len(manifest["files"]), len(by_tensor(manifest)), sum(file["bytes"] for file in manifest["files"].values())


def _layout(manifest: dict[str, Any]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in manifest["layout"].items())


def _print(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=box.SIMPLE)
    for column in columns:
        table.add_column(column, justify="right" if column in ("bytes", "boxes", "files") else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=160, highlight=False).print(table)
