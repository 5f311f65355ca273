"""Two pipelines that train on wrong gradients without a word, and megapar's beside them, each against one process.

    python -m benchmarks.silent_errors --megatron FOLDER     where megatron-core is, if it is not installed

Two ranks, gloo, fp32. Error: the largest difference of a gradient, over the largest gradient of the model.

accumulation   Two steps of torch.distributed.pipelining before the optimizer's. At the end of every step scale_grads=True, the default,
               divides all that has been accumulated by the m micro-batches: g1 / m^2 + g2 / m in place of (g1 + g2) / m.
two chunks     Megatron-core's interleaved schedule at pp=2. The next rank is the previous one too, and its messages have no tags: with
               batch_p2p_comm=True, the default, an activation is received as a gradient and the other way round.

Below each the setting with which the peer is right: so the way it is called here is not the reason. Megatron-core asks for a GPU where
it needs none; `_on_cpu` says what is replaced for that.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from benchmarks.common import Grid, Verdict, report, start
from megapar.mesh import ParallelMesh
from megapar.pipeline.kinds import make_schedule
from megapar.pipeline.runtime import PipelineRunner

RANKS, MICRO_BATCHES, ROWS, HIDDEN = 2, 4, 3, 8
AGREE = 1e-6
"""A few roundings of fp32."""
OVERLAPPED = {"overlap_p2p_comm": True, "batch_p2p_comm": False}

Batch = tuple[Tensor, Tensor]
Row = tuple[str, float, float]
"""What, the peer's error, ours."""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


def model(stages: int) -> list[Layer]:
    """The same on every rank."""
    torch.manual_seed(0)
    return [Layer() for _ in range(stages)]


def batches(steps: int) -> list[Batch]:
    """For each step (inputs, targets), of all micro-batches."""
    generator = torch.Generator().manual_seed(1)
    shape = (MICRO_BATCHES * ROWS, HIDDEN)
    return [(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for _ in range(steps)]


def micro_batches(batch: Batch) -> list[Batch]:
    return list(zip(*(x.chunk(MICRO_BATCHES) for x in batch), strict=True))


def gradients(layers: Sequence[nn.Module]) -> list[Tensor]:
    return [param.grad for layer in layers for param in layer.parameters() if param.grad is not None]


def error(run: Callable[[list[Layer], list[Batch]], None], chunks: int, steps: int) -> float:
    """In one rank: `run`'s largest error on it. It is given this rank's stages, rank + c * ranks, and the batches."""
    whole, data = model(RANKS * chunks), batches(steps)
    own = [deepcopy(layer) for layer in whole[dist.get_rank() :: RANKS]]
    run(own, data)
    for x, targets in data:
        F.mse_loss(nn.Sequential(*whole)(x), targets).backward()
    largest = max(float(grad.abs().max()) for grad in gradients(whole))
    right = gradients(whole[dist.get_rank() :: RANKS])
    return max(float((got - grad).abs().max()) for got, grad in zip(gradients(own), right, strict=True)) / largest


def ours(layers: list[Layer], data: list[Batch]) -> None:
    schedule = make_schedule(None, RANKS, len(layers), MICRO_BATCHES)
    runner = PipelineRunner(layers, ParallelMesh(pp=RANKS), schedule, inputs=lambda micro_batch: micro_batch[0])
    for batch in data:
        runner.step(micro_batches(batch), _summed, loss_scale=1 / batch[1].numel())


def _summed(x: Tensor, micro_batch: Batch) -> tuple[Tensor, int]:
    return F.mse_loss(x, micro_batch[1], reduction="sum"), micro_batch[1].numel()


def torchs(scale_grads: bool, layers: list[Layer], data: list[Batch]) -> None:
    def loss_fn(x: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(x, targets) / (1 if scale_grads else MICRO_BATCHES)

    stage = PipelineStage(layers[0], dist.get_rank(), RANKS, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=loss_fn, scale_grads=scale_grads)
    for x, targets in data:
        if dist.get_rank() == 0:
            schedule.step(x)
        else:
            schedule.step(target=targets)


@contextmanager
def _on_cpu() -> Iterator[None]:
    """Replaces what Megatron-core's schedules ask of CUDA: where a tensor is made, and to wait for a device that is not there."""
    zeros = torch.zeros

    def zeros_on_cpu(*args: Any, device: Any = None, **options: Any) -> Tensor:
        return zeros(*args, device="cpu" if device == "cuda" else device, **options)

    with (
        mock.patch("torch.zeros", zeros_on_cpu),
        mock.patch("torch.cuda.current_device", lambda: "cpu"),
        mock.patch("torch.cuda.synchronize", lambda: None),
    ):
        yield


class _Chunk(nn.Module):
    """A layer as Megatron-core's schedules want it. Hidden states are [s, b, h]."""

    def __init__(self, layer: Layer, config: Any, vp_stage: int) -> None:
        super().__init__()
        from megatron.core.enums import ModelType

        self.layer, self.config, self.model_type, self.vp_stage = layer, config, ModelType.encoder_or_decoder, vp_stage
        self.given: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor]) -> None:
        self.given = tensors[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if self.given is None else self.given)


