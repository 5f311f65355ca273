"""Decoders under ZeRO, what they are trained on, and what is read of them afterwards."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapar import ParallelMesh, vocab_parallel_cross_entropy
from megapar.models.config import DecoderConfig, gpt_style
from megapar.models.decoder import Decoder
from megapar.transport import start_all_gather
from megapar.zero.optimizer import ZeroOptimizer
from megapar.zero.setup import AdamW
from tests.parity import Values, logical

VOCABULARY = 37
SIZES = {"hidden_size": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_size": 24}
LLAMA = DecoderConfig(**SIZES, init_std=0.2)
TIED = DecoderConfig(**SIZES, init_std=0.2, tied_embeddings=True)
GPT = replace(gpt_style(**{**SIZES, "kv_heads": 1}, max_positions=16), init_std=0.2)
CONFIGS = {"llama": LLAMA, "tied": TIED, "gpt": GPT}


def micro_batch(*place: int) -> Tensor:
    """int64 [2, 8], drawn from where it stands: (data-parallel rank, step, number)."""
    seed = sum(number * 1000**power for power, number in enumerate(place))
    return torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(seed))


TOKENS = 2 * 7
"""What a micro-batch's loss is a sum over."""


def loss_sum(model: Decoder, tokens: Tensor) -> Tensor:
    """Of the next tokens' losses."""
    logits = model(tokens[:, :-1])
    return vocab_parallel_cross_entropy(logits, tokens[:, 1:].reshape(-1), tp=model.tp, vocab_size=VOCABULARY).sum()


def decoder(mesh: ParallelMesh, config: DecoderConfig = LLAMA, **options: Any) -> Decoder:
    return Decoder(config, VOCABULARY, mesh, seed=3, **options)


def wrapped(model: nn.Module, mesh: ParallelMesh, **options: Any) -> ZeroOptimizer:
    """fp32 unless told otherwise."""
    return ZeroOptimizer(model, mesh, **{"update": AdamW(lr=1e-2), "precision": "fp32", **options})


def backward(optimizer: ZeroOptimizer, step: int, count: int = 2, loss: Callable[[Any, Tensor], Tensor] = loss_sum) -> None:
    """`count` micro-batches of this rank's."""
    model, rank = optimizer.chunks[0], optimizer.mesh.dp.rank
    for m in range(count):
        optimizer.backward(loss(model, micro_batch(rank, step, m)), last=m == count - 1)


def weights(optimizer: ZeroOptimizer) -> Values:
    """This tp rank's boxes, whole, as its masters have them where there are some: clones."""
    with optimizer.unshard():
        return logical(optimizer.chunks, lambda p: p)


def masters(optimizer: ZeroOptimizer) -> list[Tensor]:
    """This rank's."""
    return [master.clone() for master in optimizer.sharded.masters]


def reduced(optimizer: ZeroOptimizer) -> dict[nn.Parameter, Tensor]:
    """Whole gradients, once `grads.finish` has been: every rank's shards joined."""
    found = {}
    for param, shard in zip(optimizer.grads.params, optimizer.grads.shards, strict=True):
        joined = start_all_gather(shard.contiguous(), optimizer.mesh.dp).wait()
        found[param] = joined[: param.numel()].view(param.shape).clone()
    return found


def same(a: Values, b: Values) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Plain(nn.Module):
    """Nothing of megapar's: blocks of nn.Linear and LayerNorm between an embedding and a projection."""

    def __init__(self, blocks: int = 3, hidden: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.blocks = nn.ModuleList(PlainBlock(hidden) for _ in range(blocks))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PlainBlock(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(hidden), nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def plain_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")
