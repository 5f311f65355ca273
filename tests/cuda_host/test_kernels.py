"""The sources of csrc/cuda run on this processor, by tests/cuda_host/cuda_runtime.h: the tests of the three ops, and more in on_host.py, in
a process of their own. That they can fail is shown on copies of the sources with one thing changed.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cuda_host import host

pytestmark = pytest.mark.skipif(host.COMPILER is None, reason="there is no C++ compiler")
NORM, ADAMW, STATE = (f"tests/ops/test_{op}.py" for op in ("grad_norm", "adamw", "step_state"))
ON_HOST = "tests/cuda_host/on_host.py"
# Left out: what is a thousand launches, what is 2^31 elements (on_host.py has an end of them), and processes of their own.
LEFT_OUT = "not thousand_steps and not fit_in_32_bits and not instruction_sets"


@pytest.fixture(scope="session")
def objects(tmp_path_factory) -> list[Path]:
    return host.build(tmp_path_factory.mktemp("cuda_host"))


def test_on_this_processor(objects, tmp_path):
    library = host.link(objects, tmp_path / "cuda_host.so")
    environment = os.environ | {host.VARIABLE: str(library), "OMP_NUM_THREADS": "1"}
    files = [NORM, ADAMW, STATE, ON_HOST]
    options = ["-x", "-p", "no:cacheprovider", "-W", "ignore:Warning only once for all operators", "-k", LEFT_OUT]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, env=environment, cwd=host.ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


ADDRESS = (ON_HOST, "at_any_address")
# file, the kernel that is compiled with it, what is changed to what, and which test must fail
MUTATIONS = [
    ("grad_norm.cu", "grad_norm", "  __syncthreads();\n", "", *ADDRESS),
    ("grad_norm.cu", "grad_norm", "half = WARP / 2", "half = WARP / 4", *ADDRESS),
    ("grad_norm.cu", "grad_norm", "warps[threadIdx.x / WARP] = mine", "warps[threadIdx.x / WARP ^ 1] = mine", *ADDRESS),
    ("grad_norm.cu", "grad_norm", "first += AHEAD * STEP", "first += STEP", *ADDRESS),
    ("grad_norm.cu", "grad_norm", "i += THREADS)", "i += 2 * THREADS)", ON_HOST, "more_chunks"),
    ("grad_norm.cu", "grad_norm", "partials[e.first + chunk.index]", "partials[e.first]", ON_HOST, "more_chunks"),
    ("grad_norm.cu", "grad_norm", "squares > 0x1p-90f && ", "", NORM, "extremes"),
    ("vector.cuh", "grad_norm", "k < at.size ? data", "k <= at.size ? data", *ADDRESS),
    ("adamw.cu", "adamw", "(threadIdx.x) * VECTOR; i < end", "(threadIdx.x) * VECTOR + 1; i < end", ON_HOST, "the_same_bits"),
    ("adamw.cu", "adamw", "int64_t begin = chunk.index * chunk_size", "int64_t begin = chunk.index * int(chunk_size)", ON_HOST, "32_bits"),
    ("adamw.cu", "adamw", "if (++column == e.columns)", "if (column == e.columns)", ADAMW, "sharding"),
    ("adamw.cu", "adamw", "if (scalars->skip != 0) return;", "", ADAMW, "skips"),
    ("vector.cuh", "adamw", "if (k < at.size) data[", "data[", ON_HOST, "the_same_bits"),
    ("vector.cuh", "adamw", "pointers % sizeof(uint4) == 0", "pointers % sizeof(uint32_t) == 0", ON_HOST, "the_same_bits"),
    ("step_state.cu", "step_state", "rows[i].beta1, rows[i].beta2", "rows[i].beta2, rows[i].beta1", STATE, "numbers"),
]


def mutated(folder: Path, objects: list[Path], file: str, kernel: str, right: str, wrong: str) -> Path:
    """A library with one kernel changed."""
    shutil.copytree(host.ROOT / "csrc", folder / "csrc")
    source = folder / "csrc" / "cuda" / file
    text = source.read_text()
    assert text.count(right) == 1, right
    source.write_text(text.replace(right, wrong))
    changed = folder / f"{kernel}.o"
    host.compile_file(source.with_name(f"{kernel}.cu"), changed)
    return host.link([*(x for x in objects if x.name != changed.name), changed], folder / "cuda_host.so")


def test_fails_on_mutated(objects, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(mutated, tmp_path / str(i), objects, *mutation[:4]) for i, mutation in enumerate(MUTATIONS)]
        asked = [[str(library.result()), *mutation[4:]] for library, mutation in zip(made, MUTATIONS, strict=True)]
    command = [sys.executable, "-m", "tests.cuda_host.run_each", json.dumps(asked)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=host.ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # 1: a test has failed; below 0: a signal has ended the process. Not 5, no test, nor 2 to 4, pytest itself.
    passed = [mutation for code, mutation in zip(json.loads(done.stdout), MUTATIONS, strict=True) if not (code == 1 or code < 0)]
    assert not passed, "changed, and no test has failed"


@pytest.fixture(scope="session")
def faults(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    return host.link_program(host.HOST / "faults.cu", folder / "faults")


FAULTS = [
    "threads wait at two barriers", "threads wait for some that have left", "threads wait for some that have left",
    "lanes shuffle under two masks", "a barrier and a shuffle wait for each other",
]  # fmt: skip


@pytest.mark.parametrize("kernel", range(7))
def test_faults_are_reported(kernel, faults):
    done = subprocess.run([str(faults), str(kernel)], capture_output=True, text=True, timeout=60, check=False)
    if kernel < len(FAULTS):
        assert FAULTS[kernel] in done.stderr and done.returncode < 0
    elif kernel == len(FAULTS):
        assert done.returncode < 0, "a misaligned vector"
    else:
        assert done.returncode == 0 and int(done.stdout) > 0, "what others have not written yet is not 1"
