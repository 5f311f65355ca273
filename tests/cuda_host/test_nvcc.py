"""csrc/cuda compiled by nvcc for GPUs that are not there: no warning, no spill, no local memory; 128-bit vectors, read from the binary."""

import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cuda_host import host

NVCC = shutil.which("nvcc")
TRITON = importlib.util.find_spec("triton")
ARCHITECTURES = (75, 80, 90, 100)
WARNINGS = ["-Werror", "all-warnings", "-Xptxas", "-v,--warn-on-spills,--warn-on-local-memory-usage,-Werror"]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
# Registers that leave a multiprocessor's 65536 to two blocks of 256 threads; csrc/cuda/adamw.cu asks for three where it draws no noise.
MOST_REGISTERS = 128


def tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: triton brings them."""
    found = Path(TRITON.origin).parent / "backends" / "nvidia" / "bin" / name if TRITON and TRITON.origin else None
    return str(found) if found and found.exists() else shutil.which(name)


def compile_cubin(kernel: str, arch: int, folder: Path) -> tuple[Path, str]:
    """The binary and what ptxas says of it."""
    assert NVCC is not None
    cubin = folder / f"{kernel}_{arch}.cubin"
    source = host.ROOT / "csrc" / "cuda" / f"{kernel}.cu"
    command = [NVCC, "-cubin", "-std=c++20", "-O3", *WARNINGS, f"-arch=sm_{arch}", str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return cubin, done.stderr


@pytest.fixture(scope="session", params=ARCHITECTURES)
def cubins(request, tmp_path_factory) -> tuple[int, dict[str, tuple[Path, str]]]:
    folder, kernels = tmp_path_factory.mktemp(f"sm_{request.param}"), [Path(name).stem for name in host.KERNELS]
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda kernel: compile_cubin(kernel, request.param, folder), kernels)
    return request.param, dict(zip(kernels, made, strict=True))


@needs_nvcc
def test_nothing_in_local_memory(cubins):
    _, made = cubins
    for kernel, (_, told) in made.items():
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", told)]
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", told)
        assert len(registers) == {"adamw": 57, "grad_norm": 8, "step_state": 1}[kernel]
        assert frames and all(frame == ("0", "0", "0") for frame in frames), told
        if kernel != "step_state":
            assert max(registers) <= MOST_REGISTERS


BYTES = {"float": 4, "bf16": 2, "fp16": 2, "short": 2, "none": 0}


def accesses(signature: str) -> tuple[int, int]:
    """Loads and stores of 128 bits that a kernel has for its vectors, from its demangled name."""
    if "chunks_kernel" in signature:
        return 2, 0  # AHEAD of csrc/cuda/grad_norm.cu
    if "adamw_kernel" not in signature:
        return 0, 0
    arguments = signature.partition("adamw_kernel<")[2].partition(">")[0].replace("(anonymous namespace)", "").split(",")
    names = [argument.strip().rpartition(":")[2] for argument in arguments[:4]]
    weight, grad, master, moment = (BYTES[name] for name in names)
    elements = 4 if weight == grad == moment == 4 else 8
    read = grad + 2 * moment + master + (0 if names[2] == "float" else weight)
    return read * elements // 16, (weight + 2 * moment + master) * elements // 16


@needs_nvcc
def test_every_stream_is_128_bits_wide(cubins):
    """As many wide loads and stores of global memory as the bytes of the formula ask for, in each kernel; none of a generic address."""
    cuobjdump, demangle = tool("cuobjdump"), shutil.which("c++filt")
    if cuobjdump is None or demangle is None:
        pytest.skip("there is no cuobjdump or c++filt: install triton and binutils")
    arch, made = cubins
    for kernel in ("adamw", "grad_norm"):
        shown = subprocess.run([cuobjdump, "-sass", str(made[kernel][0])], capture_output=True, text=True, timeout=300, check=True).stdout
        readable = subprocess.run([demangle], input=shown, capture_output=True, text=True, timeout=300, check=True).stdout
        functions = readable.split("Function : ")[1:]
        assert functions
        for function in functions:
            name = function.partition("\n")[0]
            found = tuple(len(re.findall(rf"\b{kind}\.E(?:\.\w+)*\.128\b", function)) for kind in ("LDG", "STG"))
            assert found == accesses(name), f"sm_{arch} {name}"
            assert not re.search(r"\b(LDL|STL|LD\.E|ST\.E)\b", function), f"sm_{arch} {name}: local or generic memory"
