"""The doctor: what is here, and how to get what is not."""

import importlib.metadata
import tomllib
from pathlib import Path

import torch

import megapar
from megapar import doctor

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def test_report_names_versions_devices_and_instruction_sets(monkeypatch):
    monkeypatch.setattr(doctor, "_cpu_flags", lambda: {"avx2", "amx_bf16", "sse"})
    told = doctor.doctor()
    for fact in (megapar.__version__, torch.__version__, importlib.metadata.version("safetensors"), "gloo"):
        assert fact in told
    assert "avx2, amx_bf16\n" in told


def test_missing_extras_come_with_their_command(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("tensorboard", "triton") else "1.0")
    told = {line.split()[0]: line for line in doctor.doctor().splitlines()}
    assert "pip install 'megapar[tensorboard]'" in told["tensorboard"]
    assert "pip install 'megapar[gpu]'" in told["triton"]
    assert "pip install" not in told["pytest"]


def test_extras_are_those_of_the_project():
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    assert {name: set(packages) for name, packages in doctor.EXTRAS.items()} == {name: set(p) for name, p in extras.items()}


def test_cpu_without_proc_is_no_error(monkeypatch):
    monkeypatch.setattr(doctor.Path, "is_file", lambda self: False)
    assert doctor._cpu_flags() == set()


def test_kernels(monkeypatch):
    monkeypatch.setattr(doctor.dispatch, "MISSING", {"cpu": None, "cuda": None})
    assert f"built, {torch.ops.megapar.cpu_isa()} bodies" in doctor.doctor()
    monkeypatch.setattr(doctor.dispatch, "FORCED", "reference")
    assert "every op, MEGAPAR_BACKEND=reference says so" in doctor.doctor()
    monkeypatch.setattr(doctor.dispatch, "MISSING", {"cpu": "the CPU kernels are not built: do this", "cuda": "no Triton"})
    assert "the CPU kernels are not built: do this" in doctor.doctor() and "no Triton" in doctor.doctor()
