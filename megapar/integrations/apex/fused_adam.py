"""`FusedAdam` and `MultiTensorApply` of NVIDIA apex, with its signatures and its state, on CPU and GPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from megapar.integrations.apex import adam
from megapar.integrations.apex.amp_c import FLOATS


class MultiTensorApply:
    """Calls a function of `amp_C` with its chunk size first."""

    available = True

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def check_avail(self) -> None:
        """Does nothing: the functions are always there."""

    def __call__(self, op: Callable[..., Any], noop_flag_buffer: Tensor, tensor_lists: Sequence[Sequence[Tensor]], *args: Any) -> Any:
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)


multi_tensor_applier = MultiTensorApply(2048 * 32)


class FusedAdam(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101), or Adam with L2 (arXiv:1412.6980) where not adam_w_mode, of fp32, bf16 and fp16 parameters; fp32 moments.

    All parameters of a group share its `step`. capturable: lr and step are tensors on the device, so that a step can be captured in a
    CUDA graph and a GradScaler's overflow is handled there; a step leaves the gradients unscaled. master_weights: 16-bit parameters are
    updated in an fp32 copy, which is made at their first step and saved with the state. set_grad_none: what `zero_grad` does.

    Raises RuntimeError for amsgrad, for sparse gradients and for the arguments of `step` that apex retired, ValueError for parameters of
    other dtypes.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        if amsgrad:
            raise RuntimeError("amsgrad=True is not supported: leave it out, or use torch.optim.AdamW")
        if master_weights and not capturable:
            raise RuntimeError("master_weights=True needs capturable=True, as in apex: set both, or use megapar.FusedAdamW")
        self.adam_w_mode, self.set_grad_none = int(adam_w_mode), set_grad_none
        self.capturable, self.master_weights = capturable, master_weights
        # GradScaler then passes itself to `step` and leaves gradients and overflow to it.
        self._step_supports_amp_scaling = capturable
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        devices, dtypes = ({getattr(p, name) for p in group["params"]} for name in ("device", "dtype"))
        try:
            if len(devices) > 1:
                raise ValueError(f"parameters of a group are on {' and '.join(sorted(map(str, devices)))}: make a group of each")
            if not dtypes <= set(FLOATS):
                raise ValueError(f"a parameter has dtype {', '.join(map(str, dtypes))}: convert it to float32, bfloat16 or float16")
        except ValueError:
            self.param_groups.pop()
            raise
        self._place(group)

    def _place(self, group: dict[str, Any]) -> None:
        """lr and step where a step reads them: on the device where capturable, else on the host."""
        device = group["params"][0].device if group["params"] else None
        for name, dtype, number in (("lr", torch.float32, float), ("step", torch.int32, int)):
            if name not in group:
                continue
            if self.capturable:
                value = torch.as_tensor(group[name], dtype=dtype, device=device)
                group[name] = value.reshape(1) if name == "step" else value.clone()
            else:
                group[name] = number(group[name])

    @property
    def param_groups_master(self) -> list[dict[str, list[Tensor]]] | None:
        """Each group's masters, an fp32 parameter being its own; None without master_weights."""
        if not self.master_weights:
            return None
        return [{"params": [self._state(p).get("master_param", p) for p in group["params"]]} for group in self.param_groups]

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drops the gradients where set_to_none, by default what `set_grad_none` said, else fills them with 0."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        grads: None = None,
        output_params: None = None,
        scale: None = None,
        grad_norms: None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss. GradScaler passes `grad_scaler` itself."""
        if any(x is not None for x in (grads, output_params, scale, grad_norms)):
            raise RuntimeError("step() takes no grads, output_params, scale or grad_norms any more: call it without them")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found, inv_scale = self._scaler(grad_scaler)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["params"]:
                self._update(group, params, found, inv_scale)
        return loss

    def _scaler(self, grad_scaler: torch.amp.GradScaler | None) -> tuple[dict[Any, Tensor], Tensor | None]:
        """Whether a gradient is not finite, by device, and what unscales the gradients, where that is left to the step."""
        if grad_scaler is None or not grad_scaler.is_enabled() or not self.capturable:
            return {}, None
        state = grad_scaler._per_optimizer_states[id(self)]
        if state["stage"] is OptState.UNSCALED:
            return state["found_inf_per_device"], None
        found = grad_scaler._check_inf_per_device(self)
        return found, grad_scaler._get_scale_async().double().reciprocal().float()  # type: ignore[union-attr]

    def _update(self, group: dict[str, Any], params: list[Tensor], found: dict[Any, Tensor], inv_scale: Tensor | None) -> None:
        device = group["params"][0].device
        noop = torch.zeros(1, dtype=torch.int32, device=device)
        for each in found.values():  # of all devices: they skip together
            noop.masked_fill_(each.to(device).reshape(1) != 0, 1)
        if any(p.grad.is_sparse for p in params):  # type: ignore[union-attr]
            raise RuntimeError("a gradient is sparse and FusedAdam needs dense ones: use torch.optim.SparseAdam")
        if self.capturable:
            if not isinstance(group["lr"], Tensor):  # a scheduler may have put a number there
                group["lr"] = torch.full((1,), group["lr"], dtype=torch.float32, device=device)
            if "step" not in group:
                group["step"] = torch.zeros_like(noop)
            group["step"] += 1 - noop
        else:
            group["step"] = group.get("step", 0) + 1
        states = [self._state(p) for p in params]
        lists: list[list[Any]] = [[p.grad for p in params], params, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]]
        numbers = [group["lr"], *group["betas"], group["eps"], group["step"], self.adam_w_mode, int(group["bias_correction"])]
        numbers.append(group["weight_decay"])
        if not self.capturable:
            multi_tensor_applier(adam.multi_tensor_adam, noop, lists, *numbers)
            return
        one = torch.ones(1, device=device) if inv_scale is None else inv_scale.to(device)
        for op, wanted in ((adam.multi_tensor_adam_capturable_master, True), (adam.multi_tensor_adam_capturable, False)):
            chosen = [[x for x, s in zip(tensors, states, strict=True) if ("master_param" in s) is wanted] for tensors in lists]
            masters = [[s["master_param"] for s in states if "master_param" in s]] if wanted else []
            multi_tensor_applier(op, noop, [*chosen, *masters], *numbers, one)

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        """The parameter's state, made at its first step."""
        state: dict[str, Tensor] = self.state[param]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=torch.float32)
        if self.master_weights and param.dtype != torch.float32 and "master_param" not in state:
            state["master_param"] = param.detach().float()
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` returned, apex's, or that of torch.optim.AdamW or Adam.

        Raises ValueError for tensors of another shape, and for parameters of a group that took different numbers of steps. torch would
        round moments and masters to the parameter's dtype. A state without masters gets them from the parameters.
        """
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        saved = [(p, state_dict["state"][i]) for i, p in zip(ids, params, strict=False) if i in state_dict["state"]]
        for p, values in saved:
            for name, value in values.items():
                if name != "step" and value.shape != p.shape:
                    raise ValueError(f"the saved {name} has shape {tuple(value.shape)} and its parameter {tuple(p.shape)}: load its own")
        groups = []
        for group in state_dict["param_groups"]:
            steps = {int(values["step"]) for i in group["params"] if "step" in (values := state_dict["state"].get(i, {}))}
            if len(steps) > 1:
                raise ValueError(f"parameters of a saved group have taken {sorted(steps)} steps and share one here: make groups of them")
            groups.append({**self.defaults, **({"step": steps.pop()} if steps else {}), **group})
        super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})
        for group in self.param_groups:
            self._place(group)
        for p, values in saved:
            state = self._state(p)
            for name in state:
                if name in values:
                    state[name].copy_(values[name])
