"""The memory of a save and of a load beside what the rank holds anyway: a few files, however large the model and its tensors are."""

import subprocess
import sys
from pathlib import Path

import pytest

from megapar.training.checkpoint.write import FILE_BYTES

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import sys
from pathlib import Path
import torch
from torch import nn
from megapar import AdamW, ParallelMesh, ZeroOptimizer
from megapar.optim.precision import Precision
from megapar.training.checkpoint import Saver, load_checkpoint
from megapar.training.memory import MemoryPeak

root, precision = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
mesh = ParallelMesh()
# 26 M parameters, 312 MB with moments: one tensor of one and a half files, and smaller ones.
model = nn.Sequential(nn.Linear(10000, 2400, bias=False), *[nn.Linear(1000, 1000) for _ in range(2)])
if precision == "bf16 remainder":
    precision = Precision.of("bf16", master="remainder")
optimizer = ZeroOptimizer(model, mesh, stage=3, precision=precision)


def measured(name, work):
    peak = MemoryPeak(mesh.device)
    work()
    print(name, peak.bytes(), flush=True)


def sums():
    return [float(box.read().double().sum()) for box in optimizer.boxes() if box.kind != "weight"]


def save(asynchronous, step):
    saver = Saver(root, mesh, asynchronous=asynchronous)
    saver.save(step, optimizer.boxes(), {})
    saver.before_update()
    assert saver.finish().error == ""


for box in optimizer.boxes():
    box.write(torch.rand(box.piece.box))
before = sums()
print("owned", sum(box.bytes for box in optimizer.boxes() if box.owned))
measured("save", lambda: save(False, 1))
for box in optimizer.boxes():
    box.write(torch.zeros(box.piece.box))
measured("load", lambda: load_checkpoint(root / "step-00000001", optimizer.boxes(), mesh))
assert sums() == before
if precision == "fp32":
    measured("asynchronous", lambda: save(True, 2))
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16 remainder"])
def test_a_save_and_a_load_need_little(tmp_path, precision):
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), precision], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    bytes_of = {name: int(size) for name, size in (line.split() for line in done.stdout.splitlines())}
    assert bytes_of["owned"] > 4.5 * FILE_BYTES
    # Masters that are joined: two files are in memory at once, and a box is in three forms while it is split. Else nothing is copied.
    joined = precision == "bf16 remainder"
    assert bytes_of["save"] < (3.5 if joined else 0.5) * FILE_BYTES
    assert bytes_of["load"] < (4.5 if joined else 2.5) * FILE_BYTES
    assert bytes_of.get("asynchronous", 0) < bytes_of["owned"] + FILE_BYTES
