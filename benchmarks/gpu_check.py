"""All that a GPU can settle, in one run of at most ten minutes: tests, races, benchmarks; the report is gpu-report/.

    make gpu-check

tests        tests/ops, optim, integrations and gpu on the GPU: every op against fp64 within its bound, and captured CUDA graphs
cuda         the optimizer's tests again on csrc/cuda, where it is built
sanitizer    compute-sanitizer memcheck and racecheck on the kernels of csrc/cuda, where it is installed
ranks        megapar verify --tp 2 on NCCL, where there are two GPUs
benchmarks   benchmarks/gpu.py; the static table of benchmarks/results stands beside it in the report

Each part has a share of the time, its output is a file of the report, and one that fails does not stop the next. Exit status 1 where one
failed, and at once where there is no GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from benchmarks.common import RESULTS, environment

OPTIMIZER_TESTS = (
    "tests/ops/test_adamw.py",
    "tests/ops/test_grad_norm.py",
    "tests/ops/test_step_state.py",
    "tests/gpu/test_graphs.py::test_optimizer_phase",
    "tests/gpu/test_large.py::test_optimizer",
)
"""What the three ops of csrc/cuda suffice for."""
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-n", "4")
"""Four processes, because most of the time is Triton's compiler's."""


@dataclass(frozen=True)
class Part:
    """A command. why_not: what keeps it from being run here. seconds: at most."""

    name: str
    command: Sequence[str]
    seconds: float
    why_not: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    part: Part
    said: str
    seconds: float

    @property
    def failed(self) -> bool:
        return self.said not in ("passed", "not run")


def parts(gpus: int) -> list[Part]:
    """What is to be run where there are so many GPUs."""
    on_gpu = {"MEGAPAR_TEST_DEVICE": "cuda"}
    cuda = None if importlib.util.find_spec("megapar._CUDA") else "csrc/cuda is not built: the CUDA toolkit and a CUDA torch build it"
    sanitizer = shutil.which("compute-sanitizer")
    why = cuda or (None if sanitizer else "compute-sanitizer is not on PATH: it comes with the CUDA toolkit")
    found = [Part("tests", (*PYTEST, "tests/ops", "tests/optim", "tests/integrations", "tests/gpu"), 240, None, on_gpu)]
    found.append(Part("cuda", (*PYTEST, *OPTIMIZER_TESTS), 60, cuda, on_gpu | {"MEGAPAR_BACKEND": "cuda"}))
    for tool in ("memcheck", "racecheck"):
        command = (sanitizer or "", f"--tool={tool}", "--error-exitcode=1", sys.executable, "-m", "tests.gpu.every_cuda_kernel")
        found.append(Part(tool, command, 45, why, {"MEGAPAR_BACKEND": "cuda", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    ranks = None if gpus > 1 else "it needs two GPUs"
    verify = (sys.executable, "-m", "megapar", "verify", "--tp", "2")
    found.append(Part("ranks", verify, 45, ranks))
    found.append(Part("benchmarks", (sys.executable, "-m", "benchmarks.gpu", "--minutes", "2"), 150))
    return found


def run(part: Part, folder: Path, left: float) -> Outcome:
    """Its output goes to <name>.log."""
    if part.why_not is not None:
        return Outcome(part, "not run", 0.0)
    log, begin, limit = folder / f"{part.name}.log", time.monotonic(), min(part.seconds, left)
    if limit <= 0:
        return Outcome(part, "the ten minutes were over", 0.0)
    with log.open("w") as output:
        process = subprocess.Popen(
            part.command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | part.environment, start_new_session=True
        )
        try:
            status = process.wait(limit)
            said = "passed" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            said = f"not done after {limit:.0f} s"
    return Outcome(part, said, time.monotonic() - begin)


def page(outcomes: list[Outcome], gpu: str, results: Path = RESULTS) -> str:
    """The report's text: what passed, and the tables."""
    lines = [f"# {gpu}", "", "| part | | seconds |", "|---|---|---:|"]
    lines += [f"| {o.part.name} | {o.part.why_not or o.said} | {o.seconds:.0f} |" for o in outcomes]
    for name in ("gpu", "gpu_static"):
        path = results / f"{name}.json"
        if not path.is_file():
            continue
        result = json.loads(path.read_text())
        for table in result["tables"]:
            rows = [table["columns"], ["---"] + ["---:"] * (len(table["columns"]) - 1), *table["rows"]]
            lines += ["", f"**{table['title']}**", "", *("| " + " | ".join(row) + " |" for row in rows)]
        lines += ["", *(f"- missing: {peer}: `{why}`" for peer, why in result["missing"].items())]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, object], path: Path) -> None:
    """Share of the copy bandwidth that each op reached."""
    from matplotlib.figure import Figure

    tables: list[dict[str, list[list[str]]]] = result["tables"]  # type: ignore[assignment]
    rows = [(row[0], float(row[3])) for row in tables[0]["rows"]]
    figure = Figure(figsize=(8, 0.3 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh([name for name, _ in rows][::-1], [share for _, share in rows][::-1])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("bytes that the op must move a second, over those of a copy")
    figure.savefig(path)


def main(folder: Path = Path("gpu-report"), minutes: float = 10.0) -> int:
    """Runs everything and writes the report.

    Args:
        folder: of the report.
        minutes: for all parts together.
    """
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "the driver or the GPU is missing"
        print(f"there is no GPU here ({why}): python -m benchmarks.gpu_static says what can be said without one", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    (RESULTS / "gpu.json").unlink(missing_ok=True)
    end, outcomes = time.monotonic() + 60 * minutes, list[Outcome]()
    for part in parts(torch.cuda.device_count()):
        outcomes.append(run(part, folder, end - time.monotonic()))
        print(f"{part.name:<11} {part.why_not or outcomes[-1].said}, {outcomes[-1].seconds:.0f} s", flush=True)
    gpu = torch.cuda.get_device_name()
    (folder / "report.md").write_text(page(outcomes, gpu))
    measured = RESULTS / "gpu.json"
    if measured.is_file():
        shutil.copy(measured, folder / "gpu.json")
        plot(json.loads(measured.read_text()), folder / "gpu.png")
    said = [{"name": o.part.name, "said": o.part.why_not or o.said, "seconds": o.seconds} for o in outcomes]
    (folder / "report.json").write_text(json.dumps({"gpu": gpu, **environment(), "parts": said}, indent=1) + "\n")
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
