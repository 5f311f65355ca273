"""All modes of recomputation have the same gradients and keep what the formula says."""

import pytest
import torch

from benchmarks import recompute


def recompute_once() -> tuple[list[int], list[list[float]]]:
    return recompute.measure(recompute.Sizes(b=1, s=16, hidden=32, heads=4, ffn=48, layers=2), torch.float32, 1)


def test_recompute(ranks):
    """All modes keep what the formula says, and a mode that keeps more, or takes longer, does not pass."""
    sizes = recompute.Sizes(b=1, s=16, hidden=32, heads=4, ffn=48, layers=2)
    (found, listed), names = ranks.run(1, recompute_once)[0], list(recompute.NAMES)
    assert all(second > 0 for second in listed[0])
    even = torch.ones(1, len(names))
    table, bars = recompute.grid(sizes, "fp32", found, even)
    assert [row[0] for row in table.rows] == names and all(bar.holds for bar in bars)
    found[names.index("full")] = found[names.index(recompute.NONE)]
    even[0, names.index("full")] = 1.4
    failed = [bar.bar for bar in recompute.grid(sizes, "fp32", found, even)[1] if not bar.holds]
    assert len(failed) == 3 and failed[0].startswith("fp32, full: bytes kept")


def test_recompute_checks_gradients():
    sizes = recompute.Sizes(b=1, s=8, hidden=32, heads=4, ffn=48, layers=1)
    contenders = [recompute.contender(sizes, name, torch.float32) for name in (recompute.NONE, "mlp")]
    with torch.no_grad():
        contenders[1].extra["stage"].norm.weight += 1e-3
    with pytest.raises(AssertionError, match="mlp: the gradient of"):
        recompute.check(contenders, recompute.draw(sizes, 0))
