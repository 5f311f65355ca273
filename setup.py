"""Build script: the C++ extension is declared here, everything else is in pyproject.toml.

    pip install --no-build-isolation -e .

Compiles csrc/cpu against the torch of this environment. Without torch or a C++ compiler the package is installed without kernels, and says
so when one is first called. MEGAPAR_SKIP_CPU=1 leaves them out; MAX_JOBS limits the compilers at work at once.
"""

import os
import shutil
import sys
from pathlib import Path

import setuptools

CPU_SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
# No -march: each kernel is compiled for several instruction sets and chooses when it runs (csrc/cpu/every_isa.h).
WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-pragmas"]
FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-g0", *WARNINGS]


def why_no_kernels() -> str | None:
    """What keeps this build from compiling kernels, if anything does."""
    if os.environ.get("MEGAPAR_SKIP_CPU", "0") not in ("", "0"):
        return "MEGAPAR_SKIP_CPU is set"
    if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        return "there is no C++ compiler: install g++ or clang"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch cannot be imported: install it first, and build with --no-build-isolation"
    return None


def build_options() -> dict[str, object]:
    """What setuptools is told beside pyproject.toml."""
    why = why_no_kernels()
    if why is not None:
        print(f"megapar is built without its CPU kernels, {why}", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extension = CppExtension("megapar._C", CPU_SOURCES, extra_compile_args=FLAGS, py_limited_api=False)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setuptools.setup(**build_options())
