"""A `Config` from a TOML file and `--section.key value` overrides, and what is checked of one before anything starts."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from megapar.data.intervals import parse_intervals
from megapar.training.config import Config, OptimizerConfig
from megapar.training.sections import check_batches, policy_of, precision_of, rates_of, recompute_of

T = TypeVar("T")


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The config of a TOML file, defaults where it is silent, then the overrides.

    Raises ValueError for a missing or malformed file, an unknown key (naming the nearest known one), a value of the wrong type and
    values that contradict each other. Unknown or malformed overrides end the program with tyro's message.
    """
    config = Config()
    if path is not None:
        if not path.is_file():
            raise ValueError(f"config {path} is not a file: give the path of a TOML file, such as configs/demo.toml")
        try:
            config = from_dict(Config, tomllib.loads(path.read_text(encoding="utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"config {path} is not valid TOML ({error}): correct it") from error
    if overrides:
        config = tyro.cli(Config, default=config, args=list(overrides), prog="megapar train CONFIG", config=(tyro.conf.AvoidSubcommands,))
    check(config)
    return config


def from_dict(kind: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """A config dataclass from nested dicts. Raises ValueError for unknown keys and wrong types."""
    hints = typing.get_type_hints(kind)
    made: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1, 0.0)[0]
            raise ValueError(f'config key "{name}" is not known: the nearest one is "{prefix}{near}"')
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ValueError(f'config key "{name}" is {value!r} and must be a section: write [{name}]')
            made[key] = from_dict(typing.cast(type, hints[key]), value, f"{name}.")
        else:
            made[key] = _convert(value, hints[key], name)
    return kind(**made)


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts of JSON values; `from_dict` reads it back."""
    return typing.cast(dict[str, Any], dataclasses.asdict(config))


def _convert(value: Any, hint: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        accepted = value in arguments
    elif origin is tuple:
        accepted = isinstance(value, (list, tuple)) and len(value) == len(arguments)
        value = tuple(_convert(v, h, name) for v, h in zip(value, arguments, strict=True)) if accepted else value
    else:
        kinds = arguments if origin in (types.UnionType, typing.Union) else (hint,)
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        accepted = any(value in typing.get_args(kind) if typing.get_origin(kind) is Literal else type(value) is kind for kind in kinds)
    if not accepted:
        wanted = _named(hint)
        raise ValueError(f'config key "{name}" is {value!r} and must be {wanted}: correct it')
    return value


def _named(hint: Any) -> str:
    """A type as an error names it."""
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join("none" if kind is types.NoneType else _named(kind) for kind in typing.get_args(hint))
    return str(hint if typing.get_origin(hint) else getattr(hint, "__name__", hint))


def check(config: Config) -> None:
    """Raises ValueError for sizes that make no run. What depends on the corpus or the world is checked when they are known."""
    run, optimizer, parallel = config.run, config.optimizer, config.parallel
    positive = {
        "run.steps": run.steps,
        "run.batch_size": run.batch_size if isinstance(run.batch_size, int) else 1,
        "run.micro_batch_size": 1 if run.micro_batch_size is None else run.micro_batch_size,
        "run.microbatches": 1 if run.microbatches is None else run.microbatches,
        "data.sequence_length": config.data.sequence_length,
        "parallel.tp": parallel.tp,
        "parallel.dp": 1 if parallel.dp == "auto" else parallel.dp,
        "parallel.pp": parallel.pp,
        "parallel.chunks": parallel.chunks,
        "parallel.timeout": parallel.timeout,
        "optimizer.lr": optimizer.lr,
        "optimizer.max_norm": 1.0 if optimizer.max_norm is None else optimizer.max_norm,
    }
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be above 0 and finite: change it")
    for name in ("eval_every", "save_every", "sample_tokens", "keep_last", "keep_every"):
        if getattr(run, name) < 0:
            raise ValueError(f"run.{name}={getattr(run, name)} must be 0 or more: 0 turns it off")
    if parallel.zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"parallel.zero_stage={parallel.zero_stage} must be 0, 1, 2 or 3: 1 is the default")
    _check_optimizer(optimizer)
    if parallel.dp != "auto":
        check_batches(config)
    rates_of(config)
    precision_of(config.precision)
    recompute_of(config).check(config.model.layers, parallel.tp, parallel.sequence_parallel)
    parse_intervals(config.data.skip, "data.skip")
    _check_recovery(config)
    if config.model.positions == "learned" and config.data.sequence_length > config.model.max_positions:
        lengths = f"data.sequence_length={config.data.sequence_length} is longer than model.max_positions={config.model.max_positions}"
        raise ValueError(f"{lengths}: raise the latter")


def _check_recovery(config: Config) -> None:
    policy, run = policy_of(config), config.run
    if policy.window < 2:
        raise ValueError(f"recovery.window={policy.window} must be 2 or more steps: 128 is the default")
    for name in ("back", "skip_before", "skip_after", "max_rollbacks", "max_skips"):
        if getattr(policy, name) < 0:
            raise ValueError(f"recovery.{name}={getattr(policy, name)} must be 0 or more: raise it")
    if policy.sigma is not None and not 0 < policy.sigma < math.inf:
        raise ValueError(f"recovery.sigma={policy.sigma} must be above 0 and finite: 6 is the default")
    if policy.factor is not None and not 1 < policy.factor < math.inf:
        raise ValueError(f"recovery.factor={policy.factor} must be above 1 and finite: it is a multiple of the median")
    if policy.spike != "ignore" and policy.sigma is None and policy.factor is None:
        raise ValueError(f"recovery.spike={policy.spike} needs recovery.sigma or recovery.factor: give one, or ignore spikes")
    if not policy.rolls_back:
        return
    if not run.save_every:
        raise ValueError("recovery rolls back to checkpoints and run.save_every=0 writes none: give --save-every")
    # The newest may be one step old, or still be on its way to the disk.
    needed = 2 + -(-policy.back // run.save_every)
    if 0 < run.keep_last < needed:
        why = f"recovery.back={policy.back} may need checkpoints that run.keep_last={run.keep_last} removes"
        raise ValueError(f"{why}: keep {needed}, or all")


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    if not all(0.0 <= beta < 1.0 for beta in optimizer.betas):
        raise ValueError(f"optimizer.betas={optimizer.betas} must lie in [0, 1): 0.9 and 0.95 are the defaults")
    for name in ("min_lr", "eps", "weight_decay", "weight_decay_end", "z_loss"):
        value = getattr(optimizer, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"optimizer.{name}={value} must be 0 or more and finite: change it")
    if optimizer.min_lr > optimizer.lr:
        raise ValueError(f"optimizer.min_lr={optimizer.min_lr} must not be above optimizer.lr={optimizer.lr}: lower it")
