"""How a kernel is started, and what it may know about the device it is started on.

A body takes tensors on a GPU; tensors on the CPU where Triton's interpreter runs it; or meta tensors, of which `recording` then returns the
launches, exactly as they would have been made on the target that it names: that is how kernels are compiled without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """What tile choices depend on. arch: compute capability times ten. sms: streaming multiprocessors."""

    arch: int
    sms: int


A100, H100 = Target(80, 108), Target(90, 132)


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments; `options` hold constexprs, num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


_recording: ContextVar[tuple[Target, list[Launch]] | None] = ContextVar("recording", default=None)


@contextlib.contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Collects the launches of bodies that are given meta tensors."""
    launches: list[Launch] = []
    token = _recording.set((target, launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


def target_of(device: torch.device) -> Target:
    """The interpreter's is an A100."""
    if device.type == "cuda":
        return _target_of_gpu(device.index if device.index is not None else torch.cuda.current_device())
    recorded = _recording.get()
    return A100 if recorded is None else recorded[0]


@functools.cache
def _target_of_gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Starts `kernel` on the device of the first tensor in `args`; nothing where the grid is empty."""
    if 0 in grid:
        return
    device = next(x.device for x in args if isinstance(x, Tensor))
    if device.type == "meta":
        recorded = _recording.get()
        assert recorded is not None, "a meta tensor reached a kernel outside `recording`"
        recorded[1].append(Launch(kernel, grid, args, options))
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device, whatever the pointers are
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
