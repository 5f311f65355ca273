"""Generation: greedy and top-p, the same tokens on every rank and for every tp."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar import ParallelMesh
from megapar.models.config import DecoderConfig, gpt_style
from megapar.models.decoder import Decoder
from megapar.models.generate import choose, generate

CONFIG = DecoderConfig(hidden_size=16, layers=1, heads=4, kv_heads=2, ffn_size=20, init_std=0.5)
VOCAB = 31
PROMPT = torch.tensor([[1, 5, 9], [2, 2, 30]])


def model_at(mesh: ParallelMesh, config: DecoderConfig = CONFIG) -> Decoder:
    return Decoder(config, VOCAB, mesh, seed=4)


def generate_all(tp: int) -> list[list[list[int]]]:
    model = model_at(ParallelMesh(tp=tp))
    ways = ({"temperature": 0.0}, {"top_p": 0.8, "seed": 3}, {"temperature": 2.0, "seed": 3})
    return [generate(model, PROMPT, 12, **way).tolist() for way in ways]


@pytest.mark.parametrize("tp", [2, 3])
def test_every_tp_and_rank_gives_the_same_tokens(ranks, tp):
    alone = generate_all(1)
    assert alone[0] != alone[1] != alone[2]
    assert ranks.run(tp, generate_all, tp) == [alone] * tp


def test_greedy_takes_the_likeliest_next_token():
    model = model_at(ParallelMesh.alone())
    tokens = generate(model, PROMPT, 5, temperature=0.0)
    assert torch.equal(tokens[:, :3], PROMPT)
    logits = model(tokens[:, :-1]).view(2, 7, VOCAB)
    assert torch.equal(tokens[:, 3:], logits.argmax(-1)[:, 2:])


def test_tiny_top_p_is_greedy_and_the_seed_decides():
    model = model_at(ParallelMesh.alone())
    assert torch.equal(generate(model, PROMPT, 9, top_p=1e-6, seed=1), generate(model, PROMPT, 9, temperature=0.0))
    assert torch.equal(generate(model, PROMPT, 9, seed=1), generate(model, PROMPT, 9, seed=1))
    assert not torch.equal(generate(model, PROMPT, 9, seed=1), generate(model, PROMPT, 9, seed=2))
    assert generate(model, PROMPT, 9, seed=-(2**70)).shape == (2, 12)


def test_special_tokens_are_never_chosen():
    model = model_at(ParallelMesh.alone())
    assert int(generate(model, PROMPT, 40, temperature=9.0)[:, 3:].max()) >= 12
    assert int(generate(model, PROMPT, 40, temperature=9.0, text_size=12)[:, 3:].max()) < 12


def test_window_is_all_the_model_sees():
    model = model_at(ParallelMesh.alone(), gpt_style(hidden_size=16, layers=1, heads=4, max_positions=4))
    other = PROMPT.clone()
    other[:, 0] = 7
    # With a table of 4 positions a longer view would be refused; with a window of 2 the first of 3 tokens does not matter.
    kept, changed = (generate(model, p, 6, temperature=0.0, window=2)[:, 3:] for p in (PROMPT, other))
    assert torch.equal(kept, changed)
    assert generate(model, PROMPT, 6, window=4).shape == (2, 9)


@given(st.lists(st.integers(-8, 8), min_size=2, max_size=8), st.floats(0.01, 1.0))
@settings(max_examples=60)
def test_top_p_draws_from_the_smallest_set_that_reaches_it(halves, top_p):
    logits = [half / 2 for half in halves]
    probabilities = torch.tensor(logits, dtype=torch.float64).softmax(-1).sort(descending=True).values
    smallest = next((n for n in range(1, len(logits)) if float(probabilities[:n].sum()) >= top_p + 1e-6), len(logits))
    rows = torch.tensor(logits).expand(300, -1)
    drawn = choose(rows, top_p, 1.0, torch.Generator().manual_seed(0)).flatten()
    least = min(logits[i] for i in drawn.tolist())
    assert sum(x > least for x in logits) < smallest


def test_top_p_keeps_all_of_the_smallest_set():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    counts = [torch.bincount(choose(logits, p, 1.0, generator).flatten(), minlength=3).tolist() for p in (0.4, 0.6, 0.9)]
    assert counts[0] == [4000, 0, 0]
    assert counts[1][2] == 0
    assert counts[1][0] / 4000 == pytest.approx(0.5 / 0.8, abs=0.04)
    assert counts[2][2] / 4000 == pytest.approx(0.2, abs=0.04)


def test_temperature_sharpens():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(4000, -1)
    drawn = choose(logits, 1.0, 0.5, torch.Generator().manual_seed(0)).flatten()
    assert torch.bincount(drawn)[0] / 4000 == pytest.approx(0.25 / 0.38, abs=0.04)


@pytest.mark.parametrize(
    ("prompt", "arguments", "told"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, r"shape \(1, 0\)"),
        (torch.zeros(3, dtype=torch.int64), {}, r"must be \[b, s\]"),
        (PROMPT, {"top_p": 0.0}, "top_p=0.0"),
        (PROMPT, {"top_p": 1.5}, "top_p=1.5"),
        (PROMPT, {"temperature": -1.0}, "temperature=-1.0"),
        (PROMPT, {"window": 0}, "window=0"),
        (PROMPT, {"window": -3}, "window=-3"),
        (PROMPT, {"new_tokens": -1}, "new_tokens=-1"),
        (PROMPT + 10, {}, "31"),
    ],
)
def test_bad_arguments_are_refused(prompt, arguments, told):
    model = model_at(ParallelMesh.alone())
    with pytest.raises(ValueError, match=told):
        generate(model, prompt, **{"new_tokens": 2, **arguments})
