"""What other tools read of a checkpoint: safetensors and torch.distributed.checkpoint, bit for bit, or nothing."""

import json
import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from megapar.training.checkpoint import convert as converting
from megapar.training.checkpoint import save_checkpoint
from megapar.training.checkpoint.convert import convert
from tests.training.checkpoint.test_load import MODELS, expected, fill, training_at


def save_model(folder, tp):
    mesh, step = training_at(MODELS["tied, biases"], tp)
    fill(step)
    save_checkpoint(folder, step.optimizer.boxes(), {"step": 1}, mesh)


def logical():
    """The names and shapes of all weights."""
    _, step = training_at(MODELS["tied, biases"], 1)
    return {box.piece.name: box.piece for box in step.optimizer.boxes() if box.kind == "weight"}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_safetensors_have_every_weight(ranks, tmp_path, monkeypatch, tp, dtype):
    monkeypatch.setattr(converting, "SHARD_BYTES", 2000)
    ranks.run(tp, save_model, tmp_path / "step", tp)
    told = convert(tmp_path / "step", tmp_path / "out", "safetensors", dtype)
    pieces = logical()
    assert f"{len(pieces)} tensors" in told
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == pieces.keys()
    names = set(index["weight_map"].values())
    assert len(names) > 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"model.safetensors.index.json"}
    total = 0
    for name in names:
        for tensor, values in load_file(tmp_path / "out" / name).items():
            assert index["weight_map"][tensor] == name
            assert torch.equal(values, expected("weight", pieces[tensor]).to(dtype or torch.float32)), tensor
            total += values.nbytes
    assert total == index["metadata"]["total_size"]


def test_transformers_reads_the_shards(tmp_path, monkeypatch):
    """By its own loader: index, metadata and all."""
    modeling = pytest.importorskip("transformers.modeling_utils")
    monkeypatch.setattr(converting, "SHARD_BYTES", 2000)
    save_model(tmp_path / "step", 1)
    convert(tmp_path / "step", tmp_path / "out", "safetensors")
    pieces = logical()
    files = sorted(str(path) for path in (tmp_path / "out").glob("*.safetensors"))
    found = {name: value for file in files for name, value in modeling.load_state_dict(file, map_location="cpu").items()}
    assert found.keys() == pieces.keys()
    assert all(torch.equal(found[name], expected("weight", piece)) for name, piece in pieces.items())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_torch_s_loader_reads_weights_and_moments(ranks, tmp_path, dtype):
    ranks.run(2, save_model, tmp_path / "step", 2)
    convert(tmp_path / "step", tmp_path / "out", "dcp", dtype)
    pieces, kinds = logical(), ("weight", "exp_avg", "exp_avg_sq")
    state = {
        kind: {name: torch.zeros(piece.shape, dtype=dtype if dtype and kind == "weight" else None) for name, piece in pieces.items()}
        for kind in kinds
    }
    assert len(dcp.FileSystemReader(tmp_path / "out").read_metadata().state_dict_metadata) == 3 * len(pieces)
    dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    for kind in kinds:
        for name, values in state[kind].items():
            assert torch.equal(values, expected(kind, pieces[name]).to(values.dtype)), (kind, name)
    assert "raw" not in os.listdir(tmp_path / "out")


def test_refused_before_anything_is_written(tmp_path):
    save_model(tmp_path / "step", 1)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists and is not overwritten"):
        convert(tmp_path / "step", tmp_path / "out", "safetensors")
    with pytest.raises(ValueError, match="use safetensors or dcp"):
        convert(tmp_path / "step", tmp_path / "other", "onnx")
    assert not list((tmp_path / "out").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "step"]


@pytest.mark.parametrize("to", ["safetensors", "dcp"])
def test_a_bad_file_or_a_full_disk_leaves_nothing(tmp_path, monkeypatch, to):
    save_model(tmp_path / "step", 1)
    whole = (tmp_path / "step" / "rank-00000-00000.safetensors").read_bytes()
    (tmp_path / "step" / "rank-00000-00000.safetensors").write_bytes(whole[:-1] + b"!")
    with pytest.raises(ValueError, match=r"rank-00000-00000\.safetensors was cut short or edited"):
        convert(tmp_path / "step", tmp_path / "out", to)
    (tmp_path / "step" / "rank-00000-00000.safetensors").write_bytes(whole)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            convert(tmp_path / "step", tmp_path / "out", to)
    assert [path.name for path in tmp_path.iterdir()] == ["step"]
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "half").touch()  # of one that was killed
    convert(tmp_path / "step", tmp_path / "out", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "step"]
    assert not (tmp_path / "out" / "half").exists()


def test_values_lie_on_the_disk(tmp_path):
    """And not in a map that is never flushed: read by another descriptor after `close`."""
    file = converting.MappedFile(tmp_path / "raw", [("a", torch.float32, (3,)), ("empty", torch.float32, (0, 2)), ("s", torch.int64, ())])
    file.tensors["a"].copy_(torch.tensor([1.0, 2.0, 3.0]))
    file.tensors["s"].fill_(7)
    file.close()
    found = load_file(tmp_path / "raw")
    assert found["a"].tolist() == [1, 2, 3]
    assert (found["s"].item(), found["empty"].shape) == (7, (0, 2))
