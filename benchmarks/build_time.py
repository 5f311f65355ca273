"""How long our extensions take to build, against what they stand in for: apex's `amp_C` and `fused_weight_gradient_mlp_cuda`, alone.

    python -m benchmarks.build_time                      ours
    python -m benchmarks.build_time --apex PATH          and those two of a checkout of NVIDIA/apex (PyPI's apex is another project)

Each is built from nothing in a copy of its tree, by its own setup.py, which is told to build no other extension, one after the other
with the same MAX_JOBS and TORCH_CUDA_ARCH_LIST: the environment's, else all cores, and 8.0 9.0. `_C` are the CPU kernels, which apex does
not have.

s          from start to end, the median of the repeats
CPU s      of all compilers together
MB         of the extensions
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.utils.cpp_extension import CUDA_HOME

from benchmarks.common import Grid, Verdict, report

ROOT = Path(__file__).resolve().parents[1]
OURS = ("setup.py", "pyproject.toml", "README.md", "csrc", "megapar")
APEX = ("amp_C", "fused_weight_gradient_mlp_cuda")
CPU, CUDA, PEER = "megapar _C", "megapar _CUDA", f"apex {' and '.join(APEX)}"
# Runs a setup.py of which setuptools is given only the extensions named after it.
ONLY = """
import runpy, setuptools, sys
names, real = sys.argv.pop(1).split(","), setuptools.setup
def setup(**options):
    options["ext_modules"] = [e for e in options.get("ext_modules", []) if e.name in names]
    return real(**options)
setuptools.setup = setup
sys.argv[0] = "setup.py"
sys.path.insert(0, "")
runpy.run_path("setup.py", run_name="__main__")
"""


class BuildError(RuntimeError):
    """The build failed; the message is the first error that it wrote."""


@dataclass(frozen=True)
class Build:
    """What one build took: wall seconds, seconds of all its processes, bytes of the extensions."""

    seconds: float
    cpu_seconds: float
    size: int


def build(tree: Path, parts: Sequence[str], extensions: Sequence[str], environment: dict[str, str]) -> Build:
    """Builds `extensions` in a copy of a tree's `parts`, without what was built there before. Raises BuildError where one is missing."""
    with tempfile.TemporaryDirectory() as folder:
        copy, out = Path(folder, "tree"), Path(folder, "out")
        copy.mkdir()
        for part in parts:
            if (tree / part).is_dir():
                ignored = shutil.ignore_patterns("*.so", "*.o", "__pycache__", ".git", "build")
                shutil.copytree(tree / part, copy / part, ignore=ignored, symlinks=True)
            elif (tree / part).exists():
                shutil.copy2(tree / part, copy / part)
        command = [sys.executable, "-c", ONLY, ",".join(extensions), "build_ext", "--build-lib", str(out), "--build-temp", f"{folder}/temp"]
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, cwd=copy, env={**os.environ, "CCACHE_DISABLE": "1", **environment}, capture_output=True, check=False)
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        built = list(out.rglob("*.so")) if done.returncode == 0 else []
        if {path.name.partition(".")[0] for path in built} != {name.rpartition(".")[2] for name in extensions}:
            lines = (done.stdout + done.stderr).decode(errors="replace").replace(folder, "").replace(sys.prefix, "").splitlines()
            raise BuildError(next((line.strip()[:300] for line in lines if "error" in line.lower()), "it built nothing"))
        cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Build(seconds, cpu_seconds, sum(path.stat().st_size for path in built))


def why_no_cuda() -> str | None:
    """What keeps CUDA sources from being built here, if anything does."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    return None if CUDA_HOME and nvcc.exists() else "there is no nvcc"


def measure(apex: Path | None, repeats: int, environment: dict[str, str]) -> tuple[dict[str, list[Build]], dict[str, str]]:
    """The builds by name, and why others are missing."""
    cuda = why_no_cuda()
    # Ours are told apart by what the other is left out by.
    wanted = {
        CPU: (ROOT, OURS, ("megapar._C",), {"MEGAPAR_SKIP_CUDA": "1"}),
        CUDA: (ROOT, OURS, ("megapar._CUDA",), {"MEGAPAR_SKIP_CPU": "1", "MEGAPAR_FORCE_CUDA": "1"}),
    }
    missing = {} if cuda is None else {CUDA: cuda}
    if apex is None:
        missing["apex"] = "no checkout of NVIDIA/apex was given with --apex"
    elif cuda is not None:
        missing["apex"] = cuda
    else:
        parts = sorted({path.name for path in apex.iterdir()} - {".git", "build", "dist"})
        wanted[PEER] = (apex, parts, APEX, {"APEX_CPP_EXT": "1", "APEX_CUDA_EXT": "1"})
    found: dict[str, list[Build]] = {}
    for _ in range(repeats):
        for name, (tree, parts, extensions, more) in wanted.items():
            if name in missing:
                continue
            try:
                found.setdefault(name, []).append(build(tree, parts, extensions, {**environment, **more}))
            except BuildError as error:
                missing[name] = str(error)
    return {name: builds for name, builds in found.items() if name not in missing}, missing


def grid(found: dict[str, list[Build]], environment: dict[str, str]) -> Grid:
    rows = []
    for name, builds in found.items():
        seconds, cpu_seconds = (statistics.median(getattr(b, kind) for b in builds) for kind in ("seconds", "cpu_seconds"))
        rows.append([name, f"{seconds:.1f}", f"{cpu_seconds:.1f}", f"{builds[0].size / 1e6:.1f}"])
    title = f"Build time, {environment['MAX_JOBS']} jobs, CUDA for {environment['TORCH_CUDA_ARCH_LIST']}"
    return Grid(title, ["extension", "s", "CPU s", "MB"], rows)


def verdicts(found: dict[str, list[Build]]) -> list[Verdict]:
    if CUDA not in found or PEER not in found:
        return []
    ours, theirs = (statistics.median(b.seconds for b in found[name]) for name in (CUDA, PEER))
    return [Verdict(f"build of {CUDA} / {PEER}", ours / theirs, at_most=1.0)]


def main(apex: Path | None = None, repeats: int = 1) -> None:
    """Builds everything and reports.

    Args:
        apex: a checkout of NVIDIA/apex.
        repeats: builds of each.
    """
    environment = {"MAX_JOBS": str(os.cpu_count()), "TORCH_CUDA_ARCH_LIST": "8.0 9.0"}
    environment = {name: os.environ.get(name) or value for name, value in environment.items()}
    found, missing = measure(apex, repeats, environment)
    samples = {name: [vars(b) for b in builds] for name, builds in found.items()}
    report("build_time", [grid(found, environment)], verdicts(found), missing, samples)


if __name__ == "__main__":
    tyro.cli(main)
