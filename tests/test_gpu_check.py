"""The benchmarks and the report of a GPU, as far as they go without one: the parts run, fail, end in time, and are told apart."""

import json
import sys

import pytest
import torch

from benchmarks import gpu, gpu_check, gpu_static
from benchmarks.gpu_cases import Case, Sizes, all_cases
from benchmarks.gpu_peers import PACKAGES, installed
from megapar.ops import schema

CASES = {case.title: case for case in all_cases(gpu.SMALL)}


def test_every_op_has_a_case():
    measured = {op for op in schema.FILES if any(title.split(",")[0] == op for title in CASES)}
    # Of these the case of another op launches the kernel, or it is a sum over rows.
    assert set(schema.FILES) - measured == {"rope_qkv_backward", "cross_entropy_grad_", "linear_bias_grad_"}


@pytest.mark.parametrize("title", CASES)
def test_cases_agree_and_are_timed(title):
    case = CASES[title]
    names, seconds, failed = gpu.measure(case, case.peers, "cpu", gpu.Timer("cpu"), 2)
    assert names == ["megapar", *case.peers] and not failed
    assert seconds.shape == (2, len(names)) and bool((seconds > 0).all())
    assert len(gpu.row(case, names, seconds, 1e10, ["torch", "TE"])) == 7


def test_a_wrong_peer_is_refused_and_a_broken_one_is_named():
    case = CASES["swiglu"]
    with pytest.raises(AssertionError, match="swiglu: liar differs from megapar by"):
        gpu.measure(case, {"liar": lambda i: 2 * case.ours(i)}, "cpu", gpu.Timer("cpu"), 1)

    def broken(i: object) -> None:
        raise TypeError("an argument was renamed")

    names, _, failed = gpu.measure(case, {"old": broken}, "cpu", gpu.Timer("cpu"), 1)
    assert names == ["megapar"] and failed == {"old, swiglu": "TypeError: an argument was renamed"}


def test_peers_are_of_cases_that_exist():
    """Those that are not installed are named; of the others every title is a case's."""
    found, missing = installed()
    assert set(missing) <= set(PACKAGES) and set(found) <= set(CASES)


def test_roofline():
    """The larger of the two limits."""
    case = Case("", lambda device: {}, lambda i: None, bytes=2_039_000_000, flops=624_000_000_000)
    assert gpu_static.roofline(case, "A100") == pytest.approx(2e-3)
    assert gpu_static.roofline(case, "H100") == pytest.approx(624e9 / 989e12)


def test_static_report_of_a_kernel():
    case = next(case for case in all_cases(Sizes(t=64, f=1024)) if case.title == "swiglu_backward")
    (kernel,) = gpu_static.kernels(case, 90)
    assert gpu_static._row("x", kernel)[:2] == ["x", "swiglu_backward_kernel"]
    assert gpu_static._row("x", kernel)[3] == "0" and gpu_static._row("x", kernel)[6:] == ["5 / 5", "-"]


def test_without_a_gpu_it_says_so(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_check.main(tmp_path / "report") == 1
    assert "there is no GPU here" in capsys.readouterr().err and not (tmp_path / "report").exists()
    with pytest.raises(SystemExit, match="there is no CUDA GPU here"):
        gpu.main()


def test_parts_end_in_time_and_do_not_stop_each_other(tmp_path):
    def part(name: str, code: str, seconds: float = 30, why_not: str | None = None) -> gpu_check.Part:
        return gpu_check.Part(name, (sys.executable, "-c", code), seconds, why_not, {"TOLD": "yes"})

    code = "import os; print(os.environ['TOLD'])"
    listed = [part("good", code), part("bad", "raise SystemExit(3)"), part("stuck", "import time; time.sleep(60)", 1)]
    listed.append(part("no", "", 1, "it needs two GPUs"))
    outcomes = [gpu_check.run(p, tmp_path, 100) for p in listed]
    assert [o.said for o in outcomes] == ["passed", "exit status 3", "not done after 1 s", "not run"]
    assert [o.failed for o in outcomes] == [False, True, True, False]
    assert (tmp_path / "good.log").read_text() == "yes\n" and outcomes[2].seconds < 20
    assert gpu_check.run(listed[0], tmp_path, 0).said == "the ten minutes were over"
    text = gpu_check.page(outcomes, "some GPU", tmp_path)
    assert "| no | it needs two GPUs | 0 |" in text and "| bad | exit status 3 |" in text


def test_the_parts_fit_into_the_time_and_name_what_is_missing():
    alone = gpu_check.parts(1)
    assert {p.name: p.why_not for p in alone}["ranks"] == "it needs two GPUs"
    assert {p.name: p.why_not for p in gpu_check.parts(2)}["ranks"] is None
    assert sum(p.seconds for p in alone) <= 600


def test_plot(tmp_path):
    result = {"tables": [{"rows": [["swiglu", "1.0", "2", "0.93", "-"]]}]}
    gpu_check.plot(json.loads(json.dumps(result)), tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 1000
