"""The split backward: what runs in I, what in W, and that nothing is kept after."""

from collections import Counter
from unittest import mock

import pytest
import torch

from megapar import ParallelMesh
from megapar.grads import MainGrads
from megapar.layers import linear_function
from megapar.pipeline.kinds import make_schedule
from megapar.pipeline.runtime import PipelineRunner
from megapar.pipeline.stage import Stage
from tests.pipeline.decoders import Chunk, loss_of, micro_batches, stages_of
from tests.pipeline.test_parity import config_of


def test_weight_gradients_are_computed_in_w():
    """Each of a block's GEMMs (qkv, out, gate-up, down) once a micro-batch, in W; after it nothing is kept."""
    mesh, m, chunks = ParallelMesh.alone(), 3, 2
    stages = stages_of(config_of(chunks, False, False, 2), mesh, chunks)
    MainGrads(p for stage in stages for p in stage.parameters())
    runner = PipelineRunner([Chunk(stage) for stage in stages], mesh, make_schedule("zero_bubble", 1, chunks, m))
    calls: Counter[str] = Counter()
    phase = ["F"]
    real = linear_function.linear_weight_grad

    def counting(*args, **kwargs):
        calls[phase[0]] += 1
        return real(*args, **kwargs)

    def within(name, method):
        def call(self, *args):
            phase[0] = name
            found = method(self, *args)
            if name == "W":
                assert args[0] not in self._kept
            phase[0] = "F"
            return found

        return call

    with (
        mock.patch.object(linear_function, "linear_weight_grad", counting),
        mock.patch.object(Stage, "input_gradients", within("I", Stage.input_gradients)),
        mock.patch.object(Stage, "weight_gradients", within("W", Stage.weight_gradients)),
    ):
        runner.step(micro_batches(m), loss_of(stages[-1]))
    assert calls == {"W": 4 * chunks * m}
    assert not any(stage._kept for stage in runner.stages.values())


@pytest.mark.parametrize("kind", ["gpipe", "interleaved_1f1b"])
def test_no_graph_is_kept_after_a_step(kind):
    stages = stages_of(config_of(2, False, False, 2), ParallelMesh.alone(), 2)
    runner = PipelineRunner([Chunk(stage) for stage in stages], ParallelMesh.alone(), make_schedule(kind, 1, 2, 2))
    runner.step(micro_batches(2), loss_of(stages[-1]))
    assert not any(stage._kept for stage in runner.stages.values())


def test_loss_scale_and_fp64():
    """The seed of the backward; fp64 losses are summed in fp64."""
    chunk = torch.nn.Linear(3, 1).double()
    runner = PipelineRunner([chunk], ParallelMesh.alone(), make_schedule(None, 1, 1, 2), inputs=lambda x: x)
    data = [torch.ones(1, 3, dtype=torch.float64), torch.full((2, 3), 1e-12, dtype=torch.float64)]
    totals = runner.step(data, lambda y, x: (x.sum() + 0 * y.sum(), torch.tensor(x.shape[0])), loss_scale=1.0)
    assert totals.loss.dtype == torch.float64 and float(totals.loss) == 3 + float(data[1].sum()) and totals.count == 3
    chunk.zero_grad()
    runner.step(data, lambda y, x: (y.sum(), 1), loss_scale=1024.0)
    assert torch.equal(chunk.bias.grad, torch.full((1,), 3 * 1024.0, dtype=torch.float64))
