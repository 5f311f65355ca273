"""The bf16 bodies of the linear ops as a plain program (tests/cpu_host/linear.cpp), AMX by an emulation of its instructions: results
against fp64, and memory that ends where it must. That the program can fail is shown on copies of the kernels with one thing changed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOST = ROOT / "tests" / "cpu_host"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-std=c++20", "-O1", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-Wno-unknown-pragmas"]
AVX512_BF16 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}
# MEGAPAR_LEVEL of csrc/cpu/every_isa.h, and what the program needs of the processor: the emulation needs no amx_bf16.
BODIES = {"portable": (0, set()), "avx512_bf16": (513, AVX512_BF16), "amx": (514, AVX512_BF16)}


def processor_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def run(body: str, sources: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Compiles the program for a body of the kernels in `sources`, and runs it on three threads."""
    level, needs = BODIES[body]
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    if not needs <= processor_flags():
        pytest.skip(f"this processor lacks {', '.join(sorted(needs - processor_flags()))}")
    program = folder / body
    command = [COMPILER, *FLAGS, f"-DMEGAPAR_LEVEL={level}", f"-I{sources}", f"-I{HOST}", str(HOST / "linear.cpp"), "-o", str(program)]
    compiled = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert compiled.returncode == 0, compiled.stderr[-3000:]
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("body", BODIES)
def test_against_fp64(body, tmp_path):
    done = run(body, ROOT / "csrc" / "cpu", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert done.stdout == "0 failures\n"


@pytest.mark.parametrize(
    ("file", "right", "wrong", "shows"),
    [
        ("gemm_amx.inl", "_tile_loadd(7, b + u * NR + 16, NR * 4)", "_tile_loadd(7, b + u * NR + 16, 64)", "forward t="),
        ("gemm_amx.inl", "uint16_t column_bytes[16] = {64, 64, 64,", "uint16_t column_bytes[16] = {64, 64, 32,", "AMX fault"),
        ("gemm.inl", "((a_panels * Kernel::MR - 1) * NC + b_panels * Kernel::NR)", "a_panels * Kernel::MR * NC", "wrote past its end"),
    ],
)
def test_fails_on_mutated(file, right, wrong, shows, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    kernel = tmp_path / "csrc" / "cpu" / file
    source = kernel.read_text()
    assert source.count(right) == 1
    kernel.write_text(source.replace(right, wrong))
    done = run("amx", tmp_path / "csrc" / "cpu", tmp_path)
    assert done.returncode != 0
    assert shows in done.stdout + done.stderr
