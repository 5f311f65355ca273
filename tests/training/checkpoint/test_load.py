"""Checkpoints: whole and bitwise under any layout, or refused by the name of the bad file."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megapar import ParallelMesh
from megapar.models.config import DecoderConfig, gpt_style
from megapar.models.pipelined import PipelinedDecoder
from megapar.params import Piece, seed_of
from megapar.pipeline.kinds import make_schedule
from megapar.training.checkpoint import FORMAT, load_checkpoint, newest_checkpoint, save_checkpoint
from megapar.training.checkpoint.disk import Disk
from megapar.training.checkpoint.manifest import digest
from megapar.training.config import OptimizerConfig
from megapar.training.step import TrainStep, zero

VOCAB = 31  # a prime: no tp divides it
MODELS = {
    "uneven": DecoderConfig(hidden_size=16, layers=1, heads=4, kv_heads=2, ffn_size=23),
    "shared KV": DecoderConfig(hidden_size=16, layers=1, heads=4, kv_heads=1, ffn_size=20),
    "tied, biases": gpt_style(hidden_size=16, layers=1, heads=4, max_positions=8),
}
SMALL = MODELS["uneven"]


def expected(kind: str, piece: Piece) -> torch.Tensor:
    """What a tensor of that kind and name holds here, whatever the layout."""
    return torch.randn(piece.shape, generator=torch.Generator().manual_seed(seed_of(kind, piece.name)))[piece.index]


def training_at(
    config: DecoderConfig, tp: int, sequence_parallel: bool = False, pp: int = 1
) -> tuple[ParallelMesh, TrainStep]:
    """The mesh, and the training of this rank's stages; in a pipeline there are two on each rank."""
    mesh = ParallelMesh(tp=tp, pp=pp)
    schedule = make_schedule(None, pp, 2 if pp > 1 else 1, 1)
    made = {"schedule": schedule, "sequence_parallel": sequence_parallel, "optimize": zero(OptimizerConfig(), mesh)}
    return mesh, TrainStep(PipelinedDecoder(config, VOCAB, mesh, **made), mesh)


def fill(step: TrainStep) -> None:
    for box in step.optimizer.boxes():
        box.write(expected(box.kind, box.piece))
    step.optimizer.loaded()


def save_expected(folder: Path, config: DecoderConfig, tp: int, sequence_parallel: bool = False, pp: int = 1) -> None:
    mesh, step = training_at(config, tp, sequence_parallel, pp)
    fill(step)
    save_checkpoint(folder, step.optimizer.boxes(), {"step": 7, "tp": tp}, mesh)


def save_all(root: Path, tp: int, pp: int, layers: int) -> None:
    for (name, config), sequence_parallel in itertools.product(MODELS.items(), (False, True)):
        config = dataclasses.replace(config, layers=layers)
        save_expected(root / f"{name} {tp} {pp} {sequence_parallel}", config, tp, sequence_parallel, pp)


def load_all(root: Path, tp: int, pp: int, layers: int) -> int:
    """Loads every checkpoint in `root` in this layout and compares all of it; how many elements that were."""
    compared = 0
    for (name, config), sequence_parallel in itertools.product(MODELS.items(), (False, True)):
        for folder in sorted(root.glob(f"{name} *")):
            mesh, step = training_at(dataclasses.replace(config, layers=layers), tp, sequence_parallel, pp)
            state = load_checkpoint(folder, step.optimizer.boxes(), mesh)
            assert state["step"] == 7
            for box in step.optimizer.boxes():
                assert torch.equal(box.read(), expected(box.kind, box.piece)), f"{folder.name} at tp={tp}: {box.kind} {box.piece.name}"
                compared += box.piece.numel
    return compared


def test_every_layout_loads_what_every_layout_saved_bitwise(ranks, tmp_path):
    for tp in (1, 2, 3):
        ranks.run(tp, save_all, tmp_path, tp, 1, 1)
    assert len(list(tmp_path.iterdir())) == 3 * 2 * len(MODELS)
    for tp in (1, 2, 3):
        assert min(ranks.run(tp, load_all, tmp_path, tp, 1, 1)) > 0


def test_a_pipeline_and_none_load_what_the_other_saved_bitwise(ranks, tmp_path):
    layouts = ((2, 1), (1, 2), (2, 2))
    for tp, pp in layouts:
        ranks.run(tp * pp, save_all, tmp_path, tp, pp, 5)
    for tp, pp in layouts:
        assert min(ranks.run(tp * pp, load_all, tmp_path, tp, pp, 5)) > 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "step-00000007"
    save_expected(folder, SMALL, 1)
    return folder


