"""A small run, the accidents that befall it, and what is compared of it."""

import dataclasses
import os
import random
import signal
from pathlib import Path
from typing import Any

from megapar import ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.training.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig, RunConfig
from megapar.training.loop import train
from megapar.training.metrics import read_metrics
from megapar.training.sections import Rates

TIMINGS = ("seconds", "data_seconds", "tokens_per_second", "peak_bytes")
ABOUT_THE_RUN = ("checkpoint", "resumed", "recovery")


def corpus(folder: Path, seed: int = 0) -> str:
    words = ["the", "cat", "sat", "on", "a", "mat", "while", "it", "rained", "in", "spain"]
    path = folder / f"corpus-{seed}.txt"
    path.write_text(" ".join(random.Random(seed).choices(words, k=900)))
    return str(path)


def config_for(folder: Path, tp: int) -> Config:
    return Config(
        DecoderConfig(hidden_size=16, layers=1, heads=4, kv_heads=2, ffn_size=23),
        DataConfig(corpus(folder), tokenizer="bytes", sequence_length=12),
        ObjectiveConfig(),
        OptimizerConfig(warmup=0.3),
        ParallelConfig(tp, device="cpu", sequence_parallel=tp == 3),
        RunConfig(steps=6, batch_size=4, micro_batch_size=2, out=str(folder / "out"), save_every=2, eval_every=3),
    )


def replaced(config: Config, section: str, **values: Any) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def run(config: Config, at: int = 0, accident: str = "") -> list[Any]:
    """Trains; in update `at` the last rank is interrupted, or all ranks fail. [step, interrupted, held-out loss]."""
    os.environ["XDG_CACHE_HOME"] = str(Path(config.data.corpus).parent / "cache")
    mesh = ParallelMesh(tp=config.parallel.tp, pp=config.parallel.pp)
    real = Rates.at

    def rates(self: Rates, updates: int, samples: int, batch_size: int) -> tuple[float, float]:
        if updates == at - 1 and accident == "interrupt" and mesh.world.rank == mesh.world.size - 1:
            signal.raise_signal(signal.SIGINT)
        if updates == at - 1 and accident == "failure":
            raise RuntimeError("something else broke")
        return real(self, updates, samples, batch_size)

    Rates.at = rates  # type: ignore[method-assign]
    try:
        trained = train(config, mesh)
    finally:
        Rates.at = real  # type: ignore[method-assign]
    return [trained.step, trained.interrupted, trained.held_out_loss]


def metrics_of(config: Config) -> list[dict[str, Any]]:
    """What was trained and evaluated, without times."""
    records = read_metrics(Path(config.run.out) / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in TIMINGS} for r in records if not any(kind in r for kind in ABOUT_THE_RUN)]


def events_of(config: Config, kind: str) -> list[dict[str, Any]]:
    """The records of that kind, of ABOUT_THE_RUN."""
    return [r[kind] for r in read_metrics(Path(config.run.out) / "metrics.jsonl") if kind in r]


def weights_of(config: Config, step: int) -> dict[str, bytes]:
    folder = Path(config.run.out) / "checkpoints" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
