"""What `megapar verify` proves when it is given no model: megapar's own decoder, in every style and layout that exists."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from torch import Tensor, nn

from megapar.batch import TokenBatch
from megapar.mesh import ParallelMesh
from megapar.models.config import DecoderConfig, gpt_style
from megapar.models.decoder import Decoder, DecoderStage
from megapar.params import split
from megapar.pipeline.schedule import Schedule
from megapar.training.verify import Check, verify
from megapar.training.verify_subject import SEED, Subject, language_model_loss, random_tokens

VOCAB_SIZE = 61
STYLES = {
    "Llama, 4 heads, 1 KV head": DecoderConfig(hidden_size=32, layers=2, heads=4, kv_heads=1, ffn_size=53, init_std=0.2),
    "Llama, 8 heads over 4, tied": DecoderConfig(
        hidden_size=64, layers=2, heads=8, kv_heads=4, ffn_size=80, tied_embeddings=True, init_std=0.2
    ),
    "GPT, 4 heads, tied": gpt_style(hidden_size=32, layers=2, heads=4, max_positions=16),
}


def verify_decoder(
    mesh: ParallelMesh, schedule: Schedule | None = None, zero_stage: int | None = None, precision: str = "fp32"
) -> dict[str, list[Check]]:
    """The checks of each style, without and with sequence parallelism, by a line that names the case."""
    found = {}
    for (style, config), sequence_parallel in product(STYLES.items(), (False, True) if mesh.tp.size > 1 else (False,)):
        if schedule is not None:
            config = replace(config, layers=max(config.layers, schedule.stages + 1))  # one stage has a layer more
        name = f"{style}{', sequence parallel' if sequence_parallel else ''}"
        found[name] = verify(_subject(config, sequence_parallel), mesh, schedule, zero_stage, precision)
    return found


class _LogitsStage(DecoderStage):
    """A stage whose micro-batch is a tuple of tokens; the last one goes on to the logits."""

    def forward(self, x: Tensor | None, inputs: tuple[Tensor, ...]) -> Tensor:  # type: ignore[override]
        batch = TokenBatch.of(*inputs)
        x = super().forward(x, batch)
        return self.logits(x, batch) if self.is_last else x


def _subject(config: DecoderConfig, sequence_parallel: bool) -> Subject:
    def build(mesh: ParallelMesh) -> nn.Module:
        return Decoder(config, VOCAB_SIZE, mesh, sequence_parallel=sequence_parallel, seed=SEED)

    def build_stage(mesh: ParallelMesh, stage: int, stages: int) -> nn.Module:
        layers = split(config.layers, stages)[stage]
        return _LogitsStage(config, VOCAB_SIZE, mesh, layers=layers, sequence_parallel=sequence_parallel, seed=SEED)

    return Subject(build, random_tokens, language_model_loss, build_stage)
