"""`megapar verify` on right models and on models with a planted bug, through the command line as a rank runs it."""

import contextlib
import io
import os
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from megapar import ParallelMesh
from megapar.cli import main
from megapar.training.verify import Check, verify
from megapar.training.verify_subject import Subject, language_model_loss, load_subject, random_tokens

OURS = """
    import torch
    from torch import nn
    from megapar import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding


    class Net(nn.Module):
        def __init__(self, mesh, row=RowParallelLinear, sequence_parallel=False):
            super().__init__()
            self.embedding = VocabParallelEmbedding(31, 8, tp=mesh.tp, sequence_parallel=sequence_parallel)
            self.up = ColumnParallelLinear(8, 11, tp=mesh.tp, sequence_parallel=sequence_parallel)
            self.down = row(11, 8, tp=mesh.tp, sequence_parallel=sequence_parallel)
            self.dropout = nn.Dropout(0.5)
            self.head = ColumnParallelLinear(8, 31, bias=False, tp=mesh.tp, sequence_parallel=sequence_parallel)

        def forward(self, tokens):
            x = self.embedding(tokens.reshape(-1))
            return self.head(x + self.dropout(self.down(torch.relu(self.up(x)))))[: tokens.numel()]


    def build(mesh, sequence_parallel=False):
        return Net(mesh, sequence_parallel=sequence_parallel)
"""
PLANTED = """
    import torch
    import torch.nn.functional as F
    from megapar import RowParallelLinear
    from verified_ours import Net


    class BiasOnEveryRank(RowParallelLinear):
        def forward(self, x):
            return super().forward(x) + (self.tp.size - 1) * self.bias


    class GradientNotSummed(Net):
        def forward(self, tokens):
            x = self.embedding(tokens.reshape(-1))
            h = torch.relu(F.linear(x, self.up.weight, self.up.bias))
            return self.head(x + self.down(h))


    def bias_on_every_rank(mesh):
        return Net(mesh, BiasOnEveryRank)


    def gradient_not_summed(mesh):
        return GradientNotSummed(mesh)


    def doubled_gradient(mesh):
        model = Net(mesh)
        model.up.weight.register_hook(lambda grad: grad * mesh.tp.size)
        return model


    def one_rank_doubles(mesh):
        model = Net(mesh)
        if mesh.tp.rank == 1:
            model.down.bias.register_hook(lambda grad: 2 * grad)
        return model


    def other_start(mesh):
        model = Net(mesh)
        with torch.no_grad():
            model.up.bias[0] += 1e-6 * mesh.tp.rank
        return model


    def not_a_number(mesh):
        model = Net(mesh)
        with torch.no_grad():
            model.down.bias.fill_(float("nan"))
        return model


    def more_parameters(mesh):
        model = Net(mesh)
        if mesh.tp.rank == 1:
            model.extra = torch.nn.Parameter(torch.ones(2))
        return model


    def other_shape(mesh):
        model = Net(mesh)
        model.extra = torch.nn.Parameter(torch.ones(2 + mesh.tp.rank))
        return model
"""
PLAIN = """
    import torch
    from torch import nn


    class Plain(nn.Module):
        def __init__(self, vocab=31):
            super().__init__()
            self.embedding = nn.Embedding(vocab, 8)
            self.norm = nn.LayerNorm(8)
            self.up, self.down, self.head = nn.Linear(8, 11), nn.Linear(11, 8), nn.Linear(8, 31)

        def forward(self, tokens):
            x = self.embedding(tokens)
            return (self.head(x + self.down(torch.relu(self.up(self.norm(x))))),)


    build = Plain
    plan = {"embedding": "vocab", "up": "column", "down": "row", "head": "column_gather"}
"""
HOOKS = """
    import torch
    from torch import nn
    from megapar import ColumnParallelLinear, RowParallelLinear


    class Net(nn.Sequential):
        def forward(self, x, target):
            return super().forward(x)


    def build(mesh):
        torch.rand(1 + mesh.tp.rank)  # leaves torch's generator in another place on each rank
        torch.manual_seed(1)
        model = Net(ColumnParallelLinear(5, 7, tp=mesh.tp), nn.Tanh(), RowParallelLinear(7, 3, tp=mesh.tp))
        torch.rand(1 + mesh.tp.rank)
        return model


    def inputs():
        return torch.randn(4, 5), torch.randn(4, 3)


    def loss(output, x, target):
        return (output - target).square().sum()
"""
LLAMA = """
    from transformers import LlamaConfig, LlamaForCausalLM


    def build():
        sizes = {"hidden_size": 16, "intermediate_size": 23, "num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=30, num_hidden_layers=1, max_position_embeddings=32, **sizes))
"""
STAGES = """
    import torch
    from torch import nn


    def build():
        torch.manual_seed(1)
        layers = [nn.Embedding(31, 8), *(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)), nn.Linear(8, 31)]
        return nn.Sequential(*layers)


    plan = {}


    class Stage(nn.Module):
        def __init__(self, start, stop, scale=1.0):
            super().__init__()
            self.scale = scale
            for number, layer in list(build().named_children())[start:stop]:
                self.add_module(number, layer)  # the names of the whole

        def forward(self, x, inputs):
            x = inputs[0] if x is None else x
            for layer in self.children():
                x = layer(x)
            return x if self.scale == 1.0 else self.scale * x + (1 - self.scale) * x.detach()


    def build_stage(mesh, stage, stages):
        cuts = [6 * s // stages for s in range(stages + 1)]
        return Stage(cuts[stage], cuts[stage + 1], SCALE if stage == 1 else 1.0)


    SCALE = 1.0
"""
SCALED = STAGES.replace("SCALE = 1.0", "SCALE = 2.0")
MODULES = {"verified_ours": OURS, "verified_planted": PLANTED, "verified_plain": PLAIN, "verified_hooks": HOOKS, "verified_llama": LLAMA}
MODULES |= {"verified_stages": STAGES, "verified_scaled": SCALED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name, text in MODULES.items():
        (path / f"{name}.py").write_text(textwrap.dedent(text))
    return path


def verify_in(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `megapar verify` in a rank whose current folder is `folder`."""
    before, out, err = Path.cwd(), io.StringIO(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["verify", *arguments])
    finally:
        os.chdir(before)
    return status, out.getvalue(), err.getvalue()


def failed(table: str) -> set[str]:
    """The checks that the table calls FAILED."""
    return {line.split("│")[2].strip() for line in table.splitlines() if "FAILED" in line}


@pytest.mark.parametrize("arguments", ["ours", "ours:build --sequence-parallel", "plain:build", "hooks", "llama"])
def test_right_models_pass(ranks, folder, arguments):
    told = f"verified_{arguments} --tp 2".split()
    (status, table, _), (other, silent, _) = ranks.run(2, verify_in, folder, *told)
    assert (status, other, silent) == (0, 0, "")
    assert failed(table) == set()
    assert "right: " in table
    for line in ("initial weights", "output", "loss", "gradient "):
        assert line in table


def test_right_model_passes_at_tp_3(ranks, folder):
    assert all(status == 0 for status, _, _ in ranks.run(3, verify_in, folder, "verified_ours", "--tp", "3"))


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("bias_on_every_rank", {"output", "loss", "gradient down.bias"}),
        ("gradient_not_summed", {"gradient embedding.weight"}),
        ("doubled_gradient", {"gradient up.weight"}),
        ("one_rank_doubles", {"gradient down.bias"}),
        ("other_start", {"initial weights"}),
        ("not_a_number", {"output", "loss"}),
    ],
)
def test_a_planted_bug_is_found_and_named(ranks, folder, planted, found):
    (status, table, _), (other, _, _) = ranks.run(2, verify_in, folder, f"verified_planted:{planted}", "--tp", "2")
    assert (status, other) == (1, 1)
    assert found <= failed(table)
    assert "WRONG" in table
    if planted in ("doubled_gradient", "one_rank_doubles", "gradient_not_summed"):
        assert failed(table) == found


@pytest.mark.parametrize(("planted", "told"), [("more_parameters", "extra"), ("other_shape", "(3,)")])
def test_what_is_not_one_model_is_refused_on_all_ranks(ranks, folder, planted, told):
    """Only rank 1 can see it."""
    results = ranks.run(2, verify_in, folder, f"verified_planted:{planted}", "--tp", "2")
    assert [status for status, _, _ in results] == [2, 2]
    sentences = {err.split(": ", 2)[2] for _, _, err in results}
    assert len(sentences) == 1
    assert told in sentences.pop()


def test_own_decoder_is_proved_in_every_style(ranks):
    (status, table, _), _ = ranks.run(2, verify_in, Path.cwd(), "--tp", "2")
    assert status == 0
    assert table.count("sequence parallel") == 3
    assert failed(table) == set()


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("no_such_module:build", "no module no_such_module"),
        ("verified_plain:bild", 'no function "bild"'),
        ("verified_plain:plan", 'no function "plan"'),
    ],
)
def test_targets_that_are_not_there(folder, monkeypatch, target, told):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", [*sys.path])
    with pytest.raises(ValueError, match=told):
        load_subject(target, False)


def test_sequence_parallel_reaches_the_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    told = "def build(mesh, sequence_parallel=False): ...\ndef build_stage(mesh, stage, stages{}): return {}\n"
    (tmp_path / "stages_know.py").write_text(told.format(", sequence_parallel=False", "sequence_parallel"))
    (tmp_path / "stages_do_not.py").write_text(told.format("", "None"))
    subject = load_subject("stages_know", True)
    assert subject.build_stage is not None and subject.build_stage(None, 0, 2) is True
    with pytest.raises(ValueError, match="needs build_stage"):
        load_subject("stages_do_not", True)


def test_sequence_parallel_needs_a_model_that_knows_it(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", [*sys.path])
    with pytest.raises(ValueError, match="leave the flag out"):
        load_subject("verified_plain", True)


class Embedded(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Embedding(7, 4), nn.Linear(4, 7))


def without_plan() -> str:
    mesh = ParallelMesh(tp=2)
    subject = Subject(load_subject(f"{__name__}:Embedded", False).build, random_tokens, language_model_loss)
    try:
        verify(subject, mesh)
    except ValueError as error:
        return str(error)
    return ""


def test_a_plain_model_without_a_plan_is_told_how_to_write_one(ranks):
    first, second = ranks.run(2, without_plan)
    assert first == second
    assert "pass plan=" in first


def test_a_model_without_tokens_is_told_of_inputs():
    with pytest.raises(ValueError, match=r"inputs\(\)"):
        random_tokens(nn.Linear(2, 2), 0)


def test_verdict():
    assert [Check("x", error, 1.0).passed for error in (0.0, 1.0, 1.1)] == [True, True, False]
    assert Check("x", 0.0, 0.0).passed
    assert not Check("x", float("inf"), float("inf")).passed, "a model that gives no numbers is not right"


def test_random_tokens_are_the_same_each_time():
    """And micro-batches differ, in their tokens and some in their length: else a pipeline that mixed them up would pass."""
    torch.rand(3)
    assert torch.equal(random_tokens(Embedded(), 0)[0], random_tokens(Embedded(), 0)[0])
    first, second, third = (random_tokens(Embedded(), m)[0] for m in range(3))
    assert first.shape == second.shape != third.shape and not torch.equal(first, second)


@pytest.mark.parametrize("arguments", ["--pp 2", "--pp 3 --microbatches 2 --schedule gpipe", "--pp 2 --chunks 3 --microbatches 5"])
def test_a_right_pipeline_passes(ranks, folder, arguments):
    pp = int(arguments.split()[1])
    results = ranks.run(pp, verify_in, folder, "verified_stages", *arguments.split())
    assert [status for status, _, _ in results] == [0] * pp
    for line in ("initial weights", "output", "loss", "gradient 0.weight", "gradient 5.bias"):
        assert line in results[0][1]


def test_a_stage_that_scales_gradients_is_found(ranks, folder):
    """Its outputs and losses are right, and so are the gradients after it."""
    (status, table, _), (other, _, _) = ranks.run(2, verify_in, folder, "verified_scaled", "--pp", "2", "--chunks", "2")
    assert (status, other) == (1, 1)
    assert failed(table) == {f"gradient {n}" for n in ("0.weight", "1.0.weight", "1.0.bias", "2.0.weight", "2.0.bias")}


@pytest.mark.parametrize("arguments", ["--tp 2 --pp 2 --chunks 2", "--pp 2 --schedule zero_bubble --microbatches 5"])
def test_own_decoder_is_proved_in_a_pipeline(ranks, arguments):
    size = 4 if "--tp" in arguments else 2
    results = ranks.run(size, verify_in, Path.cwd(), *arguments.split())
    assert [status for status, _, _ in results] == [0] * size
    assert failed(results[0][1]) == set()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--pp 1 --tp 1", "leaves nothing to compare"),
        ("--chunks 2", "are for pipelines"),
        ("--pp 2 --chunks 2 --schedule 1f1b", "1f1b has one chunk"),
        ("verified_plain --pp 2", "build_stage"),
        ("--pp 2 --tp 0", "leaves nothing to compare"),
        ("--tp 2 --chunks 0", "are for pipelines"),
    ],
)
def test_pipelines_that_cannot_be_verified(ranks, folder, arguments, told):
    results = ranks.run(2, verify_in, folder, *arguments.split())
    assert all(status == 2 and told in err for status, _, err in results)
