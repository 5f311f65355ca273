"""Saves and loads are timed, and leave nothing."""

import pytest

from benchmarks import checkpoint

CHECKPOINT = checkpoint.Sizes(hidden=16, layers=1, heads=4, ffn=24, vocab=40, s=8)


def checkpoint_peaks(root: str) -> dict[str, tuple[float, float]]:
    return {checkpoint.OURS: checkpoint.peaks(CHECKPOINT, root, checkpoint.OURS)}


@pytest.mark.parametrize("world", [1, 2])
def test_checkpoint(ranks, tmp_path, world):
    told, *_ = ranks.run(world, checkpoint.measure, CHECKPOINT, str(tmp_path), 1)
    parameters = 2 * 40 * 16 + 16 + 2 * 16 + 4 * 16 * 16 + 3 * 16 * 24
    assert told["bytes"] == 12 * parameters
    told["peaks"] = {name: (0.0, 0.0) for name in checkpoint.SAVES if name != checkpoint.LIMIT}
    told["peaks"].update(ranks.run(world, checkpoint_peaks, str(tmp_path))[0])
    for name, [(seconds, stall, _)] in told["saves"].items():
        assert 0 < stall <= seconds, name
    assert all(seconds > 0 for [seconds] in told["loads"].values())
    (saves, loads), verdicts = checkpoint.tables(world, told)
    assert [row[0] for row in saves.rows] == list(checkpoint.SAVES)
    assert [row[0] for row in loads.rows] == list(checkpoint.LOADS)
    assert len(verdicts) == 4
    assert not list(tmp_path.iterdir())
