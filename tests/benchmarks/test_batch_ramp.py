"""Means of a ramp-up, and its bars."""

import pytest

from benchmarks import batch_ramp


def ramp_curve(sizes: list[int], losses: list[float], held_out: float) -> batch_ramp.Curve:
    after = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return batch_ramp.Curve(len(sizes), list(zip(after, sizes, losses, strict=True)), [(after[-1], held_out)])


def test_batch_ramp(tmp_path):
    """Means are of samples, not of steps; the bars fail for a ramp-up that is like the large batch."""
    ramp = ramp_curve([1, 1, 2, 4], [4.0, 2.0, 5.0, 1.0], 2.1)
    assert batch_ramp.quarters(ramp) == [3.0, 5.0, 0.0, 1.0]
    assert batch_ramp.quarters(ramp_curve([1, 3, 8], [8.0, 4.0, 1.0], 2.0)) == [8.0, 4.0, 0.0, 1.0]
    small, large = ramp_curve([1] * 8, [2.0] * 8, 2.0), ramp_curve([4, 4], [5.0, 4.0], 3.0)
    found = {"ramp": ramp, "small": small, "large": large}
    assert [v.ratio for v in batch_ramp.verdicts(found)] == pytest.approx([0.5, 0.1])
    assert all(v.holds for v in batch_ramp.verdicts(found))
    assert not batch_ramp.verdicts({**found, "ramp": large})[1].holds
    batch_ramp.plot(found, tmp_path / "ramp.png")
    assert (tmp_path / "ramp.png").stat().st_size > 1000
