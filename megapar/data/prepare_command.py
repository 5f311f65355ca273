"""megapar prepare: the command line of `prepare`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from megapar.data.partial import Progress
from megapar.data.prepare import Preparation, prepare

LINES = 20
"""Elsewhere than on a terminal, progress is so many lines."""


def prepare_command(arguments: Sequence[str]) -> int:
    """Runs it; the exit status is 0. Raises ValueError and OSError for what is refused."""
    parser = argparse.ArgumentParser(prog="megapar prepare", description="Tokenizes text into Megatron's .bin and .idx.")
    parser.add_argument("inputs", nargs="+", help="text, .jsonl, .parquet, .arrow, packed (.gz, .zst), folders, saved datasets, or stdlib")
    parser.add_argument("--out", required=True, type=Path, help="NAME of NAME.bin, NAME.idx, NAME.tokenizer.json and NAME.json")
    parser.add_argument("--tokenizer", default="bpe", help="bpe (trained on the inputs; default), bytes, characters, or a tokenizer file")
    parser.add_argument("--vocab-size", type=int, default=Preparation.vocab_size, help="of bpe (default: %(default)s)")
    parser.add_argument("--train-bytes", type=int, default=Preparation.train_bytes, help="bpe is trained on so many (default: %(default)s)")
    parser.add_argument("--field", default=Preparation.field, help="what holds the text of a line or row (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="threads of the tokenizer (default: one a core)")
    parser.add_argument("--restart", action="store_true", help="begin anew instead of going on with what a killed run left")
    known = vars(parser.parse_args(arguments))
    restart = known.pop("restart")
    asked = Preparation(**{**known, "inputs": tuple(known["inputs"])})
    with _Bar() as bar:
        made = prepare(asked, restart, bar.told)
    left_out = f", {made.empty:,} empty documents left out" if made.empty else ""
    print(f"{asked.out}: {made.documents:,} documents, {made.tokens:,} tokens{left_out}; {bar.rate(made.tokens):,.0f} tokens/s", flush=True)
    return 0


class _Bar:
    """A live bar on a terminal, LINES plain lines elsewhere; on stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%  {task.description}"), TimeRemainingColumn())
        self._bar = Bar(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("reading", total=1.0)
        self._first: tuple[int, float] | None = None
        self._start, self._said = time.monotonic(), 0

    def told(self, progress: Progress, share: float) -> None:
        if self._first is None:
            # What a run before it did is not of this one's rate, nor is the training of a tokenizer.
            self._first = (progress.tokens, time.monotonic())
        rate = self.rate(progress.tokens)
        told = f"{progress.documents:,} documents, {progress.tokens:,} tokens, {rate:,.0f} tokens/s"
        self._bar.update(self._task, completed=share, description=told)
        if not self._console.is_terminal and int(share * LINES) > self._said:
            self._said = int(share * LINES)
            self._console.print(f"{share:4.0%}  {told}", highlight=False, soft_wrap=True)

    def rate(self, tokens: int) -> float:
        """Tokens a second of this run."""
        first, since = self._first or (0, self._start)
        return (tokens - first) / max(time.monotonic() - since, 1e-9)

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
