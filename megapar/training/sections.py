"""What the sections of a config mean: how batches are cut and grow, rates, precision, recomputation, recovery."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from megapar.mesh import data_parallel_size
from megapar.ops.step_state import LossScaling
from megapar.optim.precision import PARAMETERS, LossScaler, Master, Precision
from megapar.pipeline.kinds import make_schedule
from megapar.pipeline.schedule import Schedule
from megapar.recompute import Recompute
from megapar.training.batch_size import BatchSchedule, Scaling, parse_amount
from megapar.training.config import Config, PrecisionConfig, RecoveryConfig
from megapar.training.lr import RateSchedule, WeightDecaySchedule


def with_dp(config: Config, world_size: int) -> Config:
    """The config with as many replicas as `world_size` ranks make, where it says "auto"."""
    parallel = config.parallel
    if parallel.dp != "auto":
        return config
    dp = data_parallel_size(world_size, tp=parallel.tp, pp=parallel.pp)
    return dataclasses.replace(config, parallel=dataclasses.replace(parallel, dp=dp))


def replicas(config: Config) -> int:
    """parallel.dp, once `with_dp` has made it a number; 1 before that."""
    return 1 if config.parallel.dp == "auto" else config.parallel.dp


def ranks_of(config: Config) -> int:
    """How many ranks the layout has, with one replica where their number is open."""
    return config.parallel.tp * replicas(config) * config.parallel.pp


# Batches


def batches_of(config: Config) -> BatchSchedule:
    """The batch size over the run. Raises ValueError for a text that is none."""
    run, length = config.run, config.data.sequence_length
    if run.rampup and isinstance(run.batch_size, str):
        raise ValueError(f'run.rampup="{run.rampup}" ends at run.batch_size, which is "{run.batch_size}": make that a number')
    try:
        if run.rampup:
            return BatchSchedule.ramp(run.rampup, int(run.batch_size), length)
        return BatchSchedule.parse(run.batch_size, length)
    except ValueError as error:
        raise ValueError(f"{'run.rampup' if run.rampup else 'run.batch_size'}: {error}") from error


def steps_of(config: Config) -> int:
    """Optimizer steps of the run. Raises ValueError for a run.length that is none."""
    if not config.run.length:
        return config.run.steps
    amount, _, unit = config.run.length.partition(" ")
    if unit not in ("samples", "tokens"):
        raise ValueError(f'run.length="{config.run.length}" must be an amount of samples or tokens: such as "10M samples"')
    samples = parse_amount(amount)
    samples = samples if unit == "samples" else samples // config.data.sequence_length
    batches = batches_of(config)
    if not (steps := batches.steps(samples)):
        told = f'run.length="{config.run.length}" is {samples} samples and a step takes {batches.batch_at(0)}'
        raise ValueError(f"{told}: make it longer")
    return steps


def micro_batch_size(config: Config) -> int:
    """Samples in a micro-batch of one replica. Raises ValueError where a step cannot be cut as the config says."""
    run, dp = config.run, replicas(config)
    sizes = sorted({size for _, size in batches_of(config).stages})
    if len(sizes) > 1:
        if run.microbatches is not None:
            raise ValueError(f"run.microbatches={run.microbatches} does not go with a batch that changes: give run.micro_batch_size")
        return run.micro_batch_size or max(1, math.gcd(*sizes) // dp)
    size, count, batch = run.micro_batch_size, run.microbatches, sizes[0]
    over = f" x parallel.dp={dp}" if dp > 1 else ""
    if size is not None and count is not None and size * count * dp != batch:
        both = f"run.micro_batch_size={size} x run.microbatches={count}{over}"
        raise ValueError(f"{both} must be run.batch_size={batch}: leave one of the two out, or change them")
    for name, divisor in (("micro_batch_size", size), ("microbatches", count or (1 if dp > 1 else None))):
        if divisor is not None and batch % (divisor * dp):
            raise ValueError(f"run.batch_size={batch} must be a multiple of run.{name}={divisor}{over}: change one")
    return size if size is not None else batch // ((count or 1) * dp)


def schedule_of(config: Config, batch_size: int) -> Schedule:
    """The pipeline schedule of a step of so many samples. Raises ValueError where the config's parts do not go together."""
    return _schedule(config, batch_size // (replicas(config) * micro_batch_size(config)))


def _schedule(config: Config, microbatches: int) -> Schedule:
    parallel = config.parallel
    kind = None if parallel.schedule == "auto" else parallel.schedule
    return make_schedule(kind, parallel.pp, parallel.chunks, microbatches)


MOST_STAGES = 1000
"""Each is proven to have a schedule before training starts, which takes milliseconds."""


def check_batches(config: Config) -> None:
    """Raises ValueError for the first stage of the batch's growth that micro-batches, replicas or the pipeline cannot have."""
    size, batches = micro_batch_size(config), batches_of(config)
    if len(batches.stages) > MOST_STAGES:
        raise ValueError(f"the batch has {len(batches.stages)} sizes, and {MOST_STAGES} are the most: take a larger increment")
    if len(batches.stages) > 1:
        batches.check(replicas(config), size, lambda count: _schedule(config, count))


# Rates


@dataclass(frozen=True)
class Rates:
    """What an update's learning rate and weight decay are functions of."""

    batches: BatchSchedule
    lr: RateSchedule
    weight_decay: WeightDecaySchedule
    unit: str
    sequence_length: int
    batch_scaling: Scaling

    def at(self, updates: int, samples: int, batch_size: int) -> tuple[float, float]:
        """(learning rate, weight decay) of the update after `updates` others, whose batches had `samples`."""
        end = {"steps": updates + 1, "samples": samples + batch_size, "tokens": (samples + batch_size) * self.sequence_length}[self.unit]
        factor = self.batches.lr_factor(batch_size, self.batch_scaling)
        return self.lr.rate(end) * factor, self.weight_decay.value(end)


def rates_of(config: Config) -> Rates:
    """The section's schedules over the whole run. Raises ValueError for numbers that make none."""
    optimizer, length, batches, steps = config.optimizer, config.data.sequence_length, batches_of(config), steps_of(config)
    samples = batches.samples_after(steps)
    total = {"steps": steps, "samples": samples, "tokens": samples * length}[optimizer.schedule_unit]
    try:
        shape: dict[str, Any] = {"floor": optimizer.min_lr, "warmup": optimizer.warmup, "decay": optimizer.decay}
        lr = RateSchedule.of(optimizer.schedule, optimizer.lr, total, decay_shape=optimizer.decay_shape, **shape)
        end = optimizer.weight_decay if optimizer.weight_decay_end is None else optimizer.weight_decay_end
        decay = WeightDecaySchedule(optimizer.weight_decay, end, optimizer.weight_decay_schedule, total)
    except ValueError as error:
        raise ValueError(f"[optimizer] {error}") from error
    return Rates(batches, lr, decay, optimizer.schedule_unit, length, optimizer.batch_scaling)


# The rest


def precision_of(config: PrecisionConfig) -> Precision:
    """What the section says. Raises ValueError where its parts do not go together."""
    scaler = None
    if config.loss_scale is not None:
        scaler = LossScaler.static(config.loss_scale)
    elif config.kind == "fp16":
        moving = LossScaling(growth_interval=config.growth_interval, hysteresis=config.hysteresis, min_scale=config.min_scale)
        scaler = LossScaler(config.init_scale, moving)
    usual: Master = None if config.kind == "fp32" else "fp32"
    masters: dict[str, Master] = {"auto": usual, "fp32": "fp32", "remainder": "remainder", "none": None}
    master = masters[config.master]
    return Precision(PARAMETERS[config.kind], master=master, scaler=scaler)


def recompute_of(config: Config) -> Recompute:
    """What the section says. Raises ValueError where it contradicts itself."""
    return Recompute(**dataclasses.asdict(config.recompute))


PALM = RecoveryConfig("palm", non_finite="rollback", spike="rollback", back=100, skip_before=100, skip_after=199)
"""arXiv:2204.02311, section 5.1: training restarted about 100 steps before a spike and skipped the data of 200 to 500."""


def policy_of(config: Config) -> RecoveryConfig:
    """What the section says. Raises ValueError for a preset beside keys that it would override."""
    recovery = config.recovery
    if recovery.preset == "none":
        return recovery
    for field in dataclasses.fields(recovery):
        if field.name != "preset" and (value := getattr(recovery, field.name)) != field.default:
            raise ValueError(f"recovery.{field.name}={value} beside recovery.preset={recovery.preset}, which sets it: leave one out")
    return PALM
