"""megapar plan schedule."""

import json

import pytest

from megapar.cli import main
from megapar.pipeline.check import check
from megapar.pipeline.schedule import SENDS, Schedule
from megapar.pipeline.simulate import Costs
from megapar.planning.schedule import parse_costs


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(capsys, *arguments: str) -> str:
    assert main(["plan", "schedule", *arguments]) == 0
    return capsys.readouterr().out


def test_table_bubble_and_picture(capsys, folder) -> None:
    out = plan(capsys, "--pp", "4", "--chunks", "2", "--microbatches", "8")
    assert out.splitlines()[0].split() == ["time", "rank", "0", "rank", "1", "rank", "2", "rank", "3"]
    assert "bubble 18.75% of the time that ranks compute" in out
    assert "by rank: 11, 9, 7, 5" in out
    assert "written schedule.svg" in out
    assert (folder / "schedule.svg").read_text().startswith("<?xml")


def test_zero_bubble_costs_and_kinds(capsys) -> None:
    assert "bubble 6.25% " in plan(capsys, "--pp", "4", "--chunks", "2", "--microbatches", "8", "--zero-bubble")
    assert "bubble 6.25% " in plan(capsys, "--pp", "4", "--chunks", "2", "--microbatches", "8", "--schedule", "zero_bubble")
    assert "time 40," in plan(capsys, "--pp", "2", "--microbatches", "3", "--schedule", "gpipe", "--costs", "2,3,5")
    assert "peak live activations (of one stage and micro-batch) by rank: 3, 3" in plan(
        capsys, "--pp", "2", "--microbatches", "3", "--schedule", "gpipe", "--out", "a.png"
    )


def test_trace_and_file(capsys, folder) -> None:
    plan(capsys, "--pp", "2", "--chunks", "2", "--microbatches", "3", "--out", "s.csv")
    loaded = Schedule.load(folder / "s.csv")
    assert loaded.has(SENDS) and check(loaded)
    assert "written t.json" in plan(capsys, "s.csv", "--out", "t.json")
    assert json.loads((folder / "t.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pp", "4", "--chunks", "2", "--microbatches", "8", "--group", "3"], "group=3 is smaller than pp=4"),
        (["--pp", "0", "--microbatches", "8"], "pp=0"),
        (["--pp", "4", "--microbatches", "8", "--costs", "1,2"], '"1,2" are not costs'),
        (["--pp", "4", "--microbatches", "8", "--costs", "1,2,x"], '"1,2,x" are not costs'),
        (["--pp", "4", "--microbatches", "8", "--costs", "1,2,-3"], "negative or not finite"),
        (["--pp", "4", "--microbatches", "8", "--out", "a.bmp"], "name it .svg"),
        (["--pp", "4"], "needs --pp and --microbatches"),
        (["bad.csv", "--pp", "4"], "is a schedule already"),
        (["bad.csv"], "deadlock: rank 0 at 0B0 waits for 1I0"),
        (["none.csv"], "none.csv"),
    ],
)
def test_refused_in_a_sentence(capsys, folder, arguments, words) -> None:
    (folder / "bad.csv").write_text("0F0,0B0\n1B0,1F0\n")
    assert main(["plan", "schedule", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megapar: ")
    assert words in error
    assert not (folder / "schedule.svg").exists()


def test_costs() -> None:
    assert parse_costs("1,1.1,0.9,0.05") == Costs(1, 1.1, 0.9, 0.05)
