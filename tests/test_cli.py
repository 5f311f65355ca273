"""The command line: what it makes, and one sentence for what it refuses."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megapar import cli
from megapar.cli import main
from megapar.failures import RemoteError
from megapar.training.launch import ranks_wanted
from megapar.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
[model]
hidden_size = 16
layers = 1
heads = 4
kv_heads = 2
ffn_size = 24
[data]
corpus = "c.txt"
tokenizer = "bytes"
sequence_length = 16
[parallel]
device = "cpu"
[run]
steps = 3
batch_size = 4
micro_batch_size = 2
sample_tokens = 5
prompt = "cat "
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with a config, a corpus and bad ones; no rank may be started from it."""
    (tmp_path / "c.toml").write_text(CONFIG)
    (tmp_path / "c.txt").write_text(" ".join(random.Random(0).choices(["cat", "mat", "rain"], k=300)))
    (tmp_path / "bad.toml").write_text("[run]\nstepz = 3\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def launch(*_: object) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(cli, "launch", launch)
    return tmp_path


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help(capsys, arguments):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for word in ("megapar train", "megapar verify", "megapar doctor", "torchrun", "--resume", "--nproc"):
        assert word in out


def test_help_of_train_lists_the_keys(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    keys = ("--optimizer.lr", "--run.save-every", "--save-every", "--model.kv-heads", "--model.attention", "--parallel.sequence-parallel")
    for key in keys:
        assert key in out


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("trian c.toml", '"trian" is not a command: use one of train, verify, prepare, plan, checkpoint, report, doctor'),
        ("train none.toml", "config none.toml is not a file"),
        ("train bad.toml", 'the nearest one is "run.steps"'),
        ("train c.toml --steps 0", "run.steps=0"),
        ("train c.toml --data.max-epochs 0.001 --tp 2 --nproc 2", "megapar: the run's"),
        ("train c.toml --tp 2", "start 2 (torchrun --nproc-per-node 2, or megapar train --nproc 2)"),
        ("train c.toml --tp 2 --nproc 3", "must divide the world, which has 3 ranks"),
        ("train c.toml --tp 2 --nproc 4", "the world has 4 ranks and parallel.tp=2 x parallel.dp=1 x parallel.pp=1 uses 2"),
        ("train c.toml --nproc 0", "--nproc 0 must be a number of ranks"),
        ("train c.toml --nproc=-2", "--nproc -2 must be"),
        ("train c.toml --nproc two", "--nproc two must be"),
        ("train c.toml --tp 5 --nproc auto", "tp=5 leaves a rank without one of the 4 heads"),
        ("train c.toml --tp 4 --model.ffn-size 3 --nproc auto", "model.ffn_size=3"),
        ("train c.toml --parallel.device cuda", "torch sees no GPU"),
        ("train c.toml --corpus none.txt --tp 2 --nproc 2", "corpus none.txt does not exist"),
        ("train c.toml --corpus none.txt", "corpus none.txt does not exist"),
        ("train c.toml --corpus empty.txt --tp 2 --nproc 2", "corpus empty.txt has no text"),
        ("train c.toml --corpus short.txt --tp 2 --nproc 2", "leaves 1 held_out tokens of 2 needed"),
        ("train c.toml --corpus latin.txt --tp 2 --nproc 2", "byte 0xe9 at offset 3"),
        ("train c.toml --corpus nothing --tp 2 --nproc 2", "has no text file"),
        ("train c.toml --tokenizer none.json --tp 2 --nproc 2", "tokenizer none.json is not a file"),
        ("train c.toml --data.held-out 1 --tp 2 --nproc 2", "data.held_out is 1.0 and data.test 0.0"),
        ("train c.toml --tokenizer characters --run.prompt ? --tp 2 --nproc 2", "'?' (U+003F)"),
        ("train c.toml --out c.txt/out", "run.out=c.txt/out cannot hold this run"),
        ("train c.toml --resume yes --out new", "new/checkpoints holds no checkpoint to resume from"),
        ("verify --tp 1", "--tp 1 --dp 1 --pp 1 leaves nothing to compare"),
    ],
)
def test_refusals_are_one_sentence_and_status_2(folder, capsys, monkeypatch, arguments, told):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("megapar: ")
    assert told in captured.err
    assert captured.err.count("\n") == 1
    assert "step 1/" not in captured.out


