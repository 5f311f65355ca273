"""The benchmarks compare like with like, at a tiny size, and their verdicts can fail."""

import json
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from benchmarks import (
    batch_ramp,
    build_time,
    checkpoint,
    linear,
    objectives,
    objectives_fim,
    optimizer,
    overhead,
    pipeline,
    pipeline_host,
    precision,
    recompute,
    row_ops,
    silent_errors,
    tensor_parallel,
    zero,
    zero_memory,
)
from benchmarks.__main__ import render
from benchmarks.common import Verdict, count, environment, interleaved
from megapar.batch import TokenBatch
from megapar.data.tokenizer import ByteTokenizer
from megapar.mesh import ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.models.decoder import Decoder
from megapar.objectives.fim import FillInTheMiddle
from megapar.objectives.randomness import Generator
from megapar.objectives.sample import IGNORED
from megapar.training.examples import Examples
from megapar.training.text import Text

TINY = tensor_parallel.Sizes(b=2, s=8, hidden=32, heads=4, ffn=48, vocab=40, layers=1)
EAGER = [name + variant for name in ("megapar", "DTensor") for variant in ("", ", sequence-parallel")]


def overhead_once() -> tuple[dict[str, float], dict[str, int], bool]:
    """Gradient errors, collectives by contender, whether all times are positive."""
    sizes = overhead.Sizes(hidden=32, ffn=48)
    found = overhead.contenders(sizes)
    errors = overhead.errors(found, sizes)
    seconds = interleaved(found, partial(overhead.draw, sizes), repeats=1, inner=1, warmup=0)
    collectives = {c.name: count(c, overhead.draw(sizes, -1)).collectives for c in found}
    return errors, collectives, bool((seconds[0] > 0).all())


@pytest.mark.parametrize("world", [1, 2])
def test_overhead(ranks, world):
    for errors, collectives, timed in ranks.run(world, overhead_once):
        assert len(errors) == 7
        assert all(0 <= error <= overhead.AGREE for error in errors.values()), errors
        assert timed
        # Megatron's scheme: two all-reduces forward, two backward.
        assert collectives["megapar"] == collectives["DTensor"] == (4 if world == 2 else 0)


def tensor_parallel_once() -> tuple[dict[str, float], dict[str, int], bool]:
    found = tensor_parallel.contenders(TINY, [*EAGER, tensor_parallel.PLAIN])
    values = tensor_parallel.losses(found, TINY)
    tensor_parallel.check(values)
    seconds = interleaved(found, partial(tensor_parallel.draw, TINY), repeats=1, inner=1, warmup=0)
    sent = {c.name: count(c, tensor_parallel.draw(TINY, -1)).sent for c in found}
    return values, sent, bool((seconds[0, :, :-1] > 0).all())


def test_tensor_parallel(ranks):
    for values, sent, timed in ranks.run(2, tensor_parallel_once):
        assert list(values) == [*EAGER, tensor_parallel.PLAIN]
        assert timed
        assert sent["megapar"] >= 5 * 4 * TINY.b * TINY.s * TINY.hidden  # the embedding's all-reduce and the block's four
        assert sent[tensor_parallel.PLAIN] == 0


def optimizer_once() -> dict[str, Any]:
    sizes = [(64, 33), (65,), (1000, 64)]
    found = {}
    for layout in [*optimizer.LAYOUTS, optimizer.ALONE]:
        contenders = [c for c in optimizer.contenders(layout, sizes, 1) if c.name != optimizer.COMPILED]
        errors = optimizer.check(contenders)
        allocations = {c.name: optimizer.largest_allocation(c) for c in contenders}
        contenders += optimizer.limits(1000, 1)
        seconds = interleaved(contenders, optimizer.draw, repeats=1, inner=1, warmup=0)[0].tolist()
        told = {"names": [c.name for c in contenders], "seconds": seconds, "allocations": allocations, "errors": errors}
        found[layout.name] = {**told, "parameters": 64 * 33 + 65 + 64000}
    return found


def test_optimizer(ranks):
    (found,) = ranks.run(1, optimizer_once)
    layouts = [*optimizer.LAYOUTS, optimizer.ALONE]
    for layout in layouts:
        told = found[layout.name]
        assert len(told["errors"]) == 2 and told["allocations"][optimizer.OURS] < 4096
        assert optimizer.grid(layout, told).rows[0][0] == optimizer.OURS
    # Ours moves 34 bytes in the time in which triad moves 12: 34 / 12 of its bytes a second.
    even = {
        "names": [optimizer.OURS, optimizer.EAGER, optimizer.TRIAD],
        "seconds": [[1.0, 2.0, 1.0]],
        "parameters": 1,
        "allocations": {optimizer.OURS: 0},
    }
    norm = {"names": [optimizer.OURS, "torch"], "seconds": [[1.0, 14.0]]}
    verdicts = optimizer.verdicts([(layouts[0], even)], even, norm)
    assert [v.holds for v in verdicts] == [True, True, True, False]
    assert verdicts[0].ratio == pytest.approx(34 / 12) and verdicts[2].ratio == 2


