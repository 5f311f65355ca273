"""Does it learn, and does it learn the same in parallel? A character-level model of 0.8 M parameters, alone and with tp=2.

    python -m benchmarks.convergence --text FILE       # the tiny Shakespeare text (1.1 MB), for the bars to mean something

Trains configs/characters.toml through `megapar train` (GPT-style, 4 layers, 4 heads, width 128, sequences of 128, 12 a step, 3000
steps), the last 10 % of the characters held out, fp32. Columns: loss over all held-out characters in nats a character, unigram and
bigram models on the same characters, training time. Bars: held-out loss at most 1.65, where the best n-gram reaches 1.669 on tiny
Shakespeare; with tp=2, the first 50 training losses within 1e-4 and the final held-out loss within 0.02.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Grid, Verdict, report

CONFIG = Path(__file__).parents[1] / "configs" / "characters.toml"
COMPARED_STEPS = 50
BEST_N_GRAM = 1.669


def train(text: Path, tp: int, out: Path, steps: int | None = None) -> dict[str, Any]:
    """One run of `megapar train`, one thread a rank: its summary, the training loss of each step, seconds in steps."""
    command = [sys.executable, "-m", "megapar", "train", str(CONFIG), "--nproc", str(tp), "--tp", str(tp)]
    command += ["--corpus", str(text), "--out", str(out), *(["--steps", str(steps)] if steps else [])]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [r for r in records if "loss" in r]
    summary = json.loads((out / "summary.json").read_text())
    return {**summary, "losses": [r["loss"] for r in trained], "seconds": sum(r["seconds"] for r in trained)}


def verdicts(alone: dict[str, Any], parallel: dict[str, Any]) -> list[Verdict]:
    """The bars of the two runs."""
    pairs = list(zip(alone["losses"], parallel["losses"], strict=True))[:COMPARED_STEPS]
    return [
        Verdict("held-out loss alone, nats a character", alone["held_out_loss"], at_most=1.65),
        Verdict(f"largest difference of the first {len(pairs)} losses, tp=2", max(abs(a - b) for a, b in pairs), at_most=1e-4),
        Verdict("difference of the final held-out loss, tp=2", abs(alone["held_out_loss"] - parallel["held_out_loss"]), at_most=0.02),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--steps", type=int, help="fewer steps, to try it out")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {tp: train(asked.text, tp, Path(folder) / f"tp{tp}", asked.steps) for tp in (1, 2)}
    rows = [
        [f"tp={tp}", f"{r['held_out_loss']:.4f}", f"{r['unigram']:.4f}", f"{r['bigram']:.4f}", str(r["steps"]), f"{r['seconds']:.0f}"]
        for tp, r in runs.items()
    ]
    columns = ["run", "held out", "unigram", "bigram", "steps", "seconds"]
    digest = hashlib.sha256(asked.text.read_bytes()).hexdigest()
    grid = Grid(f"character-level loss, text sha256 {digest[:16]}; the best n-gram on tiny Shakespeare: {BEST_N_GRAM}", columns, rows)
    report("convergence", [grid], verdicts(runs[1], runs[2]), {}, {str(tp): run for tp, run in runs.items()})


if __name__ == "__main__":
    main()
