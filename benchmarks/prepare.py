"""`megapar prepare` against the tokenizers library alone.

    python -m benchmarks.prepare                the standard library's sources, repeated
    python -m benchmarks.prepare --megabytes 40

tokens/s   of `megapar prepare` from a .jsonl to .bin and .idx, imports left out, the reading of the tokenizer (half a second) included; and
           of the library's own encode_batch alone, of the same documents in memory, with the same threads (RAYON_NUM_THREADS). Each in a
           process of its own, by turns, the median of the repeats
MB         the largest resident set of the process, at one time and at four times the input
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from benchmarks.common import Grid, Verdict, report

OURS, PEER = "megapar prepare", "tokenizers encode_batch"


def _ours(text: Path, tokenizer: Path, out: Path) -> tuple[int, float]:
    from megapar.data.prepare import Preparation, prepare

    start = time.perf_counter()
    made = prepare(Preparation((str(text),), out, tokenizer=str(tokenizer)))
    return made.tokens, time.perf_counter() - start


def _peer(text: Path, tokenizer: Path) -> tuple[int, float]:
    import tokenizers

    documents = [json.loads(line)["text"] for line in text.open()]
    model = tokenizers.Tokenizer.from_file(str(tokenizer))
    start = time.perf_counter()
    # The ids are what it is for; and each document has one more, its end.
    tokens = sum(len(encoding.ids) + 1 for encoding in model.encode_batch(documents))
    return tokens, time.perf_counter() - start


def _measured(kind: str, text: Path, tokenizer: Path, threads: int) -> tuple[int, float, int]:
    """(tokens, seconds, bytes of the peak) of one process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.prepare", "--worker", kind, str(text), str(tokenizer), f"{folder}/out"]
        environment = os.environ | {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        tokens, seconds, peak = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    return tokens, seconds, peak


def _write(path: Path, megabytes: float) -> None:
    from megapar.data import load_corpus

    documents, left = load_corpus("stdlib").documents, megabytes * 1e6
    with path.open("w") as file:
        number = 0
        while left > 0:
            # Text that is repeated would be found in the library's cache of words, as it is for both.
            document = documents[number % len(documents)]
            file.write(json.dumps({"text": document}) + "\n")
            left, number = left - len(document.encode()), number + 1


def main(megabytes: float = 12.0, repeats: int = 5) -> None:
    """Measures both and writes results/prepare.json."""
    from megapar.data import load_corpus, load_tokenizer

    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = folder / "tokenizer.json"
        load_tokenizer("bpe", load_corpus("stdlib"), 32000).save(tokenizer)
        text, four = folder / "text.jsonl", folder / "four.jsonl"
        _write(text, megabytes)
        _write(four, 4 * megabytes)
        rounds = [(_measured("ours", text, tokenizer, threads), _measured("peer", text, tokenizer, threads)) for _ in range(repeats)]
        large = _measured("ours", four, tokenizer, threads)
    if len({tokens for pair in rounds for tokens, _, _ in pair}) != 1:
        raise RuntimeError(f"the two do not make the same number of tokens: {rounds}")
    tokens = rounds[0][0][0]
    rates = [[tokens / measured[1] for measured in side] for side in zip(*rounds, strict=True)]
    peaks = [max(measured[2] for measured in side) for side in zip(*rounds, strict=True)]
    table = Grid(f"{megabytes:g} MB, {tokens:,} tokens, {threads} threads", ["", "tokens/s", "MB"], [])
    for label, rate, peak in zip((OURS, PEER), rates, peaks, strict=True):
        table.rows.append([label, f"{statistics.median(rate):,.0f}", f"{peak / 1e6:.0f}"])
    table.rows.append([f"{OURS}, four times the text", f"{large[0] / large[1]:,.0f}", f"{large[2] / 1e6:.0f}"])
    ratio = statistics.median(ours / peer for ours, peer in zip(*rates, strict=True))
    verdicts = [
        Verdict(f"tokens/s of {OURS} / {PEER}", ratio, at_least=0.9),
        Verdict("memory at four times the text / at one", large[2] / peaks[0], at_most=1.1),
    ]
    report("prepare", [table], verdicts, {}, {OURS: rates[0], PEER: rates[1], "four times": large})


def _worker(kind: str, text: str, tokenizer: str, out: str) -> None:
    measured = _ours(Path(text), Path(tokenizer), Path(out)) if kind == "ours" else _peer(Path(text), Path(tokenizer))
    print(json.dumps([*measured, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _worker(*sys.argv[2:])
    else:
        tyro.cli(main)
