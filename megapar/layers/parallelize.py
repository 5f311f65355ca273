"""`parallelize`: tensor parallelism for a model that one does not own, by swapping its nn.Linear and nn.Embedding modules.

A plan maps name patterns to roles. Each rank keeps its part of the weights that the model already has. Everything that no pattern names
(norms, rotary tables) stays as it is, the same on all ranks. Parameters that an attention module keeps beside its planned layers (norms
of queries and keys) see only this rank's heads: their gradients are summed over the ranks.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from megapar.collectives import gather_json
from megapar.layers.embedding import VocabParallelEmbedding
from megapar.layers.head_counts import Heads, find_heads, head_shards, localize_head_counts
from megapar.layers.linear import ColumnParallelLinear, RowParallelLinear, Shards
from megapar.mesh import Axis, ParallelMesh
from megapar.params import SpecParameter, spec_of
from megapar.transport import start_all_reduce

Role = str | Sequence[int | Shards]
"""`column`, `row`, `column_gather`, `vocab`, `replicate`, or the parts of a fused column layer, each cut by itself."""

# The names that transformers' tp_plan has for the same roles.
TRANSFORMERS_ROLES = {
    "colwise": "column",
    "rowwise": "row",
    "colwise_gather_output": "column_gather",
    "colwise_rep": "column_gather",
    "embedding_rowwise": "vocab",
    "replicated_with_grad_allreduce": "replicate",
}
ROLES = {"column": nn.Linear, "row": nn.Linear, "column_gather": nn.Linear, "vocab": nn.Embedding, "replicate": nn.Module}


def parallelize(model: nn.Module, mesh: ParallelMesh, plan: Mapping[str, Role] | None = None) -> nn.Module:
    """Cuts the model's weights over mesh.tp, in place, and returns it; gradients arrive in `.grad`, any optimizer works.

    `plan` maps patterns of module names (fnmatch: `layers.*.wq`) to roles; without one, a transformers model's own `tp_plan` is read.
    Query, key and value layers are cut between heads, and the head counts that their module keeps become local ones. Tied weights stay
    tied. Use `megapar.clip_grad_norm_` to clip. Raises ValueError, before anything is changed, for a pattern that matches nothing, an
    unknown role, sizes that cannot be cut, and weights that differ between ranks.
    """
    if plan is None:
        plan = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
        if not plan:
            raise ValueError(f'{type(model).__name__} has no tp_plan of its own: pass plan={{"layers.*.wq": "column", ...}}')
    roles = match_plan(model, plan)
    if mesh.tp.size == 1:
        return model
    _check_weights(model, mesh.tp)
    attention = _attention(model, roles)
    shards: dict[str, tuple[Shards, ...]] = {}
    for parent, heads in attention.items():
        cuts = head_shards(model.get_submodule(parent), _children(parent, roles), heads, mesh.tp.size)
        shards.update({f"{parent}.{child}" if parent else child: parts for child, parts in cuts.items()})
    made = {name: _layer(model.get_submodule(name), role, shards.get(name), mesh.tp) for name, role in roles.items() if role != "replicate"}
    shared: dict[nn.Parameter, nn.Parameter] = {}
    for name, layer in made.items():
        _move_weights(name, model.get_submodule(name), layer, shared)
    _check_ties(model, made, shared)
    for name, layer in made.items():
        setattr(model.get_submodule(_parent(name)), name.rpartition(".")[2], layer)
    for parent, heads in attention.items():
        localize_head_counts(model.get_submodule(parent), heads, mesh.tp)
        for param in model.get_submodule(parent).parameters():
            if spec_of(param) is None and param.requires_grad:
                param.register_hook(lambda grad: start_all_reduce(grad.clone(), mesh.tp).wait())
    return model


def match_plan(model: nn.Module, plan: Mapping[str, Role]) -> dict[str, Role]:
    """Role by module name. Raises ValueError for a pattern that matches nothing and for a role that is unknown or does not fit."""
    modules = dict(model.named_modules())
    roles: dict[str, Role] = {}
    for pattern, asked in plan.items():
        role = TRANSFORMERS_ROLES.get(asked, asked) if isinstance(asked, str) else asked
        if isinstance(role, str) and role not in ROLES:
            raise ValueError(f'plan: role "{role}" of pattern "{pattern}" is not one of {", ".join(ROLES)}: use one of those')
        names = [name for name in modules if fnmatchcase(name, pattern)]
        if not names:
            near = difflib.get_close_matches(pattern, [n for n, m in modules.items() if isinstance(m, (nn.Linear, nn.Embedding))], 1, 0.0)
            raise ValueError(f'plan: pattern "{pattern}" matches no module: the nearest name is "{near[0] if near else ""}"')
        for name in names:
            expected = ROLES[role] if isinstance(role, str) else nn.Linear
            if not isinstance(modules[name], expected):
                kind = type(modules[name]).__name__
                raise ValueError(f'plan: "{name}" is a {kind} and role "{role}" is for nn.{expected.__name__}: make the pattern narrower')
            if roles.setdefault(name, role) != role:
                raise ValueError(f'plan: "{name}" is given the roles "{roles[name]}" and "{role}": make one pattern narrower')
    return roles


def _attention(model: nn.Module, roles: Mapping[str, Role]) -> dict[str, Heads]:
    """The attention modules among the parents of planned layers, by name."""
    parents = dict.fromkeys(_parent(name) for name in roles)
    found = {parent: find_heads(model.get_submodule(parent), _children(parent, roles)) for parent in parents}
    return {parent: heads for parent, heads in found.items() if heads is not None}


def _children(parent: str, roles: Mapping[str, Role]) -> dict[str, Role]:
    """Roles of the direct children of `parent`, by the child's own name."""
    return {name.rpartition(".")[2]: role for name, role in roles.items() if _parent(name) == parent}


