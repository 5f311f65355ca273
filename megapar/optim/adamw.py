"""FusedAdamW: unscaling, clipping by the global norm, AdamW and the 16-bit weight in one pass over each parameter.

`megapar/ops/adamw.py` has the formula and the bytes it moves. Beside the norm's one read of the gradients the kernels make no other pass
and no tensor-sized temporary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from megapar.grads import has_main_grad
from megapar.mesh import ParallelMesh
from megapar.ops.adamw import Noise, adamw_, check_options
from megapar.ops.step_state import StepState, step_state_
from megapar.optim.grad_norm import check_whole, gradient, gradient_totals, summed
from megapar.optim.noise import parts_of

Masters = Literal["fp32", "remainder"] | None


def known_rate(lr: float | Tensor) -> float:
    """Its value where the host has it, 0 where it would have to wait. Raises ValueError for a tensor of several numbers or of integers."""
    if not isinstance(lr, Tensor):
        return float(lr)
    if lr.numel() != 1 or not lr.is_floating_point():
        raise ValueError(f"lr is {lr.dtype} of shape {tuple(lr.shape)} and must be one floating-point number: give torch.tensor(1e-3)")
    return float(lr) if lr.device.type == "cpu" else 0.0


class FusedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with torch.optim.AdamW's defaults, on a parameter's `main_grad` where it has one, else its `.grad`.

    lr: a number, or a tensor of one, which a step reads where the parameters are: give it there, and no step waits for it.
    master_weights: what 16-bit parameters are updated in: "fp32", a copy; "remainder", 16 bits beside a bfloat16 parameter that make it
    fp32; None, the parameter itself. Masters are made from the parameters at their first step.
    max_norm: gradients are scaled down to this global norm; they themselves stay as they are. `grad_norm` is the norm before, and a step
    with a gradient that is not finite is skipped: it changes and counts nothing, and `skipped` says so.
    moment_dtype: float32 by default; bfloat16 for betas[1] of at most 0.99, or with `seed`.
    mesh: whose tp ranks share the parameters; sharded ones need it where max_norm is set. One all-reduce of three numbers a step.
    seed: what is kept in bfloat16 alone, moments or a weight without master, is rounded stochastically; None rounds to nearest.

    torch.amp.GradScaler works with gradients in `.grad`. Raises ValueError for options out of range, and for parameters that do not go
    with them.
    """

    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf for the time of a step

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        master_weights: Masters = None,
        max_norm: float | None = None,
        moment_dtype: torch.dtype | None = None,
        mesh: ParallelMesh | None = None,
        seed: int | None = None,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm={max_norm} must be above 0: leave it out to not clip")
        if master_weights not in (None, "fp32", "remainder"):
            raise ValueError(f"master_weights={master_weights} must be None, 'fp32' or 'remainder': choose one")
        if moment_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"moment_dtype={moment_dtype} must be torch.float32 or torch.bfloat16: choose one")
        self.master_weights, self.max_norm, self.moment_dtype, self.mesh, self.seed = master_weights, max_norm, moment_dtype, mesh, seed
        self._rows: dict[Tensor, int] = {}
        self.step_state = StepState.create(0)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @property
    def grad_norm(self) -> Tensor | None:
        """Of the last step before clipping: float64, 0-d, a view that the next step overwrites. None without max_norm."""
        return None if self.max_norm is None else self.step_state.grad_norm

    @property
    def skipped(self) -> Tensor:
        """1 if the last step was skipped, else 0; a view like grad_norm."""
        return self.step_state.skip

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
        except ValueError:
            self.param_groups.pop()
            raise
        for param in group["params"]:
            self._rows[param] = len(self._rows)
        fresh, old = StepState.create(len(self._rows), device=group["params"][0].device if group["params"] else None), self.step_state
        fresh.counters[: len(old.counters)] = old.counters
        self.step_state = fresh if len(old.counters) == 0 else replace(old, counters=fresh.counters)
        for param, state in self.state.items():
            state["step"] = self.step_state.applied_steps[self._rows[param]]

    def _check(self, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        check_options(lr=known_rate(group["lr"]), beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"])
        if self.moment_dtype == torch.bfloat16 and self.seed is None and beta2 > 0.99:
            raise ValueError(f"beta2={beta2} moves a bfloat16 moment by less than it can round: lower it to 0.99, or give a seed")
        if self.max_norm is not None:
            check_whole(group["params"], self.mesh)
        devices = {p.device for p in [*self._rows, *group["params"]]}
        if len(devices) > 1:
            raise ValueError(f"parameters are on {' and '.join(sorted(map(str, devices)))}: use one optimizer for each")
        for param in group["params"]:
            if param.dtype == torch.float16 and self.master_weights == "remainder":
                raise ValueError("master_weights='remainder' splits bfloat16 and a parameter is float16: use 'fp32'")
            if param.dtype == torch.float16 and self.seed is not None and self.master_weights is None:
                raise ValueError("stochastic rounding knows bfloat16 and a parameter is float16: use master_weights='fp32', or no seed")

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("FusedAdamW cannot be copied or pickled: construct another and give it state_dict()")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = [(group, [p for p in group["params"] if gradient(p) is not None]) for group in self.param_groups]
        self._advance(updates)
        for group, params in updates:
            for master in (True, False):
                self._update(group, [p for p in params if self._has_master(p) is master])
        return loss

    def _advance(self, updates: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        """Norm, clip coefficient, skip flag and bias corrections of this step."""
        params = [p for _, group in updates for p in group]
        state, scalars = self.step_state, self.step_state.scalars
        total = scalars.new_zeros(3) if self.max_norm is None else gradient_totals(params, self.mesh).to(scalars.device)
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None:
            self._check_scaler(params)
            total[1] += torch.as_tensor(found_inf).reshape(()).to(total)
        if self.max_norm is not None:
            total = summed(total, self.mesh)
        state.loss_scale.copy_(scalars.new_ones(()) if scale is None else scale.reshape(()))
        betas = [group["betas"] for group, members in updates for _ in members]
        step_state_(state, total, scalars.new_ones(()), rows=[self._rows[p] for p in params], betas=betas, max_norm=self.max_norm)

    def _check_scaler(self, params: list[Tensor]) -> None:
        if any(has_main_grad(p) for p in params):
            raise ValueError(
                "torch.amp.GradScaler looks at .grad and a parameter has a main_grad: detach() the MainGrads, or use no scaler"
            )
        if self.mesh is not None and self.mesh.tp.size > 1:
            raise ValueError(
                f"torch.amp.GradScaler decides on each rank alone and tp is {self.mesh.tp.size}: train in bfloat16, or with tp=1"
            )

    def _has_master(self, param: Tensor) -> bool:
        return self.master_weights is not None and param.dtype in (torch.bfloat16, torch.float16)

    def _dtypes(self, param: Tensor) -> dict[str, torch.dtype]:
        """What the parameter's state consists of."""
        moment = self.moment_dtype or torch.promote_types(param.dtype, torch.float32)
        master = {"master": torch.int16 if self.master_weights == "remainder" else torch.float32} if self._has_master(param) else {}
        return {"exp_avg": moment, "exp_avg_sq": moment, **master}

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        """The parameter's state, made at its first step."""
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state["step"] = self.step_state.applied_steps[self._rows[param]]
            state.update({kind: torch.zeros_like(param, dtype=dtype, requires_grad=False) for kind, dtype in self._dtypes(param).items()})
            if self._has_master(param) and self.master_weights == "fp32":
                state["master"].copy_(param)
        return state

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """The parameters either all have masters or none has."""
        entries: list[list[Any]] = []
        rows, ids, places = [], [], []
        for param in params:
            state, row = self._state(param), self._rows[param]
            tensors: list[Any] = [param, gradient(param), *(state[kind] for kind in self._dtypes(param))]
            if self.seed is None:
                entries.append(tensors)
                rows.append(row)
                continue
            for part in parts_of(param, row):
                entries.append([part.of(x) for x in tensors])
                rows.append(row)
                ids.append(part.id)
                places.append(part.place)
        if not entries:
            return
        weights, grads, first, second, *masters = (list(column) for column in zip(*entries, strict=True))
        options: dict[str, Any] = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        options["noise"] = None if self.seed is None else Noise(self.seed, ids, places)
        adamw_(weights, grads, masters[0] if masters else [], first, second, self.step_state, rows, **options)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` returned, in its own dtypes; also torch.optim.AdamW's, masters then being made from the parameters.

        Raises ValueError for masters of another kind, moments that would lose bits, and tensors of another shape.
        """
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        saved = [(p, state_dict["state"][i]) for i, p in zip(ids, params, strict=False) if i in state_dict["state"]]
        for param, values in saved:
            self._check_saved(param, values)
        # torch would convert masters and moments to the parameter's dtype: tests/optim/test_adamw.py::test_resuming_is_bitwise.
        super().load_state_dict({**state_dict, "state": {}})
        self.step_state.counters.zero_()
        for param, values in saved:
            state = self._state(param)
            state["step"].copy_(torch.as_tensor(values["step"]))
            for kind in self._dtypes(param):
                if kind in values:
                    state[kind].copy_(values[kind])

    def _check_saved(self, param: Tensor, values: dict[str, Tensor]) -> None:
        dtypes = self._dtypes(param)
        if "master" in values and "master" not in dtypes:
            raise ValueError(f"the saved state has masters and master_weights is {self.master_weights}: construct it as it was saved")
        for kind in [kind for kind in dtypes if kind in values]:
            value, dtype = values[kind], dtypes[kind]
            if value.shape != param.shape:
                raise ValueError(
                    f"the saved {kind} has shape {tuple(value.shape)} and its parameter {tuple(param.shape)}: load its own"
                )
            if value.dtype != dtype and (kind == "master" or torch.promote_types(value.dtype, dtype) != dtype):
                raise ValueError(f"the saved {kind} has dtype {value.dtype} and here it is {dtype}: construct it as it was saved")
