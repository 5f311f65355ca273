"""Decoders in a pipeline, and what they are trained on: for the tests that compare them with one process."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megapar import ParallelMesh
from megapar.batch import TokenBatch
from megapar.layers.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from megapar.models.config import DecoderConfig
from megapar.models.decoder import DecoderStage

VOCABULARY = 61
MicroBatch = tuple[TokenBatch, Tensor]


def micro_batches(count: int, varying: bool = False, seed: int = 0) -> list[MicroBatch]:
    """Of 2 sequences; if `varying`, of 7, 8 or 9 tokens each, else of 7."""
    generator, made = torch.Generator().manual_seed(seed), []
    for m in range(count):
        tokens = torch.randint(0, VOCABULARY, (2, 8 + (m % 3 if varying else 0)), generator=generator)
        made.append((TokenBatch.of(tokens[:, :-1]), tokens[:, 1:]))
    return made


class Chunk(nn.Module):
    """A stage, called with what a runner calls a chunk with."""

    def __init__(self, stage: DecoderStage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor | None, micro_batch: MicroBatch) -> Tensor:
        return self.stage(x, micro_batch[0])


def intervals(sizes: list[int]) -> list[tuple[int, int]]:
    """Blocks of each stage, for so many a stage."""
    return [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


def stages_of(
    config: DecoderConfig, mesh: ParallelMesh, chunks: int, sizes: list[int] | None = None, sequence_parallel: bool = False
) -> list[DecoderStage]:
    """This rank's stages; `sizes`: the blocks of every stage, by default one each."""
    cuts = intervals(sizes or [1] * mesh.pp.size * chunks)
    places = [chunk * mesh.pp.size + mesh.pp.rank for chunk in range(chunks)]
    return [DecoderStage(config, VOCABULARY, mesh, layers=cuts[place], sequence_parallel=sequence_parallel) for place in places]


def loss_of(stage: DecoderStage) -> Callable[[Any, MicroBatch], tuple[Tensor, int]]:
    """The loss function of the stage, which is the last one (elsewhere it is not called)."""

    def loss_fn(x: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, int]:
        targets = micro_batch[1]
        loss = vocab_parallel_linear_cross_entropy(
            x, stage.head.weight, targets, tp=stage.tp, vocab_size=VOCABULARY, sequence_parallel=stage.sequence_parallel
        )
        return loss, targets.numel()

    return loss_fn