@pytest.mark.parametrize(
    ("arguments", "nearest"), [("train c.toml --stepz 4", "--steps"), ("verify --tpp 3", "--tp"), ("doctor --all", "")]
)
def test_unknown_options_end_with_status_2(folder, capsys, arguments, nearest):
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert end.value.code == 2
    assert nearest in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), 130), (RemoteError("rank 3 stopped answering: x"), 1), (OSError("disk"), 2)]
)
def test_how_a_run_ends_is_its_status(folder, capsys, monkeypatch, error, status):
    def train(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "train", train)
    assert main(["train", "c.toml"]) == status
    assert str(error) in capsys.readouterr().err


def test_other_errors_keep_their_traceback(folder, monkeypatch):
    def train(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "train", train)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", "c.toml"])


def test_a_run_leaves_what_it_says(folder, capsys):
    assert main(["train", "c.toml", "--out", "o", "--save-every", "2", "--run.eval-every", "2"]) == 0
    out = capsys.readouterr().out
    for told in ("corpus c.txt", "step 1/3", "held-out loss", "unigram", "bigram", "sample:", "model o/model"):
        assert told in out
    found = {path.relative_to("o").as_posix() for path in Path("o").rglob("*") if path.is_file()}
    pictures = {name for name in found if name.startswith("report-") and name.endswith(".png")}
    assert {"report-loss.png", "report-loss-tokens.png", "report-lr.png", "report-checkpoint-stalls.png"} <= pictures
    checkpoint = {f"checkpoints/step-0000000{n}/{name}" for n in (2, 3) for name in ("manifest.json", "rank-00000-00000.safetensors")}
    model = {f"model/{name}" for name in ("manifest.json", "rank-00000-00000.safetensors", "tokenizer.json")}
    checkpoint |= {"checkpoints/latest", "lock"}
    assert found == {"config.json", "report.html", "metrics.jsonl", "sample.txt", "summary.json"} | checkpoint | model | pictures
    summary = json.loads(Path("o/summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["held_out_loss"] == read_metrics(Path("o/metrics.jsonl"))[-1]["held_out_loss"]
    assert summary["bigram"] < summary["unigram"]
    assert Path("o/sample.txt").read_text().startswith("cat ")
    assert json.loads(Path("o/config.json").read_text())["run"]["save_every"] == 2
    assert main(["train", "c.toml", "--out", "o"]) == 2
    assert "give --resume yes" in capsys.readouterr().err
    assert main(["train", "c.toml", "--out", "o", "--save-every", "2", "--resume", "yes", "--optimizer.lr", "0.5"]) == 2
    assert "optimizer.lr is 0.5 and was 0.001" in capsys.readouterr().err


def test_ranks_wanted(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert [ranks_wanted("auto", 3, "auto"), ranks_wanted("2", 2, "cpu")] == [3, 2]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert ranks_wanted("auto", 2, "cpu") == 2
    with pytest.raises(ValueError, match="2 ranks need a GPU each and torch sees 1"):
        ranks_wanted("auto", 2, "auto")


def test_ranks_under_torchrun_refuse_in_the_same_words(folder):
    command = "-m torch.distributed.run --nproc-per-node 2 -m megapar train c.toml --tp 2 --corpus none.txt"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, *command.split()], env=environment, capture_output=True, text=True, timeout=90)
    assert ended.returncode != 0
    told = sorted(line for line in ended.stderr.splitlines() if line.startswith("megapar: "))
    assert len(told) == 2
    assert all(line == f"megapar: rank {i}: {told[0].split(': ', 2)[2]}" for i, line in enumerate(told))
    assert "corpus none.txt does not exist" in told[0]


def test_a_report_of_a_run_that_goes_on_is_made_from_its_metrics(folder, capsys):
    Path("r").mkdir()
    assert main(["report", "r"]) == 2
    assert "r holds no metrics.jsonl: give the folder of a run" in capsys.readouterr().err
    Path("r/metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "tokens": 8}\n{"step": 2, "lo')
    assert main(["report", "r"]) == 0
    assert "r/report.html, r/report-loss.png" in capsys.readouterr().out
    assert "<html" in Path("r/report.html").read_text()


def test_checkpoints_are_inspected_and_verified(folder, capsys):
    assert main(["train", "c.toml", "--out", "o", "--save-every", "2"]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "verify", "o/checkpoints/step-00000002"]) == 0
    assert main(["checkpoint", "inspect", "o/checkpoints/step-00000002"]) == 0
    assert "blocks.0.attention.q.weight" in capsys.readouterr().out
    assert main(["checkpoint", "inspect", "o"]) == 2
    assert capsys.readouterr().err.startswith("megapar: o")
