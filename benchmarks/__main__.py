"""Runs the benchmarks, each as a process of its own, and rewrites RESULTS.md from results/*.json.

python -m benchmarks                          all that need no data
python -m benchmarks overhead                 those named
python -m benchmarks --text corpus.txt        convergence too, on a text file
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.common import RESULTS

NAMES = (
    "overhead",
    "optimizer",
    "linear",
    "row_ops",
    "attention",
    "linear_cross_entropy",
    "training_step",
    "recompute",
    "tensor_parallel",
    "pipeline",
    "zero",
    "precision",
    "checkpoint",
    "silent_errors",
    "gpu_static",
    "prepare",
    "build_time",
    "batch_ramp",
    "convergence",
)
PAGE = RESULTS.parent / "RESULTS.md"


def render(results: list[dict[str, Any]]) -> str:
    """RESULTS.md, from the parsed JSON files."""
    lines = ["# Results", "", "Written by `python -m benchmarks`. What each column is stands at the top of `benchmarks/<name>.py`.", ""]
    for result in results:
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        machine = result["machine"]
        lines += [f"## {result['name']}", ""]
        lines += [f"`{result['command']}` on {machine['cpu']}, {machine['cores']} cores, {result['date']}, {versions}.", ""]
        for table in result["tables"]:
            rows = [table["columns"], ["---"] + ["---:"] * (len(table["columns"]) - 1), *table["rows"]]
            lines += [f"**{table['title']}**", "", *("| " + " | ".join(row) + " |" for row in rows), ""]
        for v in result["verdicts"]:
            limit = f"at most {v['at_most']:.3g}" if v["at_most"] is not None else f"at least {v['at_least']:.3g}"
            lines.append(f"- {'holds' if v['holds'] else '**fails**'}: {v['bar']}: {v['ratio']:.3g}, {limit}")
        lines += [f"- missing: {peer}: `{why}`" for peer, why in result["missing"].items()]
        lines.append("")
    return "\n".join(lines)


def main(names: Annotated[tuple[str, ...], tyro.conf.Positional] = (), text: Path | None = None, render_only: bool = False) -> None:
    """Runs benchmarks and rewrites RESULTS.md.

    Args:
        names: which ones; none means all, convergence only with --text.
        text: what convergence trains on.
        render_only: run nothing, rewrite RESULTS.md.
    """
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: not a benchmark, choose from {', '.join(NAMES)}")
    if "convergence" in names and text is None:
        raise SystemExit("convergence trains on a text file: give it with --text")
    chosen = names or tuple(name for name in NAMES if name != "convergence" or text is not None)
    failed = []
    for name in () if render_only else chosen:
        module = f"benchmarks.{name}"
        if find_spec(module) is None:
            failed.append(f"{name}: there is no {module}")
            continue
        options = ["--text", str(text)] if name == "convergence" else []
        if subprocess.run([sys.executable, "-m", module, *options], check=False).returncode:
            failed.append(f"{name}: it stopped with an error, see above")
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    PAGE.write_text(render([result for result in found if {"tables", "verdicts", "missing"} <= result.keys()]))
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    tyro.cli(main)
