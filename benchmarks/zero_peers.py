"""The peers of benchmarks/zero.py: torch's DDP, ZeroRedundancyOptimizer and FSDP2, and DeepSpeed's ZeRO, each a `Trainer` of a plain Llama.

In "bf16" FSDP2 and DeepSpeed have fp32 masters and accumulate and reduce gradients in fp32. DDP knows no masters: with bf16 weights it
accumulates and reduces in bf16, the masters outside of it, which is fewer bytes and less exact than what the others do; "autocast" is
its way to fp32 gradients: fp32 weights, cast at each use.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from benchmarks.plain_llama import Llama, megapar_name
from benchmarks.zero_case import ALONE, Case, Data, plain_model

PACKAGES = "deepspeed einops hjson msgpack psutil py-cpuinfo"


def compile_blocks(model: Llama, fullgraph: bool = True) -> None:
    for block in model.layers:
        block.compile(fullgraph=fullgraph)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def whole(param: Any) -> Tensor:
    return (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().float().clone()


def named(names: list[str], tensors: Any) -> dict[str, Tensor]:
    return {megapar_name(name): whole(tensor) for name, tensor in zip(names, tensors, strict=True)}


class Torch:
    """A Llama, torch's fused AdamW, and what torch offers between them.

    parallel: "alone", a rank by itself; "DDP"; "ZeRO-1", DDP with the optimizer sharded; "FSDP2 2" and "FSDP2 3", which is
    reshard_after_forward off and on.
    """

    def __init__(self, case: Case, parallel: str, compiled: bool = False, autocast: bool = False) -> None:
        self.case, self.autocast = case, autocast
        model = plain_model(case)
        self.names = [name for name, _ in model.named_parameters()]
        self.sharded, self.reshards = parallel.startswith("FSDP2"), parallel.endswith("3")
        if not self.sharded and not autocast:
            model = model.to(case.dtype)
        if compiled:
            compile_blocks(model)
        self.loss = torch.compile(mean_loss) if compiled else mean_loss
        self.model: Any = model
        if self.sharded:
            shard(model, case, reshard=self.reshards)
        elif parallel != ALONE:
            self.model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.params = list(model.parameters())
        low = self.params[0].dtype != torch.float32
        self.masters = [nn.Parameter(p.detach().float()) for p in self.params] if low else self.params
        if parallel == "ZeRO-1":
            self.optimizer: Any = ZeroRedundancyOptimizer(self.masters, torch.optim.AdamW, fused=True, **case.adamw)
        else:
            self.optimizer = torch.optim.AdamW(self.masters, fused=True, **case.adamw)

    def backward(self, data: Data) -> None:
        for i, (inputs, targets) in enumerate(data):
            with self.accumulating(last=i == len(data) - 1), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                loss = self.loss(self.model(inputs), targets) / len(data)
            with self.accumulating(last=i == len(data) - 1):
                loss.backward()

    def accumulating(self, last: bool) -> Any:
        if self.sharded and self.case.reduce_every == "step":
            self.model.set_requires_gradient_sync(last)
            if not self.reshards:
                self.model.set_reshard_after_backward(last)
        elif isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return contextlib.nullcontext()

    @torch.no_grad()
    def update(self) -> Tensor:
        if self.masters is not self.params:
            for master, param in zip(self.masters, self.params, strict=True):
                master.grad = param.grad.float()
        norm = nn.utils.clip_grad_norm_(self.masters, self.case.max_norm, foreach=True)
        self.optimizer.step()
        if self.masters is not self.params:
            torch._foreach_copy_([p.data for p in self.params], [m.data for m in self.masters])
            self.optimizer.zero_grad()
        # DDP's gradients are views of its buckets, which it would make anew.
        set_to_none = not isinstance(self.model, DistributedDataParallel)
        for param in self.params:
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.zero_()
        return whole(norm)

    def weights(self) -> dict[str, Tensor]:
        return named(self.names, self.masters)


def shard(model: Llama, case: Case, reshard: bool) -> None:
    """torchtitan's way: the embedding, each block, and the norm with the head, which is never resharded after the forward."""
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if case.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    common: dict[str, Any] = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),)), "mp_policy": policy}
    for part in (model.tok_embeddings, *model.layers):
        fully_shard(part, reshard_after_forward=reshard, **common)
    fully_shard([model.norm, model.output], reshard_after_forward=False, **common)
    fully_shard(model, reshard_after_forward=False, **common)


class DeepSpeedZero:
    """DeepSpeed's ZeRO of a stage from 1 to 3. It reduces every micro-batch in stages 2 and 3, and has no choice there."""

    def __init__(self, case: Case, stage: int, compiled: bool = False) -> None:
        deepspeed = import_deepspeed(case.deepspeed)
        sizes, low = case.sizes, case.precision == "bf16"
        model = plain_model(case)
        self.names = [name for name, _ in model.named_parameters()]
        if compiled:
            compile_blocks(model, fullgraph=stage < 3)  # the hooks that fetch its parameters break a block's graph
        self.loss = torch.compile(mean_loss) if compiled else mean_loss
        zero = {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": 5_000_000,
            "allgather_bucket_size": 5_000_000,
            "stage3_param_persistence_threshold": 0,
            # It would replace torch.nn.functional.linear for the other contenders of the process too.
            "memory_efficient_linear": False,
        }
        config = {
            "train_micro_batch_size_per_gpu": sizes.b,
            "gradient_accumulation_steps": sizes.micro_batches,
            "gradient_clipping": case.max_norm,
            "bf16": {"enabled": low},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_optimization": zero,
        }
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **case.adamw)
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.full = deepspeed.utils.safe_get_full_fp32_param

    def backward(self, data: Data) -> None:
        for i, (inputs, targets) in enumerate(data):
            self.engine.backward(self.loss(self.engine(inputs), targets))
            if i < len(data) - 1:
                self.engine.step()

    def update(self) -> float:
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def weights(self) -> dict[str, Tensor]:
        return named(self.names, [self.full(p) for p in self.engine.module.parameters()])


def import_deepspeed(folder: str) -> Any:
    """The module in `folder`."""
    # LOCAL_SIZE: else it asks the machine's network interfaces.
    os.environ.update({"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(dist.get_world_size()), "TQDM_DISABLE": "1"})
    if folder not in sys.path:
        sys.path.append(folder)  # last: what is installed with megapar comes first
    import deepspeed  # type: ignore[import-not-found]

    deepspeed.utils.logging.logger.setLevel("ERROR")
    return deepspeed
