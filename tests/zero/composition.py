"""A decoder trained in any layout: tp x pp x dp, schedule, ZeRO stage, recomputation, precision; and what it is trained on."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megapar import ParallelMesh
from megapar.batch import TokenBatch
from megapar.models.config import DecoderConfig, gpt_style
from megapar.models.pipelined import PipelinedDecoder
from megapar.objectives.sample import IGNORED
from megapar.optim.precision import LossScaler, Precision
from megapar.params import Piece
from megapar.pipeline.kinds import make_schedule
from megapar.pipeline.schedule import Schedule
from megapar.recompute import Recompute
from megapar.training.step import TrainStep
from megapar.zero.optimizer import ZeroOptimizer
from megapar.zero.setup import AdamW
from tests.covering import Case

VOCABULARY = 37
MICRO_BATCHES = 3
SCALE = 2.0**8
"""Of the loss in fp16: far from overflow."""
PRECISIONS = {
    "fp32": Precision.of("fp32"),
    "bf16": Precision.of("bf16"),
    "bf16 remainder": Precision.of("bf16", master="remainder"),
    "fp16": Precision(torch.float16, scaler=LossScaler(SCALE)),
}
SIZES = {"hidden_size": 16, "layers": 4, "heads": 4, "ffn_size": 24}
MODELS = {
    "llama": DecoderConfig(**SIZES, kv_heads=2, init_std=0.1),
    "tied": DecoderConfig(**SIZES, kv_heads=2, init_std=0.1, tied_embeddings=True),
    "gpt": replace(gpt_style(**SIZES, kv_heads=1, max_positions=16), init_std=0.1),  # tied, biases, a KV head that ranks of tp share
}
LAYOUT: Case = {
    "tp": 1,
    "pp": 1,
    "dp": 1,
    "kind": "gpipe",
    "chunks": 1,
    "stage": 0,
    "reduce_every": "step",
    "reshard_every": "step",
    "recompute": "none",
    "sequence_parallel": False,
    "precision": "fp32",
    "model": "llama",
}
"""The plainest case, of which others are variations."""
Boxes = list[tuple[Piece, np.ndarray]]
"""Parts of logical tensors, as fp32."""


def batches(replica: int, step: int) -> list[TokenBatch]:
    """The micro-batches of a replica's step: of different lengths, and some targets of each do not count."""
    generator, made = torch.Generator().manual_seed(1000 * step + replica), []
    for m in range(MICRO_BATCHES):
        tokens = torch.randint(0, VOCABULARY, (2, 7 + (m + 2 * replica) % 4), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[0, : 1 + m + 2 * replica] = IGNORED
        made.append(TokenBatch.of(tokens[:, :-1], targets))
    return made


def trainer(case: Case, mesh: ParallelMesh, schedule: Schedule | None = None, **options: Any) -> TrainStep:
    """The training of this rank's stages; schedule: another than the case's; options: the ZeroOptimizer's."""
    precision = PRECISIONS[case["precision"]]
    options = {"update": AdamW(lr=1e-2), "precision": precision, "gather_ahead": True, **options}
    options |= {name: case[name] for name in ("stage", "reduce_every", "reshard_every")}
    model = PipelinedDecoder(
        MODELS[case["model"]],
        VOCABULARY,
        mesh,
        schedule=schedule or make_schedule(case["kind"], case["pp"], case["chunks"], MICRO_BATCHES),
        sequence_parallel=case["sequence_parallel"],
        recompute=Recompute(case["recompute"]),
        seed=3,
        dtype=precision.param,
        optimize=lambda stages: ZeroOptimizer(stages, mesh, **options),
    )
    return TrainStep(model, mesh)


def state(train: TrainStep) -> Boxes:
    """This rank's part of the weights, as their masters have them, and of the moments."""
    boxes = [(replace(box.piece, name=f"{box.kind} {box.piece.name}"), box.read()) for box in train.optimizer.boxes()]
    return [(piece, value.float().numpy().copy()) for piece, value in boxes]


def joined(boxes: Iterable[tuple[Piece, np.ndarray]]) -> dict[str, np.ndarray]:
    """The logical tensors that the boxes of several ranks are parts of, which agree to the last bit; NaN where there is none."""
    whole: dict[str, np.ndarray] = {}
    for piece, values in boxes:
        there = whole.setdefault(piece.name, np.full(piece.shape, np.nan, np.float32))[piece.index]
        known = ~np.isnan(there)
        assert np.array_equal(there[known], values[known]), f"{piece.name} differs between ranks"
        there[...] = values
    return whole
