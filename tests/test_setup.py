"""What setup.py builds, and what it says where it cannot."""

import importlib.util
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
    monkeypatch.delenv("MEGAPAR_SKIP_CPU", raising=False)
    return module


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
