"""megapar: Megatron-style model-parallel layers, kernels and training in PyTorch, right in every combination and small enough to read."""

from megapar.layers.cross_entropy import vocab_parallel_cross_entropy
from megapar.layers.embedding import VocabParallelEmbedding
from megapar.layers.linear import ColumnParallelLinear, RowParallelLinear, Shards
from megapar.layers.parallelize import parallelize
from megapar.mesh import Axis, ParallelMesh
from megapar.optim.adamw import FusedAdamW
from megapar.optim.grad_norm import clip_grad_norm_
from megapar.optim.precision import LossScaler, Precision
from megapar.params import initialize
from megapar.pipeline.kinds import make_schedule
from megapar.pipeline.runtime import PipelineRunner
from megapar.recompute import Recompute, apply_recompute
from megapar.zero.optimizer import ZeroOptimizer
from megapar.zero.setup import AdamW

__all__ = [
    "AdamW",
    "Axis",
    "ColumnParallelLinear",
    "FusedAdamW",
    "LossScaler",
    "ParallelMesh",
    "PipelineRunner",
    "Precision",
    "Recompute",
    "RowParallelLinear",
    "Shards",
    "VocabParallelEmbedding",
    "ZeroOptimizer",
    "apply_recompute",
    "clip_grad_norm_",
    "initialize",
    "make_schedule",
    "parallelize",
    "vocab_parallel_cross_entropy",
]
__version__ = "0.1.0"