def test_check_of_losses():
    with pytest.raises(AssertionError, match="b: loss"):
        tensor_parallel.check({"a": 1.0, "b": 1.0001})


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


def test_verdicts():
    assert Verdict("x", 1.19, at_most=1.2).holds and not Verdict("x", 1.21, at_most=1.2).holds
    assert Verdict("x", 1.3, at_least=1.3).holds and not Verdict("x", 1.29, at_least=1.3).holds
    assert not Verdict("x", float("nan"), at_most=1.2).holds and not Verdict("x", float("nan"), at_least=1.3).holds
    assert str(Verdict("x", 2.0, at_most=1.2)) == "FAILS: x: 2, at most 1.2"


def test_bars():
    names = [overhead.PLAIN, overhead.OURS, overhead.DTENSOR]
    fast, slow = torch.tensor([[1.0, 1.1, 5.0]]), torch.tensor([[1.0, 1.3, 5.0]])
    launches = dict.fromkeys(("tp=1", "tp=2", "tp=2, no wire"), (names, torch.stack([fast, slow])))
    assert [v.holds for v in overhead.verdicts(launches)] == [True, True, True]
    launches = dict.fromkeys(launches, (names, torch.stack([slow, fast])))
    assert [v.holds for v in overhead.verdicts(launches)] == [False, False, False]
    assert [v.holds for v in tensor_parallel.verdicts(TINY, EAGER, torch.tensor([[1.0, 1.0, 1.4, 1.2]]))] == [True, False]


def linear_once() -> tuple[list[str], list[list[float]]]:
    return linear.measure(linear.Case(5, 8, 12, torch.bfloat16), 1, 1, True, False)


def test_linear(ranks):
    """Ours and torch's agree in every dtype, and are timed."""
    for dtype in linear.NAMES:
        case = linear.Case(5, 8, 12, dtype)
        linear.check(linear.contenders(1), linear.draw(case, 0))
        linear.check(linear.swiglu_contenders(1, False), linear.draw(case, 0))
    names, seconds = ranks.run(1, linear_once)[0]
    assert names == [linear.FUSED, linear.TWO, linear.EAGER]
    assert all(second > 0 for row in seconds for second in row)
    with pytest.raises(AssertionError, match="forward ours and forward torch differ"):
        broken = linear.contenders(1, ("forward",))
        broken[0].step = lambda data: linear.linear_forward(data["x"], data["weight"]) * 1.1
        linear.check(broken, linear.draw(case, 0))


def test_bars_of_linear():
    names = [f"{kind} {who}" for kind in linear.KINDS for who in ("ours", "torch")]
    case = linear.Case(10, 10, 10, torch.bfloat16)

    def found(ours: list[float]) -> linear.Found:
        rows = [[second for one in ours for second in (one, 1.4)]]
        return {str(case): (case, names, torch.tensor(rows, dtype=torch.float64))}

    assert [v.holds for v in linear.verdicts(found([1.0, 1.0, 1.0, 0.77]), None)] == [True, True, True]
    assert [v.holds for v in linear.verdicts(found([0.5, 1.0, 1.6, 0.8]), None)] == [True, False, False]
    slow = linear.verdicts(found([1.2, 1.2, 1.2, 1.2]), 2 * 2000 / 1.4 / 1e9)
    assert [v.holds for v in slow] == [False, True, False]
    assert "at the measured peak it would be 2.00" in slow[0].bar and "forward of 10 x 10 -> 10" in slow[1].bar


def pipeline_once() -> tuple[dict[str, float], list[float]]:
    """Gradient errors by contender; whether host times are positive."""
    sizes = pipeline.Sizes(layers=5, hidden=32, heads=4, ffn=48, vocab=40, b=1, s=8)
    found = [pipeline.contender(sizes, name) for name in pipeline.ALL_OURS + pipeline.EAGER]
    return pipeline.errors(found, sizes), pipeline_host.host_seconds(1)[0][0]


def test_pipeline(ranks):
    """Every schedule, ours and torch's, gives one process's gradients."""
    for errors, host in ranks.run(2, pipeline_once):
        assert list(errors) == pipeline.ALL_OURS + pipeline.EAGER
        assert all(error <= pipeline.AGREE for error in errors.values()), errors
        assert all(second > 0 for second in host)


