"""Build script: the C++ extension is declared here, everything else is in pyproject.toml.

    pip install --no-build-isolation -e .

Compiles csrc/cpu against the torch of this environment, with g++ 12 or newer. Without torch or that compiler the package is installed
without kernels, and says so when one is first called. CXX names the compiler; MEGAPAR_SKIP_CPU=1 leaves the kernels out; MAX_JOBS limits
the compilers at work at once.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

CPU_SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
HEADERS = sorted(str(path) for suffix in ("h", "inl") for path in Path("csrc").rglob(f"*.{suffix}"))
# No -march: each kernel is compiled for several instruction sets and chooses when it runs (csrc/cpu/every_isa.h).
WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-pragmas"]
FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-g0", *WARNINGS]


def why_no_kernels() -> str | None:
    """What keeps this build from compiling kernels, if anything does."""
    if os.environ.get("MEGAPAR_SKIP_CPU", "0") not in ("", "0"):
        return "MEGAPAR_SKIP_CPU is set"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler or not shutil.which(compiler.split()[0]):
        return "there is no C++ compiler: install g++ 12 or newer"
    # The kernels are written in GCC's vector types and target pragmas, which clang takes in another form.
    macros = subprocess.run([*compiler.split(), "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=False).stdout
    version = re.search(r"#define __GNUC__ (\d+)", macros)
    if "__clang__" in macros or version is None or int(version[1]) < 12:
        return f"{compiler} is not g++ 12 or newer: install that and set CXX=g++"
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

    extension = CppExtension("megapar._C", CPU_SOURCES, extra_compile_args=FLAGS, depends=HEADERS)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


if __name__ == "__main__":
    setuptools.setup(**build_options())
