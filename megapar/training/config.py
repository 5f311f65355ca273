"""What a run is: frozen dataclasses, filled from a TOML file and `--section.key value` overrides."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from megapar.models.config import DecoderConfig
from megapar.recompute import Recompute

T = TypeVar("T")
Schedules = Literal["auto", "gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"]


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from."""

    corpus: Annotated[str, tyro.conf.arg(aliases=["--corpus"])] = "stdlib"
    """`stdlib` (the sources of Python's standard library), or a file, folder or .jsonl of text, .gz too."""
    max_bytes: int | None = None
    """Use only so much of the corpus."""
    tokenizer: Annotated[str, tyro.conf.arg(aliases=["--tokenizer"])] = "bpe"
    """`bpe` (trained on the corpus and cached), `bytes`, `characters`, or a tokenizers JSON file."""
    vocab_size: int = 4096
    """Size of the `bpe` vocabulary."""
    sequence_length: int = 256
    """Tokens in a sample (s)."""
    held_out: float = 0.05
    """The share at the end of the tokens that is only evaluated on."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted from what."""

    kind: Annotated[Literal["causal_lm", "prefix_lm", "fim", "denoising", "ul2"], tyro.conf.arg(aliases=["--objective"])] = "causal_lm"
    """Next token; prefix read in both directions; fill in the middle; corrupted text restored; UL2's mixture of denoisers."""
    reset_position_ids: bool = False
    """causal_lm, fim: positions start anew at each document."""
    reset_attention_mask: bool = False
    """causal_lm, fim: a document attends to itself alone."""
    eod_mask_loss: bool = False
    """causal_lm, fim: a document's end does not predict the next one's start."""
    target_ratio: float | None = None
    """prefix_lm: the share that is predicted; none: cut at a uniform point."""
    fim_rate: float = 0.5
    """fim: the share of documents whose middle is moved to their end."""
    spm_rate: float = 0.5
    """fim: the share of those in suffix-prefix-middle order."""
    fim_level: Literal["character", "token"] = "character"
    """fim: where a document may be cut."""
    style: Literal["sentinel", "infill", "mask", "replace", "delete"] = "sentinel"
    """denoising: what becomes of the noise."""
    noise_ratio: float = 0.15
    """denoising: the share of tokens that are noise."""
    mean_span: float = 3.0
    """denoising: mean length of a span of noise."""
    span_lengths: Literal["composition", "poisson"] = "composition"
    """denoising: how lengths are drawn: T5's way, or BART's."""
    denoisers: Literal["ul2", "ul2r"] = "ul2"
    """ul2: the seven of the paper, or UL2R's."""
    s_mode: Literal["uniform", "quarter"] = "uniform"
    """ul2: where S cuts its prefix: as the published code, or as the paper's table."""
    sentinels: int = 100
    """denoising, ul2: special tokens that stand for spans."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and clipping."""

    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-4
    """Learning rate of the last step."""
    warmup: float = 0.005
    """Share of the steps over which the rate rises linearly; a cosine follows."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; biases and gains have none."""
    max_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; none: not clipped."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is laid out over ranks."""

    tp: Annotated[int, tyro.conf.arg(aliases=["--tp"])] = 1
    """Ranks that share each layer."""
    pp: Annotated[int, tyro.conf.arg(aliases=["--pp"])] = 1
    """Ranks that the layers are dealt to, as the stages of a pipeline."""
    chunks: Annotated[int, tyro.conf.arg(aliases=["--chunks"])] = 1
    """Stages on each of those ranks, interleaved."""
    schedule: Annotated[Schedules, tyro.conf.arg(aliases=["--schedule"])] = "auto"
    """Order of forwards and backwards. auto: 1f1b, or interleaved_1f1b with several chunks."""
    split: str = "balanced"
    """Layers of each stage: balanced (by their products), even, or numbers such as 5,6,6,5."""
    sequence_parallel: bool = False
    """Shard the tokens between the parallel layers too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is any, one rank a GPU."""
    timeout: float = 60.0
    """Seconds that a collective waits for a rank."""


@dataclass(frozen=True)
class RecomputeConfig:
    """What backward computes again instead of keeping it."""

    mode: Annotated[Literal["none", "full", "attention", "mlp"], tyro.conf.arg(aliases=["--recompute"])] = "none"
    """Nothing; whole blocks; what lies between attention's projections; the MLP's activation."""
    blocks: int | None = None
    """Only the first so many blocks of each stage; none: all of them."""
    shard_saved_input: bool = False
    """full: each rank of tp keeps its part of a block's input."""