def _layer(old: nn.Module, role: Role, shards: tuple[Shards, ...] | None, tp: Axis) -> nn.Module:
    """The parallel layer for one module, on meta: its weights are moved in afterwards."""
    if isinstance(old, nn.Embedding):
        if old.padding_idx is not None or old.max_norm is not None:
            raise ValueError(f"{old}: padding_idx and max_norm are not supported by VocabParallelEmbedding: leave it out of the plan")
        return VocabParallelEmbedding(old.num_embeddings, old.embedding_dim, tp=tp, device="meta", dtype=old.weight.dtype)
    assert isinstance(old, nn.Linear)
    bias, dtype = old.bias is not None, old.weight.dtype
    if role == "row":
        cut = shards[0] if shards else Shards(old.in_features)
        return RowParallelLinear(cut, old.out_features, tp=tp, bias=bias, device="meta", dtype=dtype)
    parts: int | Sequence[int | Shards] = shards or (old.out_features if isinstance(role, str) else role)
    gather = role == "column_gather"
    new = ColumnParallelLinear(old.in_features, parts, tp=tp, bias=bias, gather_output=gather, device="meta", dtype=dtype)
    if new.out_features != old.out_features:
        raise ValueError(f"plan: parts {role} add up to {new.out_features} and the layer has {old.out_features} features: correct them")
    return new


@torch.no_grad()
def _move_weights(name: str, old: nn.Module, new: nn.Module, shared: dict[nn.Parameter, nn.Parameter]) -> None:
    """Fills `new` with this rank's boxes of the weights of `old`; weights that were one Parameter stay one."""
    for leaf, meta in list(new.named_parameters()):
        full, spec = getattr(old, leaf), spec_of(meta)
        assert spec is not None
        if full not in shared:
            local = torch.empty(meta.shape, dtype=full.dtype, device=full.device)
            for piece, view in spec.views(local):
                view.copy_(full[piece.index])
            shared[full] = SpecParameter.of(local, spec).requires_grad_(full.requires_grad)  # type: ignore[assignment]
        kept = spec_of(shared[full])
        assert kept is not None
        if [p.index for p in kept.pieces] != [p.index for p in spec.pieces]:
            raise ValueError(f"{name}.{leaf} is tied to a weight that the plan cuts another way: give both the same cut or untie them")
        setattr(new, leaf, shared[full])


def _check_ties(model: nn.Module, made: Mapping[str, nn.Module], shared: Mapping[nn.Parameter, nn.Parameter]) -> None:
    for name, module in model.named_modules(remove_duplicate=False):
        if name not in made and any(param in shared for param in module.parameters(recurse=False)):
            raise ValueError(f"{name} holds a weight of a layer that the plan cuts and is not in the plan: add it with the same cut")


def _check_weights(model: nn.Module, tp: Axis) -> None:
    digests = {}
    for name, param in model.named_parameters():
        if param.is_meta:
            raise ValueError(f"parameter {name} is on meta and has no values to keep: load or initialise the model first")
        digests[name] = [list(param.shape), zlib.crc32(param.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())]
    ranks = gather_json(digests, tp)
    for name in digests:
        if any(other.get(name) != ranks[0].get(name) for other in ranks):
            raise ValueError(f"weight {name} differs between the ranks of {tp.name}: call torch.manual_seed with one seed before building")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
