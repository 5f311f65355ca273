"""megapar checkpoint: what people are told of a checkpoint."""

import json
import shutil

import pytest

from megapar import ParallelMesh
from megapar.training.checkpoint import Saver
from megapar.training.checkpoint.commands import checkpoint_command, verify
from tests.training.checkpoint.test_load import rewrite
from tests.training.checkpoint.values import Values


def save_two(root):
    mesh = ParallelMesh()
    saver = Saver(root, mesh, asynchronous=False, file_bytes=256)
    for step in (1, 2):
        saver.save(step, Values(mesh, step).boxes(), {"step": step, "config": {"[bold]": "x"}})
        assert saver.finish().error == ""


@pytest.fixture
def saved(ranks, tmp_path):
    ranks.run(2, save_two, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_inspect(saved, capsys):
    assert checkpoint_command(["inspect", str(saved / "step-00000002")]) == 0
    told = capsys.readouterr().out
    total = "weight: 4 tensors, 294 elements, 1,176 bytes"
    for words in ("megapar-checkpoint-2", "tp=1, dp=2, pp=1", "[bold]", "[12, 8]", "float32", total):
        assert words in told, told
    assert checkpoint_command(["inspect", str(saved)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "step-" in line]
    assert [row[0] for row in rows] == ["step-00000001", "step-00000002"]
    assert rows[1][-1] == "latest"
    assert rows[0][-1] != "latest"
    with pytest.raises(ValueError, match="is no checkpoint and holds none"):
        checkpoint_command(["inspect", str(saved.parent)])


def test_verify(saved, capsys):
    assert checkpoint_command(["verify", str(saved)]) == 0
    assert capsys.readouterr().out.count(": ok, ") == 2
    path = sorted((saved / "step-00000002").glob("rank-00001-*"))[-1]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert checkpoint_command(["verify", str(saved)]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert "step-00000001: ok, " in first
    assert f"not whole: {path} was cut short or edited" in second
    path.unlink()
    assert checkpoint_command(["verify", str(path.parent)]) == 1
    assert f"{path} is missing" in capsys.readouterr().out


def edited(saved, edit):
    """What verify says of a checkpoint whose manifest was edited by someone who can compute a hash."""
    folder = shutil.copytree(saved / "step-00000001", saved / "edited")
    entries = json.loads((folder / "manifest.json").read_text())["tensors"]
    at = next(i for i, entry in enumerate(entries) if entry["name"] == "a")
    edit(entries, at)
    rewrite(folder, tensors=entries)
    with pytest.raises(ValueError) as error:
        verify(folder)
    shutil.rmtree(folder)
    return str(error.value)


def test_verify_proves_that_boxes_cover_each_tensor_once(saved):
    """Where every file is right: a gap, an overlap, a box outside, boxes of two shapes, a box that no file holds."""
    assert "weight a has 48 of its 96 elements" in edited(saved, lambda entries, at: entries.pop(at))
    assert "weight a has boxes that overlap" in edited(saved, lambda entries, at: entries.append(dict(entries[at], key="other")))

    def move(entries, at, by):
        entries[at] = {**entries[at], **{end: [entries[at][end][0] + by, 0 if end == "start" else 8] for end in ("start", "stop")}}

    assert "weight a has boxes that overlap" in edited(saved, lambda entries, at: move(entries, at, 1))
    assert "outside of its shape" in edited(saved, lambda entries, at: move(entries, at, -1))
    assert "has the shapes" in edited(saved, lambda entries, at: entries[at].update(shape=[13, 8]))
    assert "does not hold the tensors that the manifest names" in edited(saved, lambda entries, at: entries[at].update(dtype="bfloat16"))
    assert "does not hold the tensors that the manifest names" in edited(saved, lambda entries, at: entries[at].update(key="b"))


def test_convert(saved, tmp_path, capsys):
    told = ["convert", str(saved / "step-00000002"), "--to", "safetensors", "--out", str(tmp_path / "out"), "--dtype", "bf16"]
    assert checkpoint_command(told) == 0
    assert "4 tensors, 588 bytes" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is not overwritten"):
        checkpoint_command(told)
    with pytest.raises(SystemExit):
        checkpoint_command(["convert", str(saved), "--to", "pickle", "--out", "x"])
