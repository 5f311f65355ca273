"""prepare: the files are the documents; killed anywhere it goes on to the same bytes; nothing is left under the final names."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megapar.data import partial
from megapar.data import prepare as module
from megapar.data.documents import find_files
from megapar.data.indexed import IndexedDataset
from megapar.data.prepare import Preparation, prepare
from megapar.data.prepare_command import prepare_command
from megapar.data.tokenizer import read_tokenizer

TEXTS = [f"document {i}: " + "word " * (i % 7) for i in range(60)] + ["", "x"]
FINAL = ["out.bin", "out.idx", "out.json", "out.tokenizer.json"]


@pytest.fixture
def asked(tmp_path, monkeypatch) -> Preparation:
    """Three files, in batches of about 4 documents."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:40]))
    (folder / "b.txt").write_text("a file is a document")
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[40:]))
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 100)
    return Preparation((str(folder),), tmp_path / "o" / "out", tokenizer="bytes", commit_seconds=0.0)


EXPECTED = [*TEXTS[:40], "a file is a document", *[text for text in TEXTS[40:] if text]]


def names(asked: Preparation) -> list[str]:
    return sorted(path.name for path in asked.out.parent.iterdir())


def contents(asked: Preparation) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in asked.out.parent.iterdir()}


def check(asked: Preparation, expected: list[str] = EXPECTED) -> None:
    assert names(asked) == FINAL
    dataset, tokenizer = IndexedDataset(asked.out), read_tokenizer(asked.out.with_name("out.tokenizer.json"))
    ends = [document[-1] for document in dataset]
    assert [tokenizer.decode(document[:-1]) for document in dataset] == expected and ends == [tokenizer.end_of_text] * len(ends)
    facts = json.loads(asked.out.with_name("out.json").read_text())
    assert (facts["documents"], facts["tokens"]) == (len(dataset), len(dataset.tokens))
    assert (facts["dtype"], facts["vocab_size"]) == (dataset.dtype.name, tokenizer.vocab_size)


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_documents_come_back(asked, kind):
    asked = Preparation(asked.inputs, asked.out, tokenizer=kind, vocab_size=300)
    shares = []
    made = prepare(asked, told=lambda progress, share: shares.append(share))
    assert (made.documents, made.empty) == (len(EXPECTED), 1)
    assert shares == sorted(shares) and shares[-1] == 1.0
    check(asked)


def test_a_tokenizer_file(asked, tmp_path):
    prepare(Preparation(asked.inputs, asked.out, vocab_size=290))
    again = Preparation(asked.inputs, tmp_path / "p" / "out", tokenizer=str(asked.out.with_name("out.tokenizer.json")))
    prepare(again)
    assert contents(again) == contents(asked)


def test_interrupted_after_any_batch_it_goes_on_to_the_same_bytes(asked, tmp_path):
    whole = Preparation(asked.inputs, tmp_path / "w" / "out", tokenizer="bytes")
    prepare(whole)
    batches = []

    def stop(progress, share):
        batches.append(progress)
        raise KeyboardInterrupt

    while not asked.out.with_name("out.idx").exists():
        before = len(batches)
        try:
            prepare(asked, told=stop)
        except KeyboardInterrupt:
            assert not set(names(asked)) & set(FINAL)
        assert len(batches) == before + 1 or asked.out.with_name("out.idx").exists()
    assert len(batches) > 8
    assert contents(asked) == contents(whole)