def asleep_once() -> tuple[list[list[list[float]]], list[float], list[int]]:
    return pipeline_host.asleep(0.1, 1)


def test_pipeline_asleep(ranks):
    """No schedule is faster than its simulation; the bar is on the distance from it, both ways."""
    seconds, simulated, actions = ranks.run(2, asleep_once)[0]
    assert all(measured > 0.99 * least for measured, least in zip(seconds[0][0], simulated, strict=True))
    assert actions[0] > 2 * pipeline_host.MICRO_BATCHES, "sends and receives are actions too"
    exact = torch.tensor([simulated, simulated], dtype=torch.float64)[:, None]
    for factor, holds in ((1.0, True), (1.03, False), (0.97, False)):
        assert all(v.holds == holds for v in pipeline_host.grid_of_sleeps(0.1, factor * exact, simulated, actions)[1])


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


def test_silent_errors(ranks):
    """torch's default is wrong, and both that and its way out are told beside ours."""
    (default, own), (right, _) = (row[1:] for row in silent_errors.worst(ranks.run(2, silent_errors.of_torch)))
    assert default > 0.1 and right < silent_errors.AGREE and own < silent_errors.AGREE


SETUP = """
from setuptools import Extension, setup
setup(name="tree", ext_modules=[Extension(name, [name + ".c"]) for name in ("amp_C", "fused_weight_gradient_mlp_cuda", "other")])
"""


def test_build_time(tmp_path, monkeypatch):
    """Of a tree's extensions only those asked for are built, from nothing; what fails is missing with what it said."""
    for name in (*build_time.APEX, "other"):
        (tmp_path / f"{name}.c").write_text("int f(void) { return 1; }\n" if name != "other" else "#error built\n")
    (tmp_path / "setup.py").write_text(SETUP)
    (tmp_path / "amp_C.old.so").write_bytes(b"")
    took = build_time.build(tmp_path, ["setup.py", "amp_C.c", "fused_weight_gradient_mlp_cuda.c"], build_time.APEX, {})
    assert took.seconds > 0 and took.cpu_seconds > 0 and took.size > 1000
    with pytest.raises(build_time.BuildError, match="error: #error built"):
        build_time.build(tmp_path, ["setup.py", "other.c"], ["other"], {})
    with pytest.raises(build_time.BuildError, match="it built nothing"):
        build_time.build(tmp_path, ["setup.py"], ["megapar._CUDA"], {})
    assert {path.suffix for path in tmp_path.iterdir()} == {".c", ".py", ".so"}, "nothing is left in the tree"

    real = build_time.build
    monkeypatch.setattr(build_time, "ROOT", tmp_path)
    monkeypatch.setattr(build_time, "OURS", ("setup.py",))
    monkeypatch.setattr(build_time, "build", lambda *args: real(*args) if args[2] == build_time.APEX else took)
    monkeypatch.setattr(build_time, "why_no_cuda", lambda: None)
    environment = {"MAX_JOBS": "1", "TORCH_CUDA_ARCH_LIST": "8.0"}
    found, missing = build_time.measure(tmp_path, 1, environment)
    assert list(found) == [build_time.CPU, build_time.CUDA, build_time.PEER] and missing == {}
    assert len(build_time.grid(found, environment).rows) == 3 and len(build_time.verdicts(found)) == 1
    found, missing = build_time.measure(None, 1, environment)
    assert list(missing) == ["apex"] and build_time.verdicts(found) == []
    monkeypatch.setattr(build_time, "why_no_cuda", lambda: "there is no nvcc")
    found, missing = build_time.measure(tmp_path, 1, environment)
    assert list(found) == [build_time.CPU] and set(missing.values()) == {"there is no nvcc"}


def test_page():
    result = {
        "name": "n",
        **environment(),
        "tables": [{"title": "t", "columns": ["a", "b"], "rows": [["1", "2"]]}],
        "verdicts": [{"bar": "x", "ratio": 2.0, "at_most": 1.0, "at_least": None, "holds": False}],
        "missing": {"peer": "why"},
    }
    page = render([result])
    assert "| a | b |\n| --- | ---: |\n| 1 | 2 |" in page
    assert "- **fails**: x: 2, at most 1" in page and "- missing: peer: `why`" in page


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


FIM = FillInTheMiddle(sequence_length=16, vocab_size=50, end_id=49, prefix_id=50, suffix_id=51, middle_id=52, level="token")