def megatrons(options: dict[str, bool], layers: list[Layer], data: list[Batch]) -> None:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig

    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=RANKS, virtual_pipeline_model_parallel_size=len(layers), create_gloo_process_groups=False
    )
    sizes = {"num_layers": RANKS * len(layers), "hidden_size": HIDDEN, "num_attention_heads": 1}
    parallel = {"pipeline_model_parallel_size": RANKS, "virtual_pipeline_model_parallel_size": len(layers)}
    config = TransformerConfig(**sizes, **parallel, pipeline_dtype=torch.float32, **options)
    chunks = [_Chunk(layer, config, chunk) for chunk, layer in enumerate(layers)]

    def forward_step(iterator: Iterator[Batch], chunk: _Chunk) -> tuple[Tensor, Callable[[Tensor], Any]]:
        x, targets = (part.unsqueeze(1) for part in next(iterator))

        def loss_func(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = F.mse_loss(output, targets)
            return loss, {"loss": loss.detach()}

        return chunk(x), loss_func

    for batch in data:
        with _on_cpu():
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(micro_batches(batch)) for _ in chunks],
                model=chunks,
                num_microbatches=MICRO_BATCHES,
                seq_length=ROWS,
                micro_batch_size=1,
            )
    parallel_state.destroy_model_parallel()


def of_torch() -> list[Row]:
    """In one rank."""
    own, peer = error(ours, chunks=1, steps=2), f"accumulation, torch {torch.__version__.partition('+')[0]}"
    return [
        (f"{peer}: scale_grads=True (default)", error(partial(torchs, True), chunks=1, steps=2), own),
        (f"{peer}: scale_grads=False, loss / m", error(partial(torchs, False), chunks=1, steps=2), own),
    ]


def of_megatron(folder: str | None) -> list[Row]:
    """In one rank. `folder`: where megatron-core is, if it is not installed."""
    if folder is not None:
        sys.path.insert(0, folder)
    warnings.simplefilter("ignore", UserWarning)  # of Apex, Transformer Engine and CUDA graphs, none of which is used
    from megatron.core import __version__ as version

    own, peer = error(ours, chunks=2, steps=1), f"two chunks, megatron-core {version}"
    return [
        (f"{peer}: batch_p2p_comm=True (default)", error(partial(megatrons, {}), chunks=2, steps=1), own),
        (f"{peer}: overlap_p2p_comm=True instead", error(partial(megatrons, OVERLAPPED), chunks=2, steps=1), own),
    ]


def worst(by_rank: Sequence[list[Row]]) -> list[Row]:
    return [(rows[0][0], max(row[1] for row in rows), max(row[2] for row in rows)) for rows in zip(*by_rank, strict=True)]


def main(megatron: Path | None = None) -> None:
    """Shows both, writes results/silent_errors.json.

    Args:
        megatron: the folder that holds the package megatron, where it is not installed.
    """
    missing: dict[str, str] = {}
    rows = worst(start(RANKS, of_torch))
    if megatron is None and find_spec("megatron") is None:
        missing["megatron-core"] = "it is not installed: pip install --target FOLDER --no-deps megatron-core, and --megatron FOLDER"
    else:
        rows += worst(start(RANKS, of_megatron, None if megatron is None else str(megatron.resolve())))
    table = [[what, f"{peers:.2g}", f"{own:.1g}"] for what, peers, own in rows]
    grid = Grid("Silently wrong gradients, 2 ranks: error against one process", ["what, peer: its setting", "peer", "megapar"], table)
    bars = [Verdict("largest error of megapar", max(own for *_, own in rows), at_most=AGREE)]
    report("silent_errors", [grid], bars, missing, rows)


if __name__ == "__main__":
    tyro.cli(main)
