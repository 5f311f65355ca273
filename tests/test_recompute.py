"""Recomputation changes no gradient, in any mode, dtype and layout; it repeats as little as it says, and refuses what it cannot do."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapar import ParallelMesh
from megapar.batch import TokenBatch
from megapar.grads import Deferral, MainGrads
from megapar.layers.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from megapar.mesh import Axis
from megapar.models.config import DecoderConfig, gpt_style
from megapar.models.decoder import Decoder, DecoderStage
from megapar.models.pipelined import PipelinedDecoder
from megapar.ops.dropout import dropout, dropout_rows
from megapar.pipeline.kinds import make_schedule
from megapar.pipeline.runtime import PipelineRunner
from megapar.recompute import Recompute, apply_recompute
from tests.counting import counted
from tests.pipeline.decoders import Chunk, loss_of, micro_batches

VOCABULARY, ALONE = 61, ParallelMesh.alone()
LAYERS = 3
STYLES = {
    "llama": DecoderConfig(hidden_size=32, layers=LAYERS, heads=4, kv_heads=2, ffn_size=53, init_std=0.2),
    "shared kv": DecoderConfig(hidden_size=32, layers=LAYERS, heads=4, kv_heads=1, ffn_size=48, init_std=0.2),
    "gpt": gpt_style(hidden_size=32, layers=LAYERS, heads=4, max_positions=16),
}
MODES = (Recompute("full"), Recompute("full", blocks=2), Recompute("attention"), Recompute("mlp"))
SHARDED = Recompute("full", shard_saved_input=True)
DTYPES = (torch.float32, torch.bfloat16)
Found = dict[str, Tensor]


def batch_of(prefix: bool) -> tuple[TokenBatch, Tensor]:
    """2 sequences of 7 tokens, which tp=2 does not pad and tp=4 does; their targets."""
    tokens = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(7))
    batch = TokenBatch.of(tokens[:, :-1].contiguous())
    if prefix:
        batch = TokenBatch(2, 7, batch.tokens, batch.position_ids, prefix_len=torch.tensor([3, 5]))
    return batch, tokens[:, 1:].reshape(-1)


def run(stage: DecoderStage, prefix: bool, main: bool) -> Found:
    """Loss and gradients of two micro-batches, in main_grad or in .grad."""
    grads = MainGrads(stage.parameters()) if main else None
    for _ in range(2):
        batch, targets = batch_of(prefix)
        options: dict[str, Any] = {"tp": stage.tp, "vocab_size": VOCABULARY, "sequence_parallel": stage.sequence_parallel}
        loss = vocab_parallel_linear_cross_entropy(stage(None, batch), stage.head.weight, targets, **options)
        loss.backward()
    if grads is not None:
        grads.finish()
    found = {name: (p.main_grad if main else p.grad).clone() for name, p in stage.named_parameters()}
    return found | {"loss": loss.detach()}


def assert_same(found: Found, expected: Found, what: Any) -> None:
    assert found.keys() == expected.keys(), what
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{what}: {name} differs by {float((found[name] - value).abs().max()):.1e}"


def compare(mesh: ParallelMesh, styles: list[str], sequence_parallel: bool, modes: tuple[Recompute, ...]) -> None:
    for style, dtype, (prefix, main) in itertools.product(styles, DTYPES, ((False, True), (True, True), (True, False))):
        options: dict[str, Any] = {"sequence_parallel": sequence_parallel, "dtype": dtype}
        expected = run(DecoderStage(STYLES[style], VOCABULARY, mesh, **options), prefix, main)
        for mode in modes:
            stage = DecoderStage(STYLES[style], VOCABULARY, mesh, recompute=mode, **options)
            assert_same(run(stage, prefix, main), expected, (style, dtype, prefix, main, mode))


@pytest.mark.parametrize("style", STYLES)
def test_gradients_are_the_same_bits(style):
    compare(ALONE, [style], False, MODES)


def compare_in_parallel(tp: int, sequence_parallel: bool) -> None:
    compare(ParallelMesh(tp=tp), list(STYLES), sequence_parallel, MODES if sequence_parallel else (*MODES, SHARDED))


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(2, False), (2, True), (4, False), (4, True)])
def test_gradients_in_parallel(ranks, tp, sequence_parallel):
    ranks.run(tp, compare_in_parallel, tp, sequence_parallel, timeout=120)


def compare_in_a_pipeline(kind: str, chunks: int, tp: int) -> None:
    mesh = ParallelMesh(pp=2, tp=tp)
    schedule = make_schedule(kind, 2, chunks, 3)
    cuts = [(2 * i, 2 * i + 2) for i in range(2 * chunks)]
    config = DecoderConfig(hidden_size=32, layers=4 * chunks, heads=4, kv_heads=2, ffn_size=53, init_std=0.2)
    for dtype, sequence_parallel in itertools.product(DTYPES, (False, True) if tp > 1 else (False,)):
        told = []
        for mode in (None, *MODES[:1], Recompute("full", blocks=1), *MODES[2:], *((SHARDED,) if tp > 1 and not sequence_parallel else ())):
            options: dict[str, Any] = {"sequence_parallel": sequence_parallel, "dtype": dtype, "recompute": mode}
            layers = [cuts[chunk * 2 + mesh.pp.rank] for chunk in range(chunks)]
            stages = [DecoderStage(config, VOCABULARY, mesh, layers=cut, **options) for cut in layers]
            grads = MainGrads(p for stage in stages for p in stage.parameters())
            runner = PipelineRunner([Chunk(stage) for stage in stages], mesh, schedule)
            totals = runner.step(micro_batches(3, varying=True), loss_of(stages[-1]))
            grads.finish()
            found = {f"{i}.{name}": p.main_grad for i, stage in enumerate(stages) for name, p in stage.named_parameters()}
            told.append((mode, found | {"loss": totals.loss}))
        for mode, found in told[1:]:
            assert_same(found, told[0][1], (kind, dtype, sequence_parallel, mode))


@pytest.mark.parametrize(("kind", "chunks", "tp"), [("1f1b", 1, 1), ("zero_bubble", 1, 1), ("zero_bubble", 2, 1), ("zero_bubble", 1, 2)])
def test_gradients_in_a_pipeline(ranks, kind, chunks, tp):
    ranks.run(2 * tp, compare_in_a_pipeline, kind, chunks, tp, timeout=120)


class Plain(nn.Module):
    """A user's block: no parallelism, both kinds of dropout, a second tensor and an option."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer, self.up, self.down, self.drop = layer, nn.Linear(8, 24), nn.Linear(24, 8), nn.Dropout(0.3)

    def forward(self, x: Tensor, shift: Tensor, scale: float = 1.0) -> Tensor:
        rows = dropout_rows(torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x)))
        return x + scale * self.drop(self.down(dropout(F.gelu(self.up(x + shift)), 0.5, rows, self.layer)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [None, 2])
def test_any_block_with_dropout(dtype, blocks):
    """Backward draws torch's masks again, and leaves its generator as it found it."""
    torch.manual_seed(1)
    alone = nn.ModuleList([Plain(i) for i in range(3)]).to(dtype)
    again = copy.deepcopy(alone)
    apply_recompute([*again], Recompute("full", blocks=blocks))
    told = []
    for model in (alone, again):
        torch.manual_seed(2)
        shift = torch.ones(8, dtype=dtype, requires_grad=True)
        x = start = torch.randn(5, 8, dtype=dtype, requires_grad=True)
        for block in model:
            x = block(x, shift, scale=0.5)
        x.sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        told.append(grads | {"x": start.grad, "shift": shift.grad, "next": torch.rand(3)})
    assert_same(told[1], told[0], blocks)
    copied = copy.deepcopy(again)
    copied[0].up.weight.data.zero_()
    assert not torch.equal(copied[0](start, shift), again[0](start, shift)), "a copy runs the block it was copied from"


def shard_the_input_of_any_block() -> None:
    """An input whose elements no tp divides, and one without a gradient, which each rank keeps whole."""
    axis, told = ParallelMesh(tp=2).tp, []
    for recompute in (Recompute(), SHARDED):
        torch.manual_seed(1)
        block = nn.Bilinear(3, 5, 3)
        apply_recompute([block], recompute, tp=axis)
        x = torch.randn(7, 3, requires_grad=True)
        block(x * 2, torch.randn(7, 5) + axis.rank).square().sum().backward()
        told.append({"x": x.grad, **{name: p.grad for name, p in block.named_parameters()}})
    assert_same(told[1], told[0], "sharded")


def test_shard_the_input_of_any_block(ranks):
    ranks.run(2, shard_the_input_of_any_block)


def test_main_grad_is_written_by_the_gemm():
    """Of what was saved, a checkpoint returns copies that have no main_grad: the gradients of a split backward would not wait for W."""
    for mode in (Recompute(), *MODES):
        stage = DecoderStage(STYLES["gpt"], VOCABULARY, ALONE, recompute=mode)
        grads, deferral = MainGrads(stage.parameters()), Deferral(stage.parameters())
        output = stage(None, batch_of(False)[0])
        with deferral.collect() as waiting:
            output.sum().backward()
        matrices = [p for block in stage.blocks.values() for p in block.parameters() if p.dim() == 2]
        assert not any(p._main_grad_written for p in matrices), mode
        with torch.no_grad():
            for write in waiting:
                write()
        assert all(p._main_grad_written for p in matrices), mode
        grads.detach()


def collectives() -> dict[str, list[dict[str, int]]]:
    """Those of forward and of backward, by mode."""
    mesh, found = ParallelMesh(tp=2), {}
    for sequence_parallel, mode in itertools.product((False, True), (Recompute(), *MODES, SHARDED)):
        if not (sequence_parallel and mode.shard_saved_input):
            stage = DecoderStage(STYLES["llama"], VOCABULARY, mesh, sequence_parallel=sequence_parallel, recompute=mode)
            MainGrads(stage.parameters())
            with counted() as forward:
                output = stage(None, batch_of(False)[0])
            with counted() as backward:
                output.sum().backward()
            found[f"{mode} {sequence_parallel}"] = [dict(forward), dict(backward)]
    return found


def test_no_collective_is_repeated_for_nobody(ranks):
    """Of a block's forward `full` repeats those before its last product; the selective modes none."""
    found, other = ranks.run(2, collectives)
    assert found == other
    for mode, (forward, backward) in found.items():
        expected, plain = found[f"{Recompute()} {mode.split()[-1]}"]
        assert forward == expected, mode
        more = {kind: n - plain.get(kind, 0) for kind, n in backward.items() if n != plain.get(kind, 0)}
        blocks = 0 if "full" not in mode else 2 if "blocks=2" in mode else LAYERS
        if mode.endswith("True"):
            # In front of q, k, v and of the MLP; behind attention.
            wanted = {"all_gather": 2 * blocks, "reduce_scatter": blocks}
        else:
            wanted = {"all_reduce": blocks, "all_gather": blocks if "shard_saved_input=True" in mode else 0}
        assert more == {kind: n for kind, n in wanted.items() if n}, mode


def products(mode: Recompute) -> list[int]:
    """GEMMs of the op `linear` in forward and in backward."""
    stage = DecoderStage(STYLES["llama"], VOCABULARY, ALONE, recompute=mode)
    MainGrads(stage.parameters())
    with torch.profiler.profile() as forward:
        output = stage(None, batch_of(False)[0])
    with torch.profiler.profile() as backward:
        output.sum().backward()
    return [sum(event.count for event in half.key_averages() if event.key == "megapar::linear") for half in (forward, backward)]


def test_the_last_product_of_what_is_recomputed_is_left_out():
    """Forward has q k v, the projection, both of the MLP; of those `full` repeats all but the last, the others none."""
    assert [products(mode) for mode in (Recompute(), Recompute("full"), Recompute("attention"))] == [[12, 0], [12, 9], [12, 0]]


@pytest.mark.parametrize("mode", [Recompute(), *MODES], ids=str)
def test_without_gradients_nothing_changes(mode):
    batch, tokens = batch_of(False)[0], torch.tensor([[1, 2, 3]])
    expected = Decoder(STYLES["llama"], VOCABULARY, ALONE)
    model = Decoder(STYLES["llama"], VOCABULARY, ALONE, recompute=mode)
    with torch.no_grad():
        assert torch.equal(model(batch), expected(batch))
    assert torch.equal(model.next_logits(tokens), expected.next_logits(tokens))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]


