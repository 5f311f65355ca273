"""A Llama decoder in plain PyTorch, written the way people write it, and torch's own ways to make it parallel.

The same math as megapar's decoder (pre-norm, half-split RoPE, SwiGLU), with a linear layer for each matrix. `tensor_parallel_plans` is
torchtitan's plan for Llama (torchtitan/models/llama3/parallelize.py): every layer hands plain local tensors to the code between the
GEMMs, which is DTensor's fastest way; one collective each for the inputs of attention and of the feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel, parallelize_module

from megapar.params import named_specs

EPS = 1e-5


def rotate_half(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def rotary(s: int, d: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [s, d]."""
    frequency = theta ** (-torch.arange(0, d, 2).float() / d)
    angle = torch.outer(torch.arange(s).float(), frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.d = hidden // heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.wq(x).view(b, s, -1, self.d).transpose(1, 2)
        k = self.wk(x).view(b, s, -1, self.d).transpose(1, 2)
        v = self.wv(x).view(b, s, -1, self.d).transpose(1, 2)
        q = (q * cos + rotate_half(q) * sin).type_as(v)
        k = (k * cos + rotate_half(k) * sin).type_as(v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(b, s, -1))


class FeedForward(nn.Module):
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, ffn, bias=False)
        self.w2 = nn.Linear(ffn, hidden, bias=False)
        self.w3 = nn.Linear(hidden, ffn, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.attention = Attention(hidden, heads)
        self.feed_forward = FeedForward(hidden, ffn)
        self.attention_norm = nn.RMSNorm(hidden, eps=EPS)
        self.ffn_norm = nn.RMSNorm(hidden, eps=EPS)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """tokens [b, s] to logits [b, s, vocab]."""

    def __init__(self, vocab: int, hidden: int, heads: int, ffn: int, layers: int) -> None:
        super().__init__()
        self.d = hidden // heads
        self.tok_embeddings = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Block(hidden, heads, ffn) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=EPS)
        self.output = nn.Linear(hidden, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        cos, sin = rotary(tokens.shape[1], self.d)
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.output(self.norm(x))


def tensor_parallel_plans(sequence_parallel: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(plan of the whole model, plan of a block)."""
    between = Shard(1) if sequence_parallel else Replicate()
    block: dict[str, Any] = {
        "attention": PrepareModuleInput(input_layouts=(between, None, None), desired_input_layouts=(Replicate(), None, None)),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=between),
        "feed_forward": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),)),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w3": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=between),
    }
    model: dict[str, Any] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "output": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence_parallel:
        block |= {"attention_norm": SequenceParallel(), "ffn_norm": SequenceParallel()}
        model["norm"] = SequenceParallel()
    return model, block


def with_dtensor(model: Llama | Block, mesh: DeviceMesh, sequence_parallel: bool, compiled: bool = False) -> nn.Module:
    """Makes the model tensor-parallel in place, and compiles it block by block, as torchtitan does."""
    model_plan, block_plan = tensor_parallel_plans(sequence_parallel)
    blocks = [model] if isinstance(model, Block) else list(model.layers)
    if isinstance(model, Llama):
        parallelize_module(model, mesh, model_plan)
    for block in blocks:
        parallelize_module(block, mesh, block_plan)
        if compiled:
            block.compile(fullgraph=True)
    if compiled and isinstance(model, Llama):
        # torch 2.13's AOTAutograd loses the gradient's type when the first compiled block is given a collective under way.
        model.tok_embeddings.register_forward_hook(lambda _, __, out: out.wait() if isinstance(out, AsyncCollectiveTensor) else out)
    return model


NAMES = {
    "tok_embeddings": "embedding",
    "output": "head",
    "layers": "blocks",
    "feed_forward": "mlp",
    "ffn_norm": "mlp_norm",
    "wq": "q",
    "wk": "k",
    "wv": "v",
    "wo": "out",
    "w1": "gate",
    "w2": "down",
    "w3": "up",
}


def megapar_name(name: str) -> str:
    """What megapar calls the logical tensor that is parameter `name` here."""
    return ".".join(NAMES.get(word, word) for word in name.split("."))


def boxes(model: nn.Module, local: str | None = None) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
    """(logical name, box, this rank's values there) of a megapar model: of its parameters, or of their attribute `local`."""
    for _, param, spec in named_specs(model):
        for piece, view in spec.views(getattr(param, local) if local else param.data):
            yield piece.name, piece.index, view


@torch.no_grad()
def load(model: nn.Module, plain: nn.Module) -> None:
    """Copies the weights of a plain model into a megapar model."""
    full = {megapar_name(name): param for name, param in plain.named_parameters()}
    for name, index, view in boxes(model):
        view.copy_(full[name][index])


def gradient_error(model: nn.Module, plain: nn.Module, local: str = "grad") -> float:
    """Largest difference of this rank's gradients from the plain model's, over the plain model's largest one.

    `model` is megapar's, the gradients in attribute `local` of its parameters, or one of torch's, whose DTensors are gathered.
    """
    full: dict[str, Any] = {megapar_name(name): param.grad for name, param in plain.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in full.values())
    if [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]:
        given = {megapar_name(name): param.grad for name, param in model.named_parameters()}
        got = [(name, (), grad.full_tensor() if hasattr(grad, "full_tensor") else grad) for name, grad in given.items()]
    else:
        got = list(boxes(model, local))
    return max(float((view - full[name][index]).abs().max()) for name, index, view in got) / largest


def seeded(vocab: int, hidden: int, heads: int, ffn: int, layers: int) -> Llama:
    """The same Llama in every process, its matrices drawn with a standard deviation of 0.02."""
    torch.manual_seed(0)
    plain = Llama(vocab, hidden, heads, ffn, layers)
    for param in plain.parameters():
        if param.dim() > 1:
            nn.init.normal_(param, std=0.02)
    return plain
