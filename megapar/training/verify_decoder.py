"""What `megapar verify` proves when it is given no model: megapar's own decoder, in every style and layout that exists."""

from __future__ import annotations

from itertools import product

from torch import nn

from megapar.mesh import ParallelMesh
from megapar.models.config import DecoderConfig, gpt_style
from megapar.models.decoder import Decoder
from megapar.training.verify import SEED, Build, Check, Subject, language_model_loss, random_tokens, verify

VOCAB_SIZE = 61
STYLES = {
    "Llama, 4 heads, 1 KV head": DecoderConfig(hidden_size=32, layers=2, heads=4, kv_heads=1, ffn_size=53, init_std=0.2),
    "Llama, 8 heads over 4, tied": DecoderConfig(
        hidden_size=64, layers=2, heads=8, kv_heads=4, ffn_size=80, tied_embeddings=True, init_std=0.2
    ),
    "GPT, 4 heads, tied": gpt_style(hidden_size=32, layers=2, heads=4, max_positions=16),
}


def verify_decoder(mesh: ParallelMesh) -> dict[str, list[Check]]:
    """The checks of each style, without and with sequence parallelism, by a line that names the case."""
    found = {}
    for (style, config), sequence_parallel in product(STYLES.items(), (False, True)):
        name = f"{style}{', sequence parallel' if sequence_parallel else ''}"
        found[name] = verify(Subject(_builder(config, sequence_parallel), random_tokens, language_model_loss), mesh)
    return found


def _builder(config: DecoderConfig, sequence_parallel: bool) -> Build:
    def build(mesh: ParallelMesh) -> nn.Module:
        return Decoder(config, VOCAB_SIZE, mesh, sequence_parallel=sequence_parallel, seed=SEED)

    return build
