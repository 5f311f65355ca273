"""What setup.py builds, and what it says where it cannot."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def setup(monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("megapar_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("MEGAPAR_SKIP_CPU", "MEGAPAR_SKIP_CUDA", "MEGAPAR_FORCE_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MAX_JOBS", "1")
    return module


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A toolkit whose nvcc says its version, and first on PATH a script that runs it: toolkit(version) -> its folder."""

    def make(version: str) -> Path:
        home = tmp_path / "toolkit"
        for folder, text in (
            (home / "bin", f'#!/bin/sh\n[ "$1" = --version ] && echo "Cuda compilation tools, release {version}, V{version}.88"\n'
             f'[ "$1" = --dryrun ] && echo "#$ TOP={home}/bin/.." >&2\nexit 0\n'),
            (tmp_path / "path", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n'),
        ):  # fmt: skip
            folder.mkdir(parents=True)
            (folder / "nvcc").write_text(text)
            (folder / "nvcc").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "path"), prepend=os.pathsep)
        return home

    return make


def torch_for(monkeypatch, version: str | None) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", version)


def test_every_source_is_compiled(setup):
    assert setup.why_no_kernels() is None
    assert {Path(source).name for source in setup.CPU_SOURCES} == {path.name for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    assert not any(flag.startswith("-march") for flag in setup.FLAGS), "the build must run on other processors than this one"


def test_without_a_compiler(setup, monkeypatch, capsys):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    assert setup.build_options() == {}
    assert "built without its CPU kernels, there is no C++ compiler: install g++ 12 or newer" in capsys.readouterr().err


@pytest.mark.parametrize("macros", ["#define __GNUC__ 4\n#define __clang__ 1", "#define __GNUC__ 11", ""])
def test_another_compiler(setup, monkeypatch, tmp_path, macros):
    fake = tmp_path / "compiler"
    fake.write_text(f"#!/bin/sh\ncat <<END\n{macros}\nEND\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    assert setup.why_no_kernels() == f"{fake} is not g++ 12 or newer: install that and set CXX=g++"


def test_left_out(setup, monkeypatch, capsys):
    monkeypatch.setenv("MEGAPAR_SKIP_CPU", "1")
    assert setup.build_options() == {}
    assert "MEGAPAR_SKIP_CPU is set" in capsys.readouterr().err


def test_without_torch(setup, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "install it first, and build with --no-build-isolation" in setup.why_no_kernels()


def test_every_cuda_source_is_compiled(setup):
    assert {Path(source).name for source in setup.CUDA_SOURCES} == {"bindings.cpp", "adamw.cu", "grad_norm.cu", "step_state.cu"}
    torch_free = [path for path in (ROOT / "csrc" / "cuda").iterdir() if path.name != "bindings.cpp"]
    assert not any(word in path.read_text() for path in torch_free for word in ("torch/", "ATen/", "c10/"))


def test_nvcc_may_be_a_wrapper(setup, toolkit):
    home = toolkit("13.0")
    assert setup.cuda_home() == str(home) and setup.nvcc_version(str(home)) == (13, 0)


def test_a_named_toolkit_comes_first(setup, toolkit, monkeypatch):
    toolkit("13.0")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert setup.cuda_home() == "/nowhere"
    torch_for(monkeypatch, "13.0")
    assert setup.why_no_cuda() == "there is no nvcc in /nowhere: install the CUDA 13.0 toolkit, or set CUDA_HOME"


def test_versions_of_cuda(setup, toolkit, monkeypatch):
    toolkit("12.4")
    torch_for(monkeypatch, "13.0")
    why = "nvcc is of CUDA 12.4 and torch of CUDA 13.0: install the toolkit of that torch, or set CUDA_HOME"
    assert setup.why_no_cuda() == why
    torch_for(monkeypatch, "12.9")
    assert setup.why_no_cuda() is None, "another minor version will do"
    torch_for(monkeypatch, "13.0")
    monkeypatch.setenv("MEGAPAR_FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match=r"MEGAPAR_FORCE_CUDA is set and the CUDA kernels cannot be built, nvcc is of CUDA 12\.4"):
        setup.build_options()


def test_nvcc_is_not_called_for_a_torch_without_cuda(setup, monkeypatch):
    torch_for(monkeypatch, None)
    monkeypatch.setattr(setup, "cuda_home", lambda: pytest.fail("looked for nvcc"))
    assert setup.why_no_cuda() == "this torch is built without CUDA: install one that has it"
    monkeypatch.setenv("MEGAPAR_SKIP_CUDA", "1")
    assert setup.why_no_cuda() == "MEGAPAR_SKIP_CUDA is set"


def test_the_cuda_extension(setup, toolkit, monkeypatch):
    """Where torch has CUDA: both extensions, for every architecture that this nvcc knows, unless some are named."""
    home = toolkit("13.0")
    torch_for(monkeypatch, "13.0")
    code = """if True:
        import os, sys, torch
        torch.version.cuda, torch.cuda._is_compiled, torch.cuda.is_available = "13.0", lambda: True, lambda: False
        sys.path.insert(0, ".")
        import setup
        print([x.name for x in setup.build_options()["ext_modules"]], os.environ["CUDA_HOME"], os.environ["TORCH_CUDA_ARCH_LIST"])
    """
    for architectures in ("7.5;8.0;9.0;10.0+PTX", "9.0"):
        if architectures == "9.0":
            monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
        told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        expected = f"['megapar._C', 'megapar._CUDA'] {home} {architectures}"
        assert told.stdout.strip().splitlines()[-1:] == [expected], told.stderr[-2000:]


def test_architectures_and_jobs(setup, monkeypatch):
    assert setup.architectures((12, 4)) == "7.5;8.0;9.0+PTX" and setup.architectures((12, 8)) == "7.5;8.0;9.0;10.0+PTX"
    monkeypatch.setattr(setup.Path, "read_text", lambda path: "MemAvailable:    9000000 kB\n")
    monkeypatch.setattr(setup.os, "sched_getaffinity", lambda process: range(64))
    assert setup.jobs() == 2
    monkeypatch.setattr(setup.Path, "read_text", lambda path: "MemAvailable:    9000 kB\n")
    assert setup.jobs() == 1


def test_no_instructions_outside_their_bodies():
    """A function of a standard header compiled for AVX-512 may be the copy that the linker keeps for everyone.

    Weak symbols (inline functions of headers) must not use registers that only some processors have.
    """
    library = next((ROOT / "megapar").glob("_C*.so"), None)
    if library is None:
        pytest.skip("the kernels are not built")
    shown = subprocess.run(["objdump", "-d", "--no-show-raw-insn", "-C", library], capture_output=True, text=True)
    if shown.returncode:
        pytest.skip("there is no objdump")
    allowed = ("megapar::avx2::", "megapar::avx512::", "megapar::avx512_bf16::", "megapar::amx::")
    wrong, name = set(), ""
    for line in shown.stdout.splitlines():
        if line.endswith(">:"):
            name = line.partition("<")[2][:-2]
        elif ("%ymm" in line or "%zmm" in line) and not any(place in name for place in allowed):
            wrong.add(name)
    assert not wrong
