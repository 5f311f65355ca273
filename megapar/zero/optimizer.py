"""ZeRO-1, 2 and 3 (arXiv:1910.02054) behind torch's optimizer interface; stage 0 is data parallelism.

    optimizer = ZeroOptimizer(model, ParallelMesh(), stage=2, update=AdamW(lr=3e-4), precision="bf16")
    for micro_batch in step:
        optimizer.backward(loss_sum(model, micro_batch), last=micro_batch is step[-1])
    result = optimizer.step(count)              # count: what this rank's sums are sums over

Losses are sums, and so are gradients: they are divided once, by the count of all ranks and the loss scale, where the update reads them.
With ordered reduction stages, bucket sizes and overlap change no bit of the weights (tests/zero/test_bitwise.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megapar.collectives import check_same, raise_together
from megapar.failures import together
from megapar.mesh import ParallelMesh
from megapar.ops.step_state import StepState, step_state_
from megapar.optim.precision import Precision
from megapar.params import Modules
from megapar.zero.actions import actions_of
from megapar.zero.buckets import GradBuckets, Window
from megapar.zero.checks import Untouched, check_count, check_given, check_loss, check_scale
from megapar.zero.gather import Gathers
from megapar.zero.initial import lay_out
from megapar.zero.layout import make_layout
from megapar.zero.setup import BUCKET_BYTES, AdamW, Options, check_same_values, grouped, listed, reduction_of
from megapar.zero.state import StateBox, as_saved, check_states, fill
from megapar.zero.update import Shard, StepResult, apply_adamw, foreseen, step_totals
from megapar.zero.weights import storage_bytes


class ZeroOptimizer(torch.optim.Optimizer):
    """AdamW of a model whose optimizer state (stage 1), gradients (2) and parameters (3) are sharded over mesh.dp.

    model: a module, or the stages that a pipeline places on this rank. Its parameters are converted to `precision`, and stay the same
    objects. update: matrices decay and vectors do not (`ParamSpec.decay`); groups: torch's param_groups instead, dicts of `params` and
    what differs from `update`. max_norm: of the mean gradient of the whole model, over all axes; None does not clip.
    reduce_every: "step" reduces gradients once; "micro_batch" after each, which keeps only shards of them between (stages 2 and 3).
    reshard_every: stage 3 frees weights after each use ("micro_batch"), or once a step. reduction: "ordered" adds in rank order, in fp32;
    "native" is NCCL's (default on CUDA). payload: what gradients travel as. bucket_bytes: of fp32 gradients that travel together, at least,
    8 MiB by default, on CUDA 64. overlap: communication while backward goes on.
    gather_ahead: stages 1 and 2 fetch updated weights while the next forward begins; until a module runs, its weights are old.
    load_later: parameters on `meta` are not drawn; nothing runs until they have been loaded.

    Raises ValueError, on every rank, for options that do not go together, weights that are not finite, ranks whose models differ.
    """

    def __init__(
        self,
        model: Modules,
        mesh: ParallelMesh,
        *,
        stage: int = 1,
        update: AdamW | None = None,
        precision: str | Precision = "bf16",
        max_norm: float | None = 1.0,
        reduce_every: Window = "step",
        reshard_every: Window = "micro_batch",
        reduction: Literal["ordered", "native"] | None = None,
        payload: torch.dtype = torch.float32,
        bucket_bytes: int | None = None,
        overlap: bool = True,
        gather_ahead: bool = False,
        load_later: bool = False,
        groups: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.mesh, self.update = mesh, update or AdamW()
        self.chunks = [model] if isinstance(model, nn.Module) else list(model)
        error: Exception | None = None
        try:
            bucket_bytes = BUCKET_BYTES[mesh.device.type] if bucket_bytes is None else bucket_bytes
            how = (stage, max_norm, reduce_every, reshard_every, reduction, payload, bucket_bytes, overlap, gather_ahead, load_later)
            self.options = Options(*how)
            self.precision = Precision.of(precision)
            self._listed = found = listed(self.chunks, self.options, mesh)
            self.layout = make_layout(found.entries, mesh.dp.size, -(-bucket_bytes // 4))
            super().__init__(grouped(found, self.update, groups), self.update.defaults)
        except (TypeError, ValueError) as caught:
            error = caught
        raise_together(error, mesh.world)
        told = [repr({**group, "params": len(group["params"])}) for group in self.param_groups]
        told += [self.layout.digest, repr(self.options), repr(self.precision), repr(self.update)]
        check_same(told, mesh.dp, "the parameters (a hash) and options")
        check_same_values(self.chunks, mesh.dp)
        self._build()

    def _build(self) -> None:
        found, mesh, options, precision = self._listed, self.mesh, self.options, self.precision
        self.sharded, self.weights = lay_out(self.chunks, found, self.layout, mesh, precision, options)
        self.grads = GradBuckets(found.params, self.layout, mesh.dp, reduction_of(options, precision, mesh.device), found.chunk_of)
        after_use, watches = options.reshard_every == "micro_batch", options.gather_ahead
        self.gathers = Gathers(self.chunks, self.weights, after_use=after_use, ahead=options.overlap, watches=watches)
        self._index = {param: index for index, param in enumerate(found.params)}
        self.step_state = StepState.create(len(self.param_groups), device=mesh.device, **precision.first_scale)
        self._untouched = Untouched(self.chunks, found, self.weights)
        self._skipped = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self._scale_before = self.loss_scale.clone()
        self._broken, self._has_values = "", not options.load_later

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """For torch's constructor. Raises ValueError afterwards."""
        if hasattr(self, "step_state"):
            raise ValueError("groups cannot be added to a ZeroOptimizer, whose shards are laid out: construct another with groups=")
        super().add_param_group(param_group)

    # Gradients

    @property
    def loss_scale(self) -> Tensor:
        """What the next backward is seeded with, float64, 0-d, on the device."""
        return self.step_state.loss_scale

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped; waits for the last one."""
        return int(self._skipped)

    def backward(self, loss_sum: Tensor, last: bool = True) -> None:
        """Adds the gradients of a sum of losses, a scalar; `last` says that the step's other micro-batches have been.

        Raises ValueError for a loss that is no fp32 scalar or does not require a gradient.
        """
        with self.accumulating(last=last):
            check_loss(loss_sum)
            loss_sum.backward(self.loss_scale.to(loss_sum.dtype))

    @contextmanager
    def accumulating(self, backwards: int = 1, last: bool = True) -> Iterator[None]:
        """Inside it `backwards` micro-batches may be run backward by others, seeded with `loss_scale`: by a pipeline."""
        with self._together("a backward"):
            with self.grads.accumulating(backwards, last):
                yield
            # First: another rank may wait for the rest of a gather (tests/zero/test_gather.py::test_a_last_block_that_one_rank_skips).
            if self.options.reshard_every == "micro_batch" or last:
                self.gathers.release()
            self.grads.end_window()

    def actions(self, stage_to_rank: Sequence[int]) -> Callable[[Any], None]:
        """What UNSHARD, RESHARD and REDUCE_GRAD of a pipeline with these stages do: `PipelineRunner(sharding=)`."""
        mine = [stage for stage, rank in enumerate(stage_to_rank) if rank == self.mesh.pp.rank]
        ahead = self.weights.sharded and self.options.overlap
        return actions_of(self.grads, self.gathers, {stage: chunk for chunk, stage in enumerate(mine)}, ahead)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops what was accumulated since the last step; `step` does so itself."""
        self.grads.zero()

    # The step

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, count: Any = None, *, shared: Sequence[float | Tensor] = (), accept: Callable[[StepResult], bool] | None = None
    ) -> StepResult:
        """Applies the accumulated gradients, divided by the sum of all ranks' `count` and the loss scale, and clipped.

        count: what this rank's losses were sums over, a number (ranks of tp: the same one; pipeline ranks without the last stage: 0).
        accept: given norm, count and what is shared, the same on every rank, says whether the step is applied; one that is not changes
        nothing, the loss scale neither. Else nothing waits for the device. Raises ValueError for no backward before, a count that is
        none, 0 counted by all ranks (on CPU), and a loss scale that is at its minimum while gradients overflow.
        """
        with self._together("a step"):
            self._check_step(count)
            self.grads.finish()
            told = step_totals(self.grads, self._listed.specs, self.mesh, count, shared)
            rest = told[3:]
            self.gathers.release()  # what is under way would read shards that change
            if told.device.type == "cpu" and not float(rest[0]) > 0:
                raise ValueError(f"the step counted {float(rest[0]):g} on all ranks and cannot divide by it: give samples with targets")
            if accept is not None and not accept(found := foreseen(told, self.loss_scale)):
                self.zero_grad()
                self._skipped += 1
                return found
            betas = [group["betas"] for group in self.param_groups]
            how: dict[str, Any] = {"max_norm": self.options.max_norm, "scaling": self.precision.dynamic}
            self._scale_before.copy_(self.loss_scale)
            step_state_(self.step_state, told[:3], rest[0], rows=range(len(betas)), betas=betas, **how)
            self._skipped += self.step_state.skip
            for row, group in enumerate(self.param_groups):
                self._update(row, group)
            self._share_weights()
        self.grads.zero()
        norm, scale, skip = self.step_state.scalars[[1, 3, 2]]  # copies: the next step writes there
        return StepResult(norm, scale, skip, rest[0], rest[1:])

    def _update(self, row: int, group: dict[str, Any]) -> None:
        shards = []
        for index in (self._index[param] for param in group["params"]):
            grad = self.grads.whole(index) if self.weights.replicated else self.grads.shards[index]
            tensors = [self.weights.shards[index], grad, *self.sharded.moments[index], *self.sharded.masters[index : index + 1]]
            shards.append(Shard(self._listed.specs[index], self.sharded.intervals[index], tensors))
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        apply_adamw(shards, self.step_state, row, options, self.update.seed)

    def _share_weights(self, ahead: bool = True) -> None:
        """Whole weights from everybody's updated shards: now, or in stage 3 and with gather_ahead when a module needs them."""
        if self.weights.sharded:
            self.gathers.release()
        elif not self.weights.replicated:
            (self.gathers.start_all if ahead and self.options.gather_ahead else self.gathers.gather_all)()
        # Written behind autograd's back: a graph that saved the old weights must not be run backward.
        torch.autograd.graph.increment_version(self._listed.params)
        self._untouched.remember()

    # Reading and saving

    @contextmanager
    def unshard(self) -> Iterator[None]:
        """Inside it all weights are whole, for reading. Every rank of dp enters it."""
        with self._together("unshard"):
            with self.gathers.whole():
                yield
            self._untouched.remember()

    def release(self) -> None:
        """Frees whole weights that stage 3 need not keep: after an evaluation."""
        self.gathers.release()

    def boxes(self) -> Iterator[StateBox]:
        """Weights and moments that this rank holds, as boxes of logical tensors; after writing to them call `loaded`."""
        self.gathers.release()
        return self.sharded.boxes(self.weights.shards, self.options.stage > 0 or self.mesh.dp.rank == 0)

    def bytes_held(self) -> dict[str, int]:
        """What this rank holds now, by kind, padding included."""
        kinds = {"parameters": self.weights.tensors(), "gradients": self.grads.tensors(), "optimizer_state": self.sharded.tensors()}
        return {kind: storage_bytes(tensors) for kind, tensors in kinds.items()}

    def loaded(self) -> None:
        """Makes whole weights of what was written to `boxes`."""
        self._has_values = True
        self._share_weights(ahead=False)  # gathers under way hold all weights again (test_copies_and_rollbacks)

    def state_dict(self) -> dict[str, Any]:
        """This rank's share of weights and optimizer state, as boxes of logical tensors: any layout can load those of all ranks."""
        check_given(self._has_values, "state_dict")
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        return {"groups": groups, "progress": self.progress(), "boxes": as_saved(self.boxes())}

    def progress(self) -> dict[str, Any]:
        """What a step changes beside weights and moments, as plain numbers."""
        return {"skipped_steps": self.skipped_steps, **self.step_state.progress(scale=self.precision.dynamic is not None)}

    def set_progress(self, told: Mapping[str, Any]) -> None:
        """Goes on from what `progress` told."""
        self.step_state.restore(told, scale=self.precision.dynamic is not None)
        self._skipped.fill_(told["skipped_steps"])

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Takes what `state_dict` returned on each rank that saved, in any layout; weights too. Every rank of the mesh calls it.

        Raises ValueError on every rank, and changes nothing, for states that lack a part of this model or have other param_groups.
        """
        states = [state_dict] if isinstance(state_dict, Mapping) else list(state_dict)
        error: Exception | None = None
        try:
            check_states(states, len(self.param_groups))
            fill(self.boxes(), [box for state in states for box in state["boxes"]])
        except (ValueError, KeyError) as caught:
            error = caught
        raise_together(error, self.mesh.world)
        for group, saved in zip(self.param_groups, states[0]["groups"], strict=True):
            group.update({name: tuple(value) if name == "betas" else value for name, value in saved.items()})
        self.set_progress(states[0]["progress"])
        self.loaded()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("ZeroOptimizer cannot be copied or pickled: construct another and give it every rank's state_dict()")

    # Checks

    def _check_step(self, count: Any) -> None:
        check_count(count)
        if not self.grads.passes:
            raise ValueError("step was called and no backward before it: call optimizer.backward(loss_sum), then step")
        self._untouched.check()
        if self.precision.dynamic is not None:
            check_scale(self._scale_before, self.step_state.skip, self.precision.dynamic.min_scale)

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """Runs what all ranks do together; after an error of any of them nothing more is."""
        check_given(self._has_values, what)
        if self._broken:
            raise RuntimeError(f"an earlier step of this optimizer failed ({self._broken}): start the ranks again")
        try:
            with together(self.mesh, what):
                yield
        except BaseException as error:
            if self.mesh.world.size > 1:
                self._broken = f"{type(error).__name__}: {error}"
            raise
