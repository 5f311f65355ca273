"""The run's samples: a function of seed and number for every objective, special tokens after the text's, held-out text once."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from megapar import ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.objectives.randomness import Generator
from megapar.objectives.sample import IGNORED
from megapar.training.config import Config, DataConfig, ObjectiveConfig, ParallelConfig, RunConfig
from megapar.training.examples import Examples, make_objective
from megapar.training.loop import train
from megapar.training.metrics import read_metrics
from megapar.training.report import report
from megapar.training.text import Text, load_text

OBJECTIVES = {
    "causal_lm": (ObjectiveConfig(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True), 0),
    "prefix_lm": (ObjectiveConfig("prefix_lm"), 0),
    "fim": (ObjectiveConfig("fim"), 3),
    "denoising": (ObjectiveConfig("denoising", sentinels=9), 10),
    "ul2": (ObjectiveConfig("ul2", sentinels=12), 15),
}


def config_for(folder: Path, objective: ObjectiveConfig, **parallel: int) -> Config:
    path = folder / "corpus.txt"
    path.write_text(" ".join(random.Random(0).choices(["the", "cat", "sat", "on", "a", "mat", "in", "spain"], k=1500)))
    return Config(
        DecoderConfig(hidden_size=16, layers=2, heads=4, ffn_size=24),
        DataConfig(str(path), tokenizer="bytes", sequence_length=40, held_out=0.1),
        objective,
        parallel=ParallelConfig(device="cpu", **parallel),
        run=RunConfig(steps=3, batch_size=4, microbatches=2, out=str(folder / "out"), sample_tokens=20),
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Text:
    folder = tmp_path_factory.mktemp("text")
    return load_text(config_for(folder, ObjectiveConfig()).data)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_sample_is_a_function_of_its_number(text, tmp_path, kind):
    objective, specials = OBJECTIVES[kind]
    config = config_for(tmp_path, objective)
    examples, again = Examples(text, config), Examples(text, config)
    assert examples.vocab_size == 257 + specials
    together = [sample.tokens.tolist() for sample in examples.samples(0, 60)]  # more than an epoch
    one_by_one = [again.samples(number, 1)[0].tokens.tolist() for number in reversed(range(60))][::-1]
    assert together == one_by_one
    assert max(map(max, together)) < examples.vocab_size
    other = Examples(text, Config(config.model, config.data, objective, run=RunConfig(seed=1)))
    assert [sample.tokens.tolist() for sample in other.samples(0, 60)] != together


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_held_out_text_is_covered_once(text, tmp_path, kind):
    examples = Examples(text, config_for(tmp_path, OBJECTIVES[kind][0]))
    samples = examples.evaluation_samples("held_out")
    counted = sum(int((batch.targets != IGNORED).sum()) for batch in examples.evaluation("held_out", 3))
    assert counted == sum(int((sample.targets != IGNORED).sum()) for sample in samples) > 0
    if kind == "causal_lm":
        found = np.concatenate([sample.targets for sample in samples])
        assert len(found) == len(text.held_out) - 1
    assert {sample.objective for sample in samples} <= {*(examples.mixture or (kind,))}


def test_fim_takes_the_resets(text, tmp_path):
    """The corpus is one document: its end is put there by hand."""
    plain, reset = (ObjectiveConfig("fim", fim_rate=0.0, reset_position_ids=on, reset_attention_mask=on) for on in (False, True))
    window = np.array([1, 2, text.tokenizer.end_of_text, 3, 4])
    found = [make_objective(c, 40, text.tokenizer)[0](window, Generator()) for c in (plain, reset)]
    assert found[0].position_ids.tolist() == [0, 1, 2, 3] and found[1].position_ids.tolist() == [0, 1, 2, 0]


def test_unigram_loss_of_targets_by_hand(text, tmp_path):
    examples = Examples(text, config_for(tmp_path, OBJECTIVES["denoising"][0]))
    targets = np.concatenate([s.targets[s.targets != IGNORED] for s in examples.samples(0, examples._samplers[0].samples_per_epoch)])
    counts = np.bincount(targets, minlength=examples.vocab_size) + 1
    held_out = [t for s in examples.evaluation_samples("held_out") for t in s.targets if t != IGNORED]
    assert examples.unigram_loss() == pytest.approx(np.mean([-np.log(counts[t] / counts.sum()) for t in held_out]))


def run(config: Config) -> float:
    mesh = ParallelMesh(tp=config.parallel.tp, pp=config.parallel.pp)
    trained = train(config, mesh)
    summary = report(trained, config, mesh)  # whose text holds no special token, which no tokenizer could spell
    assert mesh.world.rank or "held-out loss" in summary
    assert trained.held_out_loss is not None
    return trained.held_out_loss


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_objective_trains_alike_in_every_layout(ranks, tmp_path, monkeypatch, kind):
    """Its masks, prefixes and positions reach every stage and every rank of a layer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    alone, found = tmp_path / "alone", {}
    alone.mkdir()
    found[1, 1] = run(config_for(alone, OBJECTIVES[kind][0]))
    for tp, pp in ((2, 1), (1, 2)):
        folder = tmp_path / f"{tp}{pp}"
        folder.mkdir()
        losses = ranks.run(tp * pp, run, config_for(folder, OBJECTIVES[kind][0], tp=tp, pp=pp))
        assert losses == [losses[0]] * 2
        assert losses[0] == pytest.approx(found[1, 1], abs=1e-4)
    *steps, last = read_metrics(alone / "out" / "metrics.jsonl")
    assert (set(last.get("held_out", {})) > {"ul2/R1", "ul2/S"}) == (kind == "ul2")
    assert {name.startswith("ul2/") for record in steps for name in record.get("objectives", {})} == ({True} if kind == "ul2" else set())


