"""megapar: Megatron-style model-parallel layers, kernels and training in PyTorch, right in every combination and small enough to read."""

from megapar.layers.cross_entropy import vocab_parallel_cross_entropy
from megapar.layers.embedding import VocabParallelEmbedding
from megapar.layers.linear import ColumnParallelLinear, RowParallelLinear, Shards
from megapar.layers.parallelize import parallelize
from megapar.mesh import Axis, ParallelMesh
from megapar.optim.adamw import FusedAdamW
from megapar.optim.grad_norm import clip_grad_norm_
from megapar.params import initialize

__all__ = [
    "Axis",
    "ColumnParallelLinear",
    "FusedAdamW",
    "ParallelMesh",
    "RowParallelLinear",
    "Shards",
    "VocabParallelEmbedding",
    "clip_grad_norm_",
    "initialize",
    "parallelize",
    "vocab_parallel_cross_entropy",
]
__version__ = "0.1.0"
