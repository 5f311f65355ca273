"""What a run is: frozen dataclasses, which `config_file` fills from a TOML file and `--section.key value` overrides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from megapar.models.config import DecoderConfig

Schedules = Literal["auto", "gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"]
Kinds = Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"]
Shapes = Literal["linear", "cosine", "exponential", "one_minus_sqrt"]
Action = Literal["stop", "skip", "rollback"]


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from."""

    corpus: Annotated[str, tyro.conf.arg(aliases=["--corpus"])] = "stdlib"
    """`stdlib` (Python's sources), a file, folder or .jsonl of text, or what `megapar prepare` made: `NAME`, `0.7:NAME 0.3:OTHER`."""
    max_bytes: int | None = None
    """Use only so much of the corpus."""
    tokenizer: Annotated[str, tyro.conf.arg(aliases=["--tokenizer"])] = "bpe"
    """`bpe` (trained on the corpus and cached), `bytes`, `characters`, or a tokenizers JSON file."""
    vocab_size: int = 4096
    """Size of the `bpe` vocabulary."""
    sequence_length: int = 256
    """Tokens in a sample (s)."""
    held_out: float = 0.05
    """The share at the end of the tokens, of a prepared corpus the documents, that is only evaluated on."""
    test: float = 0.0
    """The share after that, which is evaluated on once, when the run has ended."""
    held_out_tokens: int = 1_000_000
    """Prepared corpora: no more than so many of either."""
    max_epochs: float | None = None
    """A run that would read a corpus more often is refused; none: it is read as often as the run needs."""
    skip: str = ""
    """Samples that are left out, as the report of a run names them: `1200:1600 9000:9008`."""


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
    schedule: Annotated[Kinds, tyro.conf.arg(aliases=["--lr-schedule"])] = "cosine"
    """What follows the warm-up. wsd: the peak, and a decay at the end."""
    schedule_unit: Literal["steps", "samples", "tokens"] = "steps"
    """What the schedule counts; with a batch size that changes, samples or tokens."""
    warmup: float = 0.005
    """How long the rate rises linearly: a share of the run, or from 1 on how many of the unit."""
    decay: float = 0.1
    """wsd: how long the decay is, likewise."""
    decay_shape: Shapes = "linear"
    """wsd: of the decay."""
    batch_scaling: Literal["none", "sqrt", "linear"] = "none"
    """While the batch is smaller than the last one: the rate is lower by that power of their ratio."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; biases and gains have none."""
    weight_decay_end: float | None = None
    """Of the last step; none: the same."""
    weight_decay_schedule: Literal["linear", "cosine"] = "linear"
    """How it gets there."""
    max_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; none: not clipped."""
    z_loss: float = 0.0
    """Times log(Z)^2 of every token is added to the loss that is trained (PaLM: 1e-4)."""


@dataclass(frozen=True)
class PrecisionConfig:
    """Formats of what is trained, and the loss scale."""

    kind: Annotated[Literal["fp32", "bf16", "fp16"], tyro.conf.arg(aliases=["--precision"])] = "fp32"
    """Of the weights; gradients and moments are fp32."""
    master: Literal["auto", "fp32", "remainder", "none"] = "auto"
    """What 16-bit weights are updated in: an fp32 copy; bf16: 16 bits beside the weight; the weight itself. auto: fp32."""
    loss_scale: float | None = None
    """A number that stays. none: fp16 has a dynamic one, the others have none."""
    init_scale: float = 65536.0
    """The dynamic one of the first step."""
    growth_interval: int = 2000
    """Steps without overflow after which it doubles."""
    hysteresis: int = 2
    """Steps with overflow after which it halves."""
    min_scale: float = 1.0
    """Overflow at this scale ends the run."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is laid out over ranks."""

    tp: Annotated[int, tyro.conf.arg(aliases=["--tp"])] = 1
    """Ranks that share each layer."""
    dp: Annotated[int | Literal["auto"], tyro.conf.arg(aliases=["--dp"])] = 1
    """Replicas of the model, each trained on its share of a step's samples. auto: as many as the ranks make."""
    zero_stage: Annotated[int, tyro.conf.arg(aliases=["--zero"])] = 1
    """What the replicas share: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""
    reduce_every: Literal["step", "micro_batch"] = "step"
    """When gradients are summed over the replicas. micro_batch: only shards of them are kept (stages 2 and 3)."""
    reshard_every: Literal["step", "micro_batch"] = "micro_batch"
    """When stage 3 frees weights."""
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
class RecoveryConfig:
    """What is done about a step that goes wrong, by all ranks, whichever saw it."""

    preset: Literal["none", "palm"] = "none"
    """palm: instead of the keys below, back 100 steps before a spike and past the samples of 300, as PaLM's training did."""
    non_finite: Action = "stop"
    """A loss or gradient that is not finite (but an overflow that a dynamic loss scale answers)."""
    spike: Literal["ignore", "stop", "skip", "rollback"] = "ignore"
    """A loss or gradient norm far above those of the steps before."""
    data_error: Action = "stop"
    """Samples that cannot be read or made."""
    window: int = 128
    """spike: how many steps before are looked at; there have to be half as many."""
    sigma: float | None = 6.0
    """spike: so many standard deviations above their mean are far."""
    factor: float | None = None
    """spike: so many times their median is far, too."""
    back: int = 0
    """rollback: to the newest checkpoint that is at least so many steps older than the bad step."""
    skip_before: int = 0
    """rollback: beside the bad step's samples, those of so many steps before it are left out."""
    skip_after: int = 0
    """rollback: and of so many after it."""
    max_rollbacks: int = 3
    """The run stops instead of rolling back once more."""
    max_skips: int = 10
    """The run stops instead of skipping one step more in a row."""

    @property
    def rolls_back(self) -> bool:
        """Whether anything does."""
        return "rollback" in (self.non_finite, self.spike, self.data_error)