@pytest.mark.parametrize("mode", [Recompute(), Recompute("attention"), Recompute("mlp")], ids=str)
def test_a_weight_written_before_backward_is_noticed(mode):
    stage = DecoderStage(STYLES["llama"], VOCABULARY, ALONE, recompute=mode)
    MainGrads(stage.parameters())
    output = stage(None, batch_of(False)[0])
    with torch.no_grad():
        stage.blocks["1"].mlp.down.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def refuse_on_every_rank(recompute: Recompute, sequence_parallel: bool, told: str) -> None:
    mesh = ParallelMesh(pp=2)
    with pytest.raises(ValueError, match=told):
        PipelinedDecoder(STYLES["llama"], VOCABULARY, mesh, sequence_parallel=sequence_parallel, recompute=recompute)


def test_refused_on_every_rank_of_a_pipeline(ranks):
    """Of stages of 2 and 1 blocks, both ranks refuse what only the second cannot do."""
    ranks.run(2, refuse_on_every_rank, Recompute("mlp", blocks=2), False, "recompute blocks=2 is more than the 1 of a stage: lower it")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Recompute("fulll"), 'recompute mode="fulll" is not known: use none, full, attention or mlp'),
        (lambda: Recompute("full", blocks=-1), "recompute blocks=-1 must be 0 or more: leave it out"),
        (lambda: Recompute(blocks=2), 'recompute blocks=2 needs something to recompute: leave it out with mode="none"'),
        (lambda: Recompute("mlp", shard_saved_input=True), 'is for mode="full", the mode is "mlp": leave it out'),
        (lambda: apply_recompute([Plain(0)], Recompute("full", blocks=2)), "recompute blocks=2 is more than the 1 of a stage: lower it"),
        (lambda: apply_recompute([Plain(0)], SHARDED), "needs ranks to shard over and tp is 1: raise tp, or leave it out"),
        (
            lambda: apply_recompute([Plain(0)], SHARDED, tp=Axis("tp", 0, 2, (0, 1)), sequence_parallel=True),
            "with sequence parallelism, whose inputs are sharded already: leave it out",
        ),
        (lambda: apply_recompute([Plain(0)], Recompute("attention")), "megapar's Attention in every block, Plain has none: use mode="),
        (lambda: apply_recompute([Plain(0)], Recompute("mlp")), "megapar's MLP in every block, Plain has none: use mode="),
        (lambda: [apply_recompute(blocks, Recompute("full")) for blocks in [[Plain(0)]] * 2], "has a forward of its own already"),
    ],
)
def test_refusals(make, told):
    with pytest.raises(ValueError) as caught:
        make()
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_is_applied_where_one_block_cannot():
    stage = DecoderStage(STYLES["llama"], VOCABULARY, ALONE)
    with pytest.raises(ValueError, match="Plain has none"):
        apply_recompute([stage.blocks["0"], Plain(0)], Recompute("mlp"))
    assert not stage.blocks["0"].mlp.recompute
