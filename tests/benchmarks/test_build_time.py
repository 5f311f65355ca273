"""Builds are from nothing, and what fails is told."""

import pytest

from benchmarks import build_time

SETUP = """
from setuptools import Extension, setup
setup(name="tree", ext_modules=[Extension(name, [name + ".c"]) for name in ("amp_C", "fused_weight_gradient_mlp_cuda", "other")])
"""


def test_build_time(tmp_path, monkeypatch):
    """Of a tree's extensions only those asked for are built, from nothing; what fails is missing with what it said."""
    for name in (*build_time.APEX, "other"):
        (tmp_path / f"{name}.c").write_text("int f(void) { return 1; }\n" if name != "other" else "#error built\n")
    (tmp_path / "setup.py").write_text(SETUP)
    (tmp_path / "amp_C.old.so").write_bytes(b"")
    took = build_time.build(tmp_path, ["setup.py", "amp_C.c", "fused_weight_gradient_mlp_cuda.c"], build_time.APEX, {})
    assert took.seconds > 0 and took.cpu_seconds > 0 and took.size > 1000
    with pytest.raises(build_time.BuildError, match="error: #error built"):
        build_time.build(tmp_path, ["setup.py", "other.c"], ["other"], {})
    with pytest.raises(build_time.BuildError, match="it built nothing"):
        build_time.build(tmp_path, ["setup.py"], ["megapar._CUDA"], {})
    assert {path.suffix for path in tmp_path.iterdir()} == {".c", ".py", ".so"}, "nothing is left in the tree"

    real = build_time.build
    monkeypatch.setattr(build_time, "ROOT", tmp_path)
    monkeypatch.setattr(build_time, "OURS", ("setup.py",))
    monkeypatch.setattr(build_time, "build", lambda *args: real(*args) if args[2] == build_time.APEX else took)
    monkeypatch.setattr(build_time, "why_no_cuda", lambda: None)
    environment = {"MAX_JOBS": "1", "TORCH_CUDA_ARCH_LIST": "8.0"}
    found, missing = build_time.measure(tmp_path, 1, environment)
    assert list(found) == [build_time.CPU, build_time.CUDA, build_time.PEER] and missing == {}
    assert len(build_time.grid(found, environment).rows) == 3 and len(build_time.verdicts(found)) == 1
    found, missing = build_time.measure(None, 1, environment)
    assert list(missing) == ["apex"] and build_time.verdicts(found) == []
    monkeypatch.setattr(build_time, "why_no_cuda", lambda: "there is no nvcc")
    found, missing = build_time.measure(tmp_path, 1, environment)
    assert list(found) == [build_time.CPU] and set(missing.values()) == {"there is no nvcc"}