@dataclass(frozen=True)
class RunConfig:
    """How long, how big, how often, and where to."""

    steps: Annotated[int, tyro.conf.arg(aliases=["--steps"])] = 1000
    """Optimizer steps."""
    length: Annotated[str, tyro.conf.arg(aliases=["--length"])] = ""
    """Instead of steps: `10M samples` or `2B tokens`."""
    batch_size: int | str = 16
    """Samples in a step: a number, or from which sample on which number: `0:64 2M:128 10M:256` (or `... tokens`)."""
    rampup: str = ""
    """A smaller batch at first: `16 8 1M` starts with 16 samples and adds 8 in equal parts of 1M samples (or `... tokens`)."""
    micro_batch_size: int | None = None
    """Samples in a forward pass; gradients of a step are accumulated over them. none: batch_size / microbatches."""
    microbatches: Annotated[int | None, tyro.conf.arg(aliases=["--microbatches"])] = None
    """Micro-batches in a step. none: batch_size / micro_batch_size, or 1 without that either."""
    seed: Annotated[int, tyro.conf.arg(aliases=["--seed"])] = 0
    """Fixes initial weights, data order and the sample."""
    eval_every: int = 0
    """Evaluate on the held-out text every so many steps; 0: at the end only."""
    save_every: Annotated[int, tyro.conf.arg(aliases=["--save-every"])] = 0
    """Write a checkpoint every so many steps, and on SIGTERM or Ctrl-C; 0: never."""
    async_save: bool = True
    """Write it while training goes on."""
    keep_last: int = 0
    """Keep so many checkpoints, the newest; 0: all."""
    keep_every: int = 0
    """And those of every so many steps; 0: no others."""
    resume: Annotated[Literal["no", "yes", "auto"], tyro.conf.arg(aliases=["--resume"])] = "no"
    """Go on from the newest checkpoint in `out`. auto: if there is one."""
    change: Annotated[str, tyro.conf.arg(aliases=["--change"])] = ""
    """Keys that a resumed run may have otherwise than it had, such as `optimizer.lr run.steps`."""
    out: Annotated[str, tyro.conf.arg(aliases=["--out"])] = "runs/default"
    """Folder for metrics, checkpoints, pictures and the model."""
    tensorboard: bool = False
    """Write events for TensorBoard too (pip install megapar[tensorboard])."""
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
    run: RunConfig = field(default_factory=RunConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
