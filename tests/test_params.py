"""What a parameter is: cuts, names, initial values."""

import copy
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megapar import Axis, ColumnParallelLinear, ParallelMesh, RowParallelLinear, Shards, VocabParallelEmbedding, initialize
from megapar.models.config import DecoderConfig
from megapar.models.decoder import Decoder
from megapar.params import ParamSpec, Piece, SpecParameter, draw, fill, named_specs, seed_of, seeded, spec_of, split


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 16), st.integers(1, 8))
def test_split(units, parts, unit):
    if units < parts:
        with pytest.raises(ValueError, match=f"ffn={units * unit} has {units} units of {unit} and cannot be split over {parts} ranks"):
            split(units * unit, parts, unit, "ffn")
        return
    cut = split(units * unit, parts, unit)
    sizes = [b - a for a, b in cut]
    assert cut[0][0] == 0 and cut[-1][1] == units * unit and all(a[1] == b[0] for a, b in pairwise(cut))
    assert all(a % unit == b % unit == 0 for a, b in cut)
    assert max(sizes) - min(sizes) <= unit and sizes == sorted(sizes, reverse=True)


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(2, 8))
def test_split_refuses_broken_units(size, unit):
    if size % unit:
        with pytest.raises(ValueError):
            split(size, 1, unit)


def test_views_follow_the_pieces():
    pieces = (Piece("a", (4, 2), (1, 0), (3, 2)), Piece("a", (4, 2), (3, 0), (4, 2)), Piece("b", (5, 2), (0, 0), (5, 2)))
    local = torch.arange(16).view(8, 2)
    views = list(ParamSpec(pieces).views(local))
    assert [piece for piece, _ in views] == list(pieces)
    assert torch.equal(torch.cat([view for _, view in views]), local)
    views[1][1].fill_(-1)
    assert local[2].tolist() == [-1, -1], "a view, not a copy"
    assert ParamSpec(pieces).is_sharded and not ParamSpec(pieces[2:]).is_sharded
    scalar = torch.tensor(3.0)
    assert [v.shape for _, v in ParamSpec((Piece.whole("s", ()),)).views(scalar)] == [()]


class Model(nn.Module):
    def __init__(self, axis: Axis | None = None, device: str | None = None) -> None:
        super().__init__()
        q, k = Shards(8, 2, "q"), Shards(4, 2, "k")
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"qkv": ColumnParallelLinear(3, (q, k), tp=axis, device=device), "out": RowParallelLinear(8, 3, tp=axis, device=device)}
            )
            for _ in range(2)
        )
        self.embed = VocabParallelEmbedding(7, 3, tp=axis, device=device)
        self.head = ColumnParallelLinear(3, 7, tp=axis, bias=False, device=device)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(3)


def test_named_specs():
    specs = {name: spec for name, _, spec in named_specs(Model(Axis.layout("tp", 1, 2)))}
    pieces = {name: [(p.name, p.start, p.stop) for p in spec.pieces] for name, spec in specs.items()}
    assert pieces["layers.1.qkv.weight"] == [("layers.1.q.weight", (4, 0), (8, 3)), ("layers.1.k.weight", (2, 0), (4, 3))]
    assert pieces["layers.0.qkv.bias"] == [("layers.0.q.bias", (4,), (8,)), ("layers.0.k.bias", (2,), (4,))]
    assert pieces["layers.0.out.weight"] == [("layers.0.out.weight", (0, 4), (3, 8))]
    assert pieces["embed.weight"] == [("embed.weight", (4, 0), (7, 3))]
    assert "head.weight" not in specs, "tied: listed once, under its first name"
    assert pieces["norm.weight"] == [("norm.weight", (0,), (3,))] and not specs["norm.weight"].is_sharded
    assert {name for name, spec in specs.items() if spec.decay} == {name for name, p in Model().named_parameters() if p.dim() > 1}
    alone = ColumnParallelLinear(3, (Shards(2, name="gate"), Shards(2, name="up")), bias=False)
    assert [p.name for _, _, spec in named_specs(alone) for p in spec.pieces] == ["gate.weight", "up.weight"]


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def test_initialize_from_meta():
    """Same weights from meta as from a real device, whatever torch's generator holds; ties, specs and requires_grad are kept."""
    axis = Axis.layout("tp", 0, 2)
    real, meta = Model(axis), Model(axis, "meta")
    meta.norm = nn.LayerNorm(3)
    meta.layers[0]["out"].weight.requires_grad_(False)
    specs = {name: spec for name, _, spec in named_specs(meta)}
    initialize(real, seed=1)
    torch.manual_seed(123)
    initialize(meta, seed=1)
    first, second = values(real), values(meta)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert meta.head.weight is meta.embed.weight
    assert {name: spec for name, _, spec in named_specs(meta)} == specs
    assert not meta.layers[0]["out"].weight.requires_grad and meta.layers[1]["out"].weight.requires_grad
    initialize(meta, seed=2)
    third = values(meta)
    assert not torch.equal(second["embed.weight"], third["embed.weight"])
    assert not torch.equal(third["layers.0.qkv.weight"], third["layers.1.qkv.weight"])


