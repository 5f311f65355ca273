"""Tests as they run with MEGAPAR_TEST_DEVICE=cuda, without a GPU: which tensor would lie where is only noted.

    MEGAPAR_TEST_DEVICE=cuda python -m pytest -p tests.pretended_gpu tests/ops/test_rope.py

All memory is the CPU's and so are the kernels. But a tensor made with no device, or on "cuda", says that it is there, and so does what is
computed from it; an op on tensors of both, a generator of the other device and .numpy() raise as they would on a GPU. What runs inside
backward, in an op's body or in another process is not looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._device import _device_constructors

GPU = torch.device("cuda", 0)
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.type_as, Tensor.copy_, Tensor.data.__set__}
TO_NUMPY = {Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}
MADE_LIKE = {Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor}
MADE_LIKE |= {torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like}
INDEXED = {Tensor.__getitem__, Tensor.__setitem__, torch.Tensor.index_put_}
_generator = torch.Generator


class Generator(_generator):  # type: ignore[misc, valid-type]
    """Knows where it would be."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, device="cpu")
        made.pretended = torch.device(device).type == "cuda"
        return made


def tensors_in(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for y in x:
            yield from tensors_in(y)
    elif isinstance(x, dict):
        for y in x.values():
            yield from tensors_in(y)


def on_gpu(x: Tensor) -> bool:
    return getattr(x, "_pretended", False)


def note(result: Any, there: bool) -> Any:
    for x in tensors_in(result):
        with torch._C.DisableTorchFunction():
            if x.device.type == "cpu":
                x._pretended = there  # type: ignore[attr-defined]
    return result


def is_device(x: Any) -> bool:
    return isinstance(x, torch.device) or (isinstance(x, str) and x.split(":")[0] in ("cpu", "cuda"))


class PretendedGpu(TorchFunctionMode):
    """The default device is a GPU."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return GPU if on_gpu(args[0]) else func(*args)
        if func in (Tensor.is_cuda.__get__, Tensor.is_cpu.__get__):
            return on_gpu(args[0]) is (func == Tensor.is_cuda.__get__)
        if func in TO_NUMPY and on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy, copy it to host memory first")
        if func is Tensor.pin_memory:
            if on_gpu(args[0]):
                raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
            return args[0]
        there = self._place(func, args, kwargs)
        real = [self._real(x) for x in args]
        result = func(*real, **{name: self._real(x) for name, x in kwargs.items()})
        if func is Tensor.__iter__:
            return iter(note(list(result), there))
        return self._noted(func, result, there, args)

    def _noted(self, func: Any, result: Any, there: bool | None, args: Any) -> Any:
        if func == Tensor.data.__set__:
            note(args[0], on_gpu(args[1]))
        if there is None:
            return result
        if func in _device_constructors() | MOVES and any(result is x and on_gpu(x) != there for x in tensors_in(args)):
            result = result.clone()  # a copy on the other device
        return note(result, there)

    def _place(self, func: Any, args: Any, kwargs: Any) -> bool | None:
        """Whether the result is on the GPU."""
        named = [x for x in [*args, *kwargs.values()] if is_device(x)] if func not in (torch.testing.assert_close,) else []
        generators = [x for x in [*args, *kwargs.values()] if isinstance(x, _generator)]
        inputs = list(tensors_in([*args, *kwargs.values()]))
        if func is Tensor.cpu:
            place = False
        elif func is Tensor.cuda:
            place = True
        elif named and torch.device(named[-1]).type == "meta":
            place = False
        elif named:
            place = torch.device(named[-1]).type == "cuda"
        elif func in _device_constructors():
            place = True
        elif func in (Tensor.to, Tensor.type_as) and len(inputs) > 1:
            place = on_gpu(inputs[1])
        else:
            place = self._of_inputs(func, inputs, args)
        if any(getattr(g, "pretended", False) != place for g in generators):
            raise RuntimeError(f"{resolve_name(func)}: expected a {'cuda' if place else 'cpu'} device type for generator")
        return place

    def _of_inputs(self, func: Any, inputs: list[Tensor], args: Any) -> bool:
        if func is torch.autograd.grad or not inputs:
            return any(map(on_gpu, inputs))
        first = on_gpu(inputs[0])
        if func in MOVES or func in MADE_LIKE:
            return first
        if func in INDEXED and first and not (func is Tensor.__setitem__ and list(tensors_in(args[1:2]))):
            return True  # an index may be on the CPU, and values are copied
        with torch._C.DisableTorchFunction():
            real = [x for x in inputs if x.device.type == "cpu"]
            strict = "megapar" in str(func) or func in (torch.cat, torch.stack, torch.equal)
            sized = [x for x in real if strict or x.dim() > 0 or on_gpu(x)]
        if len({on_gpu(x) for x in sized}) > 1:
            raise RuntimeError(f"{resolve_name(func) or func}: expected all tensors to be on the same device, found cuda:0 and cpu")
        return any(map(on_gpu, real))

    def _real(self, x: Any) -> Any:
        if isinstance(x, torch.device) and x.type == "cuda":
            return torch.device("cpu")
        return "cpu" if isinstance(x, str) and x.split(":")[0] == "cuda" else x


class Stream:
    def record_event(self) -> Stream:
        return self


_stream = Stream()
_parameter = torch.nn.Parameter.__new__


def _new_parameter(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
    if data is None:
        data = torch.empty(0)
    return note(_parameter(cls, data, requires_grad), on_gpu(data))


def pretend(device: Any) -> None:
    """In the place of torch.set_default_device."""
    assert str(device) == "cuda"
    torch.Generator = Generator  # type: ignore[misc, assignment]
    torch.nn.Parameter.__new__ = staticmethod(_new_parameter)  # type: ignore[method-assign, assignment]
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda device=None: _stream  # type: ignore[assignment, return-value]
    PretendedGpu().__enter__()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    mock.patch.object(torch, "set_default_device", pretend).start()
