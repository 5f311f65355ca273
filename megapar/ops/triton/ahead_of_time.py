"""Compiles recorded launches for GPUs that need not be there, and reads from the binary what the hardware would execute.

A launch is bound by Triton's own binder, so that argument types, divisibility by 16 and integers that are 1 are specialised exactly as they
would be at a real launch. Registers, memory and instructions are read by cuobjdump, which Triton carries.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from megapar.ops.triton.launch import Launch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture. shared: bytes a program. stack, local: bytes a thread that should have been registers.

    instructions: how many of each opcode, `LDG.E.128` or `HGMMA.64x128x16.F32.BF16`. layouts: conversions between register layouts
    through shared memory that Triton left in.
    """

    name: str
    arch: int
    num_warps: int
    registers: int
    stack: int
    local: int
    shared: int
    layouts: int
    instructions: Counter[str]

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches the regular expression from its start."""
        return sum(n for opcode, n in self.instructions.items() if re.match(pattern, opcode))

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return self.count("LDL|STL")

    def occupancy(self) -> float:
        """Of the warps that a multiprocessor can hold, the share that registers and shared memory leave room for."""
        warps = {75: 32, 80: 64, 90: 64, 100: 64, 120: 48}[self.arch]
        shared = {75: 64, 80: 164, 90: 228, 100: 228, 120: 100}[self.arch] * 1024
        per_warp = -(-max(self.registers, 1) * 32 // 256) * 256
        programs = min(65536 // (per_warp * self.num_warps), warps // self.num_warps, 32 if self.arch >= 80 else 16)
        return min(programs, shared // (self.shared + 1024)) * self.num_warps / warps


def compile_launch(recorded: Launch, arch: int) -> Compiled:
    """Raises triton.CompilationError and its relatives where the kernel does not compile for `arch`, 75, 80, 90 or 100."""
    target = GPUTarget("cuda", arch, 32)
    backend, kernel = make_backend(target), recorded.kernel
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *recorded.args, **recorded.options
    )
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, recorded.options, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attributes)
    return _read(triton.compile(source, target=target, options=parsed.__dict__), arch)


def _read(compiled: Any, arch: int) -> Compiled:
    usage, opcodes = _dump(bytes(compiled.asm["cubin"]))
    return Compiled(
        name=compiled.metadata.name,
        arch=arch,
        num_warps=compiled.metadata.num_warps,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=compiled.metadata.shared,
        layouts=compiled.asm["ttgir"].count("ttg.convert_layout"),
        instructions=opcodes,
    )


@functools.lru_cache(maxsize=4096)
def _dump(cubin: bytes) -> tuple[dict[str, int], Counter[str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([str(CUOBJDUMP), flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass, re.MULTILINE)
    return found, Counter(opcodes)