def test_one_full_tensor_at_a_time():
    """Each is freed before the next is drawn, also where one parameter holds several."""
    drawn: list[weakref.ref] = []

    def init(full: torch.Tensor, generator: torch.Generator | None) -> None:
        assert not any(earlier() is not None for earlier in drawn)
        drawn.append(weakref.ref(full))

    parts = tuple(Shards(4, name=name) for name in "qkv")
    initialize(nn.Sequential(*(ColumnParallelLinear(3, parts, bias=False, init=init, device="meta") for _ in range(2))), seed=1)
    assert len(drawn) == 6


def test_seeds_are_remembered_on_meta():
    """What stays there can be drawn by whoever gives it memory: the values are those that `initialize` draws itself."""
    real, meta = Model(), Model(device="meta")
    meta.norm = nn.LayerNorm(3)
    initialize(real, seed=1)
    initialize(meta, seed=1, device="meta")
    assert meta.embed.weight.is_meta and meta.head.weight is meta.embed.weight
    for (name, param, spec), (_, expected, _) in zip(named_specs(meta), named_specs(real), strict=True):
        if param.is_meta:
            local = torch.empty(param.shape)
            fill(spec.views(local), spec.init, seeded(spec, spec.seeds))
            assert torch.equal(local, expected), name
    held = [*meta.parameters()]
    initialize(meta, seed=1)
    assert [*map(id, meta.parameters())] == [*map(id, held)], "whoever held a parameter holds it still"
    assert all(torch.equal(a, b) for a, b in zip(meta.parameters(), real.parameters(), strict=True))


def test_initialize_in_bf16():
    """Drawn in fp32 and rounded once: the bf16 model is the rounded fp32 model."""
    wide, narrow = (
        Decoder(DecoderConfig(32, 1, 4, ffn_size=24), 11, ParallelMesh.alone(), dtype=d) for d in (torch.float32, torch.bfloat16)
    )
    expected = values(wide)
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in values(narrow).items())


def test_meta_without_init_is_refused():
    model = nn.Sequential(ColumnParallelLinear(2, 2, device="meta"), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"parameter 1.weight is on meta and has no initial values"):
        initialize(model, 0)
    assert model[0].weight.is_meta, "a refused model must be left as it was"


def test_parameter_without_init_is_left_alone():
    model = Model()
    with torch.no_grad():
        model.norm.weight.fill_(7.0)
    initialize(model, 0)
    assert model.norm.weight.tolist() == [7.0] * 3


def test_draw_uses_torchs_generator():
    """reset_parameters() follows torch.manual_seed; the tied weight is drawn through either layer, with that parameter's own init."""
    model = Model()
    torch.manual_seed(5)
    model.head.reset_parameters()
    tied = model.embed.weight.detach().clone()
    torch.manual_seed(5)
    assert torch.equal(tied, torch.empty(7, 3).normal_())
    draw(nn.Linear(2, 2))  # carries no specs: untouched


def test_deepcopy_keeps_specs_and_ties():
    model = Model(Axis.layout("tp", 1, 2))
    copied = copy.deepcopy(model)
    assert copied.head.weight is copied.embed.weight is not model.embed.weight
    for param, twin in zip(model.parameters(), copied.parameters(), strict=True):
        assert type(param) is type(twin) and spec_of(param) is spec_of(twin)
    assert isinstance(copied.embed.weight, SpecParameter)
    assert copied.embed.tp is model.embed.tp


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(), st.text(st.characters(exclude_characters="\0"))), max_size=3))
def test_seed_of(words):
    seed = seed_of(*words)
    assert 0 <= seed < 2**63 and seed == seed_of(*words) and seed != seed_of(*words, "more")
    assert seed_of(1, "a") == 7297780294385259649
