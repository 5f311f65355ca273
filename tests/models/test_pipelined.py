"""A decoder in a pipeline: the cuts that its products ask for, the next token's logits on every rank."""

import pytest
import torch

from megapar import ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.models.decoder import Decoder
from megapar.models.generate import generate
from megapar.models.pipelined import PipelinedDecoder, decoder_cuts
from megapar.pipeline.kinds import make_schedule

VOCAB = 31
CONFIG = DecoderConfig(hidden_size=16, layers=5, heads=4, kv_heads=2, ffn_size=20, init_std=0.5)
PROMPT = torch.tensor([[1, 5, 9], [2, 2, 30]])
WAYS = ({"temperature": 0.0}, {"top_p": 0.8, "seed": 3})


def generate_all(tp: int, pp: int, chunks: int) -> list[list[list[int]]]:
    mesh = ParallelMesh(tp=tp, pp=pp)
    model = PipelinedDecoder(CONFIG, VOCAB, mesh, schedule=make_schedule(None, pp, chunks, 3), sequence_parallel=tp > 1, seed=4)
    return [generate(model, PROMPT, 6, **way).tolist() for way in WAYS]


@pytest.mark.parametrize(("tp", "pp", "chunks"), [(1, 2, 1), (2, 2, 2), (1, 4, 1), (1, 1, 1)])
def test_every_rank_generates_what_one_process_does(ranks, tp, pp, chunks):
    alone = Decoder(CONFIG, VOCAB, ParallelMesh.alone(), seed=4)
    expected = [generate(alone, PROMPT, 6, **way).tolist() for way in WAYS]
    assert ranks.run(tp * pp, generate_all, tp, pp, chunks) == [expected] * (tp * pp)


def test_products_are_those_of_the_matrices():
    """Two uses of the sequence: scores and their product with the values, each over half of the keys on average."""
    model = Decoder(CONFIG, VOCAB, ParallelMesh.alone())
    block, head = CONFIG.products(VOCAB, 10)
    matrices = sum(p.numel() for p in model.blocks["0"].parameters() if p.dim() == 2)
    assert block == matrices + 2 * (10 * 16) // 2
    assert head == model.head.weight.numel()


def test_a_large_vocabulary_takes_layers_off_the_last_stage():
    schedule = make_schedule(None, 2, 1, 2)
    assert decoder_cuts(CONFIG, 31, schedule, "balanced", 8) == [(0, 3), (3, 5)]
    assert decoder_cuts(CONFIG, 1000, schedule, "balanced", 8) == [(0, 4), (4, 5)]


def test_refusals():
    with pytest.raises(ValueError, match="pp=2 with 3 chunks needs at least 6 layers, the model has 5: lower pp or chunks"):
        decoder_cuts(CONFIG, 31, make_schedule(None, 2, 3, 2), "balanced", 8)
    with pytest.raises(ValueError, match="chunks=2 needs pp of 2 or more"):
        decoder_cuts(CONFIG, 31, make_schedule(None, 1, 2, 2), "balanced", 8)
