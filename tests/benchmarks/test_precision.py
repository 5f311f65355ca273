"""The table of precisions."""

import torch

from benchmarks import precision


def test_precision_table():
    names = list(precision.KINDS)
    seconds = torch.tensor([[2.0, 1.0, 4.0, 3.0, 3.0, 6.0]] * 3)
    memory = dict(zip(names, [(160.0, 4.0), (180.0, 2.0), (180.0, 3.5), (160.0, 6.0), (170.0, 3.0), (150.0, 6.0)], strict=True))
    grid, bars = precision.table(seconds, memory)
    assert [row[2] for row in grid.rows] == ["1.00", "2.00", "0.50", "1.00", "1.00", "0.50"]
    assert [row[5] for row in grid.rows] == ["1.00", "0.50", "0.88", "1.00", "0.50", "1.00"]
    assert [(bar.ratio, bar.holds) for bar in bars] == [(2.0, True), (0.5, True), (0.5, False), (0.875, False)]
    assert grid.rows[1][1] == "512"
    assert {precision.case_of(name)[0].dtype for name in names} == {torch.float32, torch.bfloat16, torch.float16}
