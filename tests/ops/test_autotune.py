"""Autotuning without a GPU: what is timed and when, what is remembered, and what is done with a file that is none of ours."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton

from megapar.ops.triton import autotune, gemm
from megapar.ops.triton.autotune import Choices
from megapar.ops.triton.launch import H100
from megapar.ops.triton.tiles import ACCUMULATE, PLAIN, candidates, choose

BF16 = torch.bfloat16
TILES = candidates(BF16, 90, PLAIN)
SLOWEST_FIRST = [float(len(TILES) - i) for i in range(len(TILES))]


def never(tile):
    raise AssertionError("nothing may be timed")


def times(tile):
    return SLOWEST_FIRST[TILES.index(tile)]


def test_fastest_is_remembered(tmp_path):
    path = tmp_path / "new" / "tiles.json"
    table = Choices(path)
    assert table.fastest("a", TILES, TILES[0], times) == TILES[-1] != TILES[0]
    assert table.fastest("a", TILES, TILES[0], never) == TILES[-1]
    assert Choices(path).fastest("a", TILES, TILES[0], never) == TILES[-1]
    assert Choices(path).fastest("b", TILES, TILES[0], None) == TILES[0], "without a timer the default, which is not remembered"
    assert list(json.loads(path.read_text())) == ["a"] and [p.name for p in path.parent.iterdir()] == [path.name]


def test_processes_add_to_one_file(tmp_path):
    path = tmp_path / "tiles.json"
    one, other = Choices(path), Choices(path)
    one.fastest("a", TILES, TILES[0], times)
    other.fastest("b", TILES, TILES[0], times)
    assert sorted(Choices(path).tiles) == ["a", "b"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"a": 3}', '{"a": [64, 64]}', '{"a": [64, 64, 64, 4, 4, "x"]}', '{"a": [64, 64, 64, 4, true, null]}', "\udcff"],
)
def test_broken_file_is_replaced(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match="is no table of tiles"):
        table = Choices(path)
    with pytest.warns(UserWarning, match="is no table of tiles"):
        assert table.fastest("b", TILES, TILES[0], times) == TILES[-1]
    assert list(Choices(path).tiles) == ["b"]


def test_tile_of_another_release(tmp_path):
    """A tile that is no candidate is compiled by no test: it may spill, or not fit."""
    path = tmp_path / "tiles.json"
    path.write_text('{"a": [256, 256, 64, 8, 4, null]}')
    with pytest.warns(UserWarning, match="is not a tile of this release"):
        assert Choices(path).fastest("a", TILES, TILES[0], times) == TILES[-1]
    assert Choices(path).tiles["a"] == TILES[-1]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="is no table of tiles"):
        table = Choices(tmp_path / "file" / "tiles.json")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert table.fastest("a", TILES, TILES[0], times) == TILES[-1]
    assert table.fastest("a", TILES, TILES[0], never) == TILES[-1]


def test_asked(monkeypatch):
    for value, answer in ((None, False), ("", False), ("0", False), ("1", True)):
        monkeypatch.delenv("MEGAPAR_TRITON_AUTOTUNE", raising=False)
        if value is not None:
            monkeypatch.setenv("MEGAPAR_TRITON_AUTOTUNE", value)
        assert autotune.asked() is answer
    monkeypatch.setenv("MEGAPAR_TRITON_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="MEGAPAR_TRITON_AUTOTUNE=yes must be 0 or 1"):
        autotune.asked()


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """An H100 that counts: every launch adds 1 to the second argument, and the last of the candidates is the fastest."""
    seen = SimpleNamespace(capturing=False, timed=[], launched=[])

    def launch(kernel, grid, a, target, *rest, **options):
        target += 1
        seen.launched.append(options["BLOCK_N"])

    def bench(function, **options):
        for _ in range(3):
            function()
        seen.timed.append(seen.launched[-1])
        return -float(len(seen.timed))

    monkeypatch.setenv("MEGAPAR_TRITON_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gemm, "target_of", lambda device: H100)
    monkeypatch.setattr(gemm, "launch", launch)
    monkeypatch.setattr(triton.testing, "do_bench", bench)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: seen.capturing)
    return seen


def run(size, epilogue=ACCUMULATE):
    """What one launch left in the target."""
    a, target, kernel = SimpleNamespace(device=torch.device("cuda", 0), dtype=BF16), torch.zeros(1), SimpleNamespace(__name__="some_kernel")
    gemm.launch_gemm(kernel, size, size, epilogue, (a, target, size, None, 0.5), widths=(size,), updated=(1, 3))
    return target.item()


def test_launch(gpu):
    found = [tile.n for tile in candidates(BF16, 90, ACCUMULATE)]
    assert run(4096) == 1.0, "the target is updated once"
    assert gpu.timed == found and gpu.launched[-1] == found[-1]
    before = len(gpu.launched)
    assert run(4096) == 1.0 and len(gpu.launched) == before + 1, "remembered"
    assert run(4112) == 1.0 and gpu.timed == 2 * found, "another size is timed too"


def test_not_while_capturing(gpu):
    gpu.capturing = True
    assert run(8192) == 1.0 and not gpu.timed
    assert gpu.launched == [choose(8192, 8192, BF16, H100, ACCUMULATE).n]
    gpu.capturing = False
    run(8192)
    gpu.capturing = True
    assert run(8192) == 1.0 and gpu.launched[-1] == candidates(BF16, 90, ACCUMULATE)[-1].n, "what was remembered"


def test_off_and_empty(gpu, monkeypatch):
    run(0)
    monkeypatch.delenv("MEGAPAR_TRITON_AUTOTUNE")
    run(4096)
    assert not gpu.timed
