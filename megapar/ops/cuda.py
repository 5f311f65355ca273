"""The bodies of `adamw_`, `grad_norm_` and `step_state_` that MEGAPAR_BACKEND=cuda runs: the compiled kernels of csrc/cuda.

Checks and tables are those of megapar/ops/multi_tensor.py, the kernels' launchers the ops of `torch.ops.megapar_cuda`. Formulas and bytes
stand in the files of the ops. No body waits for the device or reads from it, so a CUDA graph may capture them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megapar.ops import multi_tensor as lists
from megapar.ops.specs import Spec, check_lr_scale, check_rates


def adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scalars: Tensor,
    counters: Tensor,
    rows: Sequence[int],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    seed: int | None = None,
    ids: Sequence[int] = (),
    places: Sequence[int] = (),
    lr_scale: Tensor | None = None,
) -> None:
    """See `megapar.ops.adamw`."""
    numbers = (lr, beta1, beta2, eps, weight_decay)
    check_rates(*numbers)
    if lr_scale is not None:
        check_lr_scale(Spec.of(lr_scale), scalars.device)
    tensors = (weights, grads, masters, exp_avgs, exp_avg_sqs)
    tables = lists.adamw_tables(*tensors, scalars, counters, rows, seed=seed, ids=ids, places=places)
    lists.bump_versions([*weights])
    table = tables.table.on_this_stream()
    for group in tables.groups:
        chunks = group.chunks.on_this_stream()
        torch.ops.megapar_cuda.adamw_(
            table, chunks, lists.CHUNK, *group.dtypes, scalars, counters, lr_scale, *numbers, decoupled, seed
        )


def grad_norm_(total: Tensor, grads: Sequence[Tensor], count_zeros: bool = False) -> None:
    """See `megapar.ops.grad_norm`."""
    tables, count = lists.grad_norm_tables(total, grads)
    table, partials = tables.table.on_this_stream(), total.new_empty(count, 3)
    for group in tables.groups:
        chunks = group.chunks.on_this_stream()
        torch.ops.megapar_cuda.grad_norm_chunks_(partials, table, chunks, lists.NORM_CHUNK, *group.dtypes, count_zeros)
    torch.ops.megapar_cuda.grad_norm_total_(total, total.new_empty(len(grads), 3), partials, table, lists.NORM_CHUNK)


def step_state_(
    scalars: Tensor,
    counters: Tensor,
    total: Tensor,
    count: Tensor,
    rows: Sequence[int],
    beta1: Sequence[float],
    beta2: Sequence[float],
    max_norm: float | None,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    hysteresis: int,
    min_scale: float,
) -> None:
    """See `megapar.ops.step_state`."""
    table = lists.step_state_table(scalars, counters, total, count, rows, beta1, beta2).on_this_stream()
    scaling = (growth_factor, backoff_factor, growth_interval, hysteresis, min_scale)
    torch.ops.megapar_cuda.step_state_(scalars, counters, total, count, table, max_norm, *scaling)
