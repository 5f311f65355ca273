"""With MEGAPAR_TRITON_AUTOTUNE=1: the tile of a GEMM that was fastest when timed on this GPU, rather than tiles.py's choice.

The few candidates of tiles.py, and no others, are timed once for each kernel, shape, dtypes, GPU and Triton release. The fastest is
remembered in memory and in $XDG_CACHE_HOME/megapar/triton-tiles.json; nothing is timed while a CUDA graph is captured. Every tile sums
along K in ascending order, but in steps of its own instructions: results are reproducible, bit by bit, for one choice, so keep the file
(or leave autotuning off) where they have to be. Ranks that must agree bit by bit need one file, written before they start.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path

from megapar.ops.triton.tiles import Tile


def asked() -> bool:
    """Raises ValueError for a value that is neither 0 nor 1."""
    value = os.environ.get("MEGAPAR_TRITON_AUTOTUNE") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"MEGAPAR_TRITON_AUTOTUNE={value} must be 0 or 1: correct it or unset it")
    return value == "1"


def cache_file() -> Path:
    """Where the choices are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megapar" / "triton-tiles.json"


class Choices:
    """The fastest tiles by key, in memory and in `path`. A file that is no such table is told of and replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tiles = self._read()

    def fastest(self, key: str, candidates: Sequence[Tile], default: Tile, milliseconds: Callable[[Tile], float] | None) -> Tile:
        """The candidate remembered under `key`; if there is none, the one that takes the fewest milliseconds, or `default` without them."""
        known = self.tiles.get(key)
        if known is not None:
            if known in candidates:
                return known
            warnings.warn(f"{self.path}: {known} for {key} is not a tile of this release: timed again", stacklevel=2)
        if milliseconds is None:
            return default
        self.tiles[key] = min(candidates, key=milliseconds)
        self._write()
        return self.tiles[key]

    def _read(self) -> dict[str, Tile]:
        try:
            table = json.loads(self.path.read_text())
            if not isinstance(table, dict) or not all(_is_tile(numbers) for numbers in table.values()):
                raise ValueError("an entry is not six numbers of a tile")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            warnings.warn(f"{self.path} is no table of tiles ({error}): it is replaced when the first GEMM was timed", stacklevel=2)
            return {}
        return {key: Tile(*numbers) for key, numbers in table.items()}

    def _write(self) -> None:
        """With what other processes have added meanwhile; readers see the old file or the new one, nothing between."""
        self.tiles = self._read() | self.tiles
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, prefix=self.path.name, delete=False) as file:
                json.dump({key: astuple(tile) for key, tile in sorted(self.tiles.items())}, file, indent=0)
            os.replace(file.name, self.path)
        except OSError as error:
            warnings.warn(f"{self.path} cannot be written ({error}): each process will time its GEMMs again", stacklevel=2)


@functools.cache
def choices(path: Path) -> Choices:
    """One table for a process."""
    return Choices(path)


def _is_tile(numbers: object) -> bool:
    if not isinstance(numbers, list) or len(numbers) != 6:
        return False
    return all(type(x) is int and x > 0 for x in numbers[:5]) and (numbers[5] is None or (type(numbers[5]) is int and numbers[5] > 0))