def test_killed_it_goes_on_from_its_journal(asked, tmp_path):
    """A real death, with more written than the journal says."""
    code = f"""
import os, megapar.data.prepare as m
from megapar.data.partial import PartialCorpus
from pathlib import Path
m.BATCH_CHARACTERS = 100
asked = m.Preparation({asked.inputs}, Path({str(asked.out)!r}), tokenizer="bytes", commit_seconds=0)
def told(progress, share):
    if progress.documents > 20:
        PartialCorpus.commit = lambda self: (self._bin.write(b"x" * 99), self._bin.flush(), self._lengths.flush(), os._exit(9))
m.prepare(asked, told=told)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 9
    assert not set(names(asked)) & set(FINAL)
    done = []
    prepare(asked, told=lambda progress, share: done.append(progress.documents))
    assert done[0] > 20, "what the journal has is not done again"
    check(asked)


@pytest.mark.parametrize("crash", range(1, 6))
def test_a_crash_between_any_two_renames(asked, monkeypatch, crash):
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len([path for path in calls if ".partial." not in str(path)]) >= crash and ".partial." not in str(target):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    if crash == 5:
        prepare(asked)
    else:
        with pytest.raises(KeyboardInterrupt):
            prepare(asked)
        assert "out.idx" not in names(asked), "the index is the commit"
        with pytest.raises(ValueError, match=r"does not exist: give the name"):
            IndexedDataset(asked.out)
        monkeypatch.setattr(os, "replace", real)
        prepare(asked)
    check(asked)


def test_a_full_disk_leaves_nothing_under_the_final_names_and_is_gone_on_from(asked, monkeypatch):
    real, written = partial.sync, []

    def full(file):
        written.append(file)
        if len(written) > 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(partial, "sync", full)
    with pytest.raises(OSError, match=r"the disk of .*out is full after [1-9][0-9]* documents: free some"):
        prepare(asked)
    assert not set(names(asked)) & set(FINAL)
    monkeypatch.setattr(partial, "sync", real)
    prepare(asked)
    check(asked)


def test_a_disk_that_fills_up_while_the_last_files_are_written(asked, monkeypatch):
    """Each of them in turn is the one that does not fit."""
    real, fits = partial.sync, {"idx": False, "facts": False}

    def full(file):
        for kind in fits:
            if f".partial.{kind}" in str(file.name) and not fits[kind]:
                fits[kind] = True
                raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(partial, "sync", full)
    for _ in fits:
        with pytest.raises(OSError, match=r"the disk of .*out is full"):
            prepare(asked)
        assert not set(names(asked)) & set(FINAL)
    prepare(asked)
    assert all(fits.values())
    check(asked)


def test_restart_before_the_commit_and_after_it(asked, monkeypatch):
    real = os.replace

    def replace(source, target):
        if str(target).endswith("out.idx"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        prepare(asked)
    assert "out.bin" in names(asked)
    monkeypatch.setattr(os, "replace", real)
    prepare(asked, restart=True)
    check(asked)
    before = names(asked)
    with pytest.raises(ValueError, match="exists, and a corpus is not overwritten"):
        prepare(asked, restart=True)
    assert names(asked) == before


def test_restart_leaves_a_file_that_someone_else_put_there(asked):
    begun(asked)
    theirs = asked.out.with_name("out.bin")
    theirs.write_bytes(b"theirs")
    with pytest.raises(ValueError, match=r"out\.bin exists, and a corpus is not overwritten"):
        prepare(asked, restart=True)
    assert theirs.read_bytes() == b"theirs"
    theirs.unlink()
    prepare(asked)
    check(asked)


def test_an_input_that_was_edited_in_between_is_noticed(asked):
    begun(asked)
    path = find_files(asked.inputs[0])[0]
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    with pytest.raises(ValueError, match="begun with other times of the inputs: give the same, or --restart"):
        prepare(asked)
    prepare(asked, restart=True)
    check(asked)


def begun(asked: Preparation) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(asked, told=lambda progress, share: (_ for _ in ()).throw(KeyboardInterrupt))


def test_other_inputs_or_another_tokenizer_do_not_go_on(asked):
    begun(asked)
    with pytest.raises(ValueError, match="out was begun with other tokenizer: give the same, or --restart"):
        prepare(Preparation(asked.inputs, asked.out, tokenizer="characters"))
    (Path(asked.inputs[0]) / "b.txt").write_text("longer than it was before")
    with pytest.raises(ValueError, match="begun with other inputs"):
        prepare(asked)
    prepare(asked, restart=True)
    check(asked, [*TEXTS[:40], "longer than it was before", *[text for text in TEXTS[40:] if text]])


def test_refusals(asked, tmp_path):
    begun(asked)
    journal = asked.out.with_name(".out.partial.bin")
    journal.write_bytes(b"")
    with pytest.raises(ValueError, match="shorter than its journal says"):
        prepare(asked)
    with partial.PartialCorpus(tmp_path / "q", {}), pytest.raises(ValueError, match="q is being written by another process"):
        partial.PartialCorpus(tmp_path / "q", {})
    prepare(asked, restart=True)
    before = contents(asked)
    with pytest.raises(ValueError, match=r"out.bin exists, and a corpus is not overwritten"):
        prepare(asked)
    assert contents(asked) == before
    asked.out.with_name("out.idx").unlink()
    with pytest.raises(ValueError, match=r"out.bin exists"):
        prepare(asked, restart=True)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty.txt has no text"):
        prepare(Preparation((str(tmp_path / "empty.txt"),), tmp_path / "r", tokenizer="bytes"))
    with pytest.raises(ValueError, match="workers is 0"):
        prepare(Preparation(asked.inputs, tmp_path / "r", workers=0))
    with pytest.raises(ValueError, match="vocab_size is 5, byte-level BPE needs 257"):
        prepare(Preparation(asked.inputs, tmp_path / "r", vocab_size=5))


def test_ids_beyond_the_vocabulary_are_refused(asked, monkeypatch):
    monkeypatch.setattr(module.ByteTokenizer, "_encode_batch", lambda self, texts: [np.array([65536, 1], np.int32) for _ in texts])
    with pytest.raises(ValueError, match=r"token ids run from 1 to 65536 and must be in \[0, 256\]"):
        prepare(asked)


def test_command(asked, capsys):
    assert prepare_command([*asked.inputs, "--out", str(asked.out), "--tokenizer", "bytes"]) == 0
    told = capsys.readouterr()
    assert f"{len(EXPECTED)} documents, " in told.out and "1 empty documents left out" in told.out and "tokens/s" in told.err
    check(asked)
