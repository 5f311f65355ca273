"""csrc/cuda compiled for the CPU, with the CUDA of this folder, and its bodies in the place of the CPU's."""

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megapar.ops import cuda, dispatch, schema

HOST = Path(__file__).parent
ROOT = HOST.parents[1]
VARIABLE = "MEGAPAR_CUDA_HOST"
"""Names the library in a process whose tests are to run on it: tests/conftest.py."""
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
KERNELS = ("adamw.cu", "grad_norm.cu", "step_state.cu")
# What a GPU refuses or leaves undefined (a misaligned vector, an overflowed index) ends the process.
CHECKS = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *CHECKS]


def compile_file(source: Path, target: Path) -> None:
    """An object file. Raises RuntimeError with what the compiler says."""
    assert COMPILER is not None
    torch_headers = Path(torch.__file__).parent / "include"
    # The bindings hold no kernel and wait for no one: what costs time is to compile torch's headers.
    flags = [*FLAGS, "-Werror"] if source.suffix == ".cu" else ["-std=c++20", "-O0", "-fPIC", "-isystem", str(torch_headers)]
    includes = [f"-I{HOST}", "-isystem", sysconfig.get_paths()["include"]]
    command = [COMPILER, *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])


def link(objects: list[Path], library: Path) -> Path:
    """A shared library. Raises CalledProcessError."""
    assert COMPILER is not None
    folder = Path(torch.__file__).parent / "lib"
    command = [COMPILER, "-shared", *map(str, objects), f"-L{folder}", "-ltorch_cpu", "-lc10", "-o", str(library)]
    subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return library


def link_program(source: Path, program: Path) -> Path:
    """Of a file that has a main."""
    compile_file(source, program.with_suffix(".o"))
    subprocess.run([str(COMPILER), str(program.with_suffix(".o")), "-o", str(program)], capture_output=True, timeout=300, check=True)
    return program


def build(folder: Path, sources: Path = ROOT / "csrc" / "cuda") -> list[Path]:
    """Object files of the bindings and the kernels."""
    files = [sources / "bindings.cpp", *(sources / name for name in KERNELS)]
    objects = [folder / f"{file.stem}.o" for file in files]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_file, files, objects))
    return objects


def register(library: str) -> None:
    """From here on the three ops on CPU tensors are those of `library`."""
    torch.ops.load_library(library)
    for op in dispatch.CUDA_OPS:
        schema.LIBRARY.impl(op, getattr(cuda, op), "CPU", allow_override=True)
