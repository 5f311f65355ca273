"""The decoder: embedding, blocks, norm, output projection; Llama- or GPT-style by its config, tensor-parallel by its mesh; whole, or as a
stage of a pipeline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megapar.batch import TokenBatch
from megapar.collectives import with_summed_grad
from megapar.layers.attention import Attention
from megapar.layers.block import DecoderBlock
from megapar.layers.embedding import VocabParallelEmbedding, check_ids, embed, with_gradient_times
from megapar.layers.linear import ColumnParallelLinear
from megapar.layers.mlp import MLP
from megapar.layers.norm import LayerNorm, RMSNorm
from megapar.mesh import Axis, ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.params import Init, Interval, ParamSpec, Piece, SpecParameter, initialize
from megapar.recompute import Recompute, apply_recompute


class DecoderStage(nn.Module):
    """Some of a decoder's blocks, the embedding before the first of them, the norm and output projection after the last.

    layers: the blocks [start, stop) that it holds; all of them by default. Built on `meta` and then drawn tensor by tensor from
    (seed, name), which are those of the whole decoder: the same model for every layout. device: the mesh's by default; "meta" leaves the
    drawing to a ZeroOptimizer. Between embedding and output projection hidden
    states are [t, h], or [ceil(t / tp), h] with `sequence_parallel`. Tied embeddings on two pipeline ranks are two parameters that hold
    one logical tensor: their gradients are summed over the two ranks, the first stage's is the one that counts and is saved.
    """

    def __init__(
        self,
        config: DecoderConfig,
        vocab_size: int,
        mesh: ParallelMesh,
        *,
        layers: Interval | None = None,
        sequence_parallel: bool = False,
        recompute: Recompute | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.tp = config, vocab_size, mesh.tp
        start, stop = layers or (0, config.layers)
        self.is_first, self.is_last = start == 0, stop == config.layers
        self.sequence_parallel = sequence_parallel and mesh.tp.size > 1
        init = normal(config.init_std)
        self.common: dict[str, Any] = {"tp": mesh.tp, "sequence_parallel": self.sequence_parallel, "device": "meta", "dtype": dtype}
        if self.is_first:
            self.embedding = VocabParallelEmbedding(vocab_size, config.hidden_size, init=init, **self.common)
            self.positions = LearnedPositions(config, mesh.tp, self.sequence_parallel, dtype) if config.positions == "learned" else None
        self.blocks = nn.ModuleDict({str(layer): self._block(init) for layer in range(start, stop)})
        if self.is_last:
            self.norm = self._norm()
            self.head = ColumnParallelLinear(config.hidden_size, vocab_size, bias=False, init=init, **self.common)
        if config.tied_embeddings:
            self._tie(mesh.pp_ends)
        apply_recompute([*self.blocks.values()], recompute or Recompute(), tp=mesh.tp, sequence_parallel=self.sequence_parallel)
        initialize(self, seed, device or mesh.device)

    def forward(self, x: Tensor | None, batch: TokenBatch) -> Tensor:
        """Hidden states from those of the stage before, from `batch.tokens` on the first stage; normed on the last one."""
        if self.is_first:
            if self.positions is not None:
                check_ids(batch.position_ids, self.config.max_positions, "position_ids")
            x = with_gradient_times(self.config.embedding_gradient, self.embedding(batch.tokens))
            if self.positions is not None:
                x = self.positions(x, batch)
        for block in self.blocks.values():
            x = block(x, batch)
        return self.norm(x) if self.is_last else x  # type: ignore[return-value]

    def logits(self, x: Tensor, batch: TokenBatch) -> Tensor:
        """Of the last stage: logits [t, v / tp] of what its forward returned."""
        return batch.unpad(self.head(x))

    def _tie(self, ends: Axis) -> None:
        if self.is_first and self.is_last:
            self.head.weight = self.embedding.weight
        elif self.is_first or self.is_last:
            layer = self.embedding if self.is_first else self.head
            spec = layer.weight.spec
            pieces = tuple(replace(piece, name="../embedding.weight") for piece in spec.pieces)
            layer.weight.spec = replace(spec, pieces=pieces, tie=ends, owner=self.is_first)

    def _norm(self) -> nn.Module:
        norm = RMSNorm if self.config.norm == "rms" else LayerNorm
        return norm(self.config.hidden_size, eps=self.config.norm_eps, **self.common)

    def _block(self, init: Init) -> DecoderBlock:
        config, out_init = self.config, normal(self.config.init_std / (2 * self.config.layers) ** 0.5)
        attention = Attention(
            config.hidden_size,
            config.heads,
            config.kv_heads,
            head_size=config.head_size,
            bias=config.bias,
            rope_theta=config.rope_theta if config.positions == "rope" else None,
            init=init,
            out_init=out_init,
            backend=config.attention,
            **self.common,
        )
        mlp = MLP(
            config.hidden_size, config.ffn_size, activation=config.activation, bias=config.bias, init=init, out_init=out_init, **self.common
        )
        return DecoderBlock(self._norm(), attention, self._norm(), mlp)


class Decoder(DecoderStage):
    """All of a decoder: TokenBatch of t tokens to logits [t, this rank's part of the vocabulary]."""

    def __init__(
        self,
        config: DecoderConfig,
        vocab_size: int,
        mesh: ParallelMesh,
        *,
        sequence_parallel: bool = False,
        recompute: Recompute | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        options: dict[str, Any] = {"sequence_parallel": sequence_parallel, "recompute": recompute}
        super().__init__(config, vocab_size, mesh, **options, seed=seed, dtype=dtype, device=device)

    def forward(self, batch: TokenBatch | Tensor | None, stage_batch: TokenBatch | None = None) -> Tensor:  # type: ignore[override]
        """Logits [t, v / tp] of a TokenBatch, or of int64 tokens [b, s]; with (None, TokenBatch), as a stage, hidden states."""
        if stage_batch is not None:
            return super().forward(None, stage_batch)
        assert batch is not None
        if isinstance(batch, Tensor):
            batch = TokenBatch.of(batch)
        return self.logits(self.hidden(batch), batch)

    @torch.no_grad()
    def next_logits(self, tokens: Tensor) -> Tensor:
        """int64 [b, s] to the logits of the token after them, [b, v / tp]."""
        return self(tokens).view(*tokens.shape, -1)[:, -1]

    def hidden(self, batch: TokenBatch) -> Tensor:
        """What the output projection is given: [t, h], or [ceil(t / tp), h] with sequence parallelism."""
        return self(None, batch)  # by the module's call, on which ZeRO's gathers hang


class LearnedPositions(nn.Module):
    """Adds a learned vector for each position to the hidden states, [t, h] or this rank's share of them."""

    def __init__(self, config: DecoderConfig, tp: Axis, sequence_parallel: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.tp, self.alone, self.sequence_parallel = tp, Axis.single("positions"), sequence_parallel
        shape = (config.max_positions, config.hidden_size)
        partial = tp if sequence_parallel else None
        spec = ParamSpec((Piece.whole("weight", shape),), normal(config.init_std), partial, owner=tp.rank == 0, defers=True)
        self.weight = SpecParameter.of(torch.empty(shape, device="meta", dtype=dtype), spec)

    def forward(self, x: Tensor, batch: TokenBatch) -> Tensor:
        ids = batch.position_ids
        if self.sequence_parallel:
            c = x.shape[0]
            ids = ids[self.tp.rank * c : (self.tp.rank + 1) * c]
        vectors = embed(ids, with_summed_grad(self.weight), self.alone)
        if vectors.shape[0] < x.shape[0]:
            # The padding rows of sequence parallelism have no position.
            vectors = nn.functional.pad(vectors, (0, 0, 0, x.shape[0] - vectors.shape[0]))
        return x + vectors


def normal(std: float) -> Init:
    """N(0, std^2)."""

    def init(full: Tensor, generator: torch.Generator | None) -> None:
        full.normal_(std=std, generator=generator)

    return init
