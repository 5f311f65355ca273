"""A decoder in a pipeline: this rank's stages of it, and the runner that executes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megapar.batch import TokenBatch
from megapar.grads import MainGrads
from megapar.mesh import ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.models.decoder import DecoderStage
from megapar.params import split as cut
from megapar.pipeline.orders import one_f_one_b
from megapar.pipeline.passes import with_sharding
from megapar.pipeline.runtime import PipelineRunner
from megapar.pipeline.schedule import Schedule
from megapar.pipeline.split import split_layers
from megapar.recompute import Recompute
from megapar.transport import start_all_gather
from megapar.zero.optimizer import ZeroOptimizer


class PipelinedDecoder:
    """The stages of a decoder that a schedule places on this rank; its micro-batches are TokenBatches.

    schedule: None runs one micro-batch a step. split: as in `split_layers`; layers cost what their products do, with sequences of
    `sequence_length`. Gradients arrive in main_grad (`grads`). optimize: makes the ZeroOptimizer of the stages, in which gradients then
    are, and which shards what it shards by the schedule's actions. The model is the same for every mesh and schedule. Raises ValueError for
    fewer layers than stages, and for several chunks without a pipeline, in which they would be one.
    """

    def __init__(
        self,
        config: DecoderConfig,
        vocab_size: int,
        mesh: ParallelMesh,
        *,
        schedule: Schedule | None = None,
        split: str = "balanced",
        sequence_length: int = 1,
        sequence_parallel: bool = False,
        recompute: Recompute | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        optimize: Callable[[Sequence[nn.Module]], ZeroOptimizer] | None = None,
    ) -> None:
        schedule = schedule or one_f_one_b(mesh.pp.size, 1)
        self.config, self.vocab_size, self.mesh, self.tp = config, vocab_size, mesh, mesh.tp
        self.cuts = decoder_cuts(config, vocab_size, schedule, split, sequence_length)
        # Of every stage, so that all ranks refuse together.
        (recompute or Recompute()).check(min(stop - start for start, stop in self.cuts), mesh.tp.size, sequence_parallel)
        options: dict[str, Any] = {"sequence_parallel": sequence_parallel, "recompute": recompute, "seed": seed, "dtype": dtype}
        options["device"] = None if optimize is None else "meta"  # an optimizer draws no more than this rank keeps
        self.stages = [
            DecoderStage(config, vocab_size, mesh, layers=layers, **options)
            for layers, rank in zip(self.cuts, schedule.stage_to_rank, strict=True)
            if rank == mesh.pp.rank
        ]
        self.optimizer = None if optimize is None else optimize(self.stages)
        if self.optimizer is None:
            self.grads = MainGrads(param for stage in self.stages for param in stage.parameters())
            self.runner = PipelineRunner(self.stages, mesh, schedule)
            return
        self.grads = self.optimizer.grads
        self.runner = PipelineRunner(self.stages, mesh, self._sharded(schedule), sharding=self.optimizer.actions(schedule.stage_to_rank))

    def set_schedule(self, schedule: Schedule) -> None:
        """Steps by another schedule of the same stages on the same ranks, with another number of micro-batches for example.

        Every rank of the mesh calls it, between accumulations; weights, optimizer and gradients stay. As `PipelineRunner.set_schedule`.
        """
        self.runner.set_schedule(self._sharded(schedule))

    def _sharded(self, schedule: Schedule) -> Schedule:
        """With what the optimizer does to the shards of each stage."""
        if self.optimizer is None:
            return schedule
        how = self.optimizer.options
        prefetch = 1 if how.reshard_every == "micro_batch" else len(self.stages)
        return with_sharding(schedule, prefetch, every_micro_batch=how.reduce_every == "micro_batch")

    @torch.no_grad()
    def next_logits(self, tokens: Tensor) -> Tensor:
        """int64 [b, s] to the logits of the token after them, [b, v / tp], the same bits on every pipeline rank."""
        batch, pp = TokenBatch.of(tokens), self.mesh.pp
        output = self.runner.forward(batch)
        start, stop = cut(self.vocab_size, self.tp.size)[self.tp.rank]
        if self.runner.is_last:
            logits = self.stages[-1].logits(output, batch).view(batch.b, batch.s, -1)[:, -1].contiguous()
        else:
            param = next(self.stages[0].parameters())
            logits = torch.zeros(batch.b, stop - start, dtype=param.dtype, device=param.device)
        return logits if pp.size == 1 else start_all_gather(logits[None], pp).wait()[self.runner.schedule.stage_to_rank[-1]]


def decoder_cuts(config: DecoderConfig, vocab_size: int, schedule: Schedule, split: str, sequence_length: int) -> list[tuple[int, int]]:
    """Each stage's layers. Raises ValueError where the decoder cannot be cut so. Needs no process group."""
    pp, stages = len(schedule.ranks), schedule.stages
    if pp == 1 and stages > 1:
        raise ValueError(f"chunks={stages} needs pp of 2 or more, there is one pipeline rank: leave chunks out, or raise pp")
    if config.layers < stages:
        raise ValueError(
            f"pp={pp} with {stages // pp} chunks needs at least {stages} layers, the model has {config.layers}: lower pp or chunks"
        )
    block, head = config.products(vocab_size, sequence_length)
    return split_layers([block] * (config.layers - 1) + [block + head], stages, split)
