"""All contenders train one process's weights and send what their stage must."""

from unittest import mock

import pytest
import torch

from benchmarks import zero, zero_memory


def zero_once(precision: str) -> tuple[dict[str, tuple[float, float]], list[list[list[float]]], list[int], dict[str, tuple[float, float]]]:
    """Errors by contender; seconds and bytes sent; errors of one that trains on its rank's tokens alone."""
    case = zero.Case(zero.TINY, precision)
    names = zero.names_of(case, compiled=False)
    errors = zero.errors(case, names)
    with mock.patch.object(zero, "trainer", lambda case, name: zero.Torch(case, zero.ALONE)):
        wrong = zero.errors(case, ["torch DDP"])
    with mock.patch.object(zero, "errors", lambda case, names: errors):
        return errors, *zero.measure(case, names, 1), wrong


SENT = {
    "fp32": {"torch alone": 0, "megapar 0": 4, "megapar 1": 4, "megapar 2": 4, "torch DDP": 4, "torch ZeRO-1": 6, "torch FSDP2 2": 4},
    "bf16": {"torch alone": 0, "megapar 0": 4, "megapar 1": 3, "megapar 2": 3, "torch DDP": 2, "torch ZeRO-1": 4, "torch FSDP2 2": 3},
}
"""Bytes a weight from one of two ranks: fp32 gradients (DDP: of the weights' dtype), and weights where they are gathered."""


@pytest.mark.parametrize("precision", list(SENT))
def test_zero(ranks, precision):
    """All contenders train one process's weights, and send what their stage must; DeepSpeed, which is not here, is left out."""
    weights = sum(p.numel() for p in zero.trainer(zero.Case(zero.TINY), "torch alone").params)
    for errors, seconds, sent, wrong in ranks.run(2, zero_once, precision):
        zero.check(errors, precision)
        with pytest.raises(AssertionError, match="torch DDP: a tensor's change is off"):
            zero.check(wrong, precision)
        whole, update, waiting = torch.tensor(seconds)[:, 0]
        assert len(whole) == len(errors) and (update > 0).all() and (whole > update).all() and (whole > waiting).all()
        each = {name: bytes_ / weights for name, bytes_ in zip(errors, sent, strict=True)}
        for name, expected in SENT[precision].items():
            assert each[name] == pytest.approx(expected, abs=0.01), (name, each)
        # Weights twice and a half for each of two micro-batches at most, without those kept from one use to the next.
        assert each["megapar 2"] < each["megapar 3"] < 2 * each["megapar 2"] + 2


def test_limit_of_zero():
    """A sharded optimizer's limit is without the other rank's update; waiting and bytes are told as they were measured."""
    names = ["megapar 0", "megapar 1", "torch DDP, compiled", "megapar alone", "torch alone, compiled"]
    seconds = torch.tensor([[[2.0, 2.0, 4.0, 1.0, 2.0]], [[0.5, 0.5, 0.5, 0.5, 0.5]], [[0.25, 0.25, 0.25, 0.0, 0.0]]])
    peaks = {name: [200.0, 100.0] for name in names}
    case = zero.Case()
    rows = zero.grid("t", case, 2, names, seconds, [10**6] * 5, list(peaks.values()), names[2]).rows
    assert [row[6] for row in rows] == ["0.50", "0.38", "0.50", "1.00", "1.00"]
    assert rows[0][1:6] + rows[0][7:] == ["512", "2.00", "2000.0", "500.0", "250.0", "1.0", "200", "100"]
    names = [*names[:2], "torch DDP", "torch DDP, compiled", "DeepSpeed 1"]
    peaks |= {"torch DDP": [9.0, 80.0], "DeepSpeed 1": [9.0, 200.0]}
    found = zero.verdicts("", names, torch.tensor([[[2.0, 2.0, 4.0, 2.5, 3.5]]]), peaks, 1.5)
    assert [(v.bar, v.ratio, v.holds) for v in found] == [
        (": tokens/s of megapar 0 / torch DDP, compiled", 1.25, False),
        (": tensors of megapar 0 / torch DDP", 1.25, False),
        (": tokens/s of megapar 1 / DeepSpeed 1", 1.75, True),
        (": tensors of megapar 1 / DeepSpeed 1", 0.5, True),
    ]


def test_memory_of_zero():
    """What a step held at its peak is counted, freed or not; the search finds the last size under the cap."""
    meter = zero_memory.Meter()
    with meter.measuring():
        kept = torch.empty(1000, dtype=torch.float64)
        torch.empty(3000, dtype=torch.float64)
    assert meter.held == 8000 and meter.peak == 32000
    with meter.measuring():
        del kept
    assert meter.held == 0 and meter.peak == 8000
    assert zero_memory.search(lambda b: 10 + 10 * b, 65) == (5, 20, 60)
    assert zero_memory.search(lambda b: 10 + 10 * b, 19) == (0, 20, 20)
    assert zero_memory.search(lambda b: 0, 1)[0] == zero_memory.MOST
