"""How a run lies over its ranks, from its config."""

from __future__ import annotations

from datetime import timedelta

from megapar.layers.attention import split_heads
from megapar.mesh import ParallelMesh, data_parallel_size
from megapar.models.pipelined import decoder_cuts
from megapar.params import split
from megapar.training.config import Config
from megapar.training.sections import batches_of, check_batches, ranks_of, recompute_of, schedule_of


def check_layout(config: Config, world_size: int) -> None:
    """Raises ValueError unless model and batches can be cut over the config's ranks and they are `world_size`. Needs no process group."""
    model, parallel, tp = config.model, config.parallel, config.parallel.tp
    if data_parallel_size(world_size, tp=tp, pp=parallel.pp) != parallel.dp:
        layout = f"parallel.tp={tp} x parallel.dp={parallel.dp} x parallel.pp={parallel.pp}"
        fix = f"start {ranks_of(config)}, or change --dp"
        raise ValueError(f"the world has {world_size} ranks and {layout} uses {ranks_of(config)}: {fix}")
    check_batches(config)
    split_heads(model.heads, model.kv_heads or model.heads, tp)
    split(model.ffn_size, tp, what="model.ffn_size")
    schedule = schedule_of(config, batches_of(config).batch_at(0))
    cuts = decoder_cuts(model, config.data.vocab_size, schedule, parallel.split, config.data.sequence_length)
    recompute_of(config).check(min(stop - start for start, stop in cuts), tp, parallel.sequence_parallel)


def make_mesh(config: Config) -> ParallelMesh:
    """The mesh that the config asks for: on GPUs, or on the CPU where there are none or it says so."""
    device = "cpu" if config.parallel.device == "cpu" else None
    return ParallelMesh(tp=config.parallel.tp, pp=config.parallel.pp, device=device, timeout=timedelta(seconds=config.parallel.timeout))
