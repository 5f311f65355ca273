"""A run's memory by kind: what is held is counted, and the peak sees what is allocated and freed again."""

import torch

from megapar import ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.models.pipelined import PipelinedDecoder
from megapar.optim.precision import Precision
from megapar.training.config import OptimizerConfig, ParallelConfig
from megapar.training.memory import MemoryPeak, memory_by_kind
from megapar.training.step import zero

CONFIG = DecoderConfig(hidden_size=64, layers=1, heads=4, ffn_size=96)


def test_the_peak_remembers_what_was_freed():
    peak = MemoryPeak(torch.device("cpu"))
    torch.ones(32 << 20)
    assert 0.9 * (128 << 20) <= peak.bytes() <= 2 * (128 << 20)


def kinds(precision: str, stage: int) -> tuple[int, dict[str, int]]:
    mesh = ParallelMesh()
    peak = MemoryPeak(mesh.device)
    optimize = zero(OptimizerConfig(), mesh, ParallelConfig(zero_stage=stage), Precision.of(precision))
    model = PipelinedDecoder(CONFIG, 61, mesh, optimize=optimize)
    assert model.optimizer is not None
    return sum(p.numel() for stage in model.stages for p in stage.parameters()), memory_by_kind(model.optimizer, peak)


def test_kinds_are_what_the_formats_take(ranks):
    for precision, stage, each in [("fp32", 1, (4, 4, 4)), ("bf16", 0, (2, 4, 12)), ("bf16", 1, (2, 4, 6)), ("bf16", 2, (2, 2, 6))]:
        for count, memory in ranks.run(2, kinds, precision, stage):
            found = [memory[kind] / count for kind in ("parameters", "gradients", "optimizer_state")]
            assert all(abs(a / b - 1) < 0.01 for a, b in zip(found, each, strict=True)), (precision, stage, found)
            held = sum(memory[kind] for kind in ("parameters", "gradients", "optimizer_state"))
            assert memory["activations"] == max(0, memory["peak"] - held)