def test_the_test_part_is_evaluated_at_the_end(tmp_path, capsys):
    config = config_for(tmp_path, OBJECTIVES["ul2"][0])
    config = replace(config, data=replace(config.data, test=0.1), run=replace(config.run, eval_every=2))
    mesh = ParallelMesh.alone()
    trained = train(config, mesh)
    *_, before, last = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert before["held_out_loss"] == trained.held_out_loss != last["test_loss"] == trained.test_loss
    assert set(last["test"]) > {"ul2/R1", "ul2/S"}
    assert f"test loss {trained.test_loss:.4f}" in report(trained, config, mesh)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["test_loss"] == trained.test_loss
    assert not any("test_loss" in record for record in read_metrics(tmp_path / "out" / "metrics.jsonl")[:-1])
    assert "the run reads it 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        (ObjectiveConfig("denoising", sentinels=1), "give 2 sentinels"),
        (ObjectiveConfig("denoising", noise_ratio=1.5), "ratio=1.5"),
        (ObjectiveConfig("fim", fim_rate=2.0), "rate=2.0"),
        (ObjectiveConfig("prefix_lm", target_ratio=0.0), "target_ratio=0.0"),
        (ObjectiveConfig(noise_ratio=0.5), "objective.noise_ratio=0.5 is for denoising, and objective.kind is causal_lm: leave it out"),
        (ObjectiveConfig("ul2", eod_mask_loss=True), "is for causal_lm and fim"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(text, tmp_path, objective, told):
    with pytest.raises(ValueError, match=told):
        Examples(text, config_for(tmp_path, objective))


def test_a_tokenizer_that_does_not_give_parts_back_is_refused_before_training(tmp_path):
    """As those of Llama, which put a space before a text and take it away again."""
    path = tmp_path / "metaspace.json"
    config = config_for(tmp_path, ObjectiveConfig("fim", fim_rate=0.1))
    metaspace = tokenizers.Tokenizer(tokenizers.models.BPE())
    metaspace.pre_tokenizer, metaspace.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["<|endoftext|>"], show_progress=False)
    metaspace.train([config.data.corpus], trainer)
    metaspace.save(str(path))
    config = replace(config, data=replace(config.data, tokenizer=str(path)))
    with pytest.raises(ValueError, match="does not give back text that it encoded in parts: use one that does, or level=token"):
        train(config, ParallelMesh.alone())
    config = replace(config, objective=ObjectiveConfig("fim", fim_level="token"))
    Examples(load_text(config.data), config).check(config)
