"""What `megapar verify` prints."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from megapar.training.verify import Check

BOUNDS = {
    "fp32": "|error| <= max(4 x fp32 error against fp64, 1e-6 x the largest)",
    "bf16": "||error|| <= max(2 x bf16 error against fp64, a rounding of each element)",
    "fp16": "||error|| <= max(2 x fp16 error against fp64, a rounding of each element)",
}


def print_cases(cases: Mapping[str, list[Check]], layout: str, precision: str = "fp32", *, each: bool) -> None:
    """A table of every check (`each`), or a line a case with the check that comes nearest to its bound; then the verdict."""
    table = Table(title=f"{layout} against one process: {BOUNDS[precision]}")
    for column in ("model", "what"):
        table.add_column(column)
    for column in ("worst error", "bound", "error / bound", ""):
        table.add_column(column, justify="right")
    failed = total = 0
    for case, checks in cases.items():
        failed, total = failed + sum(not check.passed for check in checks), total + len(checks)
        shown = checks if each else [max(checks, key=_ratio)]
        for check in shown:
            verdict = "[green]ok[/]" if check.passed else "[red]FAILED[/]"
            table.add_row(case, check.name, f"{check.error:.1e}", f"{check.bound:.1e}", f"{_ratio(check):.2f}", verdict)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    if not each:
        console.print("each line shows the check that came nearest to its bound")
    verdict = "right" if not failed else f"WRONG: {failed} of {total} comparisons exceed their bound"
    console.print(f"{verdict}: {total} comparisons (initial weights bitwise, outputs, losses, raw gradients)" if not failed else verdict)


def _ratio(check: Check) -> float:
    return check.error / check.bound if check.bound else (0.0 if check.error == 0 else float("inf"))