def refusal(folder: Path, config: DecoderConfig = SMALL) -> str:
    mesh, step = training_at(config, 1)
    with pytest.raises(ValueError) as error:
        load_checkpoint(folder, step.optimizer.boxes(), mesh)
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(folder: Path, **changes: Any) -> None:
    """Edits the manifest as someone who can compute a sha256 would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    manifest.update(changes)
    manifest["sha256"] = digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["manifest.json", "rank-00000-00000.safetensors"]))
def test_one_flipped_bit_is_refused_by_the_name_of_its_file(saved, tmp_path, data, name):
    content = bytearray((saved / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.sampled_from([1, 2, 4, 16, 64, 128]))
    folder = tmp_path / "flipped"
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(content)
    assert str(folder / name) in refusal(folder)


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000-00000.safetensors"])
@pytest.mark.parametrize("keep", [None, 0, 1, -1])
def test_a_missing_or_short_file_is_named(saved, tmp_path, name, keep):
    folder = shutil.copytree(saved, tmp_path / "cut")
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if keep is not None:
        (folder / name).write_bytes(content[:keep])
    assert str(folder / name) in refusal(folder)


def test_other_format_is_named(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "other")
    rewrite(folder, format="megapar-checkpoint-9")
    assert "megapar-checkpoint-9" in refusal(folder)
    assert FORMAT in refusal(folder)


def test_no_file_outside_the_folder_is_read(saved, tmp_path):
    """Neither a listed file that lies elsewhere, nor a tensor in a file that the manifest does not list and hash."""
    manifest = json.loads((saved / "manifest.json").read_text())
    (told,) = manifest["files"].values()
    for outside in ("../rank-00000-00000.safetensors", str(tmp_path / "rank-00000-00000.safetensors")):
        folder = tmp_path / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        shutil.copy(saved / "rank-00000-00000.safetensors", tmp_path)
        rewrite(folder, files={outside: told}, tensors=[entry | {"file": outside} for entry in manifest["tensors"]])
        assert "rank-00000-00000.safetensors" in refusal(folder)
        rewrite(folder, files=manifest["files"], tensors=[entry | {"file": outside} for entry in manifest["tensors"]])
        assert "no sha256" in refusal(folder)


def test_missing_tensor_and_other_shape_are_named(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "short")
    entries = json.loads((folder / "manifest.json").read_text())["tensors"]
    rewrite(folder, tensors=[e for e in entries if (e["kind"], e["name"]) != ("exp_avg", "blocks.0.mlp.down.weight")])
    assert "exp_avg blocks.0.mlp.down.weight" in refusal(folder)
    wider = refusal(saved, DecoderConfig(hidden_size=16, layers=1, heads=4, kv_heads=2, ffn_size=24))
    assert "[23, 16]" in wider
    assert "[24, 16]" in wider
    assert "blocks.1." in refusal(saved, DecoderConfig(hidden_size=16, layers=2, heads=4, kv_heads=2, ffn_size=23))


def test_never_overwrites(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(ValueError, match="never overwritten"):
        save_expected(saved, SMALL, 1)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_what_a_killed_save_left_is_replaced(tmp_path):
    partial = tmp_path / "step-00000009.tmp"
    partial.mkdir()
    (partial / "rank-00000-00000.safetensors").write_text("half")
    (partial / "rank-00005-00000.safetensors").write_text("of another layout")
    assert newest_checkpoint(tmp_path) is None
    save_expected(tmp_path / "step-00000009", SMALL, 1)
    assert sorted(path.name for path in (tmp_path / "step-00000009").iterdir()) == ["manifest.json", "rank-00000-00000.safetensors"]
    assert not partial.exists()


def fail_to_save(root: Path, where: str, failing: int) -> list[str]:
    """The sentence of this rank for each way in which rank `failing` cannot write."""
    mesh, step = training_at(SMALL, 2)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    original = getattr(Disk, where)
    if mesh.world.rank == failing:
        setattr(Disk, where, full)
    try:
        save_checkpoint(root / where, step.optimizer.boxes(), {}, mesh)
    except (OSError, ValueError) as error:
        return [str(error), sorted(path.name for path in root.iterdir())]
    finally:
        setattr(Disk, where, original)
    return []


@pytest.mark.parametrize(("where", "failing"), [("write", 0), ("write", 1), ("sync", 1), ("rename", 0)])
def test_a_rank_that_cannot_write_stops_all_and_leaves_nothing(ranks, tmp_path, where, failing):
    first, second = ranks.run(2, fail_to_save, tmp_path, where, failing)
    assert first == second
    assert "No space left" in first[0]
    assert f"rank {failing} could not save" in first[0]
    assert first[1] == []


def load_error(folder: Path) -> str:
    mesh, step = training_at(SMALL, 2)
    try:
        load_checkpoint(folder, step.optimizer.boxes(), mesh, refuse_on_last if folder.name == "fine" else lambda state: None)
    except ValueError as error:
        return str(error)
    return ""


def refuse_on_last(state: dict[str, Any]) -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError(f"rank 1 does not want step {state['step']}")


def test_all_ranks_refuse_in_the_same_words(ranks, tmp_path):
    fine = tmp_path / "fine"
    ranks.run(2, save_expected, fine, SMALL, 2)
    short = shutil.copytree(fine, tmp_path / "short")
    (short / "rank-00001-00000.safetensors").write_bytes(b"\0" * 9)
    first, second = ranks.run(2, load_error, short)
    assert first == second
    assert str(short / "rank-00001-00000.safetensors") in first
    assert ranks.run(2, load_error, fine) == ["rank 1 does not want step 7"] * 2
