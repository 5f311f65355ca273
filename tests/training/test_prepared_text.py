"""Runs on prepared corpora: one is the text tokenized at the start, a blend is its corpora's samples, what does not fit is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megapar.data.blend import Blend
from megapar.data.indexed import IndexedWriter
from megapar.data.prepare import Preparation, prepare
from megapar.data.prepared import open_corpus
from megapar.mesh import ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.training.config import Config, DataConfig, ObjectiveConfig, ParallelConfig, RunConfig
from megapar.training.examples import Examples
from megapar.training.loop import train
from megapar.training.report import report
from megapar.training.text import load_text


def made(folder: Path, name: str, seed: int, documents: int = 100, **options) -> Path:
    generator = np.random.default_rng(seed)
    texts = [" ".join(generator.choice(["the", "cat", "sat", "on", "a", "mat"], generator.integers(1, 30))) for _ in range(documents)]
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(Preparation((str(source),), folder / name, **{"tokenizer": "bytes", **options}))
    return folder / name


def config_for(corpus: object, folder: Path = Path("."), **data) -> Config:
    return Config(
        DecoderConfig(hidden_size=16, layers=1, heads=2, ffn_size=24),
        DataConfig(str(corpus), sequence_length=20, **{"held_out": 0.1, **data}),
        parallel=ParallelConfig(device="cpu"),
        run=RunConfig(steps=3, batch_size=4, out=str(folder / "out"), sample_tokens=5),
    )


def tokens_of(examples: Examples, first: int, count: int) -> list[list[int]]:
    return [sample.tokens.tolist() for sample in examples.samples(first, count)]


def test_one_corpus_is_the_text_split_between_documents(tmp_path):
    name = made(tmp_path, "a", 0)
    text, raw = load_text(config_for(name).data), load_text(config_for(f"{name}.jsonl", tokenizer="bytes").data)
    whole = np.concatenate([raw.train, raw.held_out])
    assert np.concatenate([text.parts[0][1], text.held_out]).tolist() == whole.tolist()
    assert (text.held_out == text.tokenizer.end_of_text).sum() == 10 and text.parts[0][1][-1] == text.tokenizer.end_of_text
    assert isinstance(text.parts[0][1], np.memmap), "a corpus that is larger than memory is not read whole"
    # Samples are cut and shuffled as those of the text are.
    alone = replace(text, parts=((1.0, np.array(text.parts[0][1])),))
    assert tokens_of(Examples(text, config_for(name)), 0, 300) == tokens_of(Examples(alone, config_for(name)), 0, 300)


def test_a_blend_is_its_corpora_samples_in_any_cut(tmp_path):
    names = [made(tmp_path, "a", 0), made(tmp_path, "b", 1, 40)]
    config = config_for(f"3:{names[0]} 1:{names[1]}")
    text = load_text(config.data)
    assert [weight for weight, _ in text.parts] == [0.75, 0.25]
    examples = Examples(text, config)
    together = tokens_of(examples, 0, 200)
    assert [tokens_of(examples, number, 1)[0] for number in range(199, -1, -1)][::-1] == together
    alone = [Examples(load_text(config_for(name).data), config) for name in names]
    corpora, numbers = Blend((3.0, 1.0)).draw(0, 200)
    assert (corpora == 1).sum() == 50, "more than an epoch of the small one"
    assert together == [tokens_of(alone[c], int(n), 1)[0] for c, n in zip(corpora, numbers, strict=True)]
    other = load_text(config_for(f"2:{names[0]} 1:{names[1]}").data)
    assert len({text.corpus_sha256, other.corpus_sha256, load_text(config_for(names[0]).data).corpus_sha256}) == 3
    limited = load_text(replace(config.data, held_out_tokens=40))
    assert len(limited.held_out) == 40 and limited.train.tolist() == text.train.tolist()


def test_the_last_documents_are_the_test_part(tmp_path):
    name = made(tmp_path, "a", 0)
    without, text = load_text(config_for(name, held_out=0.3).data), load_text(config_for(name, held_out=0.1, test=0.2).data)
    assert text.train.tolist() == without.train.tolist() and not len(without.test)
    assert np.concatenate([text.held_out, text.test]).tolist() == without.held_out.tolist()
    assert [int((part == text.tokenizer.end_of_text).sum()) for part in (text.held_out, text.test)] == [10, 20]
    assert text.test[-1] == text.held_out[-1] == text.tokenizer.end_of_text
    with pytest.raises(ValueError, match=re.escape("leave none to the share 0.001")):
        load_text(config_for(name, held_out=0.1, test=0.001).data)


def written(name: Path, documents: list[list[list[int]]], dtype: str = "int64") -> Path:
    """Megatron's own files, which have no tokenizer beside them."""
    with IndexedWriter(name, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return name


@pytest.mark.parametrize(("held_out", "test"), [(2**32 + 7, 7), (7, 2**32 + 7), (300, 7), (7, 257)])
def test_ids_of_the_evaluated_parts_are_checked_before_a_cast_wraps_them(tmp_path, held_out, test):
    documents = [[[i % 7 for i in range(50)]]] * 18 + [[[held_out] * 5], [[test] * 5]]
    name = written(tmp_path / "x", documents)
    with pytest.raises(ValueError, match=r"token ids run from .* and must be in \[0, 257\)"):
        load_text(config_for(name, tokenizer="bytes", held_out=0.05, test=0.05).data)


def test_a_part_without_a_target_is_refused_before_training(tmp_path):
    end = 256
    name = written(tmp_path / "x", [[[i % 7 for i in range(50)] + [end]]] * 19 + [[[end]], [[end]], [[end]]], "int32")
    config = replace(config_for(name, tmp_path, tokenizer="bytes", held_out=0.1), objective=ObjectiveConfig(eod_mask_loss=True))
    with pytest.raises(ValueError, match=r"data\.held_out leaves text in which objective causal_lm has no target"):
        train(config, ParallelMesh.alone())
    with pytest.raises(ValueError, match="held_out_tokens=1 must be 2 or more"):
        load_text(replace(config.data, held_out_tokens=1))


def test_the_fingerprint_is_of_documents_and_tokens(tmp_path):
    three = [[[1, 2], [3, 4]], [[5, 6]], [[7, 8]]]
    boundaries = [[[1, 2]], [[3, 4], [5, 6]], [[7, 8]]]
    lengths, token = [[[1], [2, 3, 4]], *three[1:]], [*three[:2], [[7, 9]]]
    names = [written(tmp_path / str(i), docs, "int32") for i, docs in enumerate((three, boundaries, lengths, token, three))]
    *others, same = (open_corpus(name, 1.0, 0.4).fingerprint for name in names)
    assert len(set(others)) == 4 and same == others[0]


def test_a_sample_depends_on_seed_epoch_and_corpus(tmp_path):
    """One window alone, which no shuffle can change: what is drawn for it does."""
    names = [written(tmp_path / name, [[[1] * 21], [[2] * 5]], "int32") for name in "ab"]
    config = replace(config_for(names[0], tokenizer="bytes", held_out=0.4), objective=ObjectiveConfig("prefix_lm"))

    def cuts(config: Config, count: int = 40) -> list[int]:
        return [int(sample.prefix_end[0]) for sample in Examples(load_text(config.data), config).samples(0, count)]

    first = cuts(config)
    assert len(set(first)) > 10, "of as many epochs"
    assert first == cuts(config) and first[:7] == cuts(config, 7)
    assert cuts(replace(config, run=replace(config.run, seed=1))) != first
    blend = cuts(replace(config, data=replace(config.data, corpus=f"1:{names[0]} 1:{names[1]}")))
    assert blend[::2] != blend[1::2], "the second corpus is not drawn for as the first"


def test_how_often_the_corpora_are_read(tmp_path):
    names = [made(tmp_path, "a", 0), made(tmp_path, "b", 1, 20)]
    config = config_for(f"0.5:{names[0]} 0.5:{names[1]}")
    small = Examples(load_text(config_for(names[1]).data), config)._samplers[0].samples_per_epoch
    config = replace(config, run=replace(config.run, steps=-(-2 * small // 4)))  # half of these samples are of the small corpus
    examples = Examples(load_text(config.data), config)
    assert examples.epochs(2 * small) == pytest.approx(1, abs=1 / small) and examples.epochs(0) == 0
    examples.leave_out([(0, 2 * small)])
    assert examples.epochs(2 * small) == pytest.approx(2, abs=1 / small)
    for limit, fits in ((0.9, False), (1.2, True), (0.0, False)):
        limited = replace(config, data=replace(config.data, max_epochs=limit))
        if fits:
            Examples(load_text(config.data), config).check(limited)
        else:
            with pytest.raises(ValueError, match=rf"read data.corpus 1.0. times and data.max_epochs is {limit}: make the run shorter"):
                train(limited, ParallelMesh.alone())


def test_a_run(tmp_path, monkeypatch):
    names = [made(tmp_path, "a", 0), made(tmp_path, "b", 1)]
    config = config_for(f"0.5:{names[0]} 0.5:{names[1]}", tmp_path)
    mesh = ParallelMesh()
    trained = train(config, mesh)
    assert "held-out loss" in report(trained, config, mesh) and trained.step == 3
    mesh.close()


def test_megatrons_own_files(tmp_path):
    """They have no tokenizer beside them, and nobody has looked at their ids."""
    tokenizer = made(tmp_path, "a", 0).with_name("a.tokenizer.json")
    with IndexedWriter(tmp_path / "theirs", "int32") as writer:
        for start in range(100):
            writer.add_document([list(range(start, start + 20)), [256]])
    with pytest.raises(ValueError, match=r"theirs has no theirs.tokenizer.json beside it: give data.tokenizer"):
        load_text(config_for(tmp_path / "theirs").data)
    config = config_for(tmp_path / "theirs", tokenizer=str(tokenizer))
    assert len(load_text(config.data).parts[0][1]) == 90 * 21
    # The ids of the samples are checked too: the models that count may see only a part.
    text = load_text(config.data)
    bad = replace(text, parts=((1.0, np.full(100, 257)),))
    with pytest.raises(ValueError, match=r"token ids run from 257 to 257 and must be in \[0, 257\): give the tokenizer that made them"):
        Examples(bad, config).samples(0, 1)
    with IndexedWriter(tmp_path / "wide", "int32") as writer:
        for _ in range(100):
            writer.add_document([[300, -0]])
    with pytest.raises(ValueError, match="token ids run from 0 to 300"):
        load_text(config_for(tmp_path / "wide", tokenizer="bytes").data)


def damage(path: Path, **facts) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_refusals(tmp_path):
    a, b = made(tmp_path, "a", 0), made(tmp_path, "b", 1, tokenizer="characters")
    one = made(tmp_path, "one", 0, documents=1)

    def refused(told: str, corpus: object, **data) -> None:
        with pytest.raises(ValueError, match=told):
            load_text(config_for(corpus, **data).data)

    refused("a and .*b have different tokenizers", f"1:{a} 1:{b}")
    refused("weights are .0.0, 1.0. and must be above 0", f"0:{a} 1:{b}")
    refused("weights are .-1.0, 1.0.", f"-1:{a} 1:{b}")
    refused("every corpus of a blend has a weight", f"0.5:{a} {b}")
    refused("missing.bin does not exist", f"1:{tmp_path}/missing")
    refused("give the name without .idx", f"{a}.idx")
    refused("data.max_bytes=5 is for text", a, max_bytes=5)
    refused("is not .*a.tokenizer.json, which made the corpus", a, tokenizer=f"{b}.tokenizer.json")
    refused("data.held_out is 1.0", a, held_out=1.0)
    refused("1 documents leave none to the share", one)
    (tmp_path / "b").mkdir()
    refused("is a text, and prepared with .idx", b)
    load_text(config_for(f"1:{b}").data)
    damage(tmp_path / "a.json", tokenizer_sha256="0")
    refused("is not the tokenizer that .*a.json tells of", a)
    damage(tmp_path / "a.json", tokens=7)
    refused("tells of 100 documents of 7 tokens", a)
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-2])
    refused("the two are not of one corpus", a)
