"""Build script: the compiled extensions are declared here, everything else is in pyproject.toml.

    pip install --no-build-isolation -e .

Compiles csrc/cpu against the torch of this environment, with g++ 12 or newer; and csrc/cuda where that torch has CUDA and nvcc is found.
Without torch or a compiler the package is installed without kernels, and says so when one is first called.

    CXX                   the C++ compiler
    CUDA_HOME             the CUDA toolkit; else that of the nvcc on PATH, which may be a wrapper
    TORCH_CUDA_ARCH_LIST  what to compile for; else the GPUs of this machine, and without any what this nvcc knows
    MAX_JOBS              compilers at work at once; else one a core, as far as memory reaches
    MEGAPAR_SKIP_CPU=1, MEGAPAR_SKIP_CUDA=1   leave kernels out
    MEGAPAR_FORCE_CUDA=1                      fail rather than leave out the CUDA kernels
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

CPU_SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.c*") if path.suffix in (".cu", ".cpp"))
HEADERS = sorted(str(path) for suffix in ("h", "inl", "cuh") for path in Path("csrc").rglob(f"*.{suffix}"))
# No -march: each kernel is compiled for several instruction sets and chooses when it runs (csrc/cpu/every_isa.h).
WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-pragmas"]
FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-g0", *WARNINGS]
NVCC_FLAGS = ["-std=c++20", "-O3"]
JOB_BYTES = 4 << 30  # of memory, for one compiler: nvcc's front end on torch's headers, and room beside it


def asked(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def why_no_kernels() -> str | None:
    """What keeps this build from compiling the CPU kernels, if anything does."""
    if asked("MEGAPAR_SKIP_CPU"):
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


def cuda_home() -> str | None:
    """The toolkit: nvcc itself is asked where it lies, since the one on PATH may be a script that runs another."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    if named or not nvcc:
        return named
    told = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    return str(Path(top[1]).resolve()) if top else str(Path(nvcc).resolve().parents[1])


def nvcc_version(home: str) -> tuple[int, int] | None:
    """None where there is no nvcc."""
    nvcc = Path(home, "bin", "nvcc")
    if not nvcc.exists():
        return None
    found = re.search(r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout)
    return (int(found[1]), int(found[2])) if found else None


def why_no_cuda() -> str | None:
    """What keeps this build from compiling the CUDA kernels, if anything does. Without a torch that has CUDA, nvcc is not looked for."""
    if asked("MEGAPAR_SKIP_CUDA"):
        return "MEGAPAR_SKIP_CUDA is set"
    try:
        import torch
    except ImportError:
        return "torch cannot be imported: install it first, and build with --no-build-isolation"
    wanted = torch.version.cuda
    if wanted is None:
        return "this torch is built without CUDA: install one that has it"
    home = cuda_home()
    version = nvcc_version(home) if home else None
    if version is None:
        return f"there is no nvcc{f' in {home}' if home else ''}: install the CUDA {wanted} toolkit, or set CUDA_HOME"
    if version[0] != int(wanted.partition(".")[0]):
        return f"nvcc is of CUDA {version[0]}.{version[1]} and torch of CUDA {wanted}: install the toolkit of that torch, or set CUDA_HOME"
    return None


def architectures(version: tuple[int, int]) -> str:
    """For any GPU that this nvcc knows: one binary a generation, which its later chips run too, and PTX for what is to come."""
    return "7.5;8.0;9.0;10.0+PTX" if version >= (12, 8) else "7.5;8.0;9.0+PTX"


def jobs() -> int:
    """One a core, as far as free memory reaches."""
    cores, memory = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, Path("/proc/meminfo")
    free = re.search(r"MemAvailable:\s+(\d+) kB", memory.read_text()) if memory.exists() else None
    return max(1, min(cores, int(free[1]) * 1024 // JOB_BYTES)) if free else cores


def cuda_extension() -> setuptools.Extension:
    """Told through the environment, before torch reads it: where the toolkit is, and what to compile for."""
    home = cuda_home()
    assert home is not None
    os.environ["CUDA_HOME"] = home
    import torch
    from torch.utils.cpp_extension import CUDAExtension

    version = nvcc_version(home)
    assert version is not None
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures(version))
    # A toolkit without headers is completed by those that torch's own packages bring.
    headers = sorted(Path(torch.__file__).parents[1].glob("nvidia/*/include")) if not Path(home, "include/cuda_runtime.h").exists() else []
    flags = {"cxx": ["-std=c++20", "-O2", "-g0"], "nvcc": NVCC_FLAGS}
    return CUDAExtension("megapar._CUDA", CUDA_SOURCES, include_dirs=[str(x) for x in headers], extra_compile_args=flags, depends=HEADERS)


def build_options() -> dict[str, object]:
    """What setuptools is told beside pyproject.toml. Ends the build where the CUDA kernels are asked for and cannot be built."""
    no_cpu, no_cuda = why_no_kernels(), why_no_cuda()
    if no_cuda is not None and asked("MEGAPAR_FORCE_CUDA"):
        raise SystemExit(f"MEGAPAR_FORCE_CUDA is set and the CUDA kernels cannot be built, {no_cuda}")
    for device, why in (("CPU", no_cpu), ("CUDA", no_cuda)):
        if why is not None:
            print(f"megapar is built without its {device} kernels, {why}", file=sys.stderr)
    if no_cpu and no_cuda:
        return {}
    os.environ.setdefault("MAX_JOBS", str(jobs()))
    extensions = [] if no_cuda else [cuda_extension()]
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    if not no_cpu:
        extensions.insert(0, CppExtension("megapar._C", CPU_SOURCES, extra_compile_args=FLAGS, depends=HEADERS))
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildExtension}}


if __name__ == "__main__":
    setuptools.setup(**build_options())
