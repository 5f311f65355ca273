"""Row ops compute the same gradients as their peers; their bars."""

import pytest
import torch

from benchmarks import row_ops


@pytest.mark.parametrize("case", row_ops.cases()[4:], ids=str)
def test_row_ops(case):
    """Of the sizes in cache: all compute the same gradients, and a wrong one is noticed."""
    eager = row_ops.contender(row_ops.EAGER, case, case.peer)
    row_ops.check(case, [row_ops.contender(row_ops.OURS, case, case.ours), eager])
    wrong = row_ops.contender(row_ops.EAGER, case, lambda *args: [z * 1.1 for z in row_ops.outputs_of(case.peer(*args))])
    with pytest.raises(AssertionError, match=r"a gradient of eager is off by 1\.0e-01"):
        row_ops.check(case, [wrong])


def test_row_ops_bars():
    case, names = row_ops.cases()[0], [row_ops.OURS, row_ops.EAGER, row_ops.COMPILED, row_ops.COPY]
    for seconds, holds in (([1.0, 3.1, 1.1, 0.9], [True, True]), ([1.0, 2.9, 0.9, 0.9], [False, False])):
        assert [v.holds for v in row_ops.verdicts(case, names, torch.tensor([seconds]))] == holds
    row = row_ops.row(case, names, torch.tensor([[1e-3, 3e-3, 2e-3, 5e-4]], dtype=torch.float64))
    assert row[1:] == ["1000", "3000", "2000", "3.00", "2.00", "33.6", "0.50"]