@dataclass(frozen=True)
class RunConfig:
    """How long, how big, how often, and where to."""

    steps: Annotated[int, tyro.conf.arg(aliases=["--steps"])] = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Samples in a step."""
    micro_batch_size: int | None = None
    """Samples in a forward pass; gradients of a step are accumulated over them. none: batch_size / microbatches."""
    microbatches: Annotated[int | None, tyro.conf.arg(aliases=["--microbatches"])] = None
    """Micro-batches in a step. none: batch_size / micro_batch_size, or 1 without that either."""
    seed: Annotated[int, tyro.conf.arg(aliases=["--seed"])] = 0
    """Fixes initial weights, data order and the sample."""
    eval_every: int = 0
    """Evaluate on the held-out text every so many steps; 0: at the end only."""
    save_every: Annotated[int, tyro.conf.arg(aliases=["--save-every"])] = 0
    """Write a checkpoint every so many steps; 0: never."""
    resume: Annotated[bool, tyro.conf.arg(aliases=["--resume"])] = False
    """Go on from the newest checkpoint in `out`."""
    out: Annotated[str, tyro.conf.arg(aliases=["--out"])] = "runs/default"
    """Folder for metrics, checkpoints, pictures and the model."""
    sample_tokens: int = 96
    """Length of the text generated at the end."""
    prompt: str = "def "
    """What that text starts with."""


@dataclass(frozen=True)
class Config:
    """Pretraining of a decoder."""

    model: DecoderConfig = field(default_factory=DecoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    run: RunConfig = field(default_factory=RunConfig)


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
        kinds = arguments if origin is types.UnionType else (hint,)
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        accepted = any(type(value) is kind for kind in kinds)
    if not accepted:
        wanted = " or ".join(map(repr, arguments)) if origin is Literal else str(hint if origin else getattr(hint, "__name__", hint))
        raise ValueError(f'config key "{name}" is {value!r} and must be {wanted}: correct it')
    return value


def micro_batch_size(run: RunConfig) -> int:
    """Samples in a micro-batch. Raises ValueError where the step cannot be cut as the config says."""
    size, count = run.micro_batch_size, run.microbatches
    if size is not None and count is not None and size * count != run.batch_size:
        both = f"run.micro_batch_size={size} x run.microbatches={count}"
        raise ValueError(f"{both} must be run.batch_size={run.batch_size}: leave one of the two out, or change them")
    for name, divisor in (("micro_batch_size", size), ("microbatches", count)):
        if divisor is not None and run.batch_size % divisor:
            raise ValueError(f"run.batch_size={run.batch_size} must be a multiple of run.{name}={divisor}: change one")
    return size if size is not None else run.batch_size // (count or 1)


def recompute_of(config: Config) -> Recompute:
    """What the section says. Raises ValueError where it contradicts itself."""
    return Recompute(**dataclasses.asdict(config.recompute))


def check(config: Config) -> None:
    """Raises ValueError for sizes that make no run. What depends on the corpus or the world is checked when they are known."""
    run, optimizer = config.run, config.optimizer
    positive = {
        "run.steps": run.steps,
        "run.batch_size": run.batch_size,
        "run.micro_batch_size": 1 if run.micro_batch_size is None else run.micro_batch_size,
        "run.microbatches": 1 if run.microbatches is None else run.microbatches,
        "data.sequence_length": config.data.sequence_length,
        "parallel.tp": config.parallel.tp,
        "parallel.pp": config.parallel.pp,
        "parallel.chunks": config.parallel.chunks,
        "parallel.timeout": config.parallel.timeout,
        "optimizer.lr": optimizer.lr,
        "optimizer.max_norm": 1.0 if optimizer.max_norm is None else optimizer.max_norm,
    }
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be above 0 and finite: change it")
    for name in ("eval_every", "save_every", "sample_tokens"):
        if getattr(run, name) < 0:
            raise ValueError(f"run.{name}={getattr(run, name)} must be 0 or more: 0 turns it off")
    micro_batch_size(run)
    recompute_of(config).check(config.model.layers, config.parallel.tp, config.parallel.sequence_parallel)
    if not 0.0 <= optimizer.warmup < 1.0:
        raise ValueError(f"optimizer.warmup={optimizer.warmup} must lie in [0, 1), it is a share of the steps: 0.005 is the default")
    if not all(0.0 <= beta < 1.0 for beta in optimizer.betas):
        raise ValueError(f"optimizer.betas={optimizer.betas} must lie in [0, 1): 0.9 and 0.95 are the defaults")
    for name in ("min_lr", "eps", "weight_decay"):
        if not getattr(optimizer, name) >= 0:
            raise ValueError(f"optimizer.{name}={getattr(optimizer, name)} must be 0 or more: raise it")
    if optimizer.min_lr > optimizer.lr:
        raise ValueError(f"optimizer.min_lr={optimizer.min_lr} must not be above optimizer.lr={optimizer.lr}: lower it")
    if config.model.positions == "learned" and config.data.sequence_length > config.model.max_positions:
        lengths = f"data.sequence_length={config.data.sequence_length} is longer than model.max_positions={config.model.max_positions}"
        raise ValueError(f"{lengths}: raise the latter")
