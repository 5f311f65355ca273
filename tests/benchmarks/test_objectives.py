"""Middles are asked for as they are trained; the bars of the objectives can fail."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import objectives, objectives_fim
from megapar.batch import TokenBatch
from megapar.data.tokenizer import ByteTokenizer
from megapar.mesh import ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.models.decoder import Decoder
from megapar.objectives.fim import FillInTheMiddle
from megapar.objectives.randomness import Generator
from megapar.objectives.sample import IGNORED
from megapar.training.examples import Examples
from megapar.training.text import Text

FIM = FillInTheMiddle(sequence_length=16, vocab_size=50, end_id=49, prefix_id=50, suffix_id=51, middle_id=52, level="token")


def test_middles_are_the_same_for_all_forms_and_alone_counted():
    text = np.arange(34, dtype=np.int32) % 20
    text[[4, 17]] = FIM.end_id
    (document,) = objectives_fim.documents(text, FIM.end_id)  # what the ends of the text may have cut is none
    assert document.tolist() == text[5:17].tolist()
    found = [objectives_fim.cut(document, Generator(i)) for i in range(600)]
    assert {(1, 11), (1, 1), (11, 1)} <= {(len(m.prefix), len(m.middle)) for m in found}
    for m in found:
        assert np.concatenate([m.prefix, m.middle, m.suffix]).tolist() == document.tolist()
        for form, context in objectives_fim.contexts(m, FIM).items():
            sample = objectives_fim.asked(context, m.middle, form)
            assert sample.targets[sample.targets != IGNORED].tolist() == m.middle.tolist()
            given = [*m.prefix] if form == objectives_fim.PREFIX else [*m.prefix, *m.suffix]
            assert sorted(i for i in context if i < FIM.vocab_size) == sorted(given)


@pytest.mark.parametrize("seed", range(20))
def test_the_form_of_middles_is_the_one_that_fim_trains(seed):
    spm = replace(FIM, rate=1.0, spm_rate=1.0).document(np.arange(12), Generator(seed))
    middle_at = int(np.flatnonzero(spm == FIM.middle_id)[0])
    suffix, written = spm[2:middle_at], spm[middle_at + 1 : -1]
    for cut in range(len(written) + 1):
        m = objectives_fim.Middle(written[:cut], written[cut:], suffix)
        assert spm.tolist() == [*objectives_fim.contexts(m, FIM)[objectives_fim.SPM], *m.middle, FIM.end_id]


def test_lines_that_say_a_word_twice(tmp_path):
    assert objectives_fim.says_twice("self.offset = offset") and objectives_fim.says_twice("offsets = offsets")
    assert not objectives_fim.says_twice("self.offset = offsets") and not objectives_fim.says_twice("for i in it: it")
    objectives_fim.write_corpus(tmp_path / "corpus.jsonl")
    lines = [json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    assert len(set(lines)) == len(lines) > 10_000 and lines != sorted(lines)
    for line in lines:
        assert objectives_fim.SHORTEST <= len(line) <= objectives_fim.LONGEST and objectives_fim.says_twice(line)


def test_the_loss_of_a_middle_is_among_bytes():
    config = DecoderConfig(hidden_size=16, layers=1, heads=2, ffn_size=16, init_std=0.5)
    stage = Decoder(config, objectives_fim.BYTES + 4, ParallelMesh.alone())
    batch = TokenBatch.of(torch.arange(12)[None] * 20, torch.tensor([[IGNORED] * 4 + list(range(8))]))
    hidden = stage.hidden(batch)
    loss, count = objectives_fim.byte_loss(stage, hidden, batch)
    logits = stage.logits(hidden, batch)[4:, : objectives_fim.BYTES]
    assert count == 8
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.arange(8), reduction="sum"))


def test_objectives_verdicts():
    left_to_right, spm, prefix, suffix_prefix = (getattr(objectives_fim, name) for name in ("PLAIN", "SPM", "PREFIX", "SUFFIX_PREFIX"))
    fim = {left_to_right: [3.05, 3.03], spm: [2.8, 2.7]}
    plain = {left_to_right: [3.0, 3.0], prefix: [3.2, 3.1], suffix_prefix: [3.5, 3.5]}
    speed = {128: {"training": 50.0, "fast": 900.0, "slow": 200.0}}
    found = objectives.verdicts(fim, plain, speed)
    assert [v.ratio for v in found] == pytest.approx([2.75 / 3.15, 0.4 - 3 * 0.1, 3.04 / 3.0, 4.0])
    assert all(v.holds for v in found)
    # The better form of the plain model is the peer; each bar can fail.
    assert not objectives.verdicts(fim, {**plain, suffix_prefix: [2.8, 2.8]}, speed)[0].holds
    assert not objectives.verdicts({**fim, spm: [2.8, 2.6]}, plain, speed)[1].holds
    assert not objectives.verdicts({**fim, left_to_right: [3.1, 3.1]}, plain, speed)[2].holds
    assert not objectives.verdicts(fim, plain, {128: {"training": 150.0, "slow": 200.0}})[3].holds
    first, second = objectives.grids(fim, plain, speed)
    assert first.rows[1] == ["plain", "3.0000 (0.0000)", "", "3.1500 (0.1000)", "3.5000 (0.0000)"]
    assert ["slow", "200"] in second.rows


def test_objectives_speed():
    text = np.arange(400, dtype=np.int32) % 256
    examples = Examples(Text(ByteTokenizer(), text, text, text[:0], "", "", ((1.0, text),)), objectives.small_config(16))
    assert objectives.made(examples, 3, repeats=2) > 0
    assert objectives.small_config(1024).run.batch_size == 1 and objectives.small_config(128).run.batch_size == 8
