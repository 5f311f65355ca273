"""Whom benchmarks/zero.py compares, by name; megapar's ZeroOptimizer among them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.plain_llama import load
from benchmarks.zero_case import ALONE, AUTOCAST, COMPILED, DEEPSPEED, OURS, Case, Data, Trainer, plain_model
from benchmarks.zero_peers import DeepSpeedZero, Torch
from megapar.batch import TokenBatch
from megapar.mesh import ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.models.decoder import DecoderStage
from megapar.objectives.causal_lm import token_loss
from megapar.zero.optimizer import AdamW, ZeroOptimizer


class Ours:
    """megapar's decoder and ZeroOptimizer of a stage from 0 to 3; "alone" is stage 0 of a rank by itself."""

    def __init__(self, case: Case, stage: str) -> None:
        sizes, alone = case.sizes, stage == ALONE
        mesh = ParallelMesh.alone() if alone else ParallelMesh()
        config = DecoderConfig(hidden_size=sizes.hidden, layers=sizes.layers, heads=sizes.heads, ffn_size=sizes.ffn)
        self.model = DecoderStage(config, sizes.vocab, mesh, dtype=case.dtype)
        load(self.model, plain_model(case))
        self.optimizer = ZeroOptimizer(
            self.model,
            mesh,
            stage=0 if alone else int(stage),
            update=AdamW(**case.adamw),
            precision=case.precision,
            max_norm=case.max_norm,
            reduce_every=case.reduce_every,
            groups=[{"params": list(self.model.parameters())}],  # the peers' weight decay knows no vectors
        )

    def backward(self, data: Data) -> None:
        self.count = 0
        for i, (inputs, targets) in enumerate(data):
            batch = TokenBatch.of(inputs, targets)
            # Through the module's call, where stage 3 gathers the weights.
            loss, count = token_loss(self.model, self.model(None, batch), batch)
            self.optimizer.backward(loss, last=i == len(data) - 1)
            self.count += count

    def update(self) -> Tensor:
        return self.optimizer.step(self.count).grad_norm

    def weights(self) -> dict[str, Tensor]:
        mine = [(box.piece, box.read().float().clone()) for box in self.optimizer.boxes() if box.kind == "weight"]
        everyone: list[Any] = [mine]
        if self.optimizer.mesh.dp.size > 1:
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        full: dict[str, Tensor] = {}
        for piece, value in itertools.chain(*everyone):
            full.setdefault(piece.name, torch.full(piece.shape, torch.nan))[piece.index] = value
        return full


def trainer(case: Case, name: str) -> Trainer:
    """Of a name such as "megapar 3", "torch FSDP2 3, compiled" or "DeepSpeed 1"."""
    who, _, what = name.replace(COMPILED, "").replace(AUTOCAST, "").partition(" ")
    if who == OURS:
        return Ours(case, what)
    if who == DEEPSPEED:
        return DeepSpeedZero(case, int(what), COMPILED in name)
    return Torch(case, what, COMPILED in name, AUTOCAST in name)