def test_middles_are_the_same_for_all_forms_and_alone_counted():
    text = np.arange(34, dtype=np.int32) % 20
    text[[4, 17]] = FIM.end_id
    (document,) = objectives_fim.documents(text, FIM.end_id)  # what the ends of the text may have cut is none
    assert document.tolist() == text[5:17].tolist()
    found = [objectives_fim.cut(document, Generator(i)) for i in range(600)]
    assert {(1, 11), (1, 1), (11, 1)} <= {(len(m.prefix), len(m.middle)) for m in found}
    for m in found:
        assert np.concatenate([m.prefix, m.middle, m.suffix]).tolist() == document.tolist()
        for form, context in objectives_fim.contexts(m, FIM).items():
            sample = objectives_fim.asked(context, m.middle, form)
            assert sample.targets[sample.targets != IGNORED].tolist() == m.middle.tolist()
            given = [*m.prefix] if form == objectives_fim.PREFIX else [*m.prefix, *m.suffix]
            assert sorted(i for i in context if i < FIM.vocab_size) == sorted(given)


@pytest.mark.parametrize("seed", range(20))
def test_the_form_of_middles_is_the_one_that_fim_trains(seed):
    spm = replace(FIM, rate=1.0, spm_rate=1.0).document(np.arange(12), Generator(seed))
    middle_at = int(np.flatnonzero(spm == FIM.middle_id)[0])
    suffix, written = spm[2:middle_at], spm[middle_at + 1 : -1]
    for cut in range(len(written) + 1):
        m = objectives_fim.Middle(written[:cut], written[cut:], suffix)
        assert spm.tolist() == [*objectives_fim.contexts(m, FIM)[objectives_fim.SPM], *m.middle, FIM.end_id]


def test_lines_that_say_a_word_twice(tmp_path):
    assert objectives_fim.says_twice("self.offset = offset") and objectives_fim.says_twice("offsets = offsets")
    assert not objectives_fim.says_twice("self.offset = offsets") and not objectives_fim.says_twice("for i in it: it")
    objectives_fim.write_corpus(tmp_path / "corpus.jsonl")
    lines = [json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    assert len(set(lines)) == len(lines) > 10_000 and lines != sorted(lines)
    for line in lines:
        assert objectives_fim.SHORTEST <= len(line) <= objectives_fim.LONGEST and objectives_fim.says_twice(line)


def test_the_loss_of_a_middle_is_among_bytes():
    config = DecoderConfig(hidden_size=16, layers=1, heads=2, ffn_size=16, init_std=0.5)
    stage = Decoder(config, objectives_fim.BYTES + 4, ParallelMesh.alone())
    batch = TokenBatch.of(torch.arange(12)[None] * 20, torch.tensor([[IGNORED] * 4 + list(range(8))]))
    hidden = stage.hidden(batch)
    loss, count = objectives_fim.byte_loss(stage, hidden, batch)
    logits = stage.logits(hidden, batch)[4:, : objectives_fim.BYTES]
    assert count == 8
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.arange(8), reduction="sum"))


def test_objectives_verdicts():
    left_to_right, spm, prefix, suffix_prefix = (getattr(objectives_fim, name) for name in ("PLAIN", "SPM", "PREFIX", "SUFFIX_PREFIX"))
    fim = {left_to_right: [3.05, 3.03], spm: [2.8, 2.7]}
    plain = {left_to_right: [3.0, 3.0], prefix: [3.2, 3.1], suffix_prefix: [3.5, 3.5]}
    speed = {128: {"training": 50.0, "fast": 900.0, "slow": 200.0}}
    found = objectives.verdicts(fim, plain, speed)
    assert [v.ratio for v in found] == pytest.approx([2.75 / 3.15, 0.4 - 3 * 0.1, 3.04 / 3.0, 4.0])
    assert all(v.holds for v in found)
    # The better form of the plain model is the peer; each bar can fail.
    assert not objectives.verdicts(fim, {**plain, suffix_prefix: [2.8, 2.8]}, speed)[0].holds
    assert not objectives.verdicts({**fim, spm: [2.8, 2.6]}, plain, speed)[1].holds
    assert not objectives.verdicts({**fim, left_to_right: [3.1, 3.1]}, plain, speed)[2].holds
    assert not objectives.verdicts(fim, plain, {128: {"training": 150.0, "slow": 200.0}})[3].holds
    first, second = objectives.grids(fim, plain, speed)
    assert first.rows[1] == ["plain", "3.0000 (0.0000)", "", "3.1500 (0.1000)", "3.5000 (0.0000)"]
    assert ["slow", "200"] in second.rows


def test_objectives_speed():
    text = np.arange(400, dtype=np.int32) % 256
    examples = Examples(Text(ByteTokenizer(), text, text, text[:0], "", "", ((1.0, text),)), objectives.small_config(16))
    assert objectives.made(examples, 3, repeats=2) > 0
    assert objectives.small_config(1024).run.batch_size == 1 and objectives.small_config(128).run.batch_size == 8


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
